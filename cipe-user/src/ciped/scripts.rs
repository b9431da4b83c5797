//! `ip-up` and `ip-down`: run without a shell, with six arguments and an environment (protocol section 5).

mod facts;

use std::ffi::OsStr;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;
use tokio::task::JoinSet;

use super::options::{self, Mistake};
use crate::control::launch::set_descriptors_close_on_exec;

pub use facts::Facts;

/// Maximum time for a script.
pub const MAX_RUN_TIME: Duration = Duration::from_secs(30);
/// How long to wait for output after a script has ended: programs that it left in the background may keep the output
/// open.
const OUTPUT_WAIT: Duration = Duration::from_secs(1);
/// How long a script may take to end after SIGTERM.
const TERM_WAIT: Duration = Duration::from_secs(1);
/// Maximum octets of a line of output that is logged whole.
const MAX_LINE_OCTETS: usize = 1024;
/// For a daemon that was started without one.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a script failed.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// It could not be run.
    #[error("{script} cannot be run ({source}); {hint}")]
    Spawn {
        /// Path.
        script: String,
        /// The system's error.
        source: std::io::Error,
        /// How to fix it.
        hint: &'static str,
    },
    /// It ran and failed.
    #[error("{script} failed ({status}); see its output above")]
    Failed {
        /// Path.
        script: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// Others have write access, so it is not run as root.
    #[error("{}; not run; {}", _0.what, _0.fix)]
    Unsafe(Mistake),
    /// It was stopped because the tunnel stopped.
    #[error("{script} was stopped, because the tunnel was stopped while it ran")]
    Stopped {
        /// Path.
        script: String,
    },
    /// It was killed at the limit.
    #[error("{script} was still running after {} s and was killed; let it do long work in the background", limit.as_secs())]
    Late {
        /// Path.
        script: String,
        /// The limit.
        limit: Duration,
    },
}

/// Runs a script and logs its output line by line. A missing script is no error. When `stop` completes, the script ends
/// with all that it started.
///
/// # Errors
/// Others may write it; it cannot be run, fails, takes longer than `limit`, or is stopped.
pub async fn run(
    script: &Path,
    facts: &Facts,
    limit: Duration,
    stop: impl Future<Output = ()>,
) -> Result<(), ScriptError> {
    let shown = script.display().to_string();
    let spawn_error = |source: std::io::Error| {
        let hint = match source.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
            Some(rustix::io::Errno::NOEXEC) => "begin it with a line such as #!/bin/sh",
            Some(rustix::io::Errno::ACCESS) => "make it executable: chmod 755",
            _ => "check the path and the interpreter in its first line",
        };
        ScriptError::Spawn { script: shown.clone(), source, hint }
    };
    if !script.exists() {
        tracing::debug!("{}: no script {shown}", facts.device);
        return Ok(());
    }
    options::check_script(script).map_err(ScriptError::Unsafe)?;
    set_descriptors_close_on_exec();
    let mut command = Command::new(script);
    command
        .args(facts.arguments())
        .envs(facts.environment())
        .env_remove("SOCKS5_USER")
        .env_remove("SOCKS5_PASSWD")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .current_dir("/")
        // A process group of its own, so that all that it starts can be ended with it.
        .process_group(0);
    if std::env::var_os("PATH").is_none() {
        command.env("PATH", PATH);
    }
    let mut child = command.spawn().map_err(spawn_error)?;
    let group = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
    let name = script.file_name().unwrap_or(OsStr::new("script")).to_string_lossy().into_owned();
    let mut output = JoinSet::new();
    if let Some(stdout) = child.stdout.take() {
        output.spawn(log_lines(stdout, facts.device.clone(), name.clone()));
    }
    if let Some(stderr) = child.stderr.take() {
        output.spawn(log_lines(stderr, facts.device.clone(), name));
    }
    let signal = |signal| {
        if let Some(group) = group {
            // If the group is gone already, there is nothing left to end.
            let _ = kill_process_group(group, signal);
        }
    };
    let outcome = tokio::select! {
        biased;
        ended = child.wait() => Ok(ended),
        () = tokio::time::sleep(limit) => Err(ScriptError::Late { script: shown.clone(), limit }),
        () = stop => {
            signal(Signal::TERM);
            // A script that ignores the signal is killed, like one that is late.
            let _ = tokio::time::timeout(TERM_WAIT, child.wait()).await;
            Err(ScriptError::Stopped { script: shown.clone() })
        }
    };
    if outcome.is_err() {
        signal(Signal::KILL);
        let _ = child.wait().await;
    }
    if tokio::time::timeout(OUTPUT_WAIT, async { while output.join_next().await.is_some() {} }).await.is_err() {
        // Continues in the background as long as the programs that the script left there.
        output.detach_all();
    }
    match outcome {
        Err(ended) => Err(ended),
        Ok(Err(source)) => Err(spawn_error(source)),
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(ScriptError::Failed { script: shown, status }),
    }
}

async fn log_lines(output: impl AsyncRead + Unpin, device: String, script: String) {
    let mut reader = BufReader::with_capacity(MAX_LINE_OCTETS, output);
    while let Some(line) = next_line(&mut reader).await {
        tracing::info!("{device}: {script}: {line}");
    }
}

/// Reads the next line, or a part of a long line, in printable form; `None` at the end.
async fn next_line(reader: &mut (impl AsyncBufRead + Unpin)) -> Option<String> {
    let mut line = Vec::new();
    while line.len() < MAX_LINE_OCTETS {
        let (taken, ended) = match reader.fill_buf().await {
            Ok([]) | Err(_) if line.is_empty() => return None,
            Ok([]) | Err(_) => break,
            Ok(chunk) => {
                let room = &chunk[..chunk.len().min(MAX_LINE_OCTETS - line.len())];
                let end = room.iter().position(|octet| *octet == b'\n');
                line.extend_from_slice(&room[..end.unwrap_or(room.len())]);
                (end.map_or(room.len(), |end| end + 1), end.is_some())
            }
        };
        reader.consume(taken);
        if ended {
            break;
        }
    }
    let text = String::from_utf8_lossy(&line);
    Some(text.trim_end().chars().map(|c| if c.is_control() && c != '\t' { '?' } else { c }).collect())
}

#[cfg(test)]
pub(super) mod tests;
