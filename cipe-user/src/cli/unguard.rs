//! `cipe unguard`.

use std::collections::HashSet;
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};

use crate::ciped::guard::RecordFile;
use crate::control::run_dir::RunDir;
use crate::kernel::netlink::Netlink;

/// Arguments of `cipe unguard`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
While guard routes stand, packets for the networks behind a tunnel never leave by another route. `ip route show proto 67 table
all` lists them.

Examples:
  cipe unguard gateway-b        the tunnel with the option file /etc/cipe/gateway-b
  cipe unguard cipcb0           the tunnel that had this interface
  cipe unguard --all            all tunnels of this network namespace that have ended")]
pub(super) struct Args {
    /// Name of the tunnel's option file without the directories, or its interface.
    #[arg(value_name = "NAME|DEVICE", required_unless_present = "all", conflicts_with = "all")]
    name: Option<String>,
    /// All tunnels of this network namespace whose daemons have ended.
    #[arg(long)]
    all: bool,
}

/// Removes guard routes.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no event loop")?;
    let run_dir = RunDir::of_this_namespace().context("own network namespace not found; is /proc mounted?")?;
    runtime.block_on(async {
        match args.name {
            Some(name) => unguard(&run_dir, &name).await,
            None => unguard_all(&run_dir).await,
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn unguard(run_dir: &RunDir, name: &str) -> anyhow::Result<()> {
    let called = RecordFile::all(run_dir).into_iter().filter(|file| file.record.is_called(name));
    let (left, used): (Vec<_>, Vec<_>) = called.partition(|file| file.record.is_left());
    if let Some(file) = used.first().filter(|_| left.is_empty()) {
        let pid = file.record.pid().unwrap_or_default();
        bail!("{name}: its daemon runs, process {pid}; end it with `cipe down {name}` first, or set `guard no`");
    }
    ensure!(!left.is_empty(), "no guard routes of a tunnel {name}; `ip route show proto 67 table all` lists all");
    open(run_dir, left).await
}

/// Also those that no record tells of, as after the run directory was removed.
async fn unguard_all(run_dir: &RunDir) -> anyhow::Result<()> {
    let left: Vec<_> = RecordFile::all(run_dir).into_iter().filter(|file| file.record.is_left()).collect();
    open(run_dir, left).await?;
    let used: HashSet<_> = RecordFile::all(run_dir).into_iter().flat_map(|file| file.record.guarded).collect();
    let netlink = Netlink::new()?;
    for guarded in netlink.guard_routes().await?.iter().filter(|guarded| !used.contains(guarded)) {
        netlink.remove_guard_route(guarded).await?;
    }
    Ok(())
}

/// Removes the guard routes of these records.
pub(super) async fn open(run_dir: &RunDir, files: Vec<RecordFile>) -> anyhow::Result<()> {
    let netlink = Netlink::new()?;
    for mut file in files {
        let (name, count) = (file.record.device.clone(), file.record.guarded.len());
        file.open(&netlink, run_dir).await?;
        println!("{name}: {count} guard routes removed");
    }
    Ok(())
}
