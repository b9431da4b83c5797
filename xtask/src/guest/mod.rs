//! Guests: other kernels, booted in qemu on this tree.
//!
//! A kernel comes from Debian's packages and is unpacked under `target/kernels`, never installed. A small initramfs mounts the
//! host's file system (9p, read-only) under an overlay in memory, and starts this program in it, which runs a [`plan::Plan`]
//! and reports the results over a serial line. The guest can write nothing on the host and has no network.
//!
//! | module | is |
//! | --- | --- |
//! | `debian` | finds, fetches and unpacks Debian packages by a private configuration of the package client |
//! | `kernel` | an unpacked kernel and its modules |
//! | `initramfs` | the kernel's first file system |
//! | `machine` | qemu: its options, its deadline, its end |
//! | `plan` | the programs for a guest, and its reports |
//! | `inside` | the part that runs in the guest |
//! | `programs`, `table` | test programs as cargo builds them, and their results |
//! | `command`, `scenarios` | `cargo xtask guest`, `cargo xtask test --kernel` |

pub(crate) mod command;
mod debian;
mod initramfs;
pub(crate) mod inside;
mod kernel;
mod machine;
pub(crate) mod plan;
mod programs;
pub(crate) mod scenarios;
mod table;

use std::path::PathBuf;

use anyhow::Result;

pub(crate) use kernel::Wanted;
pub(crate) use machine::Shape;

use crate::tools;

/// Programs that a guest needs on the host, and the Debian package of each.
const NEEDS: &[(&str, &str)] =
    &[("qemu-system-x86_64", "qemu-system-x86"), ("depmod", "kmod"), ("xz", "xz-utils"), ("setpriv", "util-linux")];

/// Where kernels are unpacked.
fn folder() -> PathBuf {
    tools::target().join("kernels")
}

/// Makes sure that guests can run: on Debian it installs missing packages, and prints them.
///
/// # Errors
/// apt-get fails.
fn need_guests() -> Result<()> {
    let missing: Vec<_> =
        NEEDS.iter().filter(|(program, _)| !tools::has(program)).map(|(_, package)| *package).collect();
    tools::apt_install(&missing)
}
