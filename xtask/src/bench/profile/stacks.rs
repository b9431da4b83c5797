//! Call stacks from `perf script`, folded: equal stacks are counted together.

use std::collections::BTreeMap;

/// A function in a stack.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Frame {
    /// Its name without its hash.
    pub name: String,
    /// Whether it runs in the kernel.
    pub kernel: bool,
}

/// Threads with their sampled stacks, from the outermost function to the innermost.
#[derive(Clone, Debug, Default)]
pub(super) struct Stacks {
    counts: BTreeMap<(String, Vec<Frame>), u64>,
    /// Samples of other processes.
    pub foreign: u64,
}

/// Innermost functions of an idle CPU.
const IDLE: [&str; 5] = ["pv_native_safe_halt", "native_safe_halt", "default_idle", "mwait_idle", "acpi_safe_halt"];

impl Stacks {
    /// Reads `perf script --fields comm,pid,ip,sym`: a line with thread and process, a line a frame from the innermost
    /// outwards, an empty line. Samples of idle CPUs, and of processes that are not `wanted`, are left out.
    pub(super) fn parse(text: &str, wanted: impl Fn(u32) -> bool) -> Self {
        let mut stacks = Self::default();
        for sample in text.split("\n\n") {
            let mut lines = sample.lines().filter(|line| !line.trim().is_empty());
            let Some(head) = lines.next() else { continue };
            let Some((thread, pid)) = head.trim().rsplit_once(char::is_whitespace) else { continue };
            let mut frames: Vec<Frame> = lines.filter_map(Frame::parse).collect();
            if frames.first().is_some_and(|frame| IDLE.contains(&frame.name.as_str())) {
                continue;
            }
            if !pid.parse().is_ok_and(&wanted) {
                stacks.foreign += 1;
                continue;
            }
            frames.reverse();
            *stacks.counts.entry((thread.trim().to_owned(), frames)).or_default() += 1;
        }
        stacks
    }

    /// Every stack with its thread and its count.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &[Frame], u64)> {
        self.counts.iter().map(|((thread, frames), &count)| (thread.as_str(), frames.as_slice(), count))
    }

    /// Samples in all.
    pub(super) fn total(&self) -> u64 {
        self.counts.values().sum()
    }

    /// Samples by thread name, the most first.
    pub(super) fn threads(&self) -> Vec<(String, u64)> {
        sums(self.iter().map(|(thread, _, count)| (thread.to_owned(), count)))
    }

    /// Samples by the function that was running, the most first.
    pub(super) fn functions(&self) -> Vec<(Frame, u64)> {
        sums(self.iter().filter_map(|(_, frames, count)| Some((frames.last()?.clone(), count))))
    }
}

fn sums<K: Ord>(counts: impl Iterator<Item = (K, u64)>) -> Vec<(K, u64)> {
    let mut sums = BTreeMap::new();
    for (key, count) in counts {
        *sums.entry(key).or_default() += count;
    }
    let mut sums: Vec<(K, u64)> = sums.into_iter().collect();
    sums.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    sums
}

impl Frame {
    fn parse(line: &str) -> Option<Self> {
        let (address, symbol) = line.trim().split_once(' ')?;
        let address = u64::from_str_radix(address, 16).ok()?;
        Some(Self { name: without_hash(symbol.trim()).to_owned(), kernel: address >> 63 == 1 })
    }
}

/// Names by Rust's older mangling end in a hash.
fn without_hash(symbol: &str) -> &str {
    match symbol.rsplit_once("::h") {
        Some((name, hash)) if hash.len() == 16 && hash.chars().all(|c| c.is_ascii_hexdigit()) => name,
        _ => symbol,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRIPT: &str = "cipe worker 0 123 \n\
        \tffffffff8133df95 veth_xmit\n\
        \t          167132 cipe::engine::run::h0123456789abcdef\n\
        \n\
        cipe worker 0 123 \n\
        \tffffffff8133df99 veth_xmit\n\
        \t          167132 cipe::engine::run::h0123456789abcdef\n\
        \n\
        swapper 0 \n\
        \tffffffff8133df95 pv_native_safe_halt\n\
        \n\
        x 7 \n\
        \t          50626ab [unknown]\n\
        \n\
        stranger 8 \n\
        \t          50626ab [unknown]\n";

    #[test]
    fn equal_stacks_are_counted_and_idle_ones_are_not() {
        let stacks = Stacks::parse(SCRIPT, |pid| pid != 8);
        assert_eq!((stacks.total(), stacks.foreign), (3, 1));
        assert_eq!(stacks.threads(), [("cipe worker 0".to_owned(), 2), ("x".to_owned(), 1)]);
        let (thread, frames, count) = stacks.iter().next().expect("two stacks");
        assert_eq!((thread, count), ("cipe worker 0", 2));
        assert_eq!(frames.iter().map(|frame| frame.kernel).collect::<Vec<_>>(), [false, true]);
        assert_eq!(frames[0].name, "cipe::engine::run");
        assert_eq!(stacks.functions()[0].0.name, "veth_xmit");
    }
}
