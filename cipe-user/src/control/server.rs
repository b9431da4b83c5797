//! The engine's side of the control socket.

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};

use rustix::net::SocketAddrUnix;
use tokio::net::UnixListener;

use super::channel::{self, Channel, Peer, Received, SendError};
use super::lock::{self, Lock, Wait};
use super::protocol::{Event, Request};
use super::run_dir::RunDir;

/// Maximum daemons in the queue for [`Server::accept`].
const BACKLOG: i32 = 4096;

/// Why the engine cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Each network namespace has at most one engine.
    #[error("an engine (pid {holder}) already runs in this network namespace; {path}; use it, or stop it first", path = path.display())]
    AlreadyRunning {
        /// Its process id.
        holder: String,
        /// Its lock.
        path: PathBuf,
    },
    /// Anything else.
    #[error("control socket {path}: {cause}; is /run writable, and are you root?", path = path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        cause: io::Error,
    },
}

/// A listening control socket. Socket, lock and directory are removed on drop.
#[derive(Debug)]
pub struct Server {
    socket: UnixListener,
    /// Where that is.
    path: PathBuf,
    run: RunDir,
    lock: Option<Lock>,
    /// Another engine takes its place.
    is_replaced: bool,
}

impl Server {
    /// Listens beside an engine that still runs, at [`RunDir::next_socket`] or [`RunDir::standby_socket`]: daemons that find no engine
    /// wait there. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn beside(run: RunDir, path: PathBuf) -> Result<Self, BindError> {
        let socket = listen(&path).map_err(|cause| BindError::Io { path: path.clone(), cause })?;
        Ok(Self { socket, path, run, lock: None, is_replaced: false })
    }

    /// Takes the place of an engine that has ended.
    ///
    /// # Errors
    /// Another engine runs; or the socket cannot be renamed.
    pub fn take_place(&mut self) -> Result<(), BindError> {
        self.lock = Some(Self::lock(&self.run)?);
        let place = self.run.socket();
        std::fs::rename(&self.path, &place).map_err(|cause| BindError::Io { path: place.clone(), cause })?;
        self.path = place;
        Ok(())
    }

    /// Another engine takes its place: leaves it all files.
    pub fn leave(&mut self) {
        self.is_replaced = true;
    }

    /// Takes the engine's lock of this network namespace and listens. Removes what a dead engine left. Must be called
    /// inside a tokio runtime.
    ///
    /// # Errors
    /// Another engine runs, or the socket cannot be made.
    pub fn bind(run: RunDir) -> Result<Self, BindError> {
        let (lock, path) = (Self::lock(&run)?, run.socket());
        let socket = listen(&path).map_err(|cause| BindError::Io { path: path.clone(), cause })?;
        Ok(Self { socket, path, run, lock: Some(lock), is_replaced: false })
    }

    fn lock(run: &RunDir) -> Result<Lock, BindError> {
        let lock_path = run.engine_lock();
        let io_error = |cause| BindError::Io { path: run.socket(), cause };
        loop {
            run.create().map_err(io_error)?;
            match Lock::take(&lock_path, Wait::No) {
                Ok(Some(lock)) => return Ok(lock),
                Ok(None) => {
                    return Err(BindError::AlreadyRunning { holder: lock::holder(&lock_path), path: lock_path });
                }
                // The former engine removed the directory between the two steps.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(io_error(error)),
            }
        }
    }

    /// Waits for a connection of a trusted user; others are closed and logged. Cancel safe.
    ///
    /// # Errors
    /// Errors of accept, such as too many open files: wait until a connection closes before the next call.
    pub async fn accept(&self) -> io::Result<Connection> {
        loop {
            let stream = match self.socket.accept().await {
                Ok((stream, _)) => stream.into_std()?,
                Err(error) if is_transient(&error) => continue,
                Err(error) => return Err(error),
            };
            let connection = Connection { channel: Channel::new(stream.into())? };
            match connection.peer() {
                Ok(peer) if peer.is_trusted() => return Ok(connection),
                Ok(peer) => tracing::warn!("control socket: refused process {} of user {}", peer.pid, peer.uid),
                Err(error) => tracing::warn!("control socket: refused a connection without credentials ({error})"),
            }
        }
    }
}

/// Whether accept failed because of one connection only.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted)
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = channel::socket()?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    UnixListener::from_std(StdListener::from(socket))
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.is_replaced {
            return;
        }
        // In this order: a process that finds no lock finds no socket of this engine either.
        let _ = std::fs::remove_file(&self.path);
        self.lock = None;
        self.run.remove();
    }
}

/// A connection of a daemon or a status reader. When it closes, its tunnel is removed.
///
/// The rule for a daemon that does not read: [`Connection::send`] fails with [`SendError::Full`], the event is lost,
/// and the engine continues. Key-exchange messages and requests for keys are repeated anyway (the engine counts the
/// former as `control-full`); if [`Event::Attached`], [`Event::Failed`] or [`Event::DeviceDown`] is lost, the engine
/// closes the connection instead.
#[derive(Debug)]
pub struct Connection {
    channel: Channel<Request, Event>,
}

impl Connection {
    /// Waits for a request; `None` when the other side has closed. Answers a malformed message with [`Event::Failed`].
    /// Cancel safe.
    ///
    /// # Errors
    /// Errors of the socket.
    pub async fn receive(&mut self) -> io::Result<Option<Request>> {
        loop {
            match self.channel.receive().await? {
                Received::Message(request) => return Ok(Some(request)),
                Received::Closed => return Ok(None),
                Received::Malformed(error) => {
                    // A process that sends malformed messages and does not read may lose the answer.
                    let _ = self.channel.send(&Event::Failed { message: error.to_string() });
                }
            }
        }
    }

    /// Sends an event, and waits while the other side does not read.
    ///
    /// # Errors
    /// The event is lost; never [`SendError::Full`].
    pub async fn deliver(&self, event: &Event) -> Result<(), SendError> {
        self.channel.deliver(event).await
    }

    /// Sends an event, or fails at once; see the rule above.
    ///
    /// # Errors
    /// The event is lost.
    pub fn send(&self, event: &Event) -> Result<(), SendError> {
        self.channel.send(event)
    }

    /// The process at the other side.
    ///
    /// # Errors
    /// Errors of getsockopt.
    pub fn peer(&self) -> io::Result<Peer> {
        self.channel.peer()
    }
}
