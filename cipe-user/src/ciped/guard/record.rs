//! The record of a tunnel's guard routes: a small file in the run directory, by which the tunnel's next daemon, `cipe down` and
//! `cipe unguard` find them after the daemon was killed.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::ciped::identity::Identity;
use crate::control::run_dir::RunDir;
use crate::control::small_file::{self, Flush};
use crate::kernel::guard_routes::Destination;
use crate::kernel::owner::Owner;

/// First letters of the files' names.
const PREFIX: &str = "guard-";
/// First words of what a record says of its daemon.
const DAEMON: &str = "cipe daemon";
/// Most octets of a tunnel's name in the name of its file.
const NAME_OCTETS: usize = 80;

/// What the file holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The tunnel.
    pub tunnel: Identity,
    /// Its interface, as it was called last.
    pub device: String,
    /// Its last daemon.
    daemon: String,
    /// They stay after a stop that was asked for (`guard always`).
    pub stays: bool,
    /// The destinations that have guard routes.
    pub guarded: BTreeSet<Destination>,
}

impl Record {
    /// Of this process, without guard routes yet.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn new(tunnel: Identity, device: String, stays: bool) -> io::Result<Self> {
        Ok(Self { tunnel, device, daemon: this_daemon()?, stays, guarded: BTreeSet::new() })
    }

    /// Whether its daemon has certainly ended.
    pub fn is_left(&self) -> bool {
        Owner::from_alias(&self.daemon).is_none_or(|(_, owner)| owner.is_dead())
    }

    /// Process of its daemon.
    pub fn pid(&self) -> Option<u32> {
        Owner::from_alias(&self.daemon).map(|(_, owner)| owner.pid())
    }

    /// Whether the operator means this tunnel: by its interface, or by the name of its option file.
    pub fn is_called(&self, name: &str) -> bool {
        self.device == name || (!name.is_empty() && self.tunnel.name == name)
    }
}

fn this_daemon() -> io::Result<String> {
    let owner = Owner::of(std::process::id()).map_err(io::Error::other)?;
    Ok(owner.alias(DAEMON))
}

/// A record and its file.
#[derive(Debug)]
pub struct RecordFile {
    path: PathBuf,
    /// What it holds.
    pub record: Record,
}

impl RecordFile {
    /// Takes over the record that an earlier daemon of this tunnel has left, or begins a new one. Nothing is written yet.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn claim(run_dir: &RunDir, record: Record) -> io::Result<Self> {
        let name: String = record.tunnel.name.chars().map(plain).take(NAME_OCTETS).collect();
        let stem = if name.is_empty() { record.tunnel.prefix.clone() } else { name };
        // Files of one name may lie in several directories, and one file may serve several tunnels.
        for number in 1_u32.. {
            let file = if number == 1 { format!("{PREFIX}{stem}") } else { format!("{PREFIX}{stem}.{number}") };
            let path = run_dir.path().join(file);
            match read(&path) {
                None => return Ok(Self { path, record }),
                Some(left) if left.tunnel == record.tunnel && (left.is_left() || left.daemon == record.daemon) => {
                    return Ok(Self { path, record: Record { guarded: left.guarded, ..record } });
                }
                Some(_) => {}
            }
        }
        Err(io::Error::other("all names of guard records are in use"))
    }

    /// All records of the network namespace.
    pub fn all(run_dir: &RunDir) -> Vec<Self> {
        let entries = fs::read_dir(run_dir.path()).into_iter().flatten().flatten();
        let of_records = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX));
        let mut all: Vec<Self> =
            of_records.filter_map(|entry| Some(Self { record: read(&entry.path())?, path: entry.path() })).collect();
        all.sort_by(|a, b| a.path.cmp(&b.path));
        all
    }

    /// The destinations that other tunnels' records have, too: two tunnels may have routes to the same.
    pub fn shared(&self, run_dir: &RunDir) -> BTreeSet<Destination> {
        let others = Self::all(run_dir).into_iter().filter(|other| other.path != self.path);
        others.flat_map(|other| other.record.guarded).filter(|other| self.record.guarded.contains(other)).collect()
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, run_dir: &RunDir) -> io::Result<()> {
        // An engine that ends may remove the directory at this moment; the second attempt makes it again.
        self.try_to_write(run_dir).or_else(|_| self.try_to_write(run_dir))
    }

    fn try_to_write(&self, run_dir: &RunDir) -> io::Result<()> {
        run_dir.create()?;
        small_file::replace(&self.path, &serde_json::to_vec(&self.record)?, Flush::Yes)
    }

    /// Removes it, and the directory if nothing else is in it.
    pub fn remove(&self, run_dir: &RunDir) {
        // It may never have been written.
        let _ = fs::remove_file(&self.path);
        run_dir.remove();
    }
}

fn read(path: &Path) -> Option<Record> {
    let text = fs::read(path).ok()?;
    let record = serde_json::from_slice(&text);
    if let Err(error) = &record {
        tracing::warn!("{}: no guard record: {error}; `cipe unguard --all` removes what it stood for", path.display());
    }
    record.ok()
}

/// A character of a tunnel's name as it may stand in the name of a file.
fn plain(character: char) -> char {
    if character.is_ascii_alphanumeric() || "-_@+".contains(character) { character } else { '_' }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn identity(name: &str) -> Identity {
        let [ipaddr, ptpaddr] = [[10, 0, 0, 1], [10, 0, 0, 2]].map(IpAddr::from);
        Identity { name: name.to_owned(), prefix: "cipcb".to_owned(), ipaddr, ptpaddr }
    }

    fn destination(last: u8) -> Destination {
        Destination { to: (IpAddr::from([10, 9, last, 0]), 24), from: None, table: 254, tos: 0 }
    }

    fn claim(run_dir: &RunDir, identity: Identity) -> RecordFile {
        RecordFile::claim(run_dir, Record::new(identity, "cipcb0".to_owned(), false).unwrap()).unwrap()
    }

    /// As if its daemon had been killed.
    fn leave(mut file: RecordFile, run_dir: &RunDir) {
        let namespace = fs::read_link("/proc/self/ns/pid").unwrap();
        file.record.daemon = format!("{DAEMON}, pid {} start=1 {}", u32::MAX, namespace.display());
        file.write(run_dir).unwrap();
    }

    #[test]
    fn a_tunnel_finds_what_its_killed_daemon_has_left_and_no_other_tunnel_does() {
        let base = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(base.path(), 1);
        let mut first = claim(&run_dir, identity("gateway-b"));
        first.record.guarded.insert(destination(1));
        first.write(&run_dir).unwrap();
        // One name, another tunnel: the same file for two daemons, or another file of this name.
        let other = Identity { ipaddr: [10, 0, 0, 3].into(), ..identity("gateway-b") };
        let mut second = claim(&run_dir, other.clone());
        assert!(second.record.guarded.is_empty());
        second.record.guarded.extend([destination(1), destination(2)]);
        second.write(&run_dir).unwrap();
        let shared = BTreeSet::from([destination(1)]);
        assert_eq!([&first, &second].map(|file| file.shared(&run_dir)), [shared.clone(), shared]);
        leave(first, &run_dir);
        leave(second, &run_dir);
        assert_eq!(claim(&run_dir, other).record.guarded, BTreeSet::from([destination(1), destination(2)]));
        let again = claim(&run_dir, identity("gateway-b"));
        assert_eq!(again.record.guarded, BTreeSet::from([destination(1)]));
        again.write(&run_dir).unwrap();
        assert!(!again.record.is_left() && RecordFile::all(&run_dir)[1].record.is_left());
        let names = RecordFile::all(&run_dir).into_iter().map(|file| file.record.tunnel.name).collect::<Vec<_>>();
        assert_eq!(names, ["gateway-b"; 2]);
    }

    #[test]
    fn nothing_is_left_after_the_last_record() {
        let base = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(base.path(), 1);
        let file = claim(&run_dir, identity("a/../b"));
        file.write(&run_dir).unwrap();
        assert!(run_dir.path().join("guard-a____b").exists());
        file.remove(&run_dir);
        assert!(!run_dir.path().exists());
    }

    #[test]
    fn a_damaged_record_is_no_record() {
        let base = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(base.path(), 1);
        run_dir.create().unwrap();
        fs::write(run_dir.path().join("guard-x"), "{").unwrap();
        assert!(RecordFile::all(&run_dir).is_empty());
        assert!(claim(&run_dir, identity("x")).record.guarded.is_empty());
    }
}
