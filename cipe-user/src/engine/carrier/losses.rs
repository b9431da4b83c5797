//! Datagrams that the kernel dropped at UDP sockets, because their receive buffers were full or a checksum was wrong.
//!
//! The count does not come with datagrams; it is in /proc/net/udp and udp6 (proc(5)), with the socket's inode.

use std::collections::HashMap;

/// Positions of the socket's inode and the number of dropped datagrams among the fields of a line.
const INODE: usize = 9;
const DROPS: usize = 12;

/// Returns the datagrams dropped since each socket of this network namespace was made, by inode, without zeros. Empty
/// if /proc cannot be read.
pub(crate) fn of_all_sockets() -> HashMap<u64, u64> {
    let files = ["/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"];
    let read = files.iter().filter_map(|file| std::fs::read_to_string(file).ok());
    read.flat_map(|text| text.lines().filter_map(entry).collect::<Vec<_>>()).collect()
}

fn entry(line: &str) -> Option<(u64, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let inode = fields.nth(INODE)?.parse().ok()?;
    let drops = fields.nth(DROPS - INODE - 1)?.parse().ok().filter(|drops| *drops > 0)?;
    Some((inode, drops))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_gives_inode_and_drops() {
        let header = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops";
        let with = |drops| {
            format!(
                "  412: 0100007F:1A85 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 36871 2 0000000000000000 {drops}  "
            )
        };
        assert_eq!(entry(header), None);
        assert_eq!(entry(&with(0)), None);
        assert_eq!(entry(&with(17)), Some((36871, 17)));
        assert_eq!(entry("412: 0100007F:1A85"), None);
    }
}
