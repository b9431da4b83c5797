//! Small files that a process keeps for those after it.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Whether to wait until the disk has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// A power failure leaves the old file or the new one.
    Yes,
    /// A power failure may leave a damaged file.
    No,
}

/// Replaces a file, so that a reader sees the old one or the new one. Only its owner may read it. One writer at a time.
///
/// # Errors
/// It cannot be written; the old one stays.
pub fn replace(path: &Path, octets: &[u8], flush: Flush) -> io::Result<()> {
    let new = beside(path, "new");
    // One that a crash has left.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(octets)?;
    if flush == Flush::Yes {
        file.sync_all()?;
    }
    fs::rename(&new, path)?;
    match flush {
        Flush::Yes => File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all(),
        Flush::No => Ok(()),
    }
}

/// The place of a file that belongs to another one. It is hidden, so that no list of those files has it.
pub fn beside(path: &Path, extension: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".");
    name.push(extension);
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_is_replaced_and_nothing_is_left_over() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("a.json");
        fs::write(beside(&path, "new"), "left by a crash").unwrap();
        for (text, flush) in [("first", Flush::Yes), ("second", Flush::No)] {
            replace(&path, text.as_bytes(), flush).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 1);
        assert!(replace(&base.path().join("none/a"), b"", Flush::Yes).is_err());
    }
}
