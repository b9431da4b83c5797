//! Frames from a packet socket, which a thread collects.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBufForce;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::net::{RecvFlags, recv};
use socket2::{Domain, Protocol, Socket, Type};

use crate::namespace::Namespace;
use crate::process::patient;

/// `ETH_P_ALL`, in network order as packet(7) requires.
const ALL_PROTOCOLS: i32 = 0x0003_u16.to_be() as i32;

/// A captured frame.
#[derive(Clone, Debug)]
pub struct Captured {
    /// When it was read.
    pub at: Instant,
    /// The frame, from the Ethernet header on.
    pub octets: Vec<u8>,
}

/// A running capture; ends when dropped.
pub struct Capture {
    shared: Arc<Shared>,
    stop: Arc<OwnedFd>,
    socket: Arc<Socket>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

#[derive(Default)]
struct Shared {
    frames: Mutex<Vec<Captured>>,
    arrived: Condvar,
}

impl Capture {
    /// Captures on all devices of `namespace` the frames that `keep` accepts, in both directions, up to `limit` frames.
    ///
    /// # Errors
    /// A packet socket cannot be opened.
    pub fn start(namespace: &Namespace, limit: usize, keep: impl Fn(&[u8]) -> bool + Send + 'static) -> Result<Self> {
        let socket = namespace
            .run(|| Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(ALL_PROTOCOLS))))
            .context("packet socket")?;
        // By force: a buffer of the default limit is full after a few superframes, and frames lost here would look as if they
        // were lost on the link.
        setsockopt(&socket, RcvBufForce, &(64 << 20))?;
        let (socket, stop) = (Arc::new(socket), Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?));
        let shared = Arc::new(Shared::default());
        let thread = std::thread::spawn({
            let (shared, stop, socket) = (shared.clone(), stop.clone(), socket.clone());
            move || run(&socket, &stop, &shared, limit, keep)
        });
        Ok(Self { shared, stop, socket, thread: Some(thread) })
    }

    /// Waits for a frame that `wanted` accepts, and returns it; `None` if none came `within` that time.
    pub fn wait_for(&self, within: Duration, wanted: impl Fn(&[u8]) -> bool) -> Option<Captured> {
        let deadline = Instant::now() + patient(within);
        let mut seen = 0;
        let mut frames = self.shared.frames.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(frame) = frames[seen..].iter().find(|frame| wanted(&frame.octets)) {
                return Some(frame.clone());
            }
            seen = frames.len();
            let left = deadline.checked_duration_since(Instant::now())?;
            frames = self.shared.arrived.wait_timeout(frames, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Frames that the kernel dropped since the last call, because the buffer was full.
    ///
    /// # Errors
    /// getsockopt(2) fails.
    pub fn missed(&self) -> io::Result<u32> {
        // struct tpacket_stats: packets, drops.
        let mut statistics = [0_u32; 2];
        let mut length = size_of_val(&statistics) as libc::socklen_t;
        let (descriptor, level, name) = (self.socket.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_STATISTICS);
        // SAFETY: the kernel writes at most `length` octets, all of which `statistics` has.
        let answer =
            unsafe { libc::getsockopt(descriptor, level, name, (&raw mut statistics).cast(), &raw mut length) };
        if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(statistics[1]) }
    }

    /// Ends the capture and returns the frames in order.
    ///
    /// # Errors
    /// An error while capturing: frames may be missing.
    pub fn finish(mut self) -> Result<Vec<Captured>> {
        self.end().context("capture")?;
        Ok(std::mem::take(&mut *self.shared.frames.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    fn end(&mut self) -> io::Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        rustix::io::write(&*self.stop, &1_u64.to_ne_bytes())?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the capture thread panicked")))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("capture: {error}");
        }
    }
}

fn run(socket: &Socket, stop: &OwnedFd, shared: &Shared, limit: usize, keep: impl Fn(&[u8]) -> bool) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 17];
    loop {
        let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            result => result?,
        };
        let (packet, ending) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
        if packet {
            // First read the frames that arrived before the stop.
            let (length, _) = match recv(socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::NETDOWN) => continue,
                result => result?,
            };
            if keep(&buffer[..length]) {
                let mut frames = shared.frames.lock().unwrap_or_else(PoisonError::into_inner);
                if frames.len() < limit {
                    frames.push(Captured { at: Instant::now(), octets: buffer[..length].to_vec() });
                    shared.arrived.notify_all();
                }
            }
        } else if ending {
            return Ok(());
        }
    }
}
