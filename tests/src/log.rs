//! Lines of a process's log with their times, and waits for them.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::process::patient;

/// One line of a log.
#[derive(Clone, Debug)]
pub struct Line {
    /// When it was read.
    pub at: Instant,
    /// The line without its line feed.
    pub text: String,
}

/// A log that grows while its source is open. Cheap to clone; clones share the lines.
#[derive(Clone, Default)]
pub struct Log {
    shared: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    lines: Vec<Line>,
    ended: bool,
}

impl Log {
    /// Reads `source` in a thread until all writers have closed it.
    pub fn follow(source: impl Read + Send + 'static) -> Self {
        let log = Self::default();
        let shared = log.shared.clone();
        std::thread::spawn(move || {
            for text in BufReader::new(source).split(b'\n').map_while(Result::ok) {
                let text = String::from_utf8_lossy(&text).into_owned();
                shared.0.lock().unwrap_or_else(PoisonError::into_inner).lines.push(Line { at: Instant::now(), text });
                shared.1.notify_all();
            }
            shared.0.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
            shared.1.notify_all();
        });
        log
    }

    /// The lines so far.
    pub fn lines(&self) -> Vec<Line> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner).lines.clone()
    }

    /// The lines so far as one text.
    pub fn text(&self) -> String {
        self.lines().iter().map(|line| format!("{}\n", line.text)).collect()
    }

    /// Waits for a line that `wanted` accepts, from the line number `from` on; `None` if none came `within` that time or
    /// before the end.
    pub fn wait_for_line(&self, from: usize, within: Duration, wanted: impl Fn(&str) -> bool) -> Option<Line> {
        let deadline = Instant::now() + patient(within);
        let mut seen = from;
        let mut state = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let new = state.lines.get(seen..).unwrap_or_default();
            if let Some(line) = new.iter().find(|line| wanted(&line.text)) {
                return Some(line.clone());
            }
            if state.ended {
                return None;
            }
            seen = seen.max(state.lines.len());
            let left = deadline.checked_duration_since(Instant::now())?;
            state = self.shared.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for `count` lines that `wanted` accepts, and returns how many there are then: fewer if they did not arrive
    /// `within` that time or before the end, more if they were there already.
    pub fn wait_for_lines(&self, count: usize, within: Duration, wanted: impl Fn(&str) -> bool) -> usize {
        let matching = |state: &State| state.lines.iter().filter(|line| wanted(&line.text)).count();
        let state = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        let wait =
            self.shared.1.wait_timeout_while(state, patient(within), |state| !state.ended && matching(state) < count);
        matching(&wait.unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Waits until the source is closed; false if it was not `within` that time.
    pub fn wait_for_end(&self, within: Duration) -> bool {
        let state = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = self.shared.1.wait_timeout_while(state, patient(within), |state| !state.ended);
        wait.unwrap_or_else(PoisonError::into_inner).0.ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_once_it_is_there_and_not_after_the_end() {
        let (reader, mut writer) = std::io::pipe().expect("a pipe");
        let log = Log::follow(reader);
        std::io::Write::write_all(&mut writer, b"one\ntwo\n").expect("a reader");
        assert!(log.wait_for_line(0, crate::SOON, |line| line == "two").is_some());
        assert_eq!(log.wait_for_lines(2, crate::SOON, |line| line.contains('o')), 2);
        drop(writer);
        assert!(log.wait_for_line(2, crate::SOON, |line| line == "one").is_none());
        assert_eq!(log.wait_for_lines(2, crate::SOON, |line| line == "one"), 1);
        assert!(log.wait_for_end(crate::SOON));
        assert_eq!(log.text(), "one\ntwo\n");
    }
}
