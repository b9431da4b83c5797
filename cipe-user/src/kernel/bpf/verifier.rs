//! The verifier's objection, in one line.

/// First words of the lines behind the objection: a summary of the work done.
const SUMMARY: [&str; 4] = ["processed ", "stack depth", "verification time", "insns processed"];

/// Why a program was refused: all lines behind the last checked instruction, then that instruction and its line of
/// source. `None`: the log is empty.
pub(super) fn complaint(log: &str) -> Option<String> {
    let is_summary = |line: &str| SUMMARY.iter().any(|first| line.starts_with(first));
    let lines: Vec<&str> = log.lines().map(str::trim).filter(|line| !line.is_empty() && !is_summary(line)).collect();
    let last = lines.iter().rposition(|line| instruction(line).is_some());
    let said = &lines[last.map_or(0, |last| last + 1)..];
    let said: Vec<&str> = said.iter().copied().filter(|line| !is_state(line)).collect();
    let place = last.and_then(|last| {
        let source = lines[..last].iter().rev().find_map(|line| line.strip_prefix("; "));
        let source = source.map(|source| format!(" of `{}`", source.trim())).unwrap_or_default();
        Some(format!("at {}{source}", instruction(lines[last])?))
    });
    let parts = (!said.is_empty()).then(|| said.join("; ")).into_iter().chain(place);
    Some(parts.collect::<Vec<_>>().join(", ")).filter(|text| !text.is_empty())
}

/// `12: (85) call bpf_skb_load_bytes#26 ; R0=...` without the registers.
fn instruction(line: &str) -> Option<&str> {
    let (number, rest) = line.split_once(": (")?;
    let is_number = !number.is_empty() && number.bytes().all(|octet| octet.is_ascii_digit());
    is_number.then(|| &line[..line.len() - rest.len() + rest.find(';').unwrap_or(rest.len())]).map(str::trim_end)
}

/// Registers at a branch: `from 12 to 34: R0=...`.
fn is_state(line: &str) -> bool {
    line.starts_with("from ") && line.contains(": R") || line.starts_with("R0") && line.contains('=')
}

#[cfg(test)]
mod tests {
    use super::complaint;

    #[test]
    fn the_complaint_is_said_with_its_place_and_without_the_summary() {
        let log = "0: R1=ctx() R10=fp0\n; fn clamp(ctx) @ mss.rs:41\n235: (bf) r2 = r7   ; R2_w=scalar()\n\
                   ; bpf_skb_load_bytes(ctx) @ mss.rs:97\n236: (85) call bpf_skb_load_bytes#26\n\
                   R4 invalid zero-sized read: u64=[0,65535]\nprocessed 236 insns (limit 1000000)\n\
                   verification time 812 usec\nstack depth 64+0\n";
        let expected = "R4 invalid zero-sized read: u64=[0,65535], at 236: (85) call bpf_skb_load_bytes#26 of \
                        `bpf_skb_load_bytes(ctx) @ mss.rs:97`";
        assert_eq!(complaint(log).as_deref(), Some(expected));
        // From an older kernel: the summary is in another order, and the objection has two lines.
        let log = "7: (71) r1 = *(u8 *)(r1 +0)\ninvalid access to packet, off=0 size=1, R1(id=0,off=0,r=0)\n\
                   R1 offset is outside of the packet\nverification time 9 usec\nstack depth 0\nprocessed 8 insns\n";
        let expected = "invalid access to packet, off=0 size=1, R1(id=0,off=0,r=0); R1 offset is outside of the packet, at \
                        7: (71) r1 = *(u8 *)(r1 +0)";
        assert_eq!(complaint(log).as_deref(), Some(expected));
    }

    #[test]
    fn what_was_refused_before_the_first_instruction_is_said_alone() {
        assert_eq!(complaint("unknown opcode 8d\nprocessed 0 insns\n").as_deref(), Some("unknown opcode 8d"));
        assert_eq!(complaint("processed 0 insns\nstack depth 0\n"), None);
        assert_eq!(complaint(""), None);
    }
}
