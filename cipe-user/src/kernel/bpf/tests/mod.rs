//! The programs in the kernel: decisions under BPF_PROG_TEST_RUN, attachment in a separate network namespace. All tests
//! need root; without it they are skipped, with the reason printed.

mod attachment;
mod carrier;
mod ethernet;
mod frames;
mod lan;
mod live;
mod logs;
mod private;
mod shield;

use std::os::fd::OwnedFd;

use aya::programs::{ProgramError, TestRun as _, TestRunOptions};
use rustix::net::{AddressFamily, SocketType, socket};

use super::*;

/// Device of frames under BPF_PROG_TEST_RUN: loopback.
const DEVICE: u32 = 1;
/// A tunnel that the tests set up.
const TUNNEL: u32 = 2;
/// Values of `enum xdp_action`.
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;
/// Values of `TC_ACT_*`.
const TC_OK: u32 = 0;
const TC_SHOT: u32 = 2;

/// Loads the programs with small maps; `None` without the permission.
fn programs() -> Option<Programs> {
    programs_with(LoadOptions::default())
}

fn programs_with(options: LoadOptions) -> Option<Programs> {
    match Programs::load(&LoadOptions { max_tunnels: 4, max_carriers: 2, ..options }) {
        Ok(mut programs) => {
            programs.load_lan().unwrap();
            Some(programs)
        }
        Err(error @ Error::Privilege { .. }) => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn xdp_socket() -> OwnedFd {
    socket(AddressFamily::XDP, SocketType::RAW, None).unwrap()
}

impl Programs {
    /// Runs an XDP program on a frame that is received on [`DEVICE`], queue 0; returns its action.
    fn run_xdp(&mut self, program: &'static str, frame: &[u8]) -> u32 {
        self.run_xdp_from(program, frame, DEVICE, 0)
    }

    /// The same for a device of this network namespace that runs native XDP, and any of its receive queues.
    fn run_xdp_from(&mut self, program: &'static str, frame: &[u8], ifindex: u32, queue: u32) -> u32 {
        let (action, out) = self.run_xdp_on(program, frame, ifindex, queue);
        assert_eq!(out, frame, "{program} changed the frame");
        action
    }

    /// The same for a program that may change the frame; returns the frame as well.
    fn run_xdp_on(&mut self, program: &'static str, frame: &[u8], ifindex: u32, queue: u32) -> (u32, Vec<u8>) {
        let mut out = vec![0; frame.len()];
        // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex. Its data_end is
        // that of the first buffer; frames of several buffers omit it (and then come from loopback).
        let context = [0, frame.len() as u32, 0, ifindex, queue, 0].map(u32::to_ne_bytes).concat();
        let ctx_in = (ifindex != DEVICE).then_some(&context[..]);
        let options = TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ctx_in, ..Default::default() };
        let result = xdp(&mut self.ebpf, program).unwrap().test_run(options).unwrap();
        (result.return_value, out)
    }

    /// Runs the TC program on a frame that leaves [`DEVICE`]; returns its action and the frame.
    fn run_tc(&mut self, frame: &[u8], gso_size: u32) -> (u32, Vec<u8>) {
        self.run_tc_of(names::PRIVATE_TC, frame, gso_size)
    }

    fn run_tc_of(&mut self, program: &'static str, frame: &[u8], gso_size: u32) -> (u32, Vec<u8>) {
        /// `struct __sk_buff`: its size, and the offset of gso_size.
        const SK_BUFF: usize = 192;
        const GSO_SIZE: usize = 176;
        let mut context = [0; SK_BUFF];
        context[GSO_SIZE..GSO_SIZE + 4].copy_from_slice(&gso_size.to_ne_bytes());
        let mut out = vec![0; frame.len()];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..Default::default()
        };
        let program = classifier(&mut self.ebpf, program).unwrap();
        let result: Result<_, ProgramError> = program.test_run(options);
        (result.unwrap().return_value, out)
    }

    fn counted(&self, tunnel: u32, verdict: Verdict) -> u64 {
        self.verdicts(tunnel).unwrap()[verdict as usize]
    }
}

/// Reports all refused programs, not only the first. Runs unchanged in a guest with another kernel.
#[test]
fn every_program_loads() {
    let mut ebpf = match read(&LoadOptions { max_tunnels: 4, max_carriers: 2, ..LoadOptions::default() }) {
        Ok(ebpf) => ebpf,
        Err(error @ Error::Privilege { .. }) => {
            eprintln!("skipped: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let known: Vec<_> = ebpf.programs().map(|(name, _)| name.to_owned()).collect();
    let programs = PROGRAMS.into_iter().chain([names::LAN_XDP]);
    assert_eq!(known.len(), programs.clone().count(), "{known:?}");
    let refused: Vec<_> = programs.filter_map(|name| load(&mut ebpf, name).err()).collect();
    let refused: Vec<_> = refused.iter().map(Error::to_string).collect();
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}

#[test]
fn the_largest_tables_load() {
    match Programs::load(&LoadOptions::default()) {
        Ok(mut programs) => {
            programs.set_tunnel(MAX_TUNNELS - 1, Tunnel::default()).unwrap();
            assert!(programs.set_tunnel(MAX_TUNNELS, Tunnel::default()).is_err());
            assert_eq!(programs.verdicts(MAX_TUNNELS - 1).unwrap(), [0; Verdict::COUNT]);
            assert!(programs.take_keys().is_some() && programs.take_keys().is_none());
        }
        Err(error @ Error::Privilege { .. }) => eprintln!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn forgetting_what_is_not_known_is_no_error() {
    let Some(mut programs) = programs() else { return };
    programs.remove_private_address([7; 6]).unwrap();
    programs.remove_ethernet_device([77, 78]).unwrap();
    programs.remove_carrier_device(77).unwrap();
    programs.remove_carrier_address("192.0.2.1:4000".parse().unwrap()).unwrap();
    programs.detach_carrier(77);
    programs.detach_private(77);
}

#[test]
fn a_device_that_is_not_there_is_named_by_its_index() {
    let Some(mut programs) = programs() else { return };
    let error = programs.attach_carrier(0x7FFF_FFFF, XdpMode::Auto).unwrap_err();
    assert_eq!(error.to_string(), "there is no network device with index 2147483647; it may have been removed");
}

#[test]
fn an_object_that_is_none_is_refused_with_the_reason() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), b"no ELF").unwrap();
    let options = LoadOptions { object: Some(file.path().to_owned()), ..LoadOptions::default() };
    let error = Programs::load(&options).err().unwrap();
    assert!(error.to_string().starts_with("the eBPF object cannot be loaded ("), "{error}");
}
