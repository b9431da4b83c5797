//! A second implementation of the wire, to test the first against: small, slow, and written from the specification
//! alone. It shares no line with `cipe-user`, and behaves as the original does wherever the specification knows that.
//!
//! A [`Peer`] is one end of a tunnel in a thread of its own. It answers the key exchange on a socket that the caller
//! has bound, in whichever namespace; it echoes pings and UDP inside the tunnel, so that a scenario can ping through
//! it; it counts everything and tells events through a channel.

mod cipher;
mod echo;
mod message;
mod packet;
mod session;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::EventfdFlags;

pub use self::cipher::{Cipher, KEY};
pub use self::packet::{Opened, Refused, open, seal};
use self::session::Session;
use self::worker::Worker;

/// Where a time stamp stands in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stamp {
    /// Octet 48, as in 1.4.5.
    First,
    /// Octet 56, as later versions may have it.
    Second,
}

/// Octet order of the check sum in NK_IND and NK_ACK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Most significant octet first.
    Big,
    /// Least significant octet first.
    Little,
}

/// What becomes of the old send key when another one is announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldKey {
    /// It is used no more.
    Forgotten,
    /// The NK_IND goes under it, and nothing after that.
    Announces,
    /// It is used until the NK_ACK.
    Kept,
}

/// How a peer behaves.
#[derive(Clone, Debug)]
pub struct Config {
    /// Cipher and word order.
    pub cipher: Cipher,
    /// The static key.
    pub key: [u8; KEY],
    /// Where to send to at first; `None`: whoever sends something valid.
    pub peer: Option<SocketAddr>,
    /// Least time between two attempts at a key.
    pub tokxc: Duration,
    /// Life of a send key; a receive key lives twice as long.
    pub tokey: Duration,
    /// Window of time stamps in seconds; 0: not checked.
    pub tokxts: u32,
    /// Packets under one send key before another one is made.
    pub send_packets: u64,
    /// Packets under one receive key before it goes deaf, forgets the key and asks for another.
    pub receive_packets: u64,
    /// Shortest inner packet that is taken.
    pub shortest_inner: usize,
    /// Send an unanswered NK_IND again after this time; `None`: never.
    pub resend: Option<Duration>,
    /// What becomes of the old send key at a change. An NK_IND that was asked for goes under the static key in any case.
    pub old_key: OldKey,
    /// Refuse receive keys that were taken before.
    pub refuse_old: bool,
    /// So many NK_ACKs, from the first on, are lost.
    pub lose_acks: u32,
    /// Ask for the other end's configuration at the start, in clear, as 1.5 does.
    pub asks_configuration: bool,
    /// Send data under the static key while there is no dynamic one; otherwise drop it.
    pub static_data: bool,
    /// Where it writes and looks for time stamps.
    pub stamp: Stamp,
    /// Order of the check sums it sends.
    pub order: Order,
    /// Octets of its socket's receive buffer, as the kernel counts them; `None`: as the kernel likes.
    pub receive_buffer: Option<usize>,
    /// Echo what comes through the tunnel.
    pub echo: bool,
    /// Tell [`Event::Delivered`] for every packet. Off, so that a stream does not fill the channel.
    pub tell_packets: bool,
}

impl Config {
    /// The behaviour of the original 1.4.5, echoing.
    pub fn original(cipher: Cipher, key: [u8; KEY]) -> Self {
        Self {
            cipher,
            key,
            peer: None,
            tokxc: Duration::from_secs(10),
            tokey: Duration::from_secs(600),
            tokxts: 0,
            send_packets: 32_767,
            receive_packets: 65_534,
            shortest_inner: 31,
            resend: None,
            old_key: OldKey::Announces,
            refuse_old: false,
            lose_acks: 0,
            asks_configuration: false,
            static_data: true,
            stamp: Stamp::First,
            order: Order::Big,
            receive_buffer: None,
            echo: true,
            tell_packets: false,
        }
    }
}

/// What a peer has counted since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Datagrams received, of whatever kind.
    pub datagrams: u64,
    /// Data packets sent under a dynamic key.
    pub sent_dynamic: u64,
    /// Data packets sent under the static key.
    pub sent_static: u64,
    /// Data packets not sent, since there was no key to send them under, or nobody to send them to.
    pub unsent: u64,
    /// Data packets received under a dynamic key.
    pub delivered_dynamic: u64,
    /// Data packets received under the static key.
    pub delivered_static: u64,
    /// Data packets echoed.
    pub echoed: u64,
    /// Datagrams of an impossible length.
    pub bad_length: u64,
    /// Datagrams under a dynamic key that it does not have.
    pub no_receive_key: u64,
    /// Datagrams with a wrong CRC.
    pub bad_crc: u64,
    /// Datagrams with an impossible P.
    pub bad_p: u64,
    /// Inner packets shorter than [`Config::shortest_inner`].
    pub short_inner: u64,
    /// Messages that are none, or outside the window of time stamps.
    pub bad_message: u64,
    /// Send keys taken into use.
    pub send_keys: u64,
    /// Receive keys taken into use.
    pub receive_keys: u64,
    /// Receive keys refused, since they were taken before.
    pub refused_keys: u64,
    /// NK_IND received under a dynamic key.
    pub chained_keys: u64,
    /// NK_REQ sent.
    pub requests_sent: u64,
    /// NK_REQ received.
    pub requests_received: u64,
    /// NK_IND sent.
    pub indications_sent: u64,
    /// Times that the other end was found at another address.
    pub moves: u64,
}

/// What a peer tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Its send key was acknowledged; it sends under it from now on.
    SendKey,
    /// It took a receive key.
    ReceiveKey,
    /// It forgot its receive key, worn out or old.
    Deaf,
    /// A message of another kind came: CT_PING, CT_KILL and so on, by its type octet.
    Message(u8),
    /// A datagram in clear came, from its type octet on.
    Clear(Vec<u8>),
    /// The other end is now at this address.
    Moved(SocketAddr),
    /// An inner packet came; only with [`Config::tell_packets`].
    Delivered(Vec<u8>),
}

enum Command {
    Data(Vec<u8>),
    Control(u8, Vec<u8>),
    Clear(u8),
    Silence(bool),
    Move(UdpSocket),
    Renew,
    Stop,
}

/// One end of a tunnel, running until it is stopped or dropped.
pub struct Peer {
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
    counters: Arc<Mutex<Counters>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Peer {
    /// Starts a peer on a bound socket. Events come through the receiver; nobody needs to read them.
    ///
    /// # Errors
    /// No event descriptor or thread could be made, or the socket cannot be made non-blocking.
    pub fn start(socket: UdpSocket, config: Config) -> io::Result<(Self, Receiver<Event>)> {
        Self::launch(socket, config, None)
    }

    /// Starts a peer that stands between the tunnel and a device: a descriptor that takes and gives one bare IP packet
    /// a call, such as a TUN device without packet information. What it delivers is written there; whatever is read
    /// there is sent.
    ///
    /// # Errors
    /// As [`Self::start`], or the device cannot be made non-blocking.
    pub fn start_with_device(
        socket: UdpSocket,
        config: Config,
        device: OwnedFd,
    ) -> io::Result<(Self, Receiver<Event>)> {
        rustix::io::ioctl_fionbio(&device, true)?;
        Self::launch(socket, config, Some(device))
    }

    fn launch(socket: UdpSocket, config: Config, device: Option<OwnedFd>) -> io::Result<(Self, Receiver<Event>)> {
        socket.set_nonblocking(true)?;
        if let Some(octets) = config.receive_buffer {
            // The kernel doubles what it is told (socket(7)).
            rustix::net::sockopt::set_socket_recv_buffer_size(&socket, octets / 2)?;
        }
        let wake = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let counters = Arc::new(Mutex::new(Counters::default()));
        let (commands, inbox) = mpsc::channel();
        let (events, told) = mpsc::channel();
        let worker = Worker {
            socket,
            device,
            session: Session::new(config),
            events,
            wake: wake.clone(),
            inbox,
            published: counters.clone(),
            silent: false,
        };
        let thread = std::thread::Builder::new().name("peer".into()).spawn(move || worker.run())?;
        Ok((Self { commands, wake, counters, thread: Some(thread) }, told))
    }

    /// Sends an inner packet through the tunnel.
    pub fn send(&self, packet: Vec<u8>) {
        self.command(Command::Data(packet));
    }

    /// Sends a control message: its type octet and at most 46 octets of data.
    pub fn send_message(&self, number: u8, data: &[u8]) {
        self.command(Command::Control(number, data.to_vec()));
    }

    /// Sends a message in clear, which an original does with its configuration only.
    pub fn send_clear(&self, number: u8) {
        self.command(Command::Clear(number));
    }

    /// Deaf and mute, as a host that has lost its network, or back again.
    pub fn silence(&self, silent: bool) {
        self.command(Command::Silence(silent));
    }

    /// Goes on with its keys on another socket, as a host that has got another address.
    ///
    /// # Errors
    /// A socket that cannot be made non-blocking.
    pub fn move_to(&self, socket: UdpSocket) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        self.command(Command::Move(socket));
        Ok(())
    }

    /// Makes a new send key now.
    pub fn renew(&self) {
        self.command(Command::Renew);
    }

    /// What it has counted so far.
    pub fn counters(&self) -> Counters {
        *self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops it and returns what it has counted.
    ///
    /// # Errors
    /// What ended it before: an error of its socket other than those that ICMP brings.
    pub fn stop(mut self) -> io::Result<Counters> {
        self.halt()?;
        Ok(self.counters())
    }

    fn halt(&mut self) -> io::Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        self.command(Command::Stop);
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the peer's thread panicked")))
    }

    fn command(&self, command: Command) {
        // A thread that has ended takes no commands; stop() tells why it did.
        if self.commands.send(command).is_ok() {
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.halt();
    }
}
