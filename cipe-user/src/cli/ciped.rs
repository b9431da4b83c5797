//! `ciped-cb` and the other daemons: start in the background, and signals.
//!
//! The first process reads the options and, unless `debug` is set, starts itself again as a child. The child leaves the
//! terminal when the tunnel is up, so errors still appear on the terminal, and the exit code is right.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::logging::{self, Destination, SYSLOG_ONLY};
use super::{engine, process};
use crate::ciped::daemon::{self, OperatorCommand};
use crate::ciped::identity::Identity;
use crate::ciped::memory::{self, MemoryFile};
use crate::ciped::options::{self, Draft, Options, Problem, Program, SPECS, Severity, Sources};
use crate::ciped::setup::Setup;
use crate::control::launch::{Launch, Readiness, launch, report_failure};
use crate::control::run_dir::{self, RunDir};
use crate::kernel::confinement::protect_memory;

/// How long a tunnel may take to come up: start of the engine, creation of the tunnel, and ip-up.
const START_DEADLINE: Duration = Duration::from_secs(120);
/// Maximum wait at the end for threads that still wait for an engine.
const EXIT_WAIT: Duration = Duration::from_millis(100);

/// Arguments of the daemons.
#[derive(Debug, Parser)]
#[command(version, about = "Run one CIPE tunnel.", after_help = help())]
pub(super) struct Args {
    /// Option file, absolute path; read after /etc/cipe/options.
    #[arg(short = 'o', value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Options; `NAME` alone sets a boolean.
    #[arg(value_name = "NAME=VALUE")]
    pub settings: Vec<OsString>,
    /// Started by the program itself: report on stdout when up.
    #[arg(long, hide = true)]
    launched: bool,
}

/// Arguments of `cipe ciped`.
#[derive(Debug, clap::Args)]
pub(super) struct NamedArgs {
    /// Name to run under: ciped-cb, ciped-ci, ciped-db or ciped-di.
    #[arg(long, value_name = "NAME", default_value = "ciped-cb", value_parser = program)]
    pub program: Program,
    /// Arguments of the daemon with this name.
    #[command(flatten)]
    pub args: Args,
}

/// Reads the name of a daemon.
pub(super) fn program(name: &str) -> Result<Program, String> {
    Program::from_name(name.as_bytes()).ok_or_else(|| "write ciped-cb, ciped-ci, ciped-db or ciped-di".to_owned())
}

fn help() -> String {
    let mut text = "Options, in files as `NAME VALUE`, here as NAME=VALUE; a later one wins:\n".to_owned();
    for spec in SPECS {
        text.push_str(&format!("  {:<10}  {}\n", spec.name, spec.help));
    }
    text.push_str(
        "\nExamples:\n  ciped-cb -o /etc/cipe/gateway-b\n  ciped-cb -o /etc/cipe/gateway-b peer=192.0.2.2:6789 debug\n\
         \nSignals: TERM and INT stop the tunnel; HUP reads the option files again.",
    );
    text
}

/// Runs the daemon, or brings it into the background.
pub(super) fn run(program: Program, args: Args) -> anyhow::Result<ExitCode> {
    if !rustix::process::geteuid().is_root() {
        anyhow::bail!("not root; tunnels are made of devices, eBPF programs and keys; run it as root");
    }
    process::set_name(program.name());
    let sources = Sources::new(program, args.files.clone(), args.settings.clone());
    let (draft, problems) = options::load(&sources);
    let (options, problems) = options::settle(&draft, problems);
    let Some(options) = options else {
        let errors = problems.iter().filter(|problem| problem.severity == Severity::Error);
        let lines: Vec<String> = errors.map(|problem| format!("{}: {problem}", program.name())).collect();
        if args.launched {
            report_failure(&lines.join("\n"));
        } else {
            eprintln!("{}", lines.join("\n"));
        }
        return Ok(ExitCode::FAILURE);
    };
    if options.debug {
        logging::init(Destination::Stderr { verbose: true });
        serve(sources, draft, options, &problems, || {
            if let Err(error) = Readiness::Service.up() {
                tracing::warn!("cannot tell systemd that the tunnel is up: {error}");
            }
        })?;
    } else if args.launched {
        return launched(sources, draft, options, &problems);
    } else {
        let words = args.files.iter().flat_map(|file| [OsString::from("-o"), file.into()]).chain(args.settings);
        into_background(program, words)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn into_background(program: Program, words: impl Iterator<Item = OsString>) -> anyhow::Result<()> {
    let arguments = std::iter::once(OsString::from("--launched")).chain(words).collect();
    let executable = std::env::current_exe().context("own executable not found; is /proc mounted?")?;
    Ok(launch(&Launch { program: executable, name: program.name().into(), arguments, deadline: START_DEADLINE })?)
}

fn launched(sources: Sources, draft: Draft, options: Options, problems: &[Problem]) -> anyhow::Result<ExitCode> {
    let readiness = Readiness::begin().context("cannot leave the terminal")?;
    logging::init(Destination::Syslog { name: sources.program.name(), complain: true });
    let up = || {
        if let Err(error) = readiness.up() {
            tracing::error!("cannot leave the terminal: {error}");
        }
    };
    if let Err(error) = serve(sources, draft, options, problems, up) {
        tracing::error!(target: SYSLOG_ONLY, "{error:#}");
        report_failure(&format!("{error:#}"));
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn serve(
    sources: Sources,
    draft: Draft,
    options: Options,
    problems: &[Problem],
    up: impl FnOnce(),
) -> anyhow::Result<()> {
    tracing::info!("CIPE daemon vers {}", env!("CARGO_PKG_VERSION"));
    protect_memory();
    for problem in problems {
        tracing::warn!("{problem}");
    }
    let run_dir = RunDir::of_this_namespace().context("own network namespace not found; is /proc mounted?")?;
    let engine = engine::launch(options.mtu + options.protocol.header() as u32)?;
    let carrier = format!("{} {}", options.me.text, options.peer.text);
    let name = memory::file_name(sources.files.last().map(PathBuf::as_path), &carrier);
    let identity = Identity::new(&sources, &options);
    let memory = MemoryFile::claim(&run_dir::state_directory(), &name, &identity);
    let setup = Setup { sources, draft, options, run_dir, memory, engine };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no event loop")?;
    let outcome = runtime.block_on(async {
        let commands = commands().context("cannot handle signals")?;
        daemon::run(setup, commands, up).await
    });
    runtime.shutdown_timeout(EXIT_WAIT);
    outcome
}

/// Turns signals into commands.
fn commands() -> std::io::Result<mpsc::Receiver<OperatorCommand>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        loop {
            let command = tokio::select! {
                _ = terminate.recv() => OperatorCommand::Stop,
                _ = interrupt.recv() => OperatorCommand::Stop,
                _ = hang_up.recv() => OperatorCommand::Reload,
            };
            if sender.send(command).await.is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}
