//! The daemon's side of the control socket.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;
use rustix::net::SocketAddrUnix;

use super::channel::{self, Channel, Received, SendError};
use super::launch::{Launch, LaunchError, launch};
use super::lock::{Lock, Wait};
use super::protocol::{Event, Request};
use super::run_dir::RunDir;

/// Attempts to meet an engine that is going or coming.
const ATTEMPTS: u32 = 5;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody listens.
    #[error("no engine runs in this network namespace; {path}; start a tunnel with ciped-cb, or run `cipe engine`", path = path.display())]
    NotRunning {
        /// The socket.
        path: PathBuf,
    },
    /// Somebody else listens.
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
    #[error("control socket {path}: {source}; are you root?", path = path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A connection to the engine.
#[derive(Debug)]
pub struct Client {
    channel: Channel<Event, Request>,
}

impl Client {
    /// Connects to the engine of this network namespace. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// No engine, or not root's.
    pub fn connect(run: &RunDir) -> Result<Self, ConnectError> {
        let path = run.socket();
        let io_error = |source| ConnectError::Io { path: path.clone(), source };
        let socket = channel::socket().map_err(io_error)?;
        let address = SocketAddrUnix::new(&path).map_err(|error| io_error(error.into()))?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => {}
            Err(Errno::NOENT | Errno::CONNREFUSED) => return Err(ConnectError::NotRunning { path }),
            Err(error) => return Err(io_error(error.into())),
        }
        let client = Self { channel: Channel::new(socket).map_err(io_error)? };
        let peer = client.channel.peer().map_err(io_error)?;
        if !peer.is_trusted() {
            return Err(ConnectError::Untrusted { uid: peer.uid, pid: peer.pid, path });
        }
        Ok(client)
    }

    /// Connects, and starts the engine first if none runs. Of several daemons at once, one starts it.
    ///
    /// # Errors
    /// No connection, or the engine did not start; its own words are in the error.
    pub async fn connect_or_start(run: &RunDir, engine: &Launch) -> Result<Self, ConnectError> {
        let mut outcome = Self::connect(run);
        for _ in 0..ATTEMPTS {
            // Anything but "not running" is final. The engine may end between its start and the connection when its
            // last tunnel went at that moment.
            let Err(ConnectError::NotRunning { .. }) = &outcome else { break };
            let (run_dir, engine) = (run.clone(), engine.clone());
            let started = tokio::task::spawn_blocking(move || start(&run_dir, &engine)).await;
            match started.unwrap_or_else(|error| Err(io::Error::other(error).into())) {
                Ok(()) => outcome = Self::connect(run),
                Err(StartError::Launch(error)) => {
                    // Another one, started by hand or by systemd, may have come first.
                    outcome = Self::connect(run);
                    if outcome.is_err() {
                        return Err(error.into());
                    }
                }
                Err(StartError::Io(source)) => return Err(ConnectError::Io { path: run.socket(), source }),
            }
        }
        outcome
    }

    /// Waits for an event; `None` when the engine has gone. Cancel safe.
    ///
    /// # Errors
    /// Of the socket, or an event that this version does not know.
    pub async fn receive(&mut self) -> io::Result<Option<Event>> {
        match self.channel.receive().await? {
            Received::Message(event) => Ok(Some(event)),
            Received::Closed => Ok(None),
            Received::Malformed(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }

    /// Sends a request.
    ///
    /// # Errors
    /// It is lost; a full socket means that the engine hangs.
    pub fn send(&self, request: &Request) -> Result<(), SendError> {
        self.channel.send(request)
    }
}

#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Launch(#[from] LaunchError),
}

/// Starts the engine unless one listens by now. Blocks.
fn start(run: &RunDir, engine: &Launch) -> Result<(), StartError> {
    // Held until the engine is ready: the others wait here, and then find it.
    let lock = loop {
        run.create()?;
        match Lock::take(&run.start_lock(), Wait::Block) {
            Ok(Some(lock)) => break lock,
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
    };
    let socket = channel::socket()?;
    let address = SocketAddrUnix::new(run.socket()).map_err(io::Error::from)?;
    if rustix::net::connect(&socket, &address).is_ok() {
        return Ok(());
    }
    let outcome = launch(engine);
    if outcome.is_err() {
        drop(lock);
        run.remove();
    }
    Ok(outcome?)
}
