//! The hooks of TC programs. On a hub's visible end: a tcx link, which ends with its descriptor. A kernel without tcx
//! gets a filter of a clsact qdisc, which remains when its process is killed: the engine that adopts the hub removes
//! it.

use std::io;
use std::os::fd::AsFd;

use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, qdisc_add_clsact, qdisc_detach_program,
};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use cipe_common::maps::names;

use rustix::net::{AddressFamily, SocketType, netdevice, socket};

use super::error::{Error, chain, os_error};
use super::link::Link;

/// Whether the kernel has tcx links. True if the kernel cannot be asked (missing capability): attaching then reports
/// the error.
pub fn has_tcx() -> bool {
    let answer = SchedClassifier::query_tcx("lo", TcAttachType::Egress);
    !answer.is_err_and(|error| is_unknown(&error))
}

/// Attaches behind existing programs.
pub(super) fn attach(program: &mut SchedClassifier, (device, ifindex): (&str, u32)) -> Result<TcHook, ProgramError> {
    match Link::tcx_egress(program.fd()?.as_fd(), ifindex) {
        Ok(link) => Ok(TcHook::Link(link)),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            attach_filter(program, device).map(|filter| TcHook::Filter { _held: filter })
        }
        Err(error) => Err(ProgramError::IOError(error)),
    }
}

/// The attachment of a TC program to a pair's visible end.
pub(super) enum TcHook {
    /// A tcx link.
    Link(Link),
    /// A filter, on a kernel without tcx.
    Filter {
        /// Detaches it when it is dropped.
        _held: SchedClassifierLink,
    },
}

/// A place for programs of tcx links: `enum bpf_attach_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Place {
    Ingress = 46,
    Egress = 47,
}

/// Whether the program with this number is attached to a device. True if the kernel has no tcx links, or cannot be asked.
pub(super) fn is_attached(ifindex: u32, place: Place, program: Option<u32>) -> bool {
    programs_at(ifindex, place).is_none_or(|present| present.iter().any(|present| Some(*present) == program))
}

/// The numbers of the programs at a place of a device, by BPF_PROG_QUERY; `None`: the kernel does not say. [`SchedClassifier::query_tcx`]
/// also opens each program, which takes CAP_SYS_ADMIN.
fn programs_at(ifindex: u32, place: Place) -> Option<Vec<u32>> {
    const BPF_PROG_QUERY: libc::c_long = 16;
    /// The most programs that a place has (BPF_MPROG_MAX).
    const MAX_PROGRAMS: usize = 64;
    /// `query` of `union bpf_attr`.
    #[repr(C)]
    struct Query {
        ifindex: u32,
        place: u32,
        query_flags: u32,
        attach_flags: u32,
        programs: u64,
        count: u32,
        reserved: u32,
        program_attach_flags: u64,
        links: u64,
        link_attach_flags: u64,
        revision: u64,
    }
    let mut programs = [0_u32; MAX_PROGRAMS];
    let mut query = Query {
        ifindex,
        place: place as u32,
        query_flags: 0,
        attach_flags: 0,
        programs: programs.as_mut_ptr() as u64,
        count: MAX_PROGRAMS as u32,
        reserved: 0,
        program_attach_flags: 0,
        links: 0,
        link_attach_flags: 0,
        revision: 0,
    };
    // SAFETY: the kernel reads and writes `query`, which is as long as it is told, and at most `count` numbers behind `programs`.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut query, size_of::<Query>()) };
    (result == 0).then(|| programs.into_iter().take(query.count as usize).collect())
}

/// Attaches at ingress before existing programs, by a tcx link only: a filter would stay when its process is killed.
pub(super) fn attach_ingress(program: &mut SchedClassifier, device: &str) -> Result<SchedClassifierLink, ProgramError> {
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program.attach_with_options(device, TcAttachType::Ingress, options)?;
    program.take_link(id)
}

/// Does the same by a filter.
pub(super) fn attach_filter(program: &mut SchedClassifier, device: &str) -> Result<SchedClassifierLink, ProgramError> {
    match qdisc_add_clsact(device) {
        Err(TcError::AlreadyAttached) | Ok(()) => {}
        Err(error) if os_error(&error) == Some(libc::EEXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let options = TcAttachOptions::Netlink(NlOptions::default());
    let id = program.attach_with_options(device, TcAttachType::Egress, options)?;
    program.take_link(id)
}

/// Removes the filters that a killed engine without tcx links left on a hub.
pub fn remove_leftovers(ifindex: u32) {
    let Ok(device) = name(ifindex) else { return };
    for program in [names::PRIVATE_TC, names::ETHERNET_TC] {
        match qdisc_detach_program(&device, TcAttachType::Egress, program) {
            Ok(()) => tracing::info!("{device}: TC filter {program} of an engine that died; removed"),
            // No such filter, or no clsact qdisc at all.
            Err(error) => tracing::debug!("{device}: no TC filter {program} to remove: {}", chain(&error)),
        }
    }
}

/// Kernels refuse unknown attach types as invalid.
fn is_unknown(error: &ProgramError) -> bool {
    os_error(error) == Some(libc::EINVAL)
}

/// Name of a device in this network namespace.
pub(super) fn name(ifindex: u32) -> Result<String, Error> {
    let look_up = || -> io::Result<String> {
        // Any socket works: the request is an ioctl.
        let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
        Ok(netdevice::index_to_name(any, ifindex)?)
    };
    look_up().map_err(|_| Error::NoDevice { ifindex })
}
