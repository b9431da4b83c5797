//! What a process holds at each quiet point: memory, descriptors, entries of BPF maps. It must come back to the same level.

use std::collections::BTreeMap;
use std::fs;

use crate::bpf;
use crate::process::BpfObjects;

/// Quiet points after which a process is judged.
const ENOUGH: usize = 8;

/// What one process holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Level {
    /// Memory of its own, without the program's file, in KiB.
    pub(super) memory: u64,
    /// Open descriptors.
    pub(super) descriptors: u64,
    /// Entries of its BPF maps that can grow.
    pub(super) entries: u64,
}

impl Level {
    /// What a process holds; `None` if it has ended.
    pub(super) fn of(pid: u32) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| -> Option<u64> {
            status.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
        };
        let mut maps = BpfObjects::of(pid).ok()?.maps;
        maps.sort_unstable();
        maps.dedup();
        Some(Self {
            memory: field("RssAnon:")? + field("RssShmem:")?,
            descriptors: fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64,
            entries: maps.into_iter().filter_map(bpf::entries).sum(),
        })
    }

    /// How much more a level may be: allocators keep some memory, and a door opens some descriptors and entries.
    const SLACK: Self = Self { memory: 8 * 1024, descriptors: 8, entries: 8 };

    fn each(self, other: Self, with: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            memory: with(self.memory, other.memory),
            descriptors: with(self.descriptors, other.descriptors),
            entries: with(self.entries, other.entries),
        }
    }
}

/// A figure of a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Figure {
    /// See [`Level::memory`].
    Memory,
    /// See [`Level::descriptors`].
    Descriptors,
    /// See [`Level::entries`].
    Entries,
}

impl Figure {
    fn of(self, level: Level) -> u64 {
        match self {
            Self::Memory => level.memory,
            Self::Descriptors => level.descriptors,
            Self::Entries => level.entries,
        }
    }
}

/// The levels of all processes of a soak.
#[derive(Default)]
pub(super) struct Levels {
    /// By role, such as "engine A", and process.
    lives: BTreeMap<(String, u32), Vec<Level>>,
}

impl Levels {
    /// Adds what a process holds at a quiet point.
    pub(super) fn add(&mut self, role: &str, pid: u32, level: Level) {
        self.lives.entry((role.to_owned(), pid)).or_default().push(level);
    }

    /// For each process that lived long enough: by how much its highest level in the second half of its life exceeds that in
    /// the first.
    fn growth(&self) -> impl Iterator<Item = (&str, Level)> {
        self.lives.iter().filter(|(_, levels)| levels.len() >= ENOUGH).map(|((role, _), levels)| {
            let (first, second) = levels.split_at(levels.len() / 2);
            let highest = |half: &[Level]| half.iter().fold(Level::default(), |a, b| a.each(*b, u64::max));
            (role.as_str(), highest(second).each(highest(first), u64::saturating_sub))
        })
    }

    /// A sentence about a figure, and whether it stayed level; `None`: no process lived for long enough to tell.
    pub(super) fn judge(&self, figure: Figure) -> (String, Option<bool>) {
        let slack = figure.of(Level::SLACK);
        let worst = self.growth().max_by_key(|(_, growth)| figure.of(*growth));
        let judged = self.growth().count();
        let highest = self.lives.values().flatten().map(|level| figure.of(*level)).max().unwrap_or_default();
        let unit = if figure == Figure::Memory { " KiB" } else { "" };
        match worst {
            None => (format!("highest {highest}{unit}; no process lived for {ENOUGH} quiet points"), None),
            Some((role, growth)) => {
                let grown = figure.of(growth);
                let text = format!(
                    "grew by at most {grown}{unit} ({role}) in {judged} lives, slack {slack}{unit}; highest {highest}{unit}"
                );
                (text, Some(grown <= slack))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(memory: impl Iterator<Item = u64>) -> (String, Option<bool>) {
        let mut levels = Levels::default();
        for memory in memory {
            levels.add("engine A", 1, Level { memory, descriptors: 70, entries: 3 });
        }
        assert!([Figure::Descriptors, Figure::Entries].iter().all(|figure| levels.judge(*figure).1 != Some(false)));
        levels.judge(Figure::Memory)
    }

    #[test]
    fn memory_that_grows_all_the_time_is_found_and_a_level_is_not() {
        assert_eq!(judged((0..20).map(|n| 10_000 + n * 1000)).1, Some(false));
        assert_eq!(judged((0..20).map(|n| 10_000 + n % 7 * 1000)).1, Some(true));
        assert_eq!(judged((0..20).map(|n| if n < 3 { n * 10_000 } else { 30_000 })).1, Some(true));
        let (text, is_level) = judged((0..7).map(|n| n * 100_000));
        assert!(text.contains("no process lived") && is_level.is_none(), "{text}");
    }

    #[test]
    fn a_process_has_levels_until_it_ends() {
        let own = Level::of(std::process::id()).expect("it runs");
        assert!(own.memory > 100 && own.descriptors >= 3, "{own:?}");
        assert_eq!(Level::of(u32::MAX), None);
    }
}
