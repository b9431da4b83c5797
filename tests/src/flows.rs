//! Numbered datagrams in several flows; each flow must arrive whole and in order.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::SOON;
use crate::process::patient;
use crate::topology::{Side, Topology};

/// Default number of datagrams of a flow in flight.
const WINDOW: u32 = 4;

/// Alternating payload octets, so that no two datagrams in a row can leave as segments of one superframe.
const ALTERNATING_OCTETS: [usize; 2] = [1200, 1100];

/// Flows from one LAN to the other.
pub struct Flows {
    /// Senders and receivers.
    pairs: Vec<(UdpSocket, UdpSocket)>,
    sizes: [usize; 2],
    window: u32,
    next: u32,
}

impl Flows {
    /// `count` flows whose datagrams are of one size, or of two in turn.
    ///
    /// # Errors
    /// A socket cannot be opened.
    pub fn new(net: &Topology, from: Side, count: usize, unlike: bool) -> Result<Self> {
        let flow = |_| {
            let receiver = net.lan(from.other()).run(|| UdpSocket::bind((from.other().host(), 0)))?;
            receiver.set_read_timeout(Some(patient(SOON)))?;
            let sender = net.lan(from).run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
            sender.connect(receiver.local_addr()?)?;
            Ok((sender, receiver))
        };
        let sizes = if unlike { ALTERNATING_OCTETS } else { [ALTERNATING_OCTETS[0]; 2] };
        Ok(Self { pairs: (0..count).map(flow).collect::<Result<_>>()?, sizes, window: WINDOW, next: 0 })
    }

    /// The same flows with this number of datagrams of each in flight.
    pub fn with_window(self, window: u32) -> Self {
        Self { window, ..self }
    }

    /// Sends some datagrams in each flow, all flows in turn, and waits until they have arrived; returns how many.
    ///
    /// # Errors
    /// A datagram is lost or out of order in its flow.
    pub fn round(&mut self) -> Result<u64> {
        let numbers = self.next..self.next + self.window;
        self.next += self.window;
        let mut octets = [0; ALTERNATING_OCTETS[0]];
        let mut sizes = self.sizes.iter().cycle();
        for number in numbers.clone() {
            octets[..4].copy_from_slice(&number.to_be_bytes());
            octets[4..8].copy_from_slice(&(!number).to_be_bytes());
            for (sender, receiver) in &self.pairs {
                // Number, ports and their complements: all datagrams of a size have the same checksum. One checksum value looks
                // unfinished to generic XDP on a LAN card, and the kernel would forward a packet with it.
                octets[8..10].copy_from_slice(&(!sender.local_addr()?.port()).to_be_bytes());
                octets[10..12].copy_from_slice(&(!receiver.local_addr()?.port()).to_be_bytes());
                sender.send(&octets[..sizes.next().copied().unwrap_or_default()])?;
            }
        }
        for (flow, (_, receiver)) in self.pairs.iter().enumerate() {
            let mut arrived = Vec::new();
            for number in numbers.clone() {
                arrived.push(next(receiver).with_context(|| format!("flow {flow}: {arrived:?} of {numbers:?}"))?);
                if arrived.last() != Some(&number) {
                    // Find out whether it is lost or only late.
                    receiver.set_read_timeout(Some(Duration::from_secs(1)))?;
                    arrived.extend(std::iter::from_fn(|| next(receiver).ok()));
                    bail!("flow {flow} arrives as {arrived:?} of {numbers:?}");
                }
            }
        }
        Ok(u64::from(self.window) * self.pairs.len() as u64)
    }
}

/// The number of the next datagram.
fn next(receiver: &UdpSocket) -> Result<u32> {
    let mut received = [0; ALTERNATING_OCTETS[0]];
    receiver.recv(&mut received)?;
    Ok(u32::from_be_bytes([received[0], received[1], received[2], received[3]]))
}
