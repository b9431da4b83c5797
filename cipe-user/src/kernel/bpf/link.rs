//! Links of programs on veth pairs, by bpf(2) itself: the library does not give a link's descriptor, which another engine needs to put
//! its own program in the place of ours, without a moment between.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use aya::programs::XdpMode;
use aya_obj::generated::{
    BPF_F_AFTER, XDP_FLAGS_DRV_MODE, XDP_FLAGS_HW_MODE, XDP_FLAGS_SKB_MODE, bpf_attach_type, bpf_cmd,
};

/// An attachment. It ends with the value, also if another process has its descriptor, or with the last descriptor.
pub(super) struct Link(OwnedFd);

impl Link {
    /// Attaches an XDP program.
    ///
    /// # Errors
    /// The kernel's answer.
    pub(super) fn xdp(program: BorrowedFd<'_>, ifindex: u32, mode: XdpMode) -> io::Result<Self> {
        let flags = match mode {
            XdpMode::Default => 0,
            XdpMode::Skb => XDP_FLAGS_SKB_MODE,
            XdpMode::Driver => XDP_FLAGS_DRV_MODE,
            XdpMode::Hardware => XDP_FLAGS_HW_MODE,
        };
        Self::create(program, ifindex, bpf_attach_type::BPF_XDP, flags)
    }

    /// Attaches a TC program behind others on egress.
    ///
    /// # Errors
    /// The kernel's answer: `EINVAL` if it has no tcx.
    pub(super) fn tcx_egress(program: BorrowedFd<'_>, ifindex: u32) -> io::Result<Self> {
        Self::create(program, ifindex, bpf_attach_type::BPF_TCX_EGRESS, BPF_F_AFTER)
    }

    fn create(program: BorrowedFd<'_>, ifindex: u32, hook: bpf_attach_type, flags: u32) -> io::Result<Self> {
        let fields = [program.as_raw_fd().cast_unsigned(), ifindex, hook as u32, flags];
        let link = bpf(bpf_cmd::BPF_LINK_CREATE, fields)?;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(link) }))
    }

    /// The link of this descriptor.
    pub(super) fn of(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    /// Another descriptor of it.
    ///
    /// # Errors
    /// There is none to spare.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// Puts another program in the place of the attached one, at once. The call may wait some milliseconds for those that still run
    /// the former one.
    ///
    /// # Errors
    /// The kernel's answer; the link may be detached.
    pub(super) fn update(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        update(self.0.as_fd(), program)
    }

    /// Does the same on a thread of its own.
    ///
    /// # Errors
    /// No descriptor, or no thread.
    pub(super) fn update_behind(&self, program: OwnedFd) -> io::Result<()> {
        let link = self.descriptor()?;
        let update = move || {
            if let Err(error) = update(link.as_fd(), program.as_fd()) {
                tracing::warn!("a program of the engine before this one stays attached for now: {error}");
            }
        };
        std::thread::Builder::new().name("update".to_owned()).spawn(update).map(drop)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // It is detached already if its device has gone, or somebody has detached it.
        let _ = bpf(bpf_cmd::BPF_LINK_DETACH, [self.0.as_fd().as_raw_fd().cast_unsigned(), 0, 0, 0]);
    }
}

fn update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let [link, program] = [link, program].map(|descriptor| descriptor.as_raw_fd().cast_unsigned());
    bpf(bpf_cmd::BPF_LINK_UPDATE, [link, program, 0, 0]).map(drop)
}

/// Calls bpf(2) with attributes that begin with these words; the others are zero.
fn bpf(command: bpf_cmd, fields: [u32; 4]) -> io::Result<i32> {
    let mut attributes = [0_u32; 16];
    attributes[..fields.len()].copy_from_slice(&fields);
    // SAFETY: the kernel reads as many octets as it is told, all of which are initialised, and keeps no pointer.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command as u32, attributes.as_ptr(), size_of_val(&attributes)) };
    // A descriptor, zero, or -1.
    i32::try_from(answer).ok().filter(|answer| *answer >= 0).ok_or_else(io::Error::last_os_error)
}
