//! Programs of other tunnels, and their paths.

use std::path::PathBuf;

use crate::tools;

/// The source of a missing program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A Debian package.
    Debian(&'static str),
    /// A crate with a binary.
    Crate(&'static str),
}

/// A program that a tunnel needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    /// Its file name.
    pub program: &'static str,
    /// Its source.
    pub source: Source,
    /// Arguments that make it print its version, in the first line that has a digit.
    pub version: &'static [&'static str],
}

/// The directory in which crates are installed, outside any home directory.
pub(super) fn root() -> PathBuf {
    tools::target().join("peers")
}

/// Path of a program: installed by us, or in PATH or root's directories.
pub(super) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let ours = root().join("bin");
    let folders = std::iter::once(ours).chain(std::env::split_paths(&path));
    let folders = folders.chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(program)).find(|path| path.is_file())
}
