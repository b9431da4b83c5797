//! What a daemon remembers beyond its end: which messages and keys of the peer are old.
//!
//! Recorded NK_* messages open at any later time, since the static key stays. So the newest time stamp of the peer's messages and the
//! keys that it has announced are kept in a file of the tunnel's own, which the next daemon reads. A file that is lost costs
//! this protection once, and nothing else.

use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::exchange::TakenKeys;
use crate::control::run_dir;

/// Format of the files.
const VERSION: u32 = 1;

/// Keys of the peer whose hashes are kept: those of 56 days at the default tokey.
const KEYS: usize = 8192;

/// The contents of a file.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    version: u32,
    /// The tunnel's device, for people.
    pub device: String,
    /// The newest time stamp of the peer's, in seconds since 1970.
    pub newest_stamp: Option<u32>,
    /// Whether the peer runs this program.
    #[serde(default)]
    pub is_ours: bool,
    /// Salt of the hashes.
    salt: String,
    /// Hashes of the peer's keys, oldest first.
    taken: Vec<u64>,
}

impl Memory {
    /// Of a tunnel whose daemon knows this.
    pub fn new(device: &str, newest_stamp: Option<u32>, taken: &TakenKeys) -> Self {
        Self {
            version: VERSION,
            device: device.to_owned(),
            newest_stamp,
            is_ours: false,
            salt: hex::encode(taken.salt()),
            taken: taken.newest(KEYS).collect(),
        }
    }

    /// The keys that were taken; `None` if the salt cannot be read.
    pub fn taken_keys(&self) -> Option<TakenKeys> {
        let mut salt = [0; 16];
        hex::decode_to_slice(&self.salt, &mut salt).ok()?;
        Some(TakenKeys::restored(salt, self.taken.iter().copied()))
    }
}

/// The file of one tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryFile {
    path: PathBuf,
}

impl MemoryFile {
    /// The one of this name, which [`file_name`] makes.
    pub fn new(directory: &Path, name: &OsStr) -> Self {
        Self { path: directory.join(name) }
    }

    /// Its place.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The place of the tunnel's other file, in which the engine keeps which packets under the static key were accepted.
    pub fn journal(&self) -> PathBuf {
        let (base, name) = (self.path.parent().unwrap_or(Path::new("/")), self.path.file_name().unwrap_or_default());
        run_dir::engine_part(base).join(name).with_extension("static")
    }

    /// Whether it is there.
    pub fn exists(&self) -> bool {
        self.path.exists()
    }

    /// Reads it; `None` if there is none.
    ///
    /// # Errors
    /// It cannot be read, or is damaged or of another version.
    pub fn read(&self) -> anyhow::Result<Option<Memory>> {
        let place = || self.path.display().to_string();
        let text = match std::fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(place),
        };
        let memory: Memory = serde_json::from_slice(&text).with_context(place)?;
        anyhow::ensure!(memory.version == VERSION, "{}: version {}, expected {VERSION}", place(), memory.version);
        Ok(Some(memory))
    }

    /// Replaces it, so that a reader or a power failure sees the old file or the new one. Only its owner may read it.
    ///
    /// # Errors
    /// No directory can be made there, or no file written.
    pub fn write(&self, memory: &Memory) -> anyhow::Result<()> {
        let write = || -> io::Result<()> {
            let directory = self.path.parent().unwrap_or(Path::new("/"));
            DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
            let mut new = self.path.clone().into_os_string();
            new.push(".new");
            // One that a crash has left.
            match std::fs::remove_file(&new) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(&serde_json::to_vec(memory)?)?;
            file.sync_all()?;
            std::fs::rename(&new, &self.path)?;
            File::open(directory)?.sync_all()
        };
        write().with_context(|| self.path.display().to_string())
    }

    /// Removes it; the daemon then takes the peer's messages of any age. `false`: there was none.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn forget(&self) -> anyhow::Result<bool> {
        match std::fs::remove_file(&self.path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).with_context(|| self.path.display().to_string()),
        }
    }
}

/// The name of a tunnel's file: from its last option file, or, without one, from its carrier addresses.
pub fn file_name(option_file: Option<&Path>, carrier: &str) -> OsString {
    let whole = option_file.map(|file| std::path::absolute(file).unwrap_or_else(|_| file.to_owned()));
    let text = whole.as_ref().map_or(carrier.as_bytes(), |file| file.as_os_str().as_bytes());
    let plain = text.iter().map(|octet| match octet {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | 0x80.. => *octet,
        _ => b'-',
    });
    let mut name: Vec<u8> = plain.skip_while(|octet| matches!(octet, b'-' | b'.')).collect();
    name.extend(b".json");
    OsString::from_vec(name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::wire::message::DynamicKey;

    fn memory() -> Memory {
        let mut taken = TakenKeys::new([7; 16]);
        assert!(taken.insert(&DynamicKey([1; 16])));
        assert!(taken.insert(&DynamicKey([2; 16])));
        Memory::new("cipcb0", Some(1_000_000), &taken)
    }

    #[test]
    fn what_was_written_is_read_again_and_refuses_the_same_keys() {
        let base = tempfile::tempdir().unwrap();
        let file = MemoryFile::new(&base.path().join("cipe"), OsStr::new("a.json"));
        assert_eq!(file.read().unwrap(), None);
        file.write(&memory()).unwrap();
        file.write(&memory()).unwrap();
        let read = file.read().unwrap().unwrap();
        assert_eq!(read, memory());
        let mut taken = read.taken_keys().unwrap();
        assert!(!taken.insert(&DynamicKey([1; 16])));
        assert!(!taken.insert(&DynamicKey([2; 16])));
        assert!(taken.insert(&DynamicKey([3; 16])));
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(file.path()), mode(file.path().parent().unwrap())), (0o600, 0o700));
        assert_eq!(std::fs::read_dir(file.path().parent().unwrap()).unwrap().count(), 1, "nothing is left over");
        assert!(file.forget().unwrap());
        assert!(!file.forget().unwrap());
    }

    #[test]
    fn a_key_is_not_in_the_file() {
        let base = tempfile::tempdir().unwrap();
        let file = MemoryFile::new(base.path(), OsStr::new("a.json"));
        file.write(&memory()).unwrap();
        let text = std::fs::read(file.path()).unwrap();
        for key in [[1u8; 16], [2; 16]] {
            assert!(!text.windows(16).any(|window| window == key));
            assert!(!String::from_utf8_lossy(&text).contains(&hex::encode(key)));
        }
    }

    #[test]
    fn damage_and_other_versions_are_errors_with_the_place() {
        let base = tempfile::tempdir().unwrap();
        let file = MemoryFile::new(base.path(), OsStr::new("a.json"));
        for text in ["", "{}", r#"{"version":2,"device":"","newest_stamp":null,"salt":"","taken":[]}"#] {
            std::fs::write(file.path(), text).unwrap();
            let error = format!("{:#}", file.read().unwrap_err());
            assert!(error.contains("a.json"), "{error}");
        }
    }

    #[test]
    fn names_are_plain_and_those_of_two_tunnels_differ() {
        let of = |file: &str| file_name(Some(Path::new(file)), "");
        assert_eq!(of("/etc/cipe/office b"), "etc-cipe-office-b.json");
        assert_ne!(of("/etc/cipe/a"), of("/etc/cipe/b"));
        assert_eq!(file_name(None, "192.0.2.1:6789 192.0.2.2:6789"), "192.0.2.1-6789-192.0.2.2-6789.json");
        assert_eq!(of("/../x"), "x.json");
    }
}
