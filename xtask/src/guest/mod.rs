//! Guests: other kernels, booted in qemu on the tree as it stands.
//!
//! A kernel comes from Debian's packages and is unpacked under `target/kernels`, never installed. A small initramfs of our
//! own mounts the host's file system (9p, read only) under an overlay of memory, and starts this program in it, which runs a
//! [`plan::Plan`] and tells over a serial line what came out. The guest can write nothing on the host and has no network.
//!
//! | module | is |
//! | --- | --- |
//! | `debian` | finds, fetches and unpacks Debian packages by a private configuration of the package client |
//! | `kernel` | an unpacked kernel and its modules |
//! | `initramfs` | what the kernel starts from |
//! | `machine` | qemu: its options, its deadline, its end |
//! | `plan` | what a guest shall run, and what it tells |
//! | `inside` | the part that runs in the guest |
//! | `programs`, `table` | test programs as cargo builds them, and what came out of them |
//! | `command`, `scenarios` | `cargo xtask guest`, `cargo xtask test --kernel` |

pub mod command;
mod debian;
mod initramfs;
pub mod inside;
mod kernel;
mod machine;
pub mod plan;
mod programs;
pub mod scenarios;
mod table;

use std::path::PathBuf;

use anyhow::Result;

pub use kernel::Wanted;
pub use machine::Shape;

use crate::tools;

/// Programs that a guest needs on the host, and the Debian package of each.
const NEEDS: &[(&str, &str)] =
    &[("qemu-system-x86_64", "qemu-system-x86"), ("depmod", "kmod"), ("xz", "xz-utils"), ("setpriv", "util-linux")];

/// Where kernels are unpacked.
fn folder() -> PathBuf {
    tools::target().join("kernels")
}

/// Sees to it that guests can run: installs on Debian what is missing, and says so.
///
/// # Errors
/// What apt-get says.
fn need_guests() -> Result<()> {
    let missing: Vec<_> =
        NEEDS.iter().filter(|(program, _)| !tools::has(program)).map(|(_, package)| *package).collect();
    tools::apt_install(&missing)
}
