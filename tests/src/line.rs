//! A line without Ethernet between two namespaces: a TUN device at either end and a thread that carries packets, as ppp does.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use tun_rs::{DeviceBuilder, SyncDevice};

use crate::namespace::Namespace;

/// A line; dropping it removes it.
pub struct Line {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Line {
    /// Makes a device of this name in both namespaces, sets it up, and gives it its own and its peer's address.
    ///
    /// # Errors
    /// The kernel reports an error, or `ip` fails.
    pub fn new(name: &str, ends: [(&Namespace, Ipv4Addr); 2]) -> Result<Self> {
        let device = |end: usize| -> Result<SyncDevice> {
            let ((namespace, own), (_, other)) = (ends[end], ends[1 - end]);
            let device = namespace
                .run(|| DeviceBuilder::new().name(name).mtu(1500).build_sync())
                .context("TUN device (is /dev/net/tun there?)")?;
            namespace.ip(&["link", "set", name, "up"])?;
            namespace.ip(&["addr", "add", &own.to_string(), "peer", &other.to_string(), "dev", name])?;
            Ok(device)
        };
        let devices = [device(0)?, device(1)?];
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let thread = std::thread::spawn({
            let stop = stop.clone();
            move || carry(&devices, &stop)
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let ended = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes()).map_err(io::Error::from);
        let outcome = self.thread.take().map_or(Ok(Ok(())), JoinHandle::join);
        if ended.is_err() || !matches!(outcome, Ok(Ok(()))) {
            eprintln!("line: {ended:?}, {outcome:?}");
        }
    }
}

fn carry(devices: &[SyncDevice; 2], stop: &OwnedFd) -> io::Result<()> {
    let mut packet = vec![0; 1 << 16];
    loop {
        let fds = [devices[0].as_fd(), devices[1].as_fd(), stop.as_fd()];
        let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            result => result?,
        };
        if !fds[2].revents().is_empty() {
            return Ok(());
        }
        for from in [0, 1] {
            if fds[from].revents().contains(PollFlags::IN) {
                let length = devices[from].recv(&mut packet)?;
                // A device that is full or is being removed loses the packet, as a line would.
                let _ = devices[1 - from].send(&packet[..length]);
            }
        }
    }
}
