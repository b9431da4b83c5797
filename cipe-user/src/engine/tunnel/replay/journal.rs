//! What a later engine has to know of the packets under the static key, which outlives all engines and daemons: those that
//! were accepted, and the IVs of those that were sent.
//!
//! A journal is two files: entries are appended to the first; when it is full, it takes the place of the second, whose
//! name ends in `.old`. An entry is the head of an accepted packet, or the IV of a sent one and eight zero octets. Both
//! have been on the carrier, so they are no secrets. What is appended survives the process at once, and a failure of the
//! machine some seconds later.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::wire::packet::IV;

/// Octets of an entry: an IV, and a first cipher block or zeros.
const ENTRY: usize = 16;

/// Entries of one file, 4 MiB. Reading both takes some 0.1 s.
const MAX_ENTRIES: u64 = 1 << 18;

/// The contents of a journal.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Past {
    /// IVs and first blocks of accepted packets, oldest first.
    pub accepted: Vec<[u8; ENTRY]>,
    /// IVs of sent packets, oldest first.
    pub sent: Vec<[u8; IV]>,
}

impl Past {
    fn read(&mut self, octets: &[u8]) {
        let (entries, _) = octets.as_chunks::<ENTRY>();
        for entry in entries {
            let (iv, block) = entry.split_at(IV);
            match iv.first_chunk().filter(|_| block == [0; ENTRY - IV]) {
                Some(iv) => self.sent.push(*iv),
                None => self.accepted.push(*entry),
            }
        }
    }
}

/// An open journal.
#[derive(Debug)]
pub(crate) struct Journal {
    file: File,
    path: PathBuf,
    entries: u64,
    /// Entries to write.
    pending: Vec<u8>,
    /// The last write failed, which was logged.
    fails: bool,
}

impl Journal {
    /// Opens the journal of this path for appending, and reads it. An entry that was written in part is dropped.
    ///
    /// # Errors
    /// The files or their directory cannot be made, read or written.
    pub(crate) fn open(path: &Path) -> io::Result<(Self, Past)> {
        if let Some(directory) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        }
        let mut past = Past::default();
        match std::fs::read(old(path)) {
            Ok(octets) => past.read(&octets),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let mut file = append(path)?;
        let mut octets = Vec::new();
        file.read_to_end(&mut octets)?;
        past.read(&octets);
        let entries = (octets.len() / ENTRY) as u64;
        file.set_len(entries * ENTRY as u64)?;
        Ok((Self { file, path: path.to_owned(), entries, pending: Vec::new(), fails: false }, past))
    }

    /// Notes an accepted packet; it is written by [`Self::write`].
    pub(crate) fn accepted(&mut self, head: &[u8; ENTRY]) {
        self.pending.extend(head);
    }

    /// Notes a sent packet; it is written by [`Self::write`].
    pub(crate) fn sent(&mut self, iv: &[u8; IV]) {
        self.pending.extend(iv);
        self.pending.extend([0; ENTRY - IV]);
    }

    /// Writes what was noted. A failure is logged once; those entries are lost.
    pub(crate) fn write(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let written = self.try_write();
        self.pending.clear();
        match written {
            Ok(()) => self.fails = false,
            Err(error) if !self.fails => {
                self.fails = true;
                let path = self.path.display();
                tracing::warn!(
                    "{path}: {error}; packets under the static key may be accepted once more after a restart"
                );
            }
            Err(_) => {}
        }
    }

    fn try_write(&mut self) -> io::Result<()> {
        if self.entries >= MAX_ENTRIES {
            match std::fs::rename(&self.path, old(&self.path)) {
                // The last attempt came as far as this.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                renamed => renamed?,
            }
            (self.file, self.entries) = (append(&self.path)?, 0);
        }
        self.file.write_all(&self.pending)?;
        self.entries += (self.pending.len() / ENTRY) as u64;
        Ok(())
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)
}

fn old(path: &Path) -> PathBuf {
    let mut name = path.to_owned().into_os_string();
    name.push(".old");
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(number: u64) -> [u8; ENTRY] {
        let mut head = [7; ENTRY];
        head[..8].copy_from_slice(&number.to_be_bytes());
        head
    }

    #[test]
    fn what_was_noted_is_read_by_the_next_one() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("made").join("a.static");
        let (mut journal, past) = Journal::open(&path).unwrap();
        assert_eq!(past, Past::default());
        for number in 0..10 {
            journal.accepted(&head(number));
            journal.sent(&number.to_be_bytes());
            journal.write();
        }
        journal.accepted(&head(10));
        drop(journal);
        // A machine failed in the middle of a write.
        append(&path).unwrap().write_all(&[1; ENTRY - 1]).unwrap();
        let (mut journal, past) = Journal::open(&path).unwrap();
        assert_eq!(past.accepted, (0..10).map(head).collect::<Vec<_>>());
        assert_eq!(past.sent, (0..10).map(u64::to_be_bytes).collect::<Vec<_>>());
        journal.accepted(&head(11));
        journal.write();
        assert_eq!(Journal::open(&path).unwrap().1.accepted.last(), Some(&head(11)), "after the damage, too");
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn two_files_hold_the_newest_and_do_not_grow() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("a.static");
        let (mut journal, _) = Journal::open(&path).unwrap();
        for number in 0..3 * MAX_ENTRIES + 5 {
            journal.accepted(&head(number));
            if number.is_multiple_of(32) {
                journal.write();
            }
        }
        journal.write();
        let (_, past) = Journal::open(&path).unwrap();
        let count = past.accepted.len() as u64;
        assert!((MAX_ENTRIES..=2 * MAX_ENTRIES + 64).contains(&count), "{count}");
        assert_eq!(past.accepted.last(), Some(&head(3 * MAX_ENTRIES + 4)));
    }

    #[test]
    fn a_place_that_cannot_be_written_is_an_error() {
        assert!(Journal::open(Path::new("/proc/none/a.static")).is_err());
    }
}
