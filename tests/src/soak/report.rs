//! The table at the end: events by kind, and each invariant with its figures.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use super::plan::Kind;

/// A promise that has to hold after every event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Invariant {
    /// No clear frame on the carrier.
    Carrier,
    /// Each packet has a verdict.
    Sums,
    /// Nothing forged, damaged or recorded is accepted.
    Forged,
    /// Traffic flows again.
    Recovery,
    /// Memory comes back to its level.
    Memory,
    /// Descriptors, too.
    Descriptors,
    /// Entries of BPF maps, too.
    Entries,
    /// The engine has frames for packets.
    Frames,
    /// No interface, route, namespace or file stays.
    Leftovers,
}

impl Invariant {
    /// Its name in the table.
    fn name(self) -> &'static str {
        match self {
            Self::Carrier => "nothing in clear",
            Self::Sums => "sums match",
            Self::Forged => "nothing forged accepted",
            Self::Recovery => "comes back",
            Self::Memory => "memory",
            Self::Descriptors => "descriptors",
            Self::Entries => "map entries",
            Self::Frames => "frames",
            Self::Leftovers => "nothing left over",
        }
    }
}

/// The events of one kind.
#[derive(Default)]
struct Tally {
    gaps: Vec<Duration>,
    lost: usize,
    sent: usize,
}

/// The result of a soak.
#[derive(Default)]
pub struct Report {
    tallies: BTreeMap<Kind, Tally>,
    faults: BTreeMap<Invariant, usize>,
    figures: Vec<(Invariant, String)>,
    unjudged: BTreeSet<Invariant>,
}

impl Report {
    /// Counts an event: the longest time without an answer, pings sent and lost.
    pub(super) fn event(&mut self, kind: Kind, gap: Duration, (sent, lost): (usize, usize)) {
        let tally = self.tallies.entry(kind).or_default();
        tally.gaps.push(gap);
        (tally.sent, tally.lost) = (tally.sent + sent, tally.lost + lost);
    }

    /// Counts a violation.
    pub(super) fn fault(&mut self, invariant: Invariant) {
        *self.faults.entry(invariant).or_default() += 1;
    }

    /// Sets the figures of an invariant.
    pub(super) fn figure(&mut self, invariant: Invariant, text: String) {
        self.figures.push((invariant, text));
    }

    /// There was not enough to judge an invariant by.
    pub(super) fn unjudged(&mut self, invariant: Invariant) {
        self.unjudged.insert(invariant);
    }

    /// Events so far.
    pub fn events(&self) -> usize {
        self.tallies.values().map(|tally| tally.gaps.len()).sum()
    }

    /// Violations so far.
    pub fn faults(&self) -> usize {
        self.faults.values().sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<18} {:>6} {:>15} {:>15} {:>12} {:>10}",
            "event", "count", "median gap, ms", "worst gap, ms", "pings", "lost"
        )?;
        for (kind, tally) in &self.tallies {
            let mut gaps = tally.gaps.clone();
            gaps.sort();
            let (median, worst) = (gaps[gaps.len() / 2], gaps[gaps.len() - 1]);
            let (name, count, sent, lost) = (kind.name(), gaps.len(), tally.sent, tally.lost);
            writeln!(
                f,
                "{name:<18} {count:>6} {:>15} {:>15} {sent:>12} {lost:>10}",
                median.as_millis(),
                worst.as_millis()
            )?;
        }
        writeln!(f)?;
        for (invariant, text) in &self.figures {
            let outcome = match self.faults.get(invariant) {
                None if self.unjudged.contains(invariant) => "not judged".to_owned(),
                None => "ok".to_owned(),
                Some(count) => format!("FAILED ({count})"),
            };
            writeln!(f, "{:<24} {outcome:<12} {text}", invariant.name())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_line_for_each_kind_and_each_invariant() {
        let mut report = Report::default();
        for gap in [5, 700, 30] {
            report.event(Kind::EngineKill, Duration::from_millis(gap), (100, 2));
        }
        report.event(Kind::Keys, Duration::from_millis(8), (300, 0));
        report.figure(Invariant::Carrier, "9 frames".to_owned());
        report.figure(Invariant::Sums, "4 times".to_owned());
        report.fault(Invariant::Sums);
        report.fault(Invariant::Sums);
        report.figure(Invariant::Memory, "a short life".to_owned());
        report.unjudged(Invariant::Memory);
        let text = report.to_string();
        let words = |start: &str| -> Vec<String> {
            let line = text.lines().find(|line| line.starts_with(start)).expect("a line");
            line.split_whitespace().map(str::to_owned).collect()
        };
        assert_eq!(words("engine-kill"), ["engine-kill", "3", "30", "700", "300", "6"]);
        assert_eq!(words("keys"), ["keys", "1", "8", "8", "300", "0"]);
        assert_eq!(words("nothing in clear"), ["nothing", "in", "clear", "ok", "9", "frames"]);
        assert_eq!(words("memory"), ["memory", "not", "judged", "a", "short", "life"]);
        assert_eq!(words("sums match"), ["sums", "match", "FAILED", "(2)", "4", "times"]);
        assert_eq!((report.events(), report.faults()), (4, 2));
    }
}
