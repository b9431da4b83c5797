//! A TCP stream that runs until it is ended; each octet is checked on arrival.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::SOON;
use crate::namespace::Namespace;
use crate::process::patient;

/// How long a stream may stall: longer than any retransmission timeout of TCP in these scenarios.
const STALL_LIMIT: Duration = Duration::from_secs(60);
/// Octets of one write; a whole number of patterns.
const BLOCK: usize = 64 * 1024;

/// A running stream; ends when dropped.
pub struct Stream {
    arrived: Arc<(Mutex<u64>, Condvar)>,
    ending: Arc<AtomicBool>,
    sender: TcpStream,
    sending: Option<JoinHandle<io::Result<u64>>>,
    receiving: Option<JoinHandle<io::Result<u64>>>,
}

impl Stream {
    /// Connects and starts to send.
    ///
    /// # Errors
    /// No connection within [`SOON`].
    pub fn start(from: &Namespace, (to, address): (&Namespace, Ipv4Addr)) -> Result<Self> {
        let listener = to.run(|| TcpListener::bind((address, 0)))?;
        let target = listener.local_addr()?;
        let sender = from
            .run(|| TcpStream::connect_timeout(&target, patient(SOON)))
            .with_context(|| format!("TCP to {target}"))?;
        let mut receiver = listener.accept()?.0;
        receiver.set_read_timeout(Some(STALL_LIMIT))?;
        sender.set_write_timeout(Some(STALL_LIMIT))?;
        let (arrived, ending) = (Arc::<(Mutex<u64>, Condvar)>::default(), Arc::new(AtomicBool::new(false)));
        let sending = std::thread::spawn({
            let (mut sender, ending) = (sender.try_clone()?, ending.clone());
            move || {
                let block: Vec<u8> = (0..BLOCK).map(octet).collect();
                let mut sent = 0;
                while !ending.load(Relaxed) {
                    sender.write_all(&block)?;
                    sent += block.len() as u64;
                }
                sender.shutdown(Shutdown::Write)?;
                Ok(sent)
            }
        });
        let receiving = std::thread::spawn({
            let arrived = arrived.clone();
            move || {
                let mut buffer = vec![0; BLOCK];
                let mut at = 0;
                loop {
                    let length = match receiver.read(&mut buffer) {
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                        result => result?,
                    };
                    if length == 0 {
                        return Ok(at as u64);
                    }
                    if !buffer[..length].iter().zip(at..).all(|(got, at)| *got == octet(at)) {
                        return Err(io::Error::other(format!("wrong octets behind the first {at}")));
                    }
                    at += length;
                    *arrived.0.lock().unwrap_or_else(PoisonError::into_inner) = at as u64;
                    arrived.1.notify_all();
                }
            }
        });
        Ok(Self { arrived, ending, sender, sending: Some(sending), receiving: Some(receiving) })
    }

    /// Octets that have arrived so far.
    pub fn arrived(&self) -> u64 {
        *self.arrived.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether both halves still run.
    pub fn is_running(&self) -> bool {
        [&self.sending, &self.receiving].iter().all(|half| half.as_ref().is_some_and(|half| !half.is_finished()))
    }

    /// Waits until a megabyte more has arrived.
    ///
    /// # Errors
    /// The stream has broken, or less arrives within [`SOON`].
    pub fn wait_for_more(&self) -> Result<()> {
        let start = self.arrived();
        let arrived = self.arrived.0.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = self.arrived.1.wait_timeout_while(arrived, patient(SOON), |arrived| *arrived < start + 1_000_000);
        let arrived = *wait.unwrap_or_else(PoisonError::into_inner).0;
        if arrived < start + 1_000_000 {
            bail!("{arrived} octets have arrived, {start} of them before; running: {}", self.is_running());
        }
        Ok(())
    }

    /// Ends the stream and returns the number of octets received, which equals the number sent.
    ///
    /// # Errors
    /// The stream broke, stalled for a minute or lost octets.
    pub fn finish(mut self) -> Result<u64> {
        self.ending.store(true, Relaxed);
        let sent = join(self.sending.take()).context("sending")?;
        let arrived = join(self.receiving.take()).context("receiving")?;
        if sent != arrived {
            bail!("{sent} octets sent, {arrived} arrived");
        }
        Ok(arrived)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.ending.store(true, Relaxed);
        // This ends both threads; it does no harm to a stream that has ended.
        let _ = self.sender.shutdown(Shutdown::Both);
    }
}

/// The octet at a position of the stream.
fn octet(at: usize) -> u8 {
    (at % BLOCK).wrapping_mul(0x9E37_79B1).to_le_bytes()[2]
}

fn join(thread: Option<JoinHandle<io::Result<u64>>>) -> Result<u64> {
    let thread = thread.context("a stream is finished once")?;
    Ok(thread.join().map_err(|_| anyhow!("its thread panicked"))??)
}
