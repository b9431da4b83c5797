//! `cipe engine`.

use std::process::ExitCode;

use anyhow::Context;

use super::logging::{self, Destination};
use crate::control::launch::{Launch, Readiness, launch as background, report_failure};
use crate::control::protocol::{MAX_MTU, MIN_MTU};
use crate::control::run_dir::RunDir;
use crate::engine::frames::USUAL_MTU;
use crate::engine::{EngineOptions, Role, run as run_engine};
use crate::kernel::confinement::{self, Strictness};

/// Name in logs.
const PROCESS_NAME: &str = "cipe-engine";
/// Name of one that stands by.
const STANDBY_NAME: &str = "cipe-standby";
/// Maximum time for the engine to load its programs: the kernel's verifier is slow on a small or busy machine. Shorter
/// than the deadline of a daemon that starts in the background.
const START_DEADLINE: std::time::Duration = std::time::Duration::from_secs(90);

/// Arguments of `cipe engine`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Keep running after the last tunnel has ended.
    #[arg(long)]
    stay: bool,
    /// Worker threads, 1 to 15; by default one for each receive queue of the card with the most queues, up to the
    /// number of CPUs.
    #[arg(long, value_name = "N", env = "CIPE_WORKERS", value_parser = clap::value_parser!(u8).range(1..=15))]
    workers: Option<u8>,
    /// The largest MTU of a tunnel, 68 to 3500 octets. Above 1600, packets need frames of twice the memory, which are
    /// slower.
    #[arg(long, value_name = "OCTETS", env = "CIPE_LARGEST_MTU", default_value_t = USUAL_MTU,
        value_parser = clap::value_parser!(u32).range(i64::from(MIN_MTU)..=i64::from(MAX_MTU)))]
    largest_mtu: u32,
    /// Take the place of the engine that runs, in the background: start this program beside it, and have it leave when this one
    /// is ready. Its tunnels go on under the same keys.
    #[arg(long)]
    replace: bool,
    /// Stand by, in the background: take the place of the engine that runs when it dies. A daemon starts it.
    #[arg(long, hide = true, requires = "launched", conflicts_with = "replace")]
    standby: bool,
    /// Started by a daemon, or by --replace: report on stdout when up, leave the terminal, log to syslog.
    #[arg(long, hide = true)]
    launched: bool,
}

/// How a daemon starts the engine if its tunnel has an MTU of `mtu` octets.
///
/// # Errors
/// The executable of this process cannot be found.
pub(super) fn launch(mtu: u32) -> anyhow::Result<Launch> {
    let program = std::env::current_exe().context("own executable not found; is /proc mounted?")?;
    let mut arguments = vec!["engine".into(), "--launched".into()];
    if mtu > USUAL_MTU {
        arguments.extend(["--largest-mtu".into(), MAX_MTU.to_string().into()]);
    }
    Ok(Launch { program, name: "cipe".into(), arguments, deadline: START_DEADLINE })
}

/// Starts an engine in the background that takes the place of the one that runs.
fn replace(args: &Args) -> anyhow::Result<ExitCode> {
    let Launch { program, name, mut arguments, deadline } = launch(args.largest_mtu)?;
    arguments.push("--replace".into());
    arguments.extend(args.stay.then(|| "--stay".into()));
    arguments.extend(args.workers.map(|workers| format!("--workers={workers}").into()));
    background(&Launch { program, name, arguments, deadline })?;
    Ok(ExitCode::SUCCESS)
}

/// Runs the engine.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    // A daemon may have started it from the daemon's own executable; give it another name than the daemon's.
    super::process::set_name(if args.standby { STANDBY_NAME } else { PROCESS_NAME });
    if args.replace && !args.launched {
        return replace(&args);
    }
    let (workers, largest_mtu) = (args.workers.map(usize::from), args.largest_mtu);
    let confinement = std::env::var(confinement::VARIABLE).unwrap_or_default();
    let confinement = Strictness::parse(&confinement).map_err(anyhow::Error::msg)?;
    let run_dir = RunDir::of_this_namespace().context("own network namespace not found; is /proc mounted?")?;
    if !args.launched {
        logging::init(Destination::Stderr { verbose: false });
        let readiness = Readiness::Service;
        let role = Role::Only;
        run_engine(EngineOptions { stay: args.stay, workers, largest_mtu, run_dir, role, readiness, confinement })?;
        return Ok(ExitCode::SUCCESS);
    }
    let readiness = Readiness::begin().context("cannot leave the terminal")?;
    logging::init(Destination::Syslog { name: PROCESS_NAME, complain: false });
    let role = match (args.replace, args.standby) {
        (true, _) => Role::Replacement,
        (_, true) => Role::Standby,
        _ => Role::Only,
    };
    let options = EngineOptions { stay: args.stay, workers, largest_mtu, run_dir, role, readiness, confinement };
    if let Err(error) = run_engine(options) {
        tracing::error!(target: logging::SYSLOG_ONLY, "{error:#}");
        report_failure(&format!("{error:#}"));
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}
