//! A five-instruction XDP program that redirects every frame to an XSKMAP, loaded by bpf(2) alone, so that these tests
//! need neither a toolchain nor the project's own programs.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;

const BPF_MAP_TYPE_XSKMAP: u32 = 17;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const BPF_F_XDP_HAS_FRAGS: u32 = 1 << 5;

/// Where in the receive path the program runs.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub(crate) enum Hook {
    /// On skbs (`XDP_FLAGS_SKB_MODE`).
    Generic = 1 << 1,
    /// In the driver (`XDP_FLAGS_DRV_MODE`).
    Native = 1 << 2,
}

/// The attached program; dropping it detaches it.
pub(crate) struct Redirect {
    map: OwnedFd,
    _program: OwnedFd,
    _link: OwnedFd,
}

impl Redirect {
    /// Loads the program and attaches it to a device.
    pub(crate) fn attach(ifindex: u32, hook: Hook) -> io::Result<Self> {
        #[repr(C)]
        struct MapCreate {
            map_type: u32,
            key_size: u32,
            value_size: u32,
            max_entries: u32,
        }
        #[repr(C)]
        struct ProgLoad {
            prog_type: u32,
            insn_cnt: u32,
            insns: u64,
            license: u64,
            log_level: u32,
            log_size: u32,
            log_buf: u64,
            kern_version: u32,
            prog_flags: u32,
            prog_name: [u8; 16],
            prog_ifindex: u32,
            expected_attach_type: u32,
        }
        #[repr(C)]
        struct LinkCreate {
            prog_fd: u32,
            target_ifindex: u32,
            attach_type: u32,
            flags: u32,
        }

        let map = bpf(
            BPF_MAP_CREATE,
            &MapCreate { map_type: BPF_MAP_TYPE_XSKMAP, key_size: 4, value_size: 4, max_entries: 16 },
        )?;
        let code = instructions(map.as_raw_fd());
        let program = bpf(
            BPF_PROG_LOAD,
            &ProgLoad {
                prog_type: BPF_PROG_TYPE_XDP,
                insn_cnt: code.len() as u32,
                insns: code.as_ptr() as u64,
                license: c"GPL".as_ptr() as u64,
                log_level: 0,
                log_size: 0,
                log_buf: 0,
                kern_version: 0,
                prog_flags: BPF_F_XDP_HAS_FRAGS,
                prog_name: [0; 16],
                prog_ifindex: 0,
                expected_attach_type: BPF_XDP,
            },
        )?;
        let link = bpf(
            BPF_LINK_CREATE,
            &LinkCreate {
                prog_fd: program.as_raw_fd() as u32,
                target_ifindex: ifindex,
                attach_type: BPF_XDP,
                flags: hook as u32,
            },
        )?;
        Ok(Self { map, _program: program, _link: link })
    }

    /// Redirects frames received on `queue` to `socket`.
    pub(crate) fn insert(&self, queue: u32, socket: &impl AsFd) -> io::Result<()> {
        #[repr(C)]
        struct Update {
            map_fd: u32,
            reserved: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        let value = socket.as_fd().as_raw_fd();
        let update = Update {
            map_fd: self.map.as_raw_fd() as u32,
            reserved: 0,
            key: (&raw const queue) as u64,
            value: (&raw const value) as u64,
            flags: 0,
        };
        raw_bpf(BPF_MAP_UPDATE_ELEM, &update).map(drop)
    }
}

/// `return bpf_redirect_map(&map, ctx->rx_queue_index, XDP_PASS)`.
fn instructions(map: i32) -> [u64; 6] {
    let op = |code: u8, dst: u8, src: u8, off: i16, imm: i32| {
        let [lo, hi] = off.to_le_bytes();
        let imm = imm.to_le_bytes();
        u64::from_ne_bytes([code, src << 4 | dst, lo, hi, imm[0], imm[1], imm[2], imm[3]])
    };
    [
        op(0x61, 2, 1, 16, 0),  // r2 = *(u32 *)(r1 + offsetof(xdp_md, rx_queue_index))
        op(0x18, 1, 1, 0, map), // r1 = map
        op(0x00, 0, 0, 0, 0),   // (second half of the 64-bit load)
        op(0xb7, 3, 0, 0, 2),   // r3 = XDP_PASS
        op(0x85, 0, 0, 0, 51),  // call bpf_redirect_map
        op(0x95, 0, 0, 0, 0),   // exit
    ]
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    let fd = raw_bpf(command, attributes)?;
    // SAFETY: the three commands that come here answer with a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn raw_bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads the attributes, and through their pointers what the caller keeps alive through the call.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref::<T>(attributes), size_of::<T>()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}
