//! The part that runs in a guest: `xtask guest-inside PLAN`.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cipe_tests::process::wait_gone;

use super::plan::{MARK, Plan, Record, Step};

/// Time between two signs of life of a guest.
const ALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// How long a process that a program left behind may keep the program's output open after its end.
const OUTPUT_GRACE_PERIOD: Duration = Duration::from_secs(10);

/// Runs a plan.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The plan
    plan: PathBuf,
}

/// Runs the plan's steps and reports each one.
///
/// # Errors
/// The plan cannot be read.
pub(crate) fn run(args: &Args) -> Result<()> {
    let plan: Plan = serde_json::from_reader(File::open(&args.plan)?)?;
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    tell(&Record::Up(release.trim().to_owned()));
    let (stop, stopped) = mpsc::channel::<()>();
    let alive = std::thread::spawn(move || {
        while stopped.recv_timeout(ALIVE_INTERVAL) == Err(RecvTimeoutError::Timeout) {
            tell(&Record::Alive);
        }
    });
    for step in &plan.steps {
        tell(&Record::Begin(step.name.clone()));
        let start = Instant::now();
        let code = match run_step(step) {
            Ok(code) => code,
            Err(error) => {
                println!("{error:#}");
                None
            }
        };
        tell(&Record::End(code, start.elapsed().as_secs_f64()));
    }
    drop(stop);
    drop(alive.join());
    tell(&Record::Done);
    Ok(())
}

fn run_step(step: &Step) -> Result<Option<i32>> {
    // One pipe for both outputs, so that a step's lines stay whole and in order.
    let (output, input) = std::io::pipe()?;
    let mut command = Command::new(&step.program);
    command
        .args(&step.arguments)
        .current_dir(&step.folder)
        .envs(step.environment.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null()).stdout(input.try_clone()?).stderr(input);
    let mut child = command.spawn().with_context(|| step.program.display().to_string())?;
    drop(command);
    let (at_end, ended) = mpsc::channel::<()>();
    std::thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            println!("{}", String::from_utf8_lossy(&line).trim_end());
            line.clear();
        }
        drop(at_end);
    });
    if wait_gone(child.id(), Duration::from_secs(step.deadline)).is_err() {
        println!("{} is ended: it ran for {} s", step.name, step.deadline);
        child.kill()?;
    }
    let status = child.wait()?;
    // An error in both cases: the output ended, or it does not end in time.
    let _ = ended.recv_timeout(OUTPUT_GRACE_PERIOD);
    Ok(status.code())
}

fn tell(record: &Record) {
    let text = serde_json::to_string(record).unwrap_or_default();
    let mut out = std::io::stdout().lock();
    // If a line cannot be written, the host misses it and ends the guest at a deadline.
    drop(writeln!(out, "{MARK}{text}").and_then(|()| out.flush()));
}
