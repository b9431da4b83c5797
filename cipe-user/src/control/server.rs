//! The engine's side of the control socket.

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::path::PathBuf;

use rustix::net::SocketAddrUnix;
use tokio::net::UnixListener;

use super::channel::{self, Channel, Peer, Received, SendError};
use super::lock::{self, Lock, Wait};
use super::protocol::{Event, Request};
use super::run_dir::RunDir;

/// Daemons that may wait to be accepted.
const BACKLOG: i32 = 4096;

/// Why the engine cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// One engine a network namespace.
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
        /// What the system said.
        cause: io::Error,
    },
}

/// A listening control socket. Socket, lock and directory are removed on drop.
#[derive(Debug)]
pub struct Server {
    socket: UnixListener,
    run: RunDir,
    lock: Option<Lock>,
}

impl Server {
    /// Takes the engine's place in this network namespace and listens. What a dead engine left is removed. Must be
    /// called inside a tokio runtime.
    ///
    /// # Errors
    /// Another engine runs, or the socket cannot be made.
    pub fn bind(run: RunDir) -> Result<Self, BindError> {
        let lock_path = run.engine_lock();
        let io_error = |cause| BindError::Io { path: run.socket(), cause };
        let lock = loop {
            run.create().map_err(io_error)?;
            match Lock::take(&lock_path, Wait::No) {
                Ok(Some(lock)) => break lock,
                Ok(None) => {
                    return Err(BindError::AlreadyRunning { holder: lock::holder(&lock_path), path: lock_path });
                }
                // The engine before us removed the directory between the two steps.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(io_error(error)),
            }
        };
        let socket = listen(&run).map_err(io_error)?;
        Ok(Self { socket, run, lock: Some(lock) })
    }

    /// Waits for a connection of a trusted user; others are closed and logged. Cancel safe.
    ///
    /// # Errors
    /// Of accept, such as too many open files: wait for a connection to go before calling again.
    pub async fn accept(&self) -> io::Result<Connection> {
        loop {
            let stream = match self.socket.accept().await {
                Ok((stream, _)) => stream.into_std()?,
                Err(error) if is_passing(&error) => continue,
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

/// Whether accept failed for the sake of one connection only.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted)
}

fn listen(run: &RunDir) -> io::Result<UnixListener> {
    let path = run.socket();
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = channel::socket()?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(&path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    UnixListener::from_std(StdListener::from(socket))
}

impl Drop for Server {
    fn drop(&mut self) {
        // In this order: whoever sees the lock gone finds no socket of ours.
        let _ = std::fs::remove_file(self.run.socket());
        self.lock = None;
        self.run.remove();
    }
}

/// A daemon, or a status reader. When it closes, its tunnel goes.
///
/// The rule for a daemon that does not read: [`Connection::send`] fails with [`SendError::Full`], the event is lost, and
/// the engine goes on. Key-exchange messages and wishes for keys come again by themselves (the engine counts the former
/// as `control-full`); after losing [`Event::Attached`], [`Event::Failed`] or [`Event::DeviceDown`] the engine closes the
/// connection instead.
#[derive(Debug)]
pub struct Connection {
    channel: Channel<Request, Event>,
}

impl Connection {
    /// Waits for a request; `None` when the other side has gone. A malformed message is answered by
    /// [`Event::Failed`]. Cancel safe.
    ///
    /// # Errors
    /// Of the socket.
    pub async fn receive(&mut self) -> io::Result<Option<Request>> {
        loop {
            match self.channel.receive().await? {
                Received::Message(request) => return Ok(Some(request)),
                Received::Closed => return Ok(None),
                Received::Malformed(error) => {
                    // One that sends rubbish and does not read may lose the answer.
                    let _ = self.channel.send(&Event::Failed { message: error.to_string() });
                }
            }
        }
    }

    /// Sends an event, and waits as long as the other side does not read.
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

    /// Who is there.
    ///
    /// # Errors
    /// Of getsockopt.
    pub fn peer(&self) -> io::Result<Peer> {
        self.channel.peer()
    }
}
