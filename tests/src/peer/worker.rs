//! The socket side of a peer.

use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::session::Session;
use super::{Command, Counters, Errand, Event};

/// Most datagrams read in a row before commands and timers.
const BURST: usize = 64;

/// A peer's thread: it waits on the socket and on an event descriptor that wakes it for commands.
pub(super) struct Worker {
    pub(super) socket: UdpSocket,
    /// The socket before, while datagrams may still come there.
    pub(super) former: Option<UdpSocket>,
    /// The device for inner packets.
    pub(super) device: Option<OwnedFd>,
    pub(super) session: Session,
    pub(super) events: Sender<Event>,
    pub(super) wake: Arc<OwnedFd>,
    pub(super) inbox: Receiver<Errand>,
    pub(super) published: Arc<Mutex<Counters>>,
    pub(super) silent: bool,
}

impl Worker {
    pub(super) fn run(mut self) -> io::Result<()> {
        let mut buffer = vec![0; 65_536];
        // Messages that a session sends at its start.
        self.finish()?;
        loop {
            self.wait()?;
            let mut count = [0; 8];
            let _ = rustix::io::read(&self.wake, &mut count);
            while let Ok(errand) = self.inbox.try_recv() {
                let now = Instant::now();
                match errand.command {
                    Command::Data(packet) => self.session.send(&packet, now),
                    Command::Control(number, data) => self.session.send_control(number, &data),
                    Command::Clear(number) => self.session.send_clear(number),
                    Command::Silence(silent) => self.silent = silent,
                    Command::Move(socket) => (self.socket, self.former) = (socket, None),
                    Command::Roam(socket) => self.former = Some(std::mem::replace(&mut self.socket, socket)),
                    Command::Renew => self.session.announce(false, now),
                    Command::Stop => return Ok(()),
                }
                self.finish()?;
            }
            self.session.tick(Instant::now());
            self.finish()?;
            for _ in 0..BURST {
                let Some(len) = self.read_device(&mut buffer)? else { break };
                self.session.send(&buffer[..len], Instant::now());
                self.finish()?;
            }
            // Bounded, so that commands are handled under a flood, too.
            for _ in 0..BURST {
                let received = match (&self.former, self.socket.recv_from(&mut buffer)) {
                    (Some(former), Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                        former.recv_from(&mut buffer)
                    }
                    (_, received) => received,
                };
                match received {
                    Ok(_) if self.silent => {}
                    Ok((len, from)) => {
                        self.session.datagram(&buffer[..len], from, Instant::now());
                        self.finish()?;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if is_passing(&error) => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }

    /// Sends the session's datagrams, and publishes counters and then events, so that the counters always include an event.
    fn finish(&mut self) -> io::Result<()> {
        self.flush()?;
        self.write_device()?;
        *self.published.lock().unwrap_or_else(PoisonError::into_inner) = self.session.counters;
        for event in self.session.events.drain(..) {
            // The receiver may have been dropped.
            let _ = self.events.send(event);
        }
        Ok(())
    }

    /// Waits for a datagram, a command or the session's deadline.
    fn wait(&self) -> io::Result<()> {
        let timeout = self.session.deadline().map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let (former, device) = (self.former.as_ref().map(AsFd::as_fd), self.device.as_ref().map(AsFd::as_fd));
        let descriptors = [Some(self.socket.as_fd()), Some(self.wake.as_fd()), former, device];
        let mut descriptors: Vec<_> =
            descriptors.into_iter().flatten().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        match rustix::event::poll(&mut descriptors, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn read_device(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let Some(device) = &self.device else { return Ok(None) };
        match rustix::io::read(device, buffer) {
            Ok(len) => Ok(Some(len)),
            Err(Errno::AGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn write_device(&mut self) -> io::Result<()> {
        for packet in self.session.inside.drain(..) {
            let Some(device) = &self.device else { continue };
            match rustix::io::write(device, &packet) {
                // INVAL: the octets are no IP packet. IO: the device is down. A full device loses packets, as any device does.
                Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS | Errno::INVAL | Errno::IO) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        for (to, datagram) in self.session.out.drain(..) {
            if self.silent {
                continue;
            }
            match self.socket.send_to(&datagram, to) {
                Ok(_) => {}
                // A full buffer loses a datagram, as a network does.
                Err(error) if is_passing(&error) || error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Errors about the network, not about the socket.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::*;
    matches!(error.kind(), ConnectionRefused | HostUnreachable | NetworkUnreachable | NetworkDown | Interrupted)
}
