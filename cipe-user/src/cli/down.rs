//! `cipe down`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use super::status;
use super::unguard;
use crate::ciped::guard::RecordFile;
use crate::control::client::Client;
use crate::control::protocol::{Event, Request};
use crate::control::run_dir::RunDir;

/// How long the engine may take to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// How long tunnels may take to end: their daemons run ip-down first.
const END_DEADLINE: Duration = Duration::from_secs(60);
/// Time between two looks at what is left.
const LOOK: Duration = Duration::from_millis(50);

/// Arguments of `cipe down`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A tunnel that runs ends as by SIGTERM to its daemon. One whose daemon has gone (`orphaned` in `cipe show`) is removed. Its guard
routes go with it, unless the option `guard` is `always`: then `cipe unguard` removes them.

Examples:
  cipe down gateway-b           the tunnel with the option file /etc/cipe/gateway-b
  cipe down cipcb0              the tunnel with this interface")]
pub(super) struct Args {
    /// Name of the tunnel's option file without the directories, or its interface.
    #[arg(value_name = "NAME|DEVICE")]
    name: String,
}

/// Ends the tunnels of this name, and waits until they have ended.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no event loop")?;
    runtime.block_on(down(&args.name))?;
    Ok(ExitCode::SUCCESS)
}

async fn down(name: &str) -> anyhow::Result<()> {
    let run_dir = RunDir::of_this_namespace().context("own network namespace not found; is /proc mounted?")?;
    let records = |file: &RecordFile| file.record.is_called(name) && file.record.is_left() && !file.record.stays;
    let left: Vec<RecordFile> = RecordFile::all(&run_dir).into_iter().filter(records).collect();
    let ended = match status::connect()? {
        Some(mut engine) => end(&mut engine, name).await?,
        None => Vec::new(),
    };
    ensure!(!ended.is_empty() || !left.is_empty(), "no tunnel {name}; `cipe show` lists all tunnels");
    unguard::open(&run_dir, left).await
}

/// Has the engine end the tunnels of this name; returns their interfaces when they are gone.
async fn end(engine: &mut Client, name: &str) -> anyhow::Result<Vec<String>> {
    engine.send(&Request::End { name: name.to_owned() }).context("the engine does not take requests; restart it")?;
    let answer = async {
        loop {
            match engine.receive().await? {
                Some(Event::Ending { devices }) => break Ok(devices),
                Some(Event::Failed { message }) => bail!("{message}"),
                Some(_) => {}
                None => bail!("the engine has gone"),
            }
        }
    };
    let answer = tokio::time::timeout(ANSWER_DEADLINE, answer).await;
    let devices = answer.context("the engine does not answer; restart it")??;
    let gone = async {
        // The engine ends after its last tunnel, and its answers with it.
        while let Ok(all) = status::query(engine).await {
            if !all.iter().any(|status| devices.contains(&status.device)) {
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    let seconds = END_DEADLINE.as_secs();
    tokio::time::timeout(END_DEADLINE, gone)
        .await
        .with_context(|| format!("{} not gone after {seconds} s; the system log says why", devices.join(", ")))?;
    Ok(devices)
}
