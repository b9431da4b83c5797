//! Entries of BPF maps, counted by their identifiers.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_MAP_GET_FD_BY_ID: libc::c_long = 14;

/// Types of maps whose entries come and go: hash, hash for each CPU, LRU, LRU for each CPU, trie, hash of devices.
const GROWING: [u32; 6] = [1, 5, 9, 10, 11, 25];

/// Number of entries in a map; `None` if it is no hash or trie, or is gone.
pub fn entries(map: u32) -> Option<u64> {
    let descriptor = open(map).ok()?;
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", descriptor.as_raw_fd())).ok()?;
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u32>().ok());
    if !GROWING.contains(&field("map_type:")?) {
        return None;
    }
    let mut key = vec![0; field("key_size:")? as usize];
    let mut next = key.clone();
    let (mut count, limit) = (0, u64::from(field("max_entries:")?));
    // An entry that is removed meanwhile makes the kernel begin again: the limit ends that.
    while count < limit && next_key(&descriptor, (count > 0).then_some(&key), &mut next) {
        std::mem::swap(&mut key, &mut next);
        count += 1;
    }
    Some(count)
}

fn open(map: u32) -> io::Result<OwnedFd> {
    // map_id, next_id, open_flags
    let attributes = [map, 0, 0, 0];
    // SAFETY: the kernel reads the attributes during the call, and nothing else of this process.
    let answer =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_GET_FD_BY_ID, &raw const attributes, size_of_val(&attributes)) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the command has just answered with a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(answer as i32) })
}

/// Writes the key behind `key`, or the first one, to `next`; false if there is none. Both are as long as the map's keys.
fn next_key(map: &OwnedFd, key: Option<&Vec<u8>>, next: &mut [u8]) -> bool {
    let key = key.map_or(std::ptr::null(), Vec::as_ptr);
    // map_fd and padding, key, next_key, flags
    let attributes = [map.as_raw_fd() as u64, key as u64, next.as_mut_ptr() as u64, 0];
    // SAFETY: the kernel reads a key's length of octets at `key`, unless it is null, and writes as many to `next`; the caller
    // made both that long.
    let answer =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_GET_NEXT_KEY, &raw const attributes, size_of_val(&attributes)) };
    answer == 0
}
