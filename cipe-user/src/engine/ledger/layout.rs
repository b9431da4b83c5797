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
//! | 64 and on | [`RECORDS`] records of [`RECORD`] words: of the static key, of send keys, of receive keys, of [sealed send keys](SEALED_SEND), of [sealed receive keys](SEALED_RECEIVE) |
//! | [`STATIC_LOG`] and on | packets accepted under the static key: a ring of [`STATIC_ENTRIES`] |
//! | [`IV_LOG`] and on | IVs sent under the static key: a ring of as many |
//! | [`RECEIVE_LOGS`] and on | packets accepted under each receive key: [`RECEIVE_RECORDS`] logs of [`RECEIVE_ENTRIES`] |
//! | [`WINDOWS`] and on | the window of each sealed receive key: [`SEALED_RECEIVE_RECORDS`] of [`WINDOW`] |
//!
//! A change of any of this needs a new version. Words that have no meaning are 0; a later version may give them one.

use std::ops::Range;

use crate::sealed::window;

/// The first word.
pub(super) const MAGIC: u64 = u64::from_be_bytes(*b"CIPELEDG");
/// The version of this layout.
pub(super) const VERSION: u64 = 2;

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
/// When the key was first used, in nanoseconds of CLOCK_MONOTONIC; of a sealed key, of CLOCK_BOOTTIME.
pub(super) const SINCE: usize = 3;
/// Packets sealed or accepted.
pub(super) const PACKETS: usize = 4;
/// Payload octets sealed or accepted.
pub(super) const OCTETS: usize = 5;
/// Entries of its log, in all.
pub(super) const LOGGED: usize = 6;
/// Of a sealed send key: its next counter.
pub(super) const NEXT_COUNTER: usize = 7;

/// Records of send keys: the one in use and the one before it.
pub(super) const SEND_RECORDS: usize = 2;
/// Records of receive keys: those in the two slots, and those that a worker may still use until its next batch.
pub(super) const RECEIVE_RECORDS: usize = 4;
/// Records of sealed send keys: the one in use, and those that a worker may still use until its next batch.
pub(super) const SEALED_SEND_RECORDS: usize = 3;
/// Records of sealed receive keys: those of the three epochs, and those that a worker may still use until its next batch.
pub(super) const SEALED_RECEIVE_RECORDS: usize = 5;
/// The indexes of the records of sealed send keys.
pub(super) const SEALED_SEND: Range<usize> = {
    let first = 1 + SEND_RECORDS + RECEIVE_RECORDS;
    first..first + SEALED_SEND_RECORDS
};
/// The indexes of the records of sealed receive keys.
pub(super) const SEALED_RECEIVE: Range<usize> = SEALED_SEND.end..SEALED_SEND.end + SEALED_RECEIVE_RECORDS;
/// All records.
pub(super) const RECORDS: usize = SEALED_RECEIVE.end;
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
pub(super) const WINDOWS: usize = RECEIVE_LOGS + RECEIVE_RECORDS * RECEIVE_ENTRIES;
/// Words of a window, up to the next cache line.
const WINDOW: usize = window::WORDS.next_multiple_of(8);
/// Words of a ledger: 32 MiB, of which only those that are written take memory.
pub(super) const WORDS: usize = WINDOWS + SEALED_RECEIVE_RECORDS * WINDOW;

const _: () = assert!(FIRST_RECORD + RECORDS * RECORD <= HEADER);

/// The first word of a record.
pub(super) fn record(index: usize) -> usize {
    FIRST_RECORD + index * RECORD
}

/// Where the window of a sealed receive key's record begins.
pub(super) const fn window(index: usize) -> usize {
    WINDOWS + (index - SEALED_RECEIVE.start) * WINDOW
}

/// Where the log of a record begins, and its number of entries; the log of a static key is a ring. A send key has none, nor have
/// sealed keys.
pub(super) fn log(index: usize) -> Option<(usize, usize)> {
    match index {
        0 => Some((STATIC_LOG, STATIC_ENTRIES)),
        _ => {
            let receive = index.checked_sub(1 + SEND_RECORDS).filter(|receive| *receive < RECEIVE_RECORDS)?;
            Some((RECEIVE_LOGS + receive * RECEIVE_ENTRIES, RECEIVE_ENTRIES))
        }
    }
}
