//! Starting a process that goes on by itself, and knowing whether it came up.
//!
//! The child's stdout is a pipe. It writes one line when it is up, or its error; then, as a session of its own with
//! nothing open to the old world, it goes on. Used for the engine and for a daemon that leaves the terminal.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// What a child writes when it is up.
const READY: &[u8] = b"ready\n";
/// Longest error text that is passed on, in octets.
const MAX_TEXT: usize = 4096;

/// A program to start.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Executable.
    pub program: PathBuf,
    /// `argv[0]`.
    pub name: OsString,
    /// The other arguments.
    pub arguments: Vec<OsString>,
    /// How long it may take to come up.
    pub deadline: Duration,
}

/// Why the program did not come up.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// It could not be run.
    #[error("cannot start {program}: {cause}; check that the file is there and executable", program = program.display())]
    Spawn {
        /// Executable.
        program: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// It said why.
    #[error("{0}")]
    Failed(String),
    /// It ended and did not say why.
    #[error("{name} ended before it was up, without a word; look at the system log")]
    Silent {
        /// `argv[0]`.
        name: String,
    },
    /// It said nothing in time, and was ended.
    #[error("{name} was not up after {} s and was ended; look at the system log", deadline.as_secs())]
    Late {
        /// `argv[0]`.
        name: String,
        /// The time that it had.
        deadline: Duration,
    },
}

/// Starts the program and waits until it is up. Its stderr is this process' own until then.
///
/// # Errors
/// It did not come up; nothing of it is left.
pub fn launch(launch: &Launch) -> Result<(), LaunchError> {
    keep_descriptors();
    let mut child = Command::new(&launch.program)
        .arg0(&launch.name)
        .args(&launch.arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|cause| LaunchError::Spawn { program: launch.program.clone(), cause })?;
    let stdout = child.stdout.take();
    let words = stdout.map_or(Ok(Vec::new()), |stdout| read_until(stdout, Instant::now() + launch.deadline));
    let name = launch.name.to_string_lossy().into_owned();
    match words {
        Ok(words) if words == READY => {
            reap(child);
            Ok(())
        }
        Ok(words) => {
            // It has closed its stdout without being up, so it is on its way out.
            let _ = child.wait();
            let text = String::from_utf8_lossy(&words).trim().to_owned();
            Err(if text.is_empty() { LaunchError::Silent { name } } else { LaunchError::Failed(text) })
        }
        Err(_late) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(LaunchError::Late { name, deadline: launch.deadline })
        }
    }
}

/// Keeps every descriptor but stdin, stdout and stderr from programs that this process starts. Its own are close-on-exec
/// anyway; others may be left over from whoever started it.
pub fn keep_descriptors() {
    close_fds::set_fds_cloexec_threadsafe(3, &[]);
}

/// Everything up to [`READY`] or the end.
fn read_until(mut stdout: ChildStdout, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut words = Vec::new();
    let mut chunk = [0; 512];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&stdout, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let length = stdout.read(&mut chunk)?;
        words.extend_from_slice(&chunk[..length]);
        if length == 0 || words == READY || words.len() > MAX_TEXT {
            return Ok(words);
        }
    }
}

/// Waits for the child in a thread of its own, so that it leaves no zombie if it ends before this process.
fn reap(mut child: Child) {
    let waiting = std::thread::Builder::new().name("reap".to_owned()).spawn(move || child.wait());
    if let Err(error) = waiting {
        tracing::debug!("no thread to wait for the child process ({error})");
    }
}

/// Who waits for this process to be up, and has not been told yet.
#[derive(Debug)]
pub enum Readiness {
    /// Whoever started it by [`launch`].
    Launched,
    /// systemd, if it runs it as a service of `Type=notify`; otherwise nobody.
    Service,
}

impl Readiness {
    /// Leaves the terminal and the starter's session, as a process that was started by [`launch`].
    ///
    /// # Errors
    /// The process leads a group already, so it was not started so.
    pub fn begin() -> io::Result<Self> {
        rustix::process::setsid()?;
        std::env::set_current_dir("/")?;
        Ok(Self::Launched)
    }

    /// Says that this process is up. One that was launched lets go of stdout and stderr.
    ///
    /// # Errors
    /// /dev/null cannot be opened, or systemd does not listen.
    pub fn up(self) -> io::Result<()> {
        match self {
            Self::Service => sd_notify::notify(&[sd_notify::NotifyState::Ready]),
            Self::Launched => {
                let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
                // The starter may have been stopped meanwhile; that is no reason not to go on.
                let mut stdout = io::stdout();
                let _ = stdout.write_all(READY).and_then(|()| stdout.flush());
                rustix::stdio::dup2_stdout(&null)?;
                rustix::stdio::dup2_stderr(&null)?;
                Ok(())
            }
        }
    }
}

/// Says why this process, started by [`launch`], does not come up.
pub fn report_failure(text: &str) {
    let mut stdout = io::stdout();
    // If nobody reads it, nobody wants it.
    let _ = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, deadline: Duration) -> Launch {
        Launch {
            program: PathBuf::from("/bin/sh"),
            name: "child".into(),
            arguments: vec!["-c".into(), script.into()],
            deadline,
        }
    }

    #[test]
    fn a_child_that_is_up_is_left_alone() {
        // It goes on until its stdin, which is /dev/null, ends; what it writes later goes nowhere.
        launch(&shell("echo ready; exec >/dev/null; cat", Duration::from_secs(60))).unwrap();
    }

    #[test]
    fn the_words_of_a_child_that_fails_are_the_error() {
        let error = launch(&shell("echo 'no AF_XDP; eth0; lower the MTU'; exit 1", Duration::from_secs(60)));
        assert_eq!(error.unwrap_err().to_string(), "no AF_XDP; eth0; lower the MTU");
    }

    #[test]
    fn a_silent_end_a_late_child_and_a_missing_program_are_told_apart() {
        let silent = launch(&shell("exit 0", Duration::from_secs(60))).unwrap_err();
        assert!(matches!(silent, LaunchError::Silent { .. }), "{silent}");
        let late = launch(&shell("exec sleep 600", Duration::from_millis(1))).unwrap_err();
        assert!(matches!(late, LaunchError::Late { .. }), "{late}");
        let missing = Launch { program: "/nonexistent/cipe".into(), ..shell("", Duration::from_secs(60)) };
        assert!(matches!(launch(&missing).unwrap_err(), LaunchError::Spawn { .. }));
    }
}
