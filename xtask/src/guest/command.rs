//! `cargo xtask guest`: one command on another kernel.

use std::path::PathBuf;

use anyhow::{Result, bail};

use super::kernel::{Kernel, Wanted};
use super::machine::{self, End, Shape, Told};
use super::need_guests;
use super::plan::{Plan, Record, Step};
use crate::tools;

/// Runs a command in a guest.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The kernel: the latest of a line, such as 6.12, or newest
    #[arg(long, default_value = "newest")]
    kernel: Wanted,
    /// Seconds after which it is ended
    #[arg(long, default_value_t = 3600)]
    deadline: u64,
    #[command(flatten)]
    shape: Shape,
    /// The command and its arguments, as on the host; files that it writes are gone when it ends
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// Boots the kernel and runs the command in the current directory.
///
/// # Errors
/// The guest did not start or ended early, or the command failed.
pub(crate) fn run(args: &Args) -> Result<()> {
    let [program, arguments @ ..] = &args.command[..] else { bail!("there is no command") };
    let step = Step {
        name: program.clone(),
        program: PathBuf::from(program),
        arguments: arguments.to_vec(),
        folder: std::env::current_dir()?,
        environment: Vec::new(),
        deadline: args.deadline,
    };
    run_steps(args.kernel, &args.shape, vec![step], |line| println!("{line}"))
}

/// Boots a kernel, runs programs on it one after the other, and calls `listen` with each line that they print.
///
/// # Errors
/// The guest did not start or ended early; or, when all have run, the first program that failed.
pub(crate) fn run_steps(wanted: Wanted, shape: &Shape, steps: Vec<Step>, mut listen: impl FnMut(&str)) -> Result<()> {
    need_guests()?;
    tools::clean_up_on_signals(machine::end_all)?;
    let kernel = Kernel::get(wanted)?;
    let home = machine::home(&format!("command-{}", std::process::id()));
    let names: Vec<String> = steps.iter().map(|step| step.name.clone()).collect();
    let mut codes = Vec::new();
    let result = machine::run(&kernel, &Plan { steps }, shape, &home, |told| match told {
        Told::Record(Record::End(code, _), _) => codes.push(code),
        Told::Record(..) => {}
        Told::Line(line) => listen(line),
    });
    drop(std::fs::remove_dir_all(&home));
    if result? == End::StaleCode {
        bail!("qemu has run stale code, which the kernel had changed, and the kernel crashed; run it again");
    }
    match names.iter().zip(codes).find(|(_, code)| *code != Some(0)) {
        None => Ok(()),
        Some((name, Some(code))) => bail!("{name}: it ended with {code}"),
        Some((name, None)) => bail!("{name}: it was ended"),
    }
}
