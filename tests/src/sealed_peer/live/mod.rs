//! An end of a sealed tunnel on a socket: the second implementation with timers and state, in a thread of its own.
//!
//! It begins handshakes and answers them, repeats what is not answered, asks for cookies and sends them, and echoes pings and UDP
//! inside the tunnel, as the host behind it. It counts everything and sends events through a channel.

mod end;
#[cfg(test)]
mod tests;

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use self::end::End;
use super::SealedPeer;

/// Most datagrams read in a row before commands and timers.
const BURST: usize = 64;

/// How a live peer behaves.
#[derive(Clone, Debug)]
pub struct Config {
    /// Static key, id and what it says of itself.
    pub identity: SealedPeer,
    /// Address of the other end; `None`: learn it from the first handshake.
    pub peer: Option<SocketAddr>,
    /// Its clock at the start, in nanoseconds since 1970.
    pub clock: u64,
    /// The newest time stamp of the other end that it claims to have taken.
    pub newest: u64,
    /// Answer a first message without a right cookie by one.
    pub asks_cookies: bool,
    /// Number of answers, from the first on, that are lost.
    pub lose_answers: u32,
    /// Send [`Event::Delivered`] for every packet.
    pub tell_packets: bool,
}

impl Config {
    /// An end with this static key and id that carries IP packets, with the clock of this machine.
    pub fn new(static_key: [u8; 16], id: [u8; 8]) -> Self {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            identity: SealedPeer { static_key, id, fast_aes: true, carries: 3 },
            peer: None,
            clock: since.map_or(0, |time| time.as_nanos() as u64),
            newest: 0,
            asks_cookies: false,
            lose_answers: 0,
            tell_packets: false,
        }
    }
}

/// Counters of a live peer since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Datagrams received, of any kind.
    pub datagrams: u64,
    /// Datagrams that are not sealed.
    pub unsealed: u64,
    /// Data packets sent.
    pub sent: u64,
    /// Data packets delivered.
    pub delivered: u64,
    /// Data packets echoed.
    pub echoed: u64,
    /// Control packets received, also without content.
    pub control: u64,
    /// Packets of an epoch without a key.
    pub no_key: u64,
    /// Packets and handshake messages that are not authentic.
    pub refused: u64,
    /// Packets accepted before, and first messages that are not newer than one before.
    pub replayed: u64,
    /// First messages sent, repetitions not counted.
    pub begun: u64,
    /// Sessions that it has begun.
    pub initiated: u64,
    /// Sessions that it has answered, and that a packet has confirmed.
    pub confirmed: u64,
    /// Answers sent, repetitions counted.
    pub answers: u64,
    /// Retries sent.
    pub retries_sent: u64,
    /// Retries received and understood.
    pub retries_received: u64,
    /// Changes of the other end's address.
    pub moves: u64,
}

/// Events of a live peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It sends under another session from now on.
    Session,
    /// A control packet with content arrived: its type octet.
    Message(u8),
    /// An inner packet arrived; only with [`Config::tell_packets`].
    Delivered(Vec<u8>),
}

enum Command {
    Data(Vec<u8>),
    Control(Vec<u8>),
    Begin,
    Roam(UdpSocket),
    Stop,
}

/// One end of a sealed tunnel, running until it is stopped or dropped.
pub struct LivePeer {
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
    counters: Arc<Mutex<Counters>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl LivePeer {
    /// Starts it on a bound socket. The receiver gets the events; the caller need not read them.
    ///
    /// # Errors
    /// No event descriptor or thread could be made, or the socket cannot be made non-blocking.
    pub fn start(socket: UdpSocket, config: Config) -> io::Result<(Self, Receiver<Event>)> {
        socket.set_nonblocking(true)?;
        let wake = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let counters = Arc::new(Mutex::new(Counters::default()));
        let (commands, inbox) = mpsc::channel();
        let (events, told) = mpsc::channel();
        let end = End::new(config, Instant::now());
        let worker =
            Worker { sockets: vec![socket], end, events, wake: wake.clone(), inbox, published: counters.clone() };
        let thread = std::thread::Builder::new().name("sealed-peer".into()).spawn(move || worker.run())?;
        Ok((Self { commands, wake, counters, thread: Some(thread) }, told))
    }

    /// Sends an inner packet through the tunnel, after a handshake if it has no session.
    pub fn send(&self, packet: Vec<u8>) {
        self.command(Command::Data(packet));
    }

    /// Sends a control packet with this content, from its type octet on.
    pub fn send_message(&self, message: Vec<u8>) {
        self.command(Command::Control(message));
    }

    /// Begins a handshake, whether it has a session or not.
    pub fn begin(&self) {
        self.command(Command::Begin);
    }

    /// Continues on another socket, as a host with a new address, and still receives on those before.
    ///
    /// # Errors
    /// A socket that cannot be made non-blocking.
    pub fn roam_to(&self, socket: UdpSocket) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        self.command(Command::Roam(socket));
        Ok(())
    }

    /// The counters so far.
    pub fn counters(&self) -> Counters {
        *self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops it and returns its counters.
    ///
    /// # Errors
    /// It ended before, by an error of its socket that does not come from ICMP.
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
        // A thread that has ended accepts no commands; stop() reports why it ended.
        if self.commands.send(command).is_ok() {
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

impl Drop for LivePeer {
    fn drop(&mut self) {
        let _ = self.halt();
    }
}

struct Worker {
    /// It sends by the last one, and receives by all.
    sockets: Vec<UdpSocket>,
    end: End,
    events: Sender<Event>,
    wake: Arc<OwnedFd>,
    inbox: Receiver<Command>,
    published: Arc<Mutex<Counters>>,
}

impl Worker {
    fn run(mut self) -> io::Result<()> {
        let mut buffer = vec![0; 65_536];
        loop {
            self.wait()?;
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            while let Ok(command) = self.inbox.try_recv() {
                let now = Instant::now();
                match command {
                    Command::Data(packet) => self.end.send(packet, now),
                    Command::Control(message) => self.end.send_control(&message),
                    Command::Begin => self.end.begin(now),
                    Command::Roam(socket) => self.sockets.push(socket),
                    Command::Stop => return Ok(()),
                }
                self.finish()?;
            }
            self.end.tick(Instant::now());
            self.finish()?;
            for at in 0..self.sockets.len() {
                for _ in 0..BURST {
                    match self.sockets[at].recv_from(&mut buffer) {
                        Ok((length, from)) => self.end.datagram(&buffer[..length], from, Instant::now()),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                        Err(error) if is_passing(&error) => {}
                        Err(error) => return Err(error),
                    }
                    self.finish()?;
                }
            }
        }
    }

    fn wait(&self) -> io::Result<()> {
        let timeout = self.end.deadline().map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let all = self.sockets.iter().map(AsFd::as_fd).chain([self.wake.as_fd()]);
        let mut all: Vec<_> = all.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        match rustix::event::poll(&mut all, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends the end's datagrams, and publishes counters and then events, so that the counters always include an event.
    fn finish(&mut self) -> io::Result<()> {
        for (to, datagram) in self.end.out.drain(..) {
            let Some(socket) = self.sockets.last() else { continue };
            match socket.send_to(&datagram, to) {
                Ok(_) => {}
                // A full buffer loses a datagram, as a network does.
                Err(error) if is_passing(&error) || error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        *self.published.lock().unwrap_or_else(PoisonError::into_inner) = self.end.counters;
        for event in self.end.events.drain(..) {
            // The receiver may have been dropped.
            let _ = self.events.send(event);
        }
        Ok(())
    }
}

/// Errors about the network, not about the socket.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::*;
    matches!(error.kind(), ConnectionRefused | HostUnreachable | NetworkUnreachable | NetworkDown | Interrupted)
}
