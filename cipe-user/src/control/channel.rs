//! One end of a control connection: whole messages over a `SOCK_SEQPACKET` unix socket.
//!
//! A message may bring a descriptor ([`Carries`]). Neither std nor tokio has a type for such a socket. Tokio's datagram
//! type accepts any unix socket; only its readiness is used here.

use std::io::{self, IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use zeroize::Zeroizing;

use super::protocol::MAX_MESSAGE;

/// Octets that are no valid message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Over [`MAX_MESSAGE`].
    #[error("control message of {0} octets is over the limit of {MAX_MESSAGE}")]
    TooLong(usize),
    /// Not JSON, or not the expected type. The error gives only the position: the text may contain a key.
    #[error("control message is malformed at octet {0}; are engine and daemon of the same version?")]
    Malformed(usize),
}

/// Why a message was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The other side does not read, and the socket is full; this message is lost.
    #[error("the other side of the control socket does not read")]
    Full,
    /// The other side has closed.
    #[error("the other side of the control socket has gone")]
    Closed,
    /// Over [`MAX_MESSAGE`]; lost.
    #[error(transparent)]
    TooLong(DecodeError),
    /// Any other error of the system.
    #[error("control socket: {0}")]
    Io(#[from] io::Error),
}

/// Reads one message.
///
/// # Errors
/// The octets are no message of type `T`.
pub fn decode<T: DeserializeOwned>(message: &[u8]) -> Result<T, DecodeError> {
    if message.len() > MAX_MESSAGE {
        return Err(DecodeError::TooLong(message.len()));
    }
    serde_json::from_slice(message).map_err(|error| DecodeError::Malformed(error.column()))
}

/// Writes one message.
///
/// # Errors
/// [`DecodeError::TooLong`].
pub fn encode<T: Serialize>(message: &T) -> Result<Zeroizing<Vec<u8>>, DecodeError> {
    // Reserve the full size at once: growing the buffer would leave copies of a key behind.
    let mut text = Zeroizing::new(Vec::with_capacity(MAX_MESSAGE));
    let written = serde_json::to_writer(&mut *text, message);
    match written {
        Ok(()) if text.len() <= MAX_MESSAGE => Ok(text),
        _ => Err(DecodeError::TooLong(text.len())),
    }
}

/// A message that may bring a descriptor.
pub trait Carries {
    /// The descriptor to send with it.
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;

    /// Takes the descriptor that came with it. A message that brings none closes it.
    fn take_descriptor(&mut self, descriptor: OwnedFd);
}

/// A connected socket that receives `In` and sends `Out`.
#[derive(Debug)]
pub struct Channel<In, Out> {
    socket: UnixDatagram,
    types: PhantomData<fn(Out) -> In>,
}

/// The octets of a message, or the length of one over [`MAX_MESSAGE`], and the descriptor that came with it.
type Taken = (Result<Zeroizing<Vec<u8>>, usize>, Option<OwnedFd>);

/// Receives the next message from a socket: its octets, or the length of one over [`MAX_MESSAGE`]. The length is read
/// first, so that ten thousand connections do not need a buffer of the largest size each.
fn take(socket: &UnixDatagram) -> io::Result<Taken> {
    // TRUNC: return the true length, whatever the buffer's.
    let (_, length) = rustix::net::recv(socket, &mut [0; 0], RecvFlags::TRUNC | RecvFlags::PEEK)?;
    let mut message = Zeroizing::new(vec![0; length.min(MAX_MESSAGE)]);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut message)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptor = control.drain().find_map(|brought| match brought {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok((if length > MAX_MESSAGE { Err(length) } else { Ok(message) }, descriptor))
}

/// What was received.
#[derive(Debug)]
pub enum Received<In> {
    /// A message.
    Message(In),
    /// Something else; the connection stays open.
    Malformed(DecodeError),
    /// The other side has closed the connection, or has died.
    Closed,
}

impl<In: DeserializeOwned + Carries, Out: Serialize + Carries> Channel<In, Out> {
    /// Wraps a connected, non-blocking socket. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The socket cannot be registered.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self { socket: UnixDatagram::from_std(socket.into())?, types: PhantomData })
    }

    /// Waits for a message. Cancel safe: a message is either returned or still in the socket.
    ///
    /// # Errors
    /// Errors of the socket, but not the end of the connection.
    pub async fn receive(&self) -> io::Result<Received<In>> {
        let (message, descriptor) = loop {
            match self.socket.async_io(Interest::READABLE, || take(&self.socket)).await {
                // The other side has closed without reading all, which is reported once, and before the messages that it sent.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
                outcome => break outcome?,
            }
        };
        let decoded = match &message {
            Ok(message) if message.is_empty() => return Ok(Received::Closed),
            Ok(message) => decode::<In>(message),
            Err(length) => Err(DecodeError::TooLong(*length)),
        };
        Ok(match decoded {
            Ok(mut message) => {
                descriptor.into_iter().for_each(|descriptor| message.take_descriptor(descriptor));
                Received::Message(message)
            }
            Err(error) => Received::Malformed(error),
        })
    }

    /// Sends a message, or fails at once: never waits. The kernel's socket buffer (some 200 KiB) is the only queue.
    ///
    /// # Errors
    /// The message is lost.
    pub fn send(&self, message: &Out) -> Result<(), SendError> {
        let text = encode(message).map_err(SendError::TooLong)?;
        let descriptor = message.descriptor();
        loop {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if let Some(descriptor) = &descriptor {
                // The buffer has room for one.
                let _ = control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(descriptor)));
            }
            match rustix::net::sendmsg(&self.socket, &[IoSlice::new(&text)], &mut control, flags) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Err(SendError::Full),
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET | rustix::io::Errno::NOTCONN) => {
                    return Err(SendError::Closed);
                }
                Err(error) => return Err(SendError::Io(error.into())),
            }
        }
    }

    /// Sends a message, and waits while the other side does not read. Cancel safe: a cancelled message is not sent.
    ///
    /// # Errors
    /// The message is lost; never [`SendError::Full`].
    pub async fn deliver(&self, message: &Out) -> Result<(), SendError> {
        let send = || match self.send(message) {
            Err(SendError::Full) => Err(io::ErrorKind::WouldBlock.into()),
            outcome => Ok(outcome),
        };
        self.socket.async_io(Interest::WRITABLE, send).await?
    }

    /// The other side's user and process, as the kernel knows them.
    ///
    /// # Errors
    /// Errors of getsockopt.
    pub fn peer(&self) -> io::Result<Peer> {
        let credentials = rustix::net::sockopt::socket_peercred(&self.socket)?;
        Ok(Peer { uid: credentials.uid.as_raw(), pid: credentials.pid.as_raw_nonzero().get() })
    }
}

/// The process at the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// User.
    pub uid: u32,
    /// Process.
    pub pid: i32,
}

impl Peer {
    /// Root, or the user of this process (which is root except in tests).
    pub fn is_trusted(self) -> bool {
        self.uid == 0 || self.uid == rustix::process::geteuid().as_raw()
    }
}

/// Makes a non-blocking, close-on-exec socket of the right type.
pub(super) fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::control::protocol::{Event, KeyOctets, Request};
    use proptest::prelude::*;

    /// The engine's side and the daemon's.
    pub(in crate::control) fn pair() -> (Channel<Request, Event>, Channel<Event, Request>) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (a, b) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (Channel::new(a).unwrap(), Channel::new(b).unwrap())
    }

    #[tokio::test(flavor = "current_thread")]
    async fn messages_keep_their_borders_and_the_end_is_seen() {
        let (engine, daemon) = pair();
        daemon.send(&Request::DropSendKey).unwrap();
        daemon.send(&Request::SetSendKey { key: KeyOctets::new(&[7; 16]) }).unwrap();
        drop(daemon);
        assert!(matches!(engine.receive().await.unwrap(), Received::Message(Request::DropSendKey)));
        let Received::Message(Request::SetSendKey { key }) = engine.receive().await.unwrap() else { panic!() };
        assert_eq!(*key, [7; 16]);
        assert!(matches!(engine.receive().await.unwrap(), Received::Closed));
        assert!(matches!(engine.send(&Event::DeviceDown), Err(SendError::Closed)));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_was_sent_before_the_end_arrives_even_if_the_sender_has_not_read_all() {
        let (engine, daemon) = pair();
        engine.send(&Event::DeviceDown).unwrap();
        daemon.send(&Request::DropSendKey).unwrap();
        daemon.send(&Request::Status).unwrap();
        drop(daemon);
        assert!(matches!(engine.receive().await.unwrap(), Received::Message(Request::DropSendKey)));
        assert!(matches!(engine.receive().await.unwrap(), Received::Message(Request::Status)));
        assert!(matches!(engine.receive().await.unwrap(), Received::Closed));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn oversized_and_malformed_messages_are_told_apart_and_survived() {
        let (engine, daemon) = pair();
        for text in [vec![b'x'; MAX_MESSAGE + 1], b"{}".to_vec(), vec![0xFF; 3]] {
            rustix::net::send(&daemon.socket, &text, SendFlags::empty()).unwrap();
        }
        daemon.send(&Request::Status).unwrap();
        let too_long = engine.receive().await.unwrap();
        assert!(matches!(too_long, Received::Malformed(DecodeError::TooLong(n)) if n == MAX_MESSAGE + 1));
        for _ in 0..2 {
            assert!(matches!(engine.receive().await.unwrap(), Received::Malformed(DecodeError::Malformed(_))));
        }
        assert!(matches!(engine.receive().await.unwrap(), Received::Message(Request::Status)));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_daemon_that_does_not_read_never_blocks_the_engine() {
        let (engine, daemon) = pair();
        let mut sent = 0;
        let error = loop {
            match engine.send(&Event::DeviceDown) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, SendError::Full) && sent > 50, "{error} after {sent}");
        assert!(matches!(daemon.receive().await.unwrap(), Received::Message(Event::DeviceDown)));
        engine.send(&Event::StatusEnd).unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_must_arrive_waits_for_the_reader() {
        let (engine, daemon) = pair();
        let reading = async {
            for _ in 0..5000 {
                assert!(matches!(daemon.receive().await.unwrap(), Received::Message(Event::DeviceDown)));
            }
        };
        let writing = async {
            for _ in 0..5000 {
                engine.deliver(&Event::DeviceDown).await.unwrap();
            }
        };
        // Run the writer first, so that it finds the socket full.
        tokio::join!(biased; writing, reading);
        drop(daemon);
        assert!(matches!(engine.deliver(&Event::DeviceDown).await, Err(SendError::Closed)));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_kernel_says_who_is_there() {
        let (engine, _daemon) = pair();
        let peer = engine.peer().unwrap();
        assert!(peer.is_trusted());
        assert_eq!(peer.pid.unsigned_abs(), std::process::id());
        assert!(!Peer { uid: rustix::process::geteuid().as_raw() + 1, pid: 1 }.is_trusted());
    }

    #[test]
    fn no_error_repeats_what_was_sent() {
        let error = decode::<Request>(br#"{"request":"set-send-key","key":"deadbeef"}"#).unwrap_err();
        assert!(!error.to_string().contains("dead"), "{error}");
    }

    proptest! {
        #[test]
        fn decoding_is_total(message: Vec<u8>) {
            let _ = decode::<Request>(&message);
            let _ = decode::<Event>(&message);
        }
    }
}
