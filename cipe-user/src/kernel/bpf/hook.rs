//! The hooks of TC programs. On a hub's visible end: a tcx link, which ends with its descriptor. A kernel without tcx
//! gets a filter of a clsact qdisc, which remains when its process is killed: the engine that adopts the hub removes
//! it.

use std::io;

use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, qdisc_add_clsact, qdisc_detach_program,
};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use cipe_common::maps::names;

use rustix::net::{AddressFamily, SocketType, netdevice, socket};

use super::error::{Error, chain, os_error};

/// Whether the kernel has tcx links. True if the kernel cannot be asked (missing capability): attaching then reports
/// the error.
pub fn has_tcx() -> bool {
    let answer = SchedClassifier::query_tcx("lo", TcAttachType::Egress);
    !answer.is_err_and(|error| is_unknown(&error))
}

/// Attaches behind existing programs.
pub(super) fn attach(program: &mut SchedClassifier, device: &str) -> Result<SchedClassifierLink, ProgramError> {
    let options = TcAttachOptions::TcxOrder(LinkOrder::last());
    let id = match program.attach_with_options(device, TcAttachType::Egress, options) {
        Err(error) if is_unknown(&error) => return attach_filter(program, device),
        attached => attached?,
    };
    program.take_link(id)
}

/// Whether the program with this number is attached to a device's egress. True if the kernel has no tcx links, or cannot be asked.
pub(super) fn is_attached(device: &str, program: Option<u32>) -> bool {
    match SchedClassifier::query_tcx(device, TcAttachType::Egress) {
        Ok((_, present)) => present.iter().any(|present| Some(present.id()) == program),
        Err(_) => true,
    }
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
