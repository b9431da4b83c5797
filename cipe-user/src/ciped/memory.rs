//! What a daemon remembers beyond its end: which messages and keys of the peer are old.
//!
//! Recorded NK_* messages open at any later time, since the static key stays. So the newest time stamp of the peer's messages and the
//! keys that it has announced are kept in a file of the tunnel's own, which the next daemon reads. A file that is lost costs
//! this protection once, and nothing else.

use std::ffi::{OsStr, OsString};
use std::fs::DirBuilder;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::exchange::TakenKeys;
use super::identity::Identity;
use crate::control::lock::{self, Lock, Wait};
use crate::control::small_file::Flush;
use crate::control::{run_dir, small_file};
use crate::sealed::handshake::Kept;

/// Format of the files.
const VERSION: u32 = 1;

/// Keys of the peer whose hashes are kept: those of 56 days at the default tokey.
const KEYS: usize = 8192;

/// The most tunnels whose option files have the same path, in several network namespaces.
const MAX_NAMESAKES: u32 = 64;

/// How long to wait for another daemon of the same tunnel, which is about to end.
const MAX_WAIT: Duration = Duration::from_secs(3);
/// Time between two looks whether it has ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// The contents of a file.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Memory {
    version: u32,
    /// The tunnel's device, for people.
    pub device: String,
    /// The tunnel; `None` in files of versions before 2026-12.
    #[serde(default)]
    pub tunnel: Option<Identity>,
    /// Inode of its daemon's network namespace.
    #[serde(default)]
    pub namespace: Option<u64>,
    /// The newest time stamp of the peer's, in seconds since 1970.
    pub newest_stamp: Option<u32>,
    /// Whether the peer runs this program.
    #[serde(default)]
    pub is_ours: bool,
    /// Of handshakes with the peer; `None`: there was none.
    #[serde(default)]
    pub sealed: Option<Kept>,
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
            tunnel: None,
            namespace: None,
            newest_stamp,
            is_ours: false,
            sealed: None,
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
#[derive(Clone, Debug)]
pub struct MemoryFile {
    path: PathBuf,
    /// Held while a daemon uses it.
    lock: Option<Arc<Lock>>,
}

/// What a file is to a tunnel, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Match {
    Own,
    /// It does not say whose it is, or cannot be read.
    Unnamed,
    Free,
    Other,
}

impl MemoryFile {
    /// The one of this name, which [`file_name`] makes.
    pub fn new(directory: &Path, name: &OsStr) -> Self {
        Self { path: directory.join(name), lock: None }
    }

    /// The file of a tunnel, for its daemon alone. In several network namespaces, option files may have the same path: the files of such
    /// tunnels have numbers. Blocks for some seconds if another daemon of the same tunnel has not ended.
    pub fn claim(directory: &Path, name: &OsStr, tunnel: &Identity) -> Self {
        let deadline = Instant::now() + MAX_WAIT;
        let mut files: Vec<Self> = Self::namesakes(directory, name).collect();
        if let Some(other) = Self::left_behind(&files, tunnel) {
            tracing::warn!(
                "{} is of a tunnel with this option file that was sealed, with other inner addresses or of another kind; this tunnel gets a \
                 file of its own, and with `sealed auto` its peer counts as one that was never sealed; with the same peer say `sealed require`",
                other.path.display()
            );
        }
        files.sort_by_cached_key(|file| file.is_of(tunnel));
        for file in files {
            let found = file.is_of(tunnel);
            if found == Match::Other {
                continue;
            }
            loop {
                match file.try_to_lock() {
                    // Another daemon may have made it its own by now.
                    Ok(Some(lock)) if file.is_of(tunnel) <= found => {
                        return Self { lock: Some(Arc::new(lock)), ..file };
                    }
                    Ok(Some(_)) => break,
                    Ok(None) if found == Match::Own && Instant::now() < deadline => std::thread::sleep(LOOK_INTERVAL),
                    Ok(None) => {
                        tracing::info!(
                            "{} belongs to the tunnel of process {}; this tunnel gets a file of its own",
                            file.path.display(),
                            lock::holder(&file.lock_path())
                        );
                        break;
                    }
                    // Then nothing can be written there, which is logged at the first attempt.
                    Err(error) => {
                        tracing::debug!("{}: {error}", file.lock_path().display());
                        return file;
                    }
                }
            }
        }
        Self::new(directory, name)
    }

    /// The file of a tunnel that was sealed and does not run now, if this one, which is new, may be the same with other options.
    fn left_behind<'a>(files: &'a [Self], tunnel: &Identity) -> Option<&'a Self> {
        let is_new = |file: &Self| matches!(file.is_of(tunnel), Match::Free | Match::Other);
        let was_sealed = |file: &Self| {
            file.read().ok().flatten().and_then(|memory| memory.sealed).is_some_and(|kept| kept.was_sealed)
        };
        if !files.iter().all(is_new) {
            return None;
        }
        files.iter().find(|file| was_sealed(file) && matches!(file.try_to_lock(), Ok(Some(_))))
    }

    /// The files of all tunnels whose option files have one path; they need not exist.
    pub fn namesakes(directory: &Path, name: &OsStr) -> impl Iterator<Item = Self> + use<> {
        let (directory, name) = (directory.to_owned(), PathBuf::from(name));
        (1..=MAX_NAMESAKES).map(move |number| match number {
            1 => Self::new(&directory, name.as_os_str()),
            _ => Self::new(&directory, name.with_extension(format!("{number}.json")).as_os_str()),
        })
    }

    fn is_of(&self, tunnel: &Identity) -> Match {
        match self.read() {
            Ok(None) => Match::Free,
            Ok(Some(Memory { tunnel: Some(other), .. })) if other != *tunnel => Match::Other,
            Ok(Some(Memory { tunnel: Some(_), .. })) => Match::Own,
            Ok(Some(_)) | Err(_) => Match::Unnamed,
        }
    }

    fn lock_path(&self) -> PathBuf {
        small_file::beside(&self.path, "lock")
    }

    fn try_to_lock(&self) -> io::Result<Option<Lock>> {
        self.make_directory()?;
        Lock::take(&self.lock_path(), Wait::No)
    }

    fn make_directory(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(self.path.parent().unwrap_or(Path::new("/")))
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

    /// Whether somebody has removed it after it was written. It is no removal if its directory cannot be looked into or is another one, as
    /// when the file system is not mounted.
    pub fn is_removed(&self) -> bool {
        let is_there = |path: &Path| path.try_exists().ok();
        let beside = self.path.parent().unwrap_or(Path::new("/"));
        let lock = self.lock.is_some().then(|| self.lock_path());
        is_there(&self.path) == Some(false) && is_there(lock.as_deref().unwrap_or(beside)) == Some(true)
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

    /// Replaces it, so that a reader sees the old file or the new one; with [`Flush::Yes`] also after a power failure. Only its owner may
    /// read it.
    ///
    /// # Errors
    /// No directory can be made there, or no file written.
    pub fn write(&self, memory: &Memory, flush: Flush) -> anyhow::Result<()> {
        let write = || -> io::Result<()> {
            self.make_directory()?;
            small_file::replace(&self.path, &serde_json::to_vec(memory)?, flush)
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
        file.write(&memory(), Flush::Yes).unwrap();
        file.write(&memory(), Flush::Yes).unwrap();
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
    fn what_is_known_of_handshakes_is_kept_and_older_files_have_none() {
        let base = tempfile::tempdir().unwrap();
        let file = MemoryFile::new(base.path(), OsStr::new("a.json"));
        let sealed = Some(Kept { id: u64::MAX, newest: 1 << 63, was_sealed: true });
        file.write(&Memory { sealed, ..memory() }, Flush::No).unwrap();
        assert_eq!(file.read().unwrap().unwrap().sealed, sealed);
        file.write(&memory(), Flush::Yes).unwrap();
        let text = std::fs::read_to_string(file.path()).unwrap();
        let former = text.replace(r#""sealed":null,"#, "");
        assert_ne!(former, text);
        std::fs::write(file.path(), former).unwrap();
        assert_eq!(file.read().unwrap().unwrap(), memory());
    }

    fn tunnel(host: u8) -> Identity {
        let [ipaddr, ptpaddr] = [[10, 0, 0, host], [10, 0, 0, 254]].map(std::net::IpAddr::from);
        Identity { name: "a".to_owned(), prefix: "cipcb".to_owned(), ipaddr, ptpaddr }
    }

    fn name_of(file: &MemoryFile) -> String {
        file.path().file_name().unwrap().to_string_lossy().into_owned()
    }

    /// As the daemon of `tunnel(host)`, which knows this stamp.
    fn run(directory: &Path, host: u8, stamp: u32) -> MemoryFile {
        let file = MemoryFile::claim(directory, OsStr::new("a.json"), &tunnel(host));
        let memory =
            Memory { tunnel: Some(tunnel(host)), ..Memory::new("cipcb0", Some(stamp), &TakenKeys::new([7; 16])) };
        file.write(&memory, Flush::Yes).unwrap();
        file
    }

    #[test]
    fn tunnels_of_one_option_file_in_two_namespaces_have_a_file_each() {
        let base = tempfile::tempdir().unwrap();
        let (first, second) = (run(base.path(), 1, 100), run(base.path(), 2, 200));
        assert_eq!((name_of(&first), name_of(&second)), ("a.json".to_owned(), "a.2.json".to_owned()));
        assert_ne!(first.journal(), second.journal());
        drop((first, second));
        // In the other order after a start of the machine.
        for host in [2, 1] {
            let file = MemoryFile::claim(base.path(), OsStr::new("a.json"), &tunnel(host));
            assert_eq!(file.read().unwrap().unwrap().newest_stamp, Some(100 * u32::from(host)));
        }
        // Somebody has asked to forget the first one while its daemon does not run: its place is not the other's.
        assert!(MemoryFile::new(base.path(), OsStr::new("a.json")).forget().unwrap());
        assert_eq!(name_of(&MemoryFile::claim(base.path(), OsStr::new("a.json"), &tunnel(2))), "a.2.json");
        assert_eq!(std::fs::read_dir(base.path()).unwrap().count(), 1, "locks are removed");
    }

    #[test]
    fn a_tunnel_that_was_sealed_and_has_other_addresses_now_is_noticed() {
        let base = tempfile::tempdir().unwrap();
        let left_behind = |host| {
            let files: Vec<MemoryFile> = MemoryFile::namesakes(base.path(), OsStr::new("a.json")).collect();
            MemoryFile::left_behind(&files, &tunnel(host)).map(name_of)
        };
        let first = run(base.path(), 1, 100);
        assert_eq!(left_behind(2), None, "it was not sealed");
        let memory = first.read().unwrap().unwrap();
        let sealed = Some(Kept { id: 1, newest: 1, was_sealed: true });
        first.write(&Memory { sealed, ..memory }, Flush::No).unwrap();
        assert_eq!(left_behind(2), None, "it runs");
        drop(first);
        assert_eq!((left_behind(2), left_behind(1)), (Some("a.json".to_owned()), None));
        drop(run(base.path(), 2, 200));
        assert_eq!(left_behind(2), None, "it is known by now");
    }

    #[test]
    fn a_file_is_removed_only_if_its_place_is_there() {
        let base = tempfile::tempdir().unwrap();
        let state = base.path().join("state");
        let unlocked = MemoryFile::new(&state, OsStr::new("a.json"));
        let file = run(&state, 1, 100);
        assert!(!file.is_removed() && !unlocked.is_removed());
        // As if it was not mounted: without the directory, in an empty one, and where nothing can be looked into.
        let aside = base.path().join("aside");
        std::fs::rename(&state, &aside).unwrap();
        assert!(!file.is_removed() && !unlocked.is_removed());
        std::fs::create_dir(&state).unwrap();
        assert!(!file.is_removed());
        std::fs::remove_dir(&state).unwrap();
        std::fs::write(&state, "").unwrap();
        assert!(!file.is_removed() && !unlocked.is_removed());
        std::fs::remove_file(&state).unwrap();
        std::fs::rename(&aside, &state).unwrap();
        assert!(file.forget().unwrap());
        assert!(file.is_removed() && unlocked.is_removed());
    }

    #[test]
    fn tunnels_with_the_same_options_have_a_file_each_while_both_run() {
        let base = tempfile::tempdir().unwrap();
        let first = run(base.path(), 1, 100);
        assert_eq!(name_of(&run(base.path(), 1, 200)), "a.2.json");
        drop(first);
        assert_eq!(name_of(&run(base.path(), 1, 300)), "a.json");
    }

    #[test]
    fn a_file_of_a_former_version_goes_to_the_tunnel_that_comes_first() {
        let base = tempfile::tempdir().unwrap();
        let file = MemoryFile::new(base.path(), OsStr::new("a.json"));
        file.write(&memory(), Flush::Yes).unwrap();
        let text = std::fs::read_to_string(file.path()).unwrap();
        let former = text.replace(r#""tunnel":null,"namespace":null,"#, "");
        assert_ne!(former, text);
        std::fs::write(file.path(), former).unwrap();
        let (first, second) = (run(base.path(), 1, 1_000_001), run(base.path(), 2, 5));
        assert_eq!((name_of(&first), name_of(&second)), ("a.json".to_owned(), "a.2.json".to_owned()));
    }

    #[test]
    fn a_place_that_cannot_be_written_is_no_obstacle() {
        let file = MemoryFile::claim(Path::new("/proc/none"), OsStr::new("a.json"), &tunnel(1));
        assert_eq!(file.path(), Path::new("/proc/none/a.json"));
        assert!(file.write(&memory(), Flush::Yes).is_err());
    }

    #[test]
    fn a_key_is_not_in_the_file() {
        let base = tempfile::tempdir().unwrap();
        let file = MemoryFile::new(base.path(), OsStr::new("a.json"));
        file.write(&memory(), Flush::Yes).unwrap();
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
