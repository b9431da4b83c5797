//! Numbered datagrams in several flows, each of which must come out whole and in order.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::topology::{Side, Topology};

/// Datagrams of a flow that are on their way at once.
const WINDOW: u32 = 4;

/// Payload octets in turn, so that no two in a row can leave as segments of one superframe.
const UNLIKE: [usize; 2] = [1200, 1100];

/// Flows from one LAN to the other.
pub struct Flows {
    /// Senders and receivers.
    pairs: Vec<(UdpSocket, UdpSocket)>,
    sizes: [usize; 2],
    next: u32,
}

impl Flows {
    /// `count` flows whose datagrams are of one size, or of two in turn.
    ///
    /// # Errors
    /// Sockets that cannot be had.
    pub fn new(net: &Topology, from: Side, count: usize, unlike: bool) -> Result<Self> {
        let flow = |_| {
            let receiver = net.lan(from.other()).run(|| UdpSocket::bind((from.other().host(), 0)))?;
            receiver.set_read_timeout(Some(Duration::from_secs(10)))?;
            let sender = net.lan(from).run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
            sender.connect(receiver.local_addr()?)?;
            Ok((sender, receiver))
        };
        let sizes = if unlike { UNLIKE } else { [UNLIKE[0]; 2] };
        Ok(Self { pairs: (0..count).map(flow).collect::<Result<_>>()?, sizes, next: 0 })
    }

    /// Sends some datagrams in each flow, all flows in turn, and waits until they have arrived; returns how many.
    ///
    /// # Errors
    /// One that is lost, or that another one of its flow has overtaken.
    pub fn round(&mut self) -> Result<u64> {
        let numbers = self.next..self.next + WINDOW;
        self.next += WINDOW;
        let mut octets = [0; UNLIKE[0]];
        let mut sizes = self.sizes.iter().cycle();
        for number in numbers.clone() {
            octets[..4].copy_from_slice(&number.to_be_bytes());
            for (sender, _) in &self.pairs {
                sender.send(&octets[..sizes.next().copied().unwrap_or_default()])?;
            }
        }
        for (flow, (_, receiver)) in self.pairs.iter().enumerate() {
            for number in numbers.clone() {
                let mut received = [0; UNLIKE[0]];
                let lost = || format!("flow {flow}, datagram {number} is lost");
                receiver.recv(&mut received).with_context(lost)?;
                let arrived = u32::from_be_bytes([received[0], received[1], received[2], received[3]]);
                ensure!(arrived == number, "flow {flow}: {arrived} arrives in the place of {number}");
            }
        }
        Ok(u64::from(WINDOW) * self.pairs.len() as u64)
    }
}
