//! `cipe top`: a table of the tunnels that is refreshed every few seconds.

mod screen;
mod table;

use std::io::{IsTerminal, Write, stdout};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::status::{self, Rates};
use crate::control::client::Client;
use crate::control::protocol::Status;
use screen::{Action, Screen};
use table::{Row, Sort};

/// Width of a line, in columns, if the output is no terminal.
const DEFAULT_WIDTH_COLUMNS: usize = 200;

/// Arguments of `cipe top`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Keys: q quits, s changes the order, arrows and page keys scroll.

Examples:
  cipe top
  cipe top --interval 0.5 cipcb0
  cipe top --count 1 | head                 once, as text")]
pub(super) struct Args {
    /// Only this interface.
    device: Option<String>,
    /// Seconds between two tables.
    #[arg(short, long, value_name = "SECONDS", default_value = "2", value_parser = interval)]
    interval: Duration,
    /// End after this number of tables.
    #[arg(short = 'n', long, value_name = "TABLES", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Order of the tunnels.
    #[arg(short, long, default_value = "traffic")]
    sort: Sort,
    /// Write one table below the other, as when the output is no terminal.
    #[arg(short, long)]
    batch: bool,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "write seconds, from 0.1 to 3600".to_owned())
}

/// Asks the engine and draws the table until the user quits.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no event loop")?;
    let mut watch = Watch::new(args.device);
    let mut screen = if args.batch || !stdout().is_terminal() { None } else { Some(Screen::open()?) };
    let mut sort = args.sort;
    let mut tables = 0;
    loop {
        let next = Instant::now() + args.interval;
        let seen = runtime.block_on(watch.query())?;
        tables += u64::from(seen.has_rates);
        let is_last = args.count == Some(tables);
        match &mut screen {
            None => {
                let is_empty = seen.rows.is_empty();
                let mut lines =
                    if is_empty { vec![seen.headline] } else { table::lines(&seen.rows, sort, DEFAULT_WIDTH_COLUMNS) };
                lines.push(String::new());
                // The reader has closed the pipe.
                let is_unread = (is_empty || seen.has_rates) && writeln!(stdout(), "{}", lines.join("\n")).is_err();
                if is_last || is_empty || is_unread {
                    return Ok(ExitCode::SUCCESS);
                }
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            Some(screen) => loop {
                screen.draw(&seen.headline, |width| table::lines(&seen.rows, sort, width))?;
                match screen.wait(next)? {
                    Action::Quit => return Ok(ExitCode::SUCCESS),
                    Action::Sort => sort = sort.other(),
                    Action::Redraw => {}
                    Action::Refresh if is_last => return Ok(ExitCode::SUCCESS),
                    Action::Refresh => break,
                }
            },
        }
    }
}

/// The connection to the engine, and its last answer.
struct Watch {
    device: Option<String>,
    engine: Option<Client>,
    before: Option<(Vec<Status>, Instant)>,
}

/// One answer of the engine.
struct Seen {
    headline: String,
    rows: Vec<Row>,
    /// Whether there was an answer before.
    has_rates: bool,
}

impl Watch {
    fn new(device: Option<String>) -> Self {
        Self { device, engine: None, before: None }
    }

    /// Asks the engine. If it has ended, a new one may run at the next time.
    async fn query(&mut self) -> anyhow::Result<Seen> {
        if self.engine.is_none() {
            self.engine = status::connect()?;
        }
        let Some(engine) = &mut self.engine else {
            return Ok(self.nothing("no engine runs in this network namespace"));
        };
        let mut all = match status::query(engine).await {
            Ok(all) => all,
            Err(error) => {
                self.engine = None;
                return Ok(self.nothing(&format!("{error:#}")));
            }
        };
        let tunnels = all.len();
        all.retain(|status| self.device.as_ref().is_none_or(|device| *device == status.device));
        let now = Instant::now();
        let rates = |status: &Status| {
            let (before, at) = self.before.as_ref()?;
            let before = before.iter().find(|before| before.device == status.device)?;
            Some(Rates::between(before, status, now.duration_since(*at).as_secs_f64()))
        };
        let rows = all.iter().map(|status| Row::new(status, rates(status))).collect();
        let headline = match &self.device {
            Some(device) if all.is_empty() => format!("no tunnel {device}; {tunnels} others"),
            _ => format!("{tunnels} tunnel{}", if tunnels == 1 { "" } else { "s" }),
        };
        let has_rates = self.before.replace((all, now)).is_some();
        Ok(Seen { headline, rows, has_rates })
    }

    fn nothing(&mut self, headline: &str) -> Seen {
        self.before = None;
        Seen { headline: headline.to_owned(), rows: Vec::new(), has_rates: false }
    }
}
