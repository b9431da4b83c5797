//! A ledger has all that was counted before an engine was killed, and a faulty one is refused.

use std::time::Instant;

use super::*;

const KEY_1: [u8; KEY] = [1; KEY];

/// The ledger as the next engine gets it.
fn next(memory: &OwnedFd) -> anyhow::Result<Arc<Ledger>> {
    Ledger::take_over(memory.as_fd())
}

fn push(record: &Record, entries: std::ops::Range<u64>) {
    let mut log = record.log().expect("the record is the key's");
    entries.for_each(|entry| log.push(entry));
}

#[test]
fn the_next_engine_finds_what_this_one_has_counted() {
    let (ledger, memory) = Ledger::new().unwrap();
    let receive = ledger.open(Use::Receive, &KEY_1);
    push(&receive, 10..15);
    receive.account(5, 500);
    assert!(receive.since().is_none());
    let before = Instant::now();
    ledger.open(Use::Send, &KEY_1).account(7, 70);
    ledger.note_iv(99);
    assert_eq!(ledger.packets(Use::Static, &KEY_1), None, "a key in several uses is several");

    let next = next(&memory).unwrap();
    drop((ledger, receive, memory));
    let receive = next.open(Use::Receive, &KEY_1);
    assert_eq!(receive.entries().collect::<Vec<_>>(), [10, 11, 12, 13, 14]);
    assert_eq!(receive.account(1, 100), (6, 600));
    assert!(receive.since().is_some_and(|since| since <= before));
    assert_eq!(next.packets(Use::Send, &KEY_1), Some(7));
    assert_eq!(next.sent_ivs().collect::<Vec<_>>(), [99]);
    assert_eq!(next.packets(Use::Receive, &[2; KEY]), None);
}

#[test]
fn a_packet_that_was_logged_and_not_yet_counted_is_known() {
    let (ledger, memory) = Ledger::new().unwrap();
    push(&ledger.open(Use::Receive, &KEY_1), 0..1);
    assert_eq!(next(&memory).unwrap().packets(Use::Receive, &KEY_1), Some(1));
}

#[test]
fn the_oldest_record_of_a_key_that_is_not_live_is_given_away() {
    let (ledger, _memory) = Ledger::new().unwrap();
    let first = ledger.open(Use::Receive, &KEY_1);
    push(&first, 0..3);
    first.account(3, 300);
    for key in 2..100 {
        let record = ledger.open(Use::Receive, &[key; KEY]);
        assert_eq!((record.entries().count(), record.packets()), (0, 0));
        push(&record, 0..1);
    }
    assert_eq!(ledger.packets(Use::Receive, &KEY_1), Some(3));
    assert!(first.log().is_some());
    assert_eq!(ledger.packets(Use::Receive, &[99; KEY]), Some(1));
    drop(first);
    ledger.open(Use::Receive, &[100; KEY]);
    assert_eq!(ledger.packets(Use::Receive, &KEY_1), None);
}

#[test]
fn if_all_keys_are_live_the_oldest_unused_one_can_accept_nothing_more() {
    let (ledger, _memory) = Ledger::new().unwrap();
    let mut live: Vec<Record> = (0..RECEIVE_RECORDS as u8).map(|key| ledger.open(Use::Receive, &[key; KEY])).collect();
    live[0].account(1, 100);
    for key in 50..60 {
        live.push(ledger.open(Use::Receive, &[key; KEY]));
    }
    assert!(live[0].log().is_some() && live[RECEIVE_RECORDS + 9].log().is_some());
    assert!(live[1].log().is_none());
    assert_eq!(ledger.packets(Use::Receive, &[0; KEY]), Some(1));
    assert_eq!(ledger.packets(Use::Receive, &[1; KEY]), None);
}

#[test]
fn the_logs_of_the_static_key_are_rings() {
    let (ledger, memory) = Ledger::new().unwrap();
    let record = ledger.open(Use::Static, &KEY_1);
    let entries = STATIC_ENTRIES as u64;
    push(&record, 0..entries + 5);
    (0..entries + 5).for_each(|iv| ledger.note_iv(iv));
    let next = next(&memory).unwrap();
    for logged in [next.open(Use::Static, &KEY_1).entries().collect::<Vec<_>>(), next.sent_ivs().collect()] {
        assert_eq!((logged.len() as u64, logged[0], logged.last()), (entries, 5, Some(&(entries + 4))));
    }
}

#[test]
fn a_ledger_that_has_missed_a_packet_is_refused() {
    let (ledger, memory) = Ledger::new().unwrap();
    push(&ledger.open(Use::Receive, &KEY_1), 0..layout::RECEIVE_ENTRIES as u64);
    assert!(next(&memory).is_ok());
    push(&ledger.open(Use::Receive, &KEY_1), 0..1);
    assert!(next(&memory).is_err());
}

#[test]
fn what_is_no_ledger_of_this_version_is_refused() {
    for (word, what) in [(MAGIC_WORD, "not a ledger"), (VERSION_WORD, "a ledger of version 8")] {
        let (ledger, memory) = Ledger::new().unwrap();
        ledger.word(word).store(8, Ordering::Relaxed);
        let error = next(&memory).err().unwrap().to_string();
        assert!(error.starts_with(what), "{error}");
    }
    let (_ledger, memory) = Ledger::new().unwrap();
    assert!(ftruncate(&memory, 0).is_err(), "its memory can be taken away");
    let other = |flags, octets| {
        let memory = memfd_create("test", MemfdFlags::CLOEXEC | flags).unwrap();
        ftruncate(&memory, octets).unwrap();
        memory
    };
    for octets in [1, Ledger::octets()] {
        assert!(next(&other(MemfdFlags::ALLOW_SEALING, octets)).is_err(), "not sealed");
    }
    let short = other(MemfdFlags::ALLOW_SEALING, 4096);
    fcntl_add_seals(&short, SealFlags::SHRINK).unwrap();
    assert!(next(&short).is_err());
    let (pipe, _other_end) = io::pipe().unwrap();
    assert!(next(&pipe.into()).is_err());
}
