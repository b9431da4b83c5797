//! `ip-up` and `ip-down`: run without a shell in between, with six arguments and an environment (protocol section 5).

use std::ffi::{OsStr, OsString};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;
use tokio::task::JoinSet;

use crate::control::launch::keep_descriptors;
use crate::control::protocol::Cipher;

/// How long a script may run.
pub const LIMIT: Duration = Duration::from_secs(30);
/// How long output is waited for once a script has ended: what it left in the background may hold its output open.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Longest line of output that is logged whole, in octets.
const MAX_LINE: usize = 1024;
/// For a daemon that was started with none.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a script is told.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Interface.
    pub device: String,
    /// Own carrier address.
    pub me: SocketAddr,
    /// The peer's carrier address, if known.
    pub peer: Option<SocketAddr>,
    /// Own address on the tunnel.
    pub ipaddr: IpAddr,
    /// The peer's address on the tunnel.
    pub ptpaddr: IpAddr,
    /// Device MTU in octets.
    pub mtu: u32,
    /// Cipher.
    pub cipher: Cipher,
    /// Option `arg`.
    pub arg: OsString,
}

impl Facts {
    /// Device, own carrier address, the daemon's pid, ipaddr, ptpaddr, arg.
    fn arguments(&self) -> [OsString; 6] {
        [
            self.device.clone().into(),
            self.me.to_string().into(),
            std::process::id().to_string().into(),
            self.ipaddr.to_string().into(),
            self.ptpaddr.to_string().into(),
            self.arg.clone(),
        ]
    }

    fn environment(&self) -> [(&'static str, OsString); 8] {
        let cipher = match self.cipher {
            Cipher::Blowfish => "blowfish",
            Cipher::Idea | Cipher::IdeaLittle => "idea",
        };
        [
            ("CIPE_DEVICE", self.device.clone().into()),
            ("CIPE_ME", self.me.to_string().into()),
            ("CIPE_PEER", self.peer.map_or_else(String::new, |peer| peer.to_string()).into()),
            ("CIPE_IPADDR", self.ipaddr.to_string().into()),
            ("CIPE_PTPADDR", self.ptpaddr.to_string().into()),
            ("CIPE_MTU", self.mtu.to_string().into()),
            ("CIPE_CIPHER", cipher.into()),
            ("CIPE_ARG", self.arg.clone()),
        ]
    }
}

/// What became of a script.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// It could not be run.
    #[error("{script} cannot be run ({source}); {hint}")]
    Spawn {
        /// Path.
        script: String,
        /// What the system said.
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
    /// It was ended.
    #[error("{script} was still running after {} s and was killed; let it do long work in the background", limit.as_secs())]
    Late {
        /// Path.
        script: String,
        /// The time that it had.
        limit: Duration,
    },
}

/// Runs a script and logs its output line by line. A script that is not there is no error.
///
/// # Errors
/// It cannot be run, fails, or takes longer than `limit`.
pub async fn run(script: &Path, facts: &Facts, limit: Duration) -> Result<(), ScriptError> {
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
    keep_descriptors();
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
        // A group of its own, so that whatever it starts can be ended with it.
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
    let outcome = tokio::time::timeout(limit, child.wait()).await;
    if outcome.is_err() {
        if let Some(group) = group {
            // Gone meanwhile: nothing left to kill.
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = child.wait().await;
    }
    if tokio::time::timeout(LAST_WORDS, async { while output.join_next().await.is_some() {} }).await.is_err() {
        // Goes on in the background as long as what the script left there.
        output.detach_all();
    }
    match outcome {
        Err(_late) => Err(ScriptError::Late { script: shown, limit }),
        Ok(Err(source)) => Err(spawn_error(source)),
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(ScriptError::Failed { script: shown, status }),
    }
}

async fn log_lines(output: impl AsyncRead + Unpin, device: String, script: String) {
    let mut reader = BufReader::with_capacity(MAX_LINE, output);
    while let Some(line) = next_line(&mut reader).await {
        tracing::info!("{device}: {script}: {line}");
    }
}

/// The next line or piece of a long line, made printable; `None` at the end.
async fn next_line(reader: &mut (impl AsyncBufRead + Unpin)) -> Option<String> {
    let mut line = Vec::new();
    while line.len() < MAX_LINE {
        let (taken, ended) = match reader.fill_buf().await {
            Ok([]) | Err(_) if line.is_empty() => return None,
            Ok([]) | Err(_) => break,
            Ok(chunk) => {
                let room = &chunk[..chunk.len().min(MAX_LINE - line.len())];
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
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    fn facts() -> Facts {
        Facts {
            device: "cipcb7".to_owned(),
            me: "192.0.2.1:6789".parse().unwrap(),
            peer: None,
            ipaddr: "10.9.0.1".parse().unwrap(),
            ptpaddr: "10.9.0.2".parse().unwrap(),
            mtu: 1442,
            cipher: Cipher::Idea,
            arg: "two words; $(no shell)".into(),
        }
    }

    fn script(directory: &Path, text: &str) -> PathBuf {
        let path = directory.join("ip-up");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_script_gets_six_arguments_an_environment_and_three_descriptors() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        // Left over, as if from whoever started the daemon: not close-on-exec.
        let stray = rustix::io::dup(std::io::stdin()).unwrap();
        let text = format!(
            "#!/bin/sh\nexec >{out} 2>&1\nprintf '%s\\n' \"$#\" \"$@\" \
             \"$CIPE_DEVICE $CIPE_ME [$CIPE_PEER] $CIPE_MTU $CIPE_CIPHER $CIPE_ARG\"\n\
             readlink /proc/self/fd/0\ntest -e /proc/$$/fd/{stray} && echo stray\necho end\n",
            out = out.display(),
            stray = stray.as_raw_fd(),
        );
        run(&script(directory.path(), &text), &facts(), LIMIT).await.unwrap();
        let text = std::fs::read_to_string(out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let pid = std::process::id().to_string();
        let facts_line = "cipcb7 192.0.2.1:6789 [] 1442 idea two words; $(no shell)";
        let arguments = ["6", "cipcb7", "192.0.2.1:6789", &pid, "10.9.0.1", "10.9.0.2", "two words; $(no shell)"];
        assert_eq!(lines, [&arguments[..], &[facts_line, "/dev/null", "end"]].concat());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_missing_script_is_no_error() {
        run(Path::new("/nonexistent/ip-up"), &facts(), LIMIT).await.unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn failures_are_reported_with_the_way_out() {
        let directory = tempfile::tempdir().unwrap();
        let failed = run(&script(directory.path(), "#!/bin/sh\nexit 3\n"), &facts(), LIMIT).await.unwrap_err();
        assert!(failed.to_string().contains("exit status: 3"), "{failed}");
        let no_interpreter = run(&script(directory.path(), "exit 0\n"), &facts(), LIMIT).await.unwrap_err();
        assert!(no_interpreter.to_string().contains("#!/bin/sh"), "{no_interpreter}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_script_that_hangs_is_ended_with_its_children() {
        let directory = tempfile::tempdir().unwrap();
        let path = script(directory.path(), "#!/bin/sh\nsleep 600\n");
        let late = run(&path, &facts(), Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(late, ScriptError::Late { .. }), "{late}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_a_script_leaves_in_the_background_does_not_hold_the_daemon() {
        let directory = tempfile::tempdir().unwrap();
        let pid_file = directory.path().join("pid");
        let text = format!("#!/bin/sh\nsleep 600 & echo $! >{}\n", pid_file.display());
        run(&script(directory.path(), &text), &facts(), LIMIT).await.unwrap();
        let pid: i32 = std::fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
        rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn output_is_cut_into_printable_lines() {
        let long = [b'x'; MAX_LINE + 5];
        let text = [b"one\r\n\ntwo\x1b[1m\xFF\n", &long[..], b"\nlast"].concat();
        let mut reader = BufReader::with_capacity(7, &text[..]);
        let mut lines = Vec::new();
        while let Some(line) = next_line(&mut reader).await {
            lines.push(line);
        }
        let x = |n| "x".repeat(n);
        assert_eq!(lines, ["one", "", "two?[1m\u{FFFD}", &x(MAX_LINE), &x(5), "last"]);
    }
}
