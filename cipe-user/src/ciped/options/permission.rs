//! The rules for owner and mode of an option file (protocol section 5): it has a key and names programs that run as
//! root.

use std::fs::{File, Metadata, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::problem::Mistake;

/// Maximum octets of an option file; real files are much smaller.
const MAX_FILE_OCTETS: u64 = 64 * 1024;

/// Reads an option file after checking it and every directory above it.
///
/// # Errors
/// The path is relative; the file or a directory breaks the rules; the file cannot be read or is too large.
pub(super) fn read_guarded(path: &Path) -> Result<Vec<u8>, Mistake> {
    if !path.is_absolute() {
        let what = format!("option file `{}` is not given by an absolute path", path.display());
        return Err(Mistake::new(what, "write the path from / on"));
    }
    let unreadable = |error: std::io::Error| {
        Mistake::new(format!("option file cannot be read ({error})"), "check the path, and run as root")
    };
    // The checks apply to the path without symbolic links, and that path is opened. The directories of the given path
    // contain the links, so they must be as safe.
    let real = path.canonicalize().map_err(unreadable)?;
    check_directories(&real, path, unreadable)?;
    let no_follow = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let file =
        OpenOptions::new().read(true).custom_flags(no_follow.bits().cast_signed()).open(&real).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(Mistake::new("option file is not a regular file", "give the path of a file"));
    }
    check(path, Facts::of(&metadata), Role::File)?;
    read_bounded(file).map_err(unreadable)?.ok_or_else(|| {
        Mistake::new(format!("option file is larger than {MAX_FILE_OCTETS} octets"), "check that it is an option file")
    })
}

/// Checks a script that root will run, and every directory above it: nobody else may have write access.
///
/// # Errors
/// The script or a directory breaks the rules, or cannot be checked.
pub fn check_script(path: &Path) -> Result<(), Mistake> {
    let unreadable = |error: std::io::Error| {
        Mistake::new(
            format!("script {} cannot be checked ({error})", path.display()),
            "check the path, and run as root",
        )
    };
    let real = path.canonicalize().map_err(unreadable)?;
    check_directories(&real, path, unreadable)?;
    check(path, Facts::of(&std::fs::metadata(&real).map_err(unreadable)?), Role::Script)
}

/// `real`: `path` without symbolic links.
fn check_directories(real: &Path, path: &Path, unreadable: impl Fn(std::io::Error) -> Mistake) -> Result<(), Mistake> {
    for directory in real.ancestors().skip(1).chain(path.ancestors().skip(1)) {
        let metadata = std::fs::metadata(directory).map_err(&unreadable)?;
        check(directory, Facts::of(&metadata), Role::Directory)?;
    }
    Ok(())
}

fn read_bounded(file: File) -> std::io::Result<Option<Vec<u8>>> {
    let mut text = Vec::new();
    file.take(MAX_FILE_OCTETS + 1).read_to_end(&mut text)?;
    Ok((text.len() as u64 <= MAX_FILE_OCTETS).then_some(text))
}

#[derive(Clone, Copy, Debug)]
struct Facts {
    uid: u32,
    mode: u32,
}

impl Facts {
    fn of(metadata: &Metadata) -> Self {
        Self { uid: metadata.uid(), mode: metadata.mode() & 0o7777 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    File,
    Script,
    Directory,
}

fn check(path: &Path, facts: Facts, role: Role) -> Result<(), Mistake> {
    let shown = path.display();
    let (kind, forbidden, verb, fix) = match role {
        Role::File => ("option file", 0o077, "open to", format!("chmod 600 {shown}")),
        Role::Script => ("script", 0o022, "writable by", format!("chmod go-w {shown}")),
        Role::Directory => {
            ("directory", 0o022, "writable by", format!("chmod go-w {shown}, or move the file elsewhere"))
        }
    };
    if facts.uid != 0 {
        let what = format!("{kind} {shown} belongs to user {}, not to root", facts.uid);
        return Err(Mistake::new(what, format!("chown root {shown}")));
    }
    if facts.mode & forbidden != 0 {
        let what = format!("{kind} {shown} is {verb} group or other (mode {:04o})", facts.mode);
        return Err(Mistake::new(what, fix));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_may_own_read_and_change_option_files() {
        let path = Path::new("/etc/cipe/options");
        for (role, uid, mode, good) in [
            (Role::File, 0, 0o600, true),
            (Role::File, 0, 0o400, true),
            (Role::File, 0, 0o700, true),
            (Role::File, 1, 0o600, false),
            (Role::File, 0, 0o640, false),
            (Role::File, 0, 0o604, false),
            (Role::File, 0, 0o620, false),
            (Role::File, 0, 0o610, false),
            (Role::Script, 0, 0o755, true),
            (Role::Script, 0, 0o700, true),
            (Role::Script, 7, 0o755, false),
            (Role::Script, 0, 0o775, false),
            (Role::Script, 0, 0o757, false),
            (Role::Directory, 0, 0o755, true),
            (Role::Directory, 0, 0o700, true),
            (Role::Directory, 7, 0o755, false),
            (Role::Directory, 0, 0o775, false),
            (Role::Directory, 0, 0o757, false),
            (Role::Directory, 0, 0o1777, false),
        ] {
            let outcome = check(path, Facts { uid, mode }, role);
            assert_eq!(outcome.is_ok(), good, "{role:?} {uid} {mode:o}");
            if let Err(mistake) = outcome {
                assert!(mistake.what.contains("/etc/cipe/options") && !mistake.fix.is_empty());
            }
        }
    }

    #[test]
    fn a_relative_path_is_refused_and_named() {
        let mistake = read_guarded(Path::new("options")).unwrap_err();
        assert!(mistake.what.contains("`options`"), "{mistake:?}");
    }

    #[test]
    fn a_missing_file_and_a_device_end_in_a_mistake() {
        assert!(read_guarded(Path::new("/nonexistent/cipe/options")).is_err());
        assert!(read_guarded(Path::new("/dev/null")).is_err());
    }
}
