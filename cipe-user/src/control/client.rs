//! The daemon's side of the control socket.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::SocketAddrUnix;
use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};

use super::channel::{self, Channel, Received, SendError};
use super::launch::{Launch, LaunchError, launch};
use super::lock::{Lock, Wait};
use super::protocol::{Event, Request};
use super::run_dir::RunDir;

/// Maximum starts of an engine, if each engine ends before it is connected.
const MAX_ENGINE_STARTS: u32 = 5;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No engine listens.
    #[error("no engine runs in this network namespace; {path}; start a tunnel with ciped-cb, or run `cipe engine`", path = path.display())]
    NotRunning {
        /// The socket.
        path: PathBuf,
    },
    /// Another user's process listens.
    #[error("the control socket belongs to user {uid}, not to root; {path}; stop process {pid}", path = path.display())]
    Untrusted {
        /// User.
        uid: u32,
        /// Process.
        pid: i32,
        /// The socket.
        path: PathBuf,
    },
    /// The engine did not start.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// Anything else.
    #[error("control socket {path}: {cause}; are you root?", path = path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        cause: io::Error,
    },
}

/// Maximum queued requests for an engine that does not read: many more than a tunnel sends while the engine is busy.
const MAX_UNSENT_REQUESTS: usize = 1024;

/// The process of an engine.
#[derive(Debug)]
pub struct EngineProcess {
    /// Its number.
    pub pid: u32,
    /// Means this process, even if another one has got its number.
    handle: OwnedFd,
}

impl EngineProcess {
    /// Waits until it has ended; false if it has not `within` that time. Blocks.
    ///
    /// # Errors
    /// The error of poll(2).
    pub fn wait_for_end(&self, within: Duration) -> io::Result<bool> {
        let within = Timespec::try_from(within).map_err(io::Error::other)?;
        Ok(poll(&mut [PollFd::new(&self.handle, PollFlags::IN)], Some(&within))? > 0)
    }

    /// Kills it, if it has not ended.
    ///
    /// # Errors
    /// Not permitted.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.handle, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// A connection to the engine.
#[derive(Debug)]
pub struct Client {
    channel: Channel<Event, Request>,
    /// Requests for which the socket had no space, in order. [`Client::receive`] sends them while it waits.
    unsent: Mutex<VecDeque<Request>>,
}

impl Client {
    /// Connects to the engine of this network namespace. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// No engine runs, or it is not root's.
    pub fn connect(run: &RunDir) -> Result<Self, ConnectError> {
        Self::over(connect(run)?, run)
    }

    fn on(channel: Channel<Event, Request>) -> Self {
        Self { channel, unsent: Mutex::default() }
    }

    fn over(socket: OwnedFd, run: &RunDir) -> Result<Self, ConnectError> {
        let path = run.socket();
        let io_error = |cause| ConnectError::Io { path: path.clone(), cause };
        let client = Self::on(Channel::new(socket).map_err(io_error)?);
        let peer = client.channel.peer().map_err(io_error)?;
        if !peer.is_trusted() {
            return Err(ConnectError::Untrusted { uid: peer.uid, pid: peer.pid, path });
        }
        Ok(client)
    }

    /// Connects, and starts the engine first if none runs. Of several daemons at once, one starts it.
    ///
    /// # Errors
    /// No connection, or the engine did not start; the error includes the engine's message.
    pub async fn connect_or_start(run: &RunDir, engine: &Launch) -> Result<Self, ConnectError> {
        match connect(run) {
            Err(ConnectError::NotRunning { .. }) => {}
            outcome => return Self::over(outcome?, run),
        }
        let (run_dir, engine) = (run.clone(), engine.clone());
        let started = tokio::task::spawn_blocking(move || start_and_connect(&run_dir, &engine)).await;
        let socket = started
            .unwrap_or_else(|error| Err(ConnectError::Io { path: run.socket(), cause: io::Error::other(error) }))?;
        Self::over(socket, run)
    }

    /// The engine's process; `None` if it is this one, as in tests, or is not to be known. Call it before the engine's first answer,
    /// which shows that the process has not ended meanwhile.
    pub fn process(&self) -> Option<EngineProcess> {
        let pid = Pid::from_raw(self.channel.peer().ok()?.pid).filter(|pid| *pid != getpid())?;
        let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        Some(EngineProcess { pid: pid.as_raw_nonzero().get().unsigned_abs(), handle })
    }

    /// Waits for an event, and meanwhile sends the queued requests; `None` when the engine has ended. Cancel safe.
    ///
    /// # Errors
    /// Errors of the socket, an event that this version does not know, or a request that cannot be sent. The two ends have different states
    /// then: connect again.
    pub async fn receive(&mut self) -> io::Result<Option<Event>> {
        let Self { channel, unsent } = self;
        let unsent = unsent.get_mut().unwrap_or_else(PoisonError::into_inner);
        let received = loop {
            let Some(next) = unsent.front() else { break channel.receive().await? };
            tokio::select! {
                received = channel.receive() => break received?,
                sent = channel.deliver(next) => match sent {
                    // `receive` reports the end of the engine next.
                    Ok(()) | Err(SendError::Closed) => {}
                    Err(error) => return Err(io::Error::other(format!("a request to the engine is lost: {error}"))),
                },
            }
            unsent.pop_front();
        };
        match received {
            Received::Message(event) => Ok(Some(event)),
            Received::Closed => Ok(None),
            Received::Malformed(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }

    /// Sends all queued requests, and waits while the engine does not read.
    ///
    /// # Errors
    /// The error of the first request that cannot be sent.
    pub async fn flush(&mut self) -> Result<(), SendError> {
        let unsent = self.unsent.get_mut().unwrap_or_else(PoisonError::into_inner);
        while let Some(next) = unsent.front() {
            self.channel.deliver(next).await?;
            unsent.pop_front();
        }
        Ok(())
    }

    /// Sends a request, or queues it behind those for which the socket had no space: if a key were lost, the two ends
    /// would have different keys.
    ///
    /// # Errors
    /// The request is lost: the engine has ended, or hangs ([`SendError::Full`]). Unless it has ended, connect again: the two ends have
    /// different states.
    pub fn send(&self, request: &Request) -> Result<(), SendError> {
        let mut unsent = self.unsent.lock().unwrap_or_else(PoisonError::into_inner);
        if unsent.is_empty() {
            match self.channel.send(request) {
                Err(SendError::Full) => {}
                outcome => return outcome,
            }
        }
        if unsent.len() >= MAX_UNSENT_REQUESTS {
            return Err(SendError::Full);
        }
        unsent.push_back(request.clone());
        Ok(())
    }
}

/// Connects to the engine, or to one that is about to take the place of an engine that has ended.
fn connect(run: &RunDir) -> Result<OwnedFd, ConnectError> {
    let attempt = |path: &Path| -> io::Result<Option<OwnedFd>> {
        let socket = channel::socket()?;
        match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
            Ok(()) => Ok(Some(socket)),
            Err(Errno::NOENT | Errno::CONNREFUSED) => Ok(None),
            Err(error) => Err(error.into()),
        }
    };
    for path in [run.socket(), run.next_socket(), run.standby_socket()] {
        match attempt(&path) {
            Ok(Some(socket)) => return Ok(socket),
            Ok(None) => {}
            Err(cause) => return Err(ConnectError::Io { path, cause }),
        }
    }
    Err(ConnectError::NotRunning { path: run.socket() })
}

/// Starts the engine unless one listens by now, and connects to it. Blocks.
fn start_and_connect(run: &RunDir, engine: &Launch) -> Result<OwnedFd, ConnectError> {
    // Held until the engine is ready: other daemons wait here, and then find it.
    let lock = start_lock(run).map_err(|cause| ConnectError::Io { path: run.start_lock(), cause })?;
    let mut outcome = connect(run);
    for _ in 0..MAX_ENGINE_STARTS {
        if !matches!(outcome, Err(ConnectError::NotRunning { .. })) {
            break;
        }
        let launched = launch(engine);
        // Connects in either case: if the start failed, an engine may have been started by hand or by systemd. Or the
        // started engine may have ended again, because its last tunnel ended at that moment.
        outcome = connect(run);
        if let (Err(_), Err(error)) = (&outcome, launched) {
            outcome = Err(error.into());
        }
    }
    drop(lock);
    if outcome.is_err() {
        run.remove();
    }
    outcome
}

/// Takes the lock of those who start an engine. Blocks.
///
/// # Errors
/// The lock cannot be made.
pub fn start_lock(run: &RunDir) -> io::Result<Lock> {
    loop {
        run.create()?;
        match Lock::take(&run.start_lock(), Wait::Block) {
            Ok(Some(lock)) => return Ok(lock),
            Ok(None) => {}
            // An engine that ended removed the directory between the two steps.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::channel::tests::pair;
    use crate::control::protocol::KeyOctets;

    #[tokio::test]
    async fn what_a_busy_engine_has_no_room_for_reaches_it_in_order_when_it_reads() {
        const REQUESTS: u64 = 1500;
        let (engine, ours) = pair();
        let mut client = Client::on(ours);
        let key = |number: u64| {
            let mut octets = [0; 16];
            octets[..8].copy_from_slice(&number.to_be_bytes());
            Request::SetReceiveKey { key: KeyOctets::new(&octets), keep_ms: number }
        };
        let sent = (0..REQUESTS).take_while(|number| client.send(&key(*number)).is_ok()).count() as u64;
        assert!(!client.unsent.lock().unwrap().is_empty(), "the socket takes {sent} requests");
        let read = async {
            for number in 0..sent {
                let Ok(Received::Message(request)) = engine.receive().await else { panic!("request {number}") };
                assert_eq!(request, key(number));
            }
        };
        tokio::select! {
            event = client.receive() => panic!("no event was sent: {event:?}"),
            () = read => {}
        }
        assert!(client.unsent.get_mut().unwrap().is_empty());
        let sent = (0..REQUESTS).take_while(|number| client.send(&key(*number)).is_ok()).count();
        assert!(!client.unsent.get_mut().unwrap().is_empty(), "the socket takes {sent} requests");
        let read = async {
            for _ in 0..sent {
                assert!(matches!(engine.receive().await, Ok(Received::Message(_))));
            }
        };
        let (flushed, ()) = tokio::join!(client.flush(), read);
        assert!(flushed.is_ok() && client.unsent.get_mut().unwrap().is_empty());
    }

    #[tokio::test]
    async fn an_engine_that_hangs_is_told_apart_from_a_busy_one() {
        let (_engine, ours) = pair();
        let client = Client::on(ours);
        let refused = (0..100_000).find_map(|_| client.send(&Request::Status).err());
        assert!(matches!(refused, Some(SendError::Full)));
    }
}
