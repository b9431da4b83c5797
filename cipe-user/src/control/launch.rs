//! Starting a process that continues in the background, and waiting until it is up.
//!
//! The child's stdout is a pipe. The child writes one line to it when it is up, or its error. Then it continues as a
//! session of its own, with no descriptor of its parent open. Used for the engine and for a daemon that leaves the
//! terminal.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The line that a child writes when it is up.
const READY_LINE: &[u8] = b"ready\n";
/// Maximum octets of an error text that is passed on.
const MAX_ERROR_OCTETS: usize = 4096;

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
        /// The system's error.
        cause: io::Error,
    },
    /// It gave a reason.
    #[error("{0}")]
    Failed(String),
    /// It ended without a reason.
    #[error("{name} ended before it was up, without a message; look at the system log")]
    Silent {
        /// `argv[0]`.
        name: String,
    },
    /// It wrote nothing before the deadline, and was killed.
    #[error("{name} was not up after {} s and was ended; look at the system log", deadline.as_secs())]
    Late {
        /// `argv[0]`.
        name: String,
        /// The deadline.
        deadline: Duration,
    },
}

/// Starts the program and waits until it is up. Until then, it shares the stderr of this process.
///
/// # Errors
/// It did not come up; no process is left.
pub fn launch(launch: &Launch) -> Result<(), LaunchError> {
    set_descriptors_close_on_exec();
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
        Ok(words) if words == READY_LINE => {
            reap(child);
            Ok(())
        }
        Ok(words) => {
            // It has closed its stdout before it was up, so it is about to exit.
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

/// Sets close-on-exec on all descriptors except stdin, stdout and stderr, so that started programs do not inherit them.
/// The parent may have left some open; this program's own are close-on-exec anyway.
pub fn set_descriptors_close_on_exec() {
    close_fds::set_fds_cloexec_threadsafe(3, &[]);
}

/// Reads up to [`READY_LINE`] or the end.
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
        if length == 0 || words == READY_LINE || words.len() > MAX_ERROR_OCTETS {
            return Ok(words);
        }
    }
}

/// Waits for the child in a separate thread, so that the child leaves no zombie if it ends before this process.
fn reap(mut child: Child) {
    let waiting = std::thread::Builder::new().name("reap".to_owned()).spawn(move || child.wait());
    if let Err(error) = waiting {
        tracing::debug!("no thread to wait for the child process ({error})");
    }
}

/// The process that waits for this one to be up and has not been told yet.
#[derive(Debug)]
pub enum Readiness {
    /// The parent, which started this process by [`launch`].
    Launched,
    /// systemd, if it runs this process as a service of `Type=notify`; otherwise nobody.
    Service,
}

impl Readiness {
    /// Leaves the terminal and the parent's session, if [`launch`] started this process.
    ///
    /// # Errors
    /// The process already leads a group, so [`launch`] did not start it.
    pub fn begin() -> io::Result<Self> {
        rustix::process::setsid()?;
        std::env::set_current_dir("/")?;
        Ok(Self::Launched)
    }

    /// Reports that this process is up. A launched process then closes stdout and stderr.
    ///
    /// # Errors
    /// /dev/null cannot be opened, or systemd does not listen.
    pub fn up(self) -> io::Result<()> {
        match self {
            Self::Service => sd_notify::notify(&[sd_notify::NotifyState::Ready]),
            Self::Launched => {
                let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
                // The parent may have been stopped meanwhile; this process continues anyway.
                let mut stdout = io::stdout();
                let _ = stdout.write_all(READY_LINE).and_then(|()| stdout.flush());
                rustix::stdio::dup2_stdout(&null)?;
                rustix::stdio::dup2_stderr(&null)?;
                Ok(())
            }
        }
    }
}

/// Reports why this process, started by [`launch`], does not come up.
pub fn report_failure(text: &str) {
    let mut stdout = io::stdout();
    // Nobody may read it any more.
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
        // The child runs until its stdin, which is /dev/null, ends; its later output goes nowhere.
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
