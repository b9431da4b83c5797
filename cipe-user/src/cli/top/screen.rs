//! The terminal: draws the table, and restores the terminal at the end.

use std::io::{self, BufWriter, Stdout, Write, stdout};
use std::time::Instant;

use crossterm::cursor::{Hide, MoveTo, Show};
use crossterm::event::{Event, KeyCode, KeyEvent, KeyModifiers, poll, read};
use crossterm::execute;
use crossterm::queue;
use crossterm::style::{Attribute, Print, SetAttribute};
use crossterm::terminal::{
    Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode, size,
};

/// The next action of the user or the timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Ask the engine again: the interval has passed.
    Refresh,
    /// Draw the same table again: it was scrolled, or the window has another size.
    Redraw,
    /// Change the order of the table.
    Sort,
    /// Quit.
    Quit,
}

/// The terminal while this program draws on it. Dropping it restores the terminal.
pub(super) struct Screen {
    out: BufWriter<Stdout>,
    /// Number of tunnels scrolled out at the top.
    scrolled: usize,
    /// Lines of the table that fit the terminal, as last drawn.
    page: usize,
}

impl Screen {
    /// Switches the terminal to drawing.
    ///
    /// # Errors
    /// The terminal refuses it.
    pub(super) fn open() -> io::Result<Self> {
        enable_raw_mode()?;
        let mut screen = Self { out: BufWriter::new(stdout()), scrolled: 0, page: 1 };
        execute!(screen.out, EnterAlternateScreen, Hide)?;
        Ok(screen)
    }

    /// Draws a headline and a table. The table's first line stays in place while the others scroll; `table` gets the
    /// width in columns.
    ///
    /// # Errors
    /// The terminal is closed.
    pub(super) fn draw(&mut self, headline: &str, table: impl FnOnce(usize) -> Vec<String>) -> io::Result<()> {
        let (width, height) = match size()? {
            // The terminal does not know its size.
            (0, _) | (_, 0) => (80, 24),
            size => size,
        };
        let lines = table(width.into());
        let (head, rows) = lines.split_first().map_or(("", &[][..]), |(head, rows)| (head.as_str(), rows));
        self.page = usize::from(height).saturating_sub(2).max(1);
        self.scrolled = self.scrolled.min(rows.len().saturating_sub(self.page));
        let title: String = format!("cipe top: {headline}").chars().take(width.into()).collect();
        queue!(self.out, MoveTo(0, 0), Print(title), Clear(ClearType::UntilNewLine))?;
        queue!(self.out, MoveTo(0, 1), SetAttribute(Attribute::Reverse), Print(head), SetAttribute(Attribute::Reset))?;
        queue!(self.out, Clear(ClearType::UntilNewLine))?;
        for (row, line) in rows.iter().skip(self.scrolled).take(self.page).zip(2..) {
            queue!(self.out, MoveTo(0, line), Print(row), Clear(ClearType::UntilNewLine))?;
        }
        let below = rows.len().saturating_sub(self.scrolled).min(self.page) as u16 + 2;
        if below < height {
            queue!(self.out, MoveTo(0, below), Clear(ClearType::FromCursorDown))?;
        }
        self.out.flush()
    }

    /// Waits for a key with a meaning, a new window size, or the time `until`.
    ///
    /// # Errors
    /// The terminal is closed.
    pub(super) fn wait(&mut self, until: Instant) -> io::Result<Action> {
        loop {
            if !poll(until.saturating_duration_since(Instant::now()))? {
                return Ok(Action::Refresh);
            }
            match read()? {
                Event::Key(key) => {
                    if let Some(action) = self.key(key) {
                        return Ok(action);
                    }
                }
                Event::Resize(..) => return Ok(Action::Redraw),
                _ => {}
            }
        }
    }

    fn key(&mut self, key: KeyEvent) -> Option<Action> {
        let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
        self.scrolled = match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Some(Action::Quit),
            // In raw mode, the terminal does not turn keys into signals.
            KeyCode::Char('c' | 'd') if is_control => return Some(Action::Quit),
            KeyCode::Char('s') => return Some(Action::Sort),
            KeyCode::Up | KeyCode::Char('k') => self.scrolled.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => self.scrolled + 1,
            KeyCode::PageUp => self.scrolled.saturating_sub(self.page),
            KeyCode::PageDown => self.scrolled + self.page,
            KeyCode::Home => 0,
            KeyCode::End => usize::MAX,
            _ => return None,
        };
        Some(Action::Redraw)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // If the terminal is closed, there is nothing to restore.
        let _ = execute!(self.out, Show, LeaveAlternateScreen);
        let _ = disable_raw_mode();
    }
}
