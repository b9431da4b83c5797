//! The place of the control socket: one directory per network namespace, for root alone; and the place of what daemons and engines
//! keep for those after them.

use std::ffi::OsString;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Replaces [`BASE`], for tests.
pub const BASE_VARIABLE: &str = "CIPE_RUN_DIR";
/// Parent of the directories.
pub const BASE: &str = "/run/cipe";

/// Replaces [`STATE_BASE`], for tests.
pub const STATE_VARIABLE: &str = "CIPE_STATE_DIR";
/// Where daemons keep files for the next ones; in its directory `engine`, engines do.
pub const STATE_BASE: &str = "/var/lib/cipe";

/// The directory of what daemons keep: the value of [`STATE_VARIABLE`], or `state` where run-time files are elsewhere than usual, or
/// [`STATE_BASE`].
pub fn state_directory() -> PathBuf {
    let of = |variable| std::env::var_os(variable).filter(|base| !base.is_empty()).map(PathBuf::from);
    let beside = || of(BASE_VARIABLE).map(|base| base.join("state"));
    of(STATE_VARIABLE).or_else(beside).unwrap_or_else(|| PathBuf::from(STATE_BASE))
}

/// The part of a [`state_directory`] that engines may write.
pub fn engine_part(state_directory: &Path) -> PathBuf {
    state_directory.join("engine")
}

/// Inode of the calling thread's network namespace. It is another one after a start of the machine.
///
/// # Errors
/// /proc cannot be read.
pub fn namespace() -> io::Result<u64> {
    Ok(std::fs::metadata("/proc/thread-self/ns/net")?.ino())
}

/// Directory of one network namespace, such as `/run/cipe/net-4026531840`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// The directory of the calling thread's network namespace, under [`BASE`] or the value of [`BASE_VARIABLE`].
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn of_this_namespace() -> io::Result<Self> {
        let base = std::env::var_os(BASE_VARIABLE).filter(|base| !base.is_empty());
        Ok(Self::new(Path::new(&base.unwrap_or_else(|| OsString::from(BASE))), namespace()?))
    }

    /// The directory of the network namespace with this inode.
    pub fn new(base: &Path, inode: u64) -> Self {
        Self { path: base.join(format!("net-{inode}")) }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.path.join("control")
    }

    /// The control socket of an engine that is about to take the place of another one.
    pub fn next_socket(&self) -> PathBuf {
        self.path.join("control.next")
    }

    /// The control socket of an engine that stands by.
    pub fn standby_socket(&self) -> PathBuf {
        self.path.join("control.standby")
    }

    /// The lock that the engine holds while it runs.
    pub fn engine_lock(&self) -> PathBuf {
        self.path.join("engine.lock")
    }

    /// The lock that a daemon holds while it starts the engine.
    pub fn start_lock(&self) -> PathBuf {
        self.path.join("start.lock")
    }

    /// Makes the directory with mode 0700, or checks the existing one.
    ///
    /// # Errors
    /// It cannot be made, or others have access to it.
    pub fn create(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.path)?;
        let metadata = std::fs::metadata(&self.path)?;
        let owner = rustix::process::geteuid().as_raw();
        if metadata.uid() == owner && metadata.mode() & 0o077 == 0 {
            return Ok(());
        }
        let path = self.path.display();
        let reason = format!("{path} is not this user's alone; remove it and start again");
        Err(io::Error::new(io::ErrorKind::PermissionDenied, reason))
    }

    /// Removes the directory if it is empty.
    pub fn remove(&self) {
        // If it is not empty, another process uses it and removes it later.
        let _ = std::fs::remove_dir(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_directory_is_private_or_refused() {
        let base = tempfile::tempdir().unwrap();
        let run = RunDir::new(base.path(), 7);
        run.create().unwrap();
        run.create().unwrap();
        assert_eq!(std::fs::metadata(run.path()).unwrap().mode() & 0o777, 0o700);
        std::fs::set_permissions(run.path(), PermissionsExt::from_mode(0o755)).unwrap();
        assert_eq!(run.create().unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        run.remove();
        assert!(!run.path().exists());
    }
}
