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
pub struct Args {
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

/// Boots the kernel and runs the command in the folder that this one runs in.
///
/// # Errors
/// A guest that did not come so far, or a command that failed.
pub fn run(args: &Args) -> Result<()> {
    need_guests()?;
    tools::clean_up_on_signals(machine::end_all)?;
    let kernel = Kernel::get(args.kernel)?;
    let [program, arguments @ ..] = &args.command[..] else { bail!("there is no command") };
    let step = Step {
        name: program.clone(),
        program: PathBuf::from(program),
        arguments: arguments.to_vec(),
        folder: std::env::current_dir()?,
        environment: Vec::new(),
        deadline: args.deadline,
    };
    let mut code = None;
    let home = machine::home(&format!("command-{}", std::process::id()));
    let result = machine::run(&kernel, &Plan { steps: vec![step] }, &args.shape, &home, |told| match told {
        Told::Record(Record::End(value, _), _) => code = value,
        Told::Record(..) => {}
        Told::Line(line) => println!("{line}"),
    });
    drop(std::fs::remove_dir_all(&home));
    if result? == End::StaleCode {
        bail!("qemu has emulated code that the kernel had changed already, and the kernel ended; run it again");
    }
    match code {
        Some(0) => Ok(()),
        Some(code) => bail!("it ended with {code}"),
        None => bail!("it was ended"),
    }
}
