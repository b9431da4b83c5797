//! One end of another tunnel: a process in a gateway's namespace, its log, and waits for its device.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cipe_tests::SOON;
use cipe_tests::process::{signal, wait_for_either, wait_gone};
use cipe_tests::topology::{Side, Topology};
use rustix::process::Signal;

use super::device::configure;
use crate::bench::program;

/// How long a program may take to end by itself.
const GRACE: Duration = Duration::from_secs(3);
/// Time between two checks of a condition without events.
const LOOK: Duration = Duration::from_millis(20);
/// The directory of WireGuard programs' sockets, in any network namespace.
const SOCKETS: &str = "/var/run/wireguard";

/// A running program. Dropping it ends it.
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program` at the gateway of `side`, with its output in a file; `arguments` adds arguments.
    ///
    /// # Errors
    /// A program that is not there.
    pub(crate) fn start(
        net: &Topology,
        side: Side,
        program: &str,
        arguments: impl FnOnce(&mut Command) -> Result<()>,
    ) -> Result<Self> {
        let log = net.directory().join(format!("{program}.{}.log", side.letter()));
        let file = File::create(&log)?;
        let path = program::find(program).with_context(|| format!("{program} is not installed"))?;
        let mut command = net.gw(side).command(path);
        arguments(&mut command)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| program.to_owned())?;
        Ok(Self { child, log })
    }

    /// Waits until the program has made its device.
    ///
    /// # Errors
    /// The end of the log, if the program ends before or takes longer than [`SOON`].
    pub(crate) fn wait_for_device(&mut self, net: &Topology, side: Side) -> Result<()> {
        let changes = net.gw(side).device_changes()?;
        self.wait_until(
            "the device",
            || has_device(net, side),
            |pid, left| {
                wait_for_either(&changes, pid, left)?;
                changes.forget();
                Ok(())
            },
        )
    }

    /// Waits until `there` is true, by a check now and then, since there is no event for it.
    ///
    /// # Errors
    /// As [`Process::wait_for_device`].
    pub(crate) fn wait_by_looking(&mut self, what: &str, there: impl FnMut() -> bool) -> Result<()> {
        self.wait_until(what, there, |pid, left| {
            // Returns when the program has ended, or when the next check is due.
            let _ = wait_gone(pid, LOOK.min(left));
            Ok(())
        })
    }

    /// `pause` gets the process number and the remaining time, and returns when the next check is useful.
    fn wait_until(
        &mut self,
        what: &str,
        mut there: impl FnMut() -> bool,
        pause: impl Fn(u32, Duration) -> Result<()>,
    ) -> Result<()> {
        let deadline = Instant::now() + SOON;
        while !there() {
            if let Some(status) = self.child.try_wait()? {
                bail!("ended with {status} before {what} was there\n{}", self.log());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("no {what} after {SOON:?}\n{}", self.log());
            }
            pause(self.child.id(), left)?;
        }
        Ok(())
    }

    /// The last lines of the log.
    pub(crate) fn log(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        format!("{}:\n{}", self.log.display(), lines[lines.len().saturating_sub(12)..].join("\n"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let pid = self.child.id();
        let ended = signal(pid, Signal::TERM).and_then(|()| wait_gone(pid, GRACE));
        if ended.is_err()
            && let Err(error) = self.child.kill()
        {
            eprintln!("{}: {error}", self.log.display());
        }
        // The process has ended or was killed, so waiting for it cannot block.
        let _ = self.child.wait();
    }
}

/// Name of a tunnel's device. WireGuard programs name a socket after it, in a directory of the whole machine, so the name is
/// unique.
pub(super) fn device(side: Side) -> String {
    format!("{}{}", device_prefix(), side.letter())
}

fn device_prefix() -> String {
    format!("cb{}", std::process::id())
}

/// Control socket of a WireGuard program.
pub(super) fn socket(side: Side) -> PathBuf {
    Path::new(SOCKETS).join(format!("{}.sock", device(side)))
}

/// Removes the sockets that killed WireGuard programs of ours have left.
pub(crate) fn remove_sockets() {
    for side in [Side::A, Side::B] {
        // Usually there is none.
        let _ = fs::remove_file(socket(side));
    }
}

/// Whether the device of a side is there.
pub(super) fn has_device(net: &Topology, side: Side) -> bool {
    net.gw(side).devices().is_ok_and(|devices| devices.contains(&device(side)))
}

/// Runs a helper such as a key generator to its end and returns what it prints.
///
/// # Errors
/// The program is missing or fails.
pub(super) fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let path = program::find(program).with_context(|| format!("{program} is not installed"))?;
    let output = Command::new(path).args(arguments).stdin(Stdio::null()).output()?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Starts both ends, waits for their devices and configures them.
///
/// # Errors
/// Those of [`Process::start`] and [`Process::wait_for_device`].
pub(super) fn start_both(
    net: &Topology,
    program: &str,
    arguments: impl Fn(Side, &mut Command) -> Result<()>,
) -> Result<[Process; 2]> {
    let start = |side| Process::start(net, side, program, |command| arguments(side, command));
    let mut ends = [start(Side::A)?, start(Side::B)?];
    for (side, end) in [Side::A, Side::B].into_iter().zip(&mut ends) {
        end.wait_for_device(net, side)?;
        configure(net, side, &device(side))?;
    }
    Ok(ends)
}
