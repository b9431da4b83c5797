//! The layout of a ledger: 64-bit words of this host's byte order, in a file of a fixed length.
//!
//! | words | content |
//! | --- | --- |
//! | 0 | [`MAGIC`] |
//! | 1 | [`VERSION`] |
//! | 2 | not 0: the ledger has missed something, and no engine may go on by it |
//! | 3 | number of the next record |
//! | 4, 5 | salt of the keys' hashes |
//! | 6 | IVs that were sent under the static key, in all |
//! | 64 and on | [`RECORDS`] records of [`RECORD`] words |
//! | [`STATIC_LOG`] and on | packets accepted under the static key: a ring of [`STATIC_ENTRIES`] |
//! | [`IV_LOG`] and on | IVs sent under the static key: a ring of as many |
//! | [`RECEIVE_LOGS`] and on | packets accepted under each receive key: [`RECEIVE_RECORDS`] logs of [`RECEIVE_ENTRIES`] |
//!
//! A change of any of this needs a new version. Words that have no meaning are 0; a later version may give them one.

use std::ops::Range;

/// The first word.
pub(super) const MAGIC: u64 = u64::from_be_bytes(*b"CIPELEDG");
/// The version of this layout.
pub(super) const VERSION: u64 = 1;

pub(super) const MAGIC_WORD: usize = 0;
pub(super) const VERSION_WORD: usize = 1;
pub(super) const BROKEN_WORD: usize = 2;
pub(super) const NEXT_WORD: usize = 3;
pub(super) const SALT_WORDS: Range<usize> = 4..6;
pub(super) const SENT_IVS_WORD: usize = 6;

/// Words of a record.
pub(super) const RECORD: usize = 16;
/// The number of a record, from 1 on; 0: it is empty. Written last.
pub(super) const NUMBER: usize = 0;
/// The key's hash, two words.
pub(super) const HASH: usize = 1;
/// When the key was first used, in nanoseconds of CLOCK_MONOTONIC.
pub(super) const SINCE: usize = 3;
/// Packets sealed or accepted.
pub(super) const PACKETS: usize = 4;
/// Payload octets sealed or accepted.
pub(super) const OCTETS: usize = 5;
/// Entries of its log, in all.
pub(super) const LOGGED: usize = 6;

/// Records of send keys: the one in use and the one before it.
pub(super) const SEND_RECORDS: usize = 2;
/// Records of receive keys: those in the two slots, and those that a worker may still use until its next batch.
pub(super) const RECEIVE_RECORDS: usize = 4;
/// All records: of the static key, of send keys, of receive keys.
pub(super) const RECORDS: usize = 1 + SEND_RECORDS + RECEIVE_RECORDS;
const FIRST_RECORD: usize = 64;

/// Entries of the logs of the static key.
pub(super) const STATIC_ENTRIES: usize = 1 << 20;
/// Entries of the log of a receive key: as many packets as one may open ([`crate::control::protocol::Attach::receive_packets`]).
pub(super) const RECEIVE_ENTRIES: usize = 1 << 19;

/// Words of the header: one page.
const HEADER: usize = 512;
pub(super) const STATIC_LOG: usize = HEADER;
pub(super) const IV_LOG: usize = STATIC_LOG + STATIC_ENTRIES;
pub(super) const RECEIVE_LOGS: usize = IV_LOG + STATIC_ENTRIES;
/// Words of a ledger: 32 MiB, of which only those that are written take memory.
pub(super) const WORDS: usize = RECEIVE_LOGS + RECEIVE_RECORDS * RECEIVE_ENTRIES;

const _: () = assert!(FIRST_RECORD + RECORDS * RECORD <= HEADER);

/// The first word of a record.
pub(super) fn record(index: usize) -> usize {
    FIRST_RECORD + index * RECORD
}

/// Where the log of a record begins, and its number of entries; the log of a static key is a ring. A send key has none.
pub(super) fn log(index: usize) -> Option<(usize, usize)> {
    match index {
        0 => Some((STATIC_LOG, STATIC_ENTRIES)),
        _ => {
            let receive = index.checked_sub(1 + SEND_RECORDS)?;
            Some((RECEIVE_LOGS + receive * RECEIVE_ENTRIES, RECEIVE_ENTRIES))
        }
    }
}
