//! CPU time by user between two moments, and memory of the tunnel.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cipe_tests::process::CpuTime;
use cipe_tests::topology::{Side, Topology};

/// The machine's CPU time since it started, from the first line of `/proc/stat` (proc_stat(5)).
#[derive(Clone, Copy, Debug, Default)]
struct Machine {
    busy: f64,
    softirq: f64,
    idle: f64,
}

impl Machine {
    fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat")?;
        let line = text.lines().next().unwrap_or_default();
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        let seconds: Vec<f64> =
            line.split_whitespace().skip(1).filter_map(|field| Some(field.parse::<f64>().ok()? / ticks)).collect();
        // user nice system idle iowait irq softirq steal, then guest time, which the first two include.
        let [user, nice, system, idle, iowait, irq, softirq, ..] = seconds[..] else {
            anyhow::bail!("/proc/stat begins with {line:?}")
        };
        Ok(Self { busy: user + nice + system + irq + softirq, softirq: irq + softirq, idle: idle + iowait })
    }
}

/// CPU time of every process and of the machine at one moment.
pub(crate) struct Moment {
    at: Instant,
    machine: Machine,
    processes: BTreeMap<u32, CpuTime>,
}

/// CPU seconds used between two moments.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Used {
    /// By the tunnel's processes in user mode.
    pub user: f64,
    /// By the tunnel's processes in the kernel.
    pub system: f64,
    /// By softirqs and interrupts of the whole machine.
    pub softirq: f64,
    /// By everything.
    pub machine: f64,
    /// By processes that are neither the tunnel's, nor ours, nor the kernel's; a share of all CPUs, 0 to 1.
    pub foreign: f64,
}

impl Moment {
    /// Now.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub(crate) fn now() -> Result<Self> {
        let processes = pids()?.into_iter().filter_map(|pid| Some((pid, CpuTime::of(pid)?))).collect();
        Ok(Self { at: Instant::now(), machine: Machine::now()?, processes })
    }

    /// CPU time used since this moment; `tunnel`: the tunnel's processes.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub(crate) fn used(&self, tunnel: &[u32]) -> Result<Used> {
        let now = Self::now()?;
        let mut used = Used {
            softirq: now.machine.softirq - self.machine.softirq,
            machine: now.machine.busy - self.machine.busy,
            ..Used::default()
        };
        let mut foreign = Duration::ZERO;
        for (&pid, &time) in &now.processes {
            let time = time.since(self.processes.get(&pid).copied().unwrap_or_default());
            if tunnel.contains(&pid) {
                used.user += time.user.as_secs_f64();
                used.system += time.system.as_secs_f64();
            } else if pid != std::process::id() && !is_kernel_thread(pid) {
                foreign += time.user + time.system;
            }
        }
        let all = (now.at - self.at).as_secs_f64() * cpus() as f64;
        used.foreign = foreign.as_secs_f64() / all.max(1e-9);
        Ok(used)
    }
}

/// CPUs that we may use.
pub(crate) fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn pids() -> Result<Vec<u32>> {
    let entries = fs::read_dir("/proc")?.flatten();
    Ok(entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// Kernel threads have no command line.
fn is_kernel_thread(pid: u32) -> bool {
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.is_empty())
}

/// The tunnel's processes at a side: all processes in the gateway's namespace.
///
/// # Errors
/// `/proc` cannot be read.
pub(crate) fn tunnel(net: &Topology, side: Side) -> Result<Vec<u32>> {
    net.gw(side).processes()
}

/// Peak resident memory of processes together, in MiB.
pub(crate) fn peak_memory(pids: &[u32]) -> f64 {
    let kib = |pid: &u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse::<f64>().ok())
    };
    pids.iter().filter_map(kib).sum::<f64>() / 1024.0
}

/// CPU time of processes and their threads, by the scheduler's own count, which is finer than clock ticks.
///
/// # Errors
/// A kernel without scheduler statistics.
pub(crate) fn run_time(pids: &[u32]) -> Result<Duration> {
    let mut sum = 0;
    for pid in pids {
        for thread in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            let text = fs::read_to_string(thread.path().join("schedstat")).context("scheduler statistics")?;
            sum += text.split_whitespace().next().and_then(|field| field.parse::<u64>().ok()).unwrap_or_default();
        }
    }
    Ok(Duration::from_nanos(sum))
}

/// Waits until the CPUs are 93 % idle for a while, or `within` is over.
///
/// # Errors
/// `/proc` cannot be read.
pub(crate) fn wait_until_quiet(within: Duration) -> Result<()> {
    let deadline = Instant::now() + within;
    while Instant::now() < deadline {
        let before = Machine::now()?;
        std::thread::sleep(Duration::from_millis(250));
        let now = Machine::now()?;
        let (busy, idle) = (now.busy - before.busy, now.idle - before.idle);
        if idle > 0.93 * (busy + idle) {
            break;
        }
    }
    Ok(())
}
