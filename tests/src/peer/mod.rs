//! A second implementation of the protocol, to test the first one with: small, slow, and written from the specification alone.
//! It shares no code with `cipe-user`, and behaves as the original where the specification describes it.
//!
//! A [`Peer`] is one end of a tunnel in a thread of its own. It answers the key exchange on a socket that the caller has bound,
//! in whichever namespace; it echoes pings and UDP inside the tunnel, so that a scenario can ping through it; it counts
//! everything and sends events through a channel.

mod cipher;
pub(crate) mod echo;
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
pub use self::message::announcement;
pub(crate) use self::message::{CT_PING, CT_PONG};
pub use self::packet::{Opened, Refused, open, seal};
use self::session::Session;
use self::worker::Worker;

/// Position of the time stamp in a message.
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

/// Use of the old send key when another one is announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldKey {
    /// It is not used any more.
    Forgotten,
    /// The NK_IND is sent under it, and nothing after that.
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
    /// First address of the other end; `None`: learn it from the first valid datagram.
    pub peer: Option<SocketAddr>,
    /// Least time between two attempts at a key.
    pub tokxc: Duration,
    /// Life of a send key; a receive key lives twice as long.
    pub tokey: Duration,
    /// Window of time stamps in seconds; 0: not checked.
    pub tokxts: u32,
    /// Packets under one send key before another one is made.
    pub send_packets: u64,
    /// Packets under one receive key before it forgets the key and asks for another.
    pub receive_packets: u64,
    /// Shortest inner packet that is accepted.
    pub shortest_inner: usize,
    /// Retransmit an unanswered NK_IND after this time; `None`: never.
    pub resend: Option<Duration>,
    /// Use of the old send key at a change. An NK_IND after an NK_REQ is always sent under the static key.
    pub old_key: OldKey,
    /// Refuse receive keys that were accepted before.
    pub refuse_old: bool,
    /// Number of NK_ACKs, from the first on, that are lost.
    pub lose_acks: u32,
    /// Ask for the other end's configuration at the start, in clear, as 1.5 does.
    pub asks_configuration: bool,
    /// Send data under the static key while there is no dynamic one; otherwise drop it.
    pub static_data: bool,
    /// Position at which it writes and reads time stamps.
    pub stamp: Stamp,
    /// Order of the check sums it sends.
    pub order: Order,
    /// Octets of its socket's receive buffer, as the kernel counts them; `None`: the default.
    pub receive_buffer: Option<usize>,
    /// Echo packets from the tunnel.
    pub echo: bool,
    /// Send [`Event::Delivered`] for every packet. Off by default, so that a stream does not fill the channel.
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

/// Counters of a peer since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Datagrams received, of any kind.
    pub datagrams: u64,
    /// Data packets sent under a dynamic key.
    pub sent_dynamic: u64,
    /// Data packets sent under the static key.
    pub sent_static: u64,
    /// Data packets not sent, for lack of a key or of a peer address.
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
    /// Invalid messages, and messages outside the window of time stamps.
    pub bad_message: u64,
    /// Send keys taken into use.
    pub send_keys: u64,
    /// Receive keys taken into use.
    pub receive_keys: u64,
    /// Receive keys refused because they were accepted before.
    pub refused_keys: u64,
    /// NK_IND received under a dynamic key.
    pub chained_keys: u64,
    /// NK_REQ sent.
    pub requests_sent: u64,
    /// NK_REQ received.
    pub requests_received: u64,
    /// NK_IND sent.
    pub indications_sent: u64,
    /// Number of changes of the other end's address.
    pub moves: u64,
}

/// Events of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Its send key was acknowledged; it sends under it from now on.
    SendKey,
    /// It accepted a receive key.
    ReceiveKey,
    /// It forgot its receive key, which was used up or old.
    Deaf,
    /// A message of another kind arrived: CT_PING, CT_KILL and so on, by its type octet.
    Message(u8),
    /// A datagram in clear arrived; its octets from the type octet on.
    Clear(Vec<u8>),
    /// The other end is now at this address.
    Moved(SocketAddr),
    /// An inner packet arrived; only with [`Config::tell_packets`].
    Delivered(Vec<u8>),
}

enum Command {
    Data(Vec<u8>),
    Control(u8, Vec<u8>),
    Clear(u8),
    Silence(bool),
    Move(UdpSocket),
    Roam(UdpSocket),
    Renew,
    Stop,
}

/// A command; who waits for the other end of `_done` learns when it is carried out or the thread has ended.
struct Errand {
    command: Command,
    _done: Option<Sender<()>>,
}

/// One end of a tunnel, running until it is stopped or dropped.
pub struct Peer {
    commands: Sender<Errand>,
    wake: Arc<OwnedFd>,
    counters: Arc<Mutex<Counters>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Peer {
    /// Starts a peer on a bound socket. The receiver gets the events; the caller need not read them.
    ///
    /// # Errors
    /// No event descriptor or thread could be made, or the socket cannot be made non-blocking.
    pub fn start(socket: UdpSocket, config: Config) -> io::Result<(Self, Receiver<Event>)> {
        Self::launch(socket, config, None)
    }

    /// Starts a peer between the tunnel and a device: a descriptor that reads or writes one bare IP packet in each call, such
    /// as a TUN device without packet information. The peer writes delivered packets to the device, and sends packets that it
    /// reads from it.
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
            // The kernel doubles the value (socket(7)).
            rustix::net::sockopt::set_socket_recv_buffer_size(&socket, octets / 2)?;
        }
        let wake = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let counters = Arc::new(Mutex::new(Counters::default()));
        let (commands, inbox) = mpsc::channel();
        let (events, told) = mpsc::channel();
        let worker = Worker {
            socket,
            former: None,
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

    /// Stops receiving and sending, as a host without network, or starts again. This and each change below is in force on
    /// return: what a device or a socket gets after it, the peer handles after it.
    pub fn silence(&self, silent: bool) {
        self.carry_out(Command::Silence(silent));
    }

    /// Continues with its keys on another socket, as a host with a new address.
    ///
    /// # Errors
    /// A socket that cannot be made non-blocking.
    pub fn move_to(&self, socket: UdpSocket) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        self.carry_out(Command::Move(socket));
        Ok(())
    }

    /// The same, but it still receives on the socket before, as a host that has both addresses for a while.
    ///
    /// # Errors
    /// As [`Self::move_to`].
    pub fn roam_to(&self, socket: UdpSocket) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        self.carry_out(Command::Roam(socket));
        Ok(())
    }

    /// Makes a new send key now.
    pub fn renew(&self) {
        self.carry_out(Command::Renew);
    }

    /// The counters so far.
    pub fn counters(&self) -> Counters {
        *self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops it and returns its counters.
    ///
    /// # Errors
    /// The peer ended before, by an error of its socket that does not come from ICMP.
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
        self.hand_over(Errand { command, _done: None });
    }

    /// Returns when the command is carried out.
    fn carry_out(&self, command: Command) {
        let (done, waiting) = mpsc::channel();
        self.hand_over(Errand { command, _done: Some(done) });
        // Nothing is ever sent: the end of the errand, or of the thread, ends the wait.
        let _ = waiting.recv();
    }

    fn hand_over(&self, errand: Errand) {
        // A thread that has ended accepts no commands; stop() reports why it ended.
        if self.commands.send(errand).is_ok() {
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.halt();
    }
}
