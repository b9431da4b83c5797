//! The results of the tests in guests, parsed from their output, and shown as a table.

use std::time::{Duration, Instant};

use super::machine::Told;
use super::plan::Record;

/// Results of the tests of one file on one kernel.
pub(super) struct Outcome {
    /// The kernel's release.
    pub kernel: String,
    /// The file's name.
    pub name: String,
    passed: usize,
    failed: Vec<String>,
    skipped: Vec<String>,
    ended: bool,
    whole: bool,
    took: Duration,
    used: Duration,
}

impl Outcome {
    /// Whether tests have run, and all have passed.
    pub(super) fn is_right(&self) -> bool {
        self.whole && self.failed.is_empty() && self.passed > 0
    }

    /// Its line in the table.
    pub(super) fn line(&self) -> String {
        let verdict = if self.is_right() { "ok" } else { "FAILED" };
        let mut line = format!(
            "{:<22} {:<22} {verdict:<6} {:>7.1} s {:>7.1} s of CPU  {} passed",
            self.kernel,
            self.name,
            self.took.as_secs_f64(),
            self.used.as_secs_f64(),
            self.passed
        );
        if !self.failed.is_empty() {
            line += &format!(", failed: {}", self.failed.join(", "));
        } else if !self.whole {
            line += ", not all have run";
        }
        for reason in &self.skipped {
            line += &format!("; {reason}");
        }
        line
    }
}

/// Parses the output of test programs.
pub(super) struct Reader {
    kernel: String,
    /// The results so far.
    pub outcomes: Vec<Outcome>,
    failures: bool,
}

impl Reader {
    /// Starts with no results on this kernel.
    pub(super) fn new(kernel: &str) -> Self {
        Self { kernel: kernel.to_owned(), outcomes: Vec::new(), failures: false }
    }

    /// Removes a file whose tests had not ended when their guest ended.
    pub(super) fn forget_unfinished(&mut self) {
        self.outcomes.pop_if(|outcome| !outcome.ended);
    }

    /// Handles a report of the guest, and prints the parts for people at once.
    pub(super) fn take(&mut self, told: Told<'_>, start: Instant) {
        match told {
            Told::Record(Record::Up(release), used) => {
                println!(
                    "{release} is up after {:.1} s and {:.1} s of CPU",
                    start.elapsed().as_secs_f64(),
                    used.as_secs_f64()
                );
            }
            Told::Record(Record::Begin(name), used) => {
                println!("{}: {name}", self.kernel);
                self.failures = false;
                self.outcomes.push(Outcome {
                    kernel: self.kernel.clone(),
                    name,
                    passed: 0,
                    failed: Vec::new(),
                    skipped: Vec::new(),
                    ended: false,
                    whole: false,
                    took: Duration::ZERO,
                    used,
                });
            }
            Told::Record(Record::End(code, seconds), used) => {
                if let Some(outcome) = self.outcomes.last_mut() {
                    outcome.ended = true;
                    outcome.took = Duration::from_secs_f64(seconds);
                    outcome.used = used.saturating_sub(outcome.used);
                    outcome.whole = code == Some(0);
                }
            }
            Told::Record(..) => {}
            Told::Line(line) => self.line(line),
        }
    }

    fn line(&mut self, line: &str) {
        let Some(outcome) = self.outcomes.last_mut() else { return println!("{}: {line}", self.kernel) };
        self.failures |= line == "failures:";
        let test = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "));
        match test {
            Some((_, "ok")) => outcome.passed += 1,
            Some((name, "FAILED")) => outcome.failed.push(name.to_owned()),
            _ => {}
        }
        if line.starts_with("skipped: ") && !outcome.skipped.iter().any(|reason| reason == line) {
            outcome.skipped.push(line.to_owned());
        }
        if test.is_some() || self.failures || line.starts_with("skipped: ") {
            println!("{}: {line}", self.kernel);
        }
    }
}
