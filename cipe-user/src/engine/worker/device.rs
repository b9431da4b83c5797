//! A device of the private side as a worker has it: the hidden end of a hub or of an Ethernet tunnel's pair, or a LAN card with a
//! short cut.

use std::io::IoSlice;
use std::time::Instant;

use rustix::io::Errno;

use super::Worker;
use super::refusals::Refusals;
use crate::engine::BATCH;
use crate::engine::carrier::outer::ETHERNET;
use crate::engine::datapath::{Device, Devices, Injected};
use crate::engine::port::{Turns, XskPort};
use crate::inner::coalesce::VNET_HEADER;
use crate::kernel::bpf::Ends;
use crate::xsk::{Injector, Packet, Pool, Umem};

/// Sockets of one device.
pub(super) struct PrivateDevice {
    ports: Vec<XskPort>,
    turns: Turns,
    injector: Injector,
    kind: Kind,
    refusals: Refusals,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The hidden end of a veth pair. What a full queue drops, it would drop in single frames as well.
    Hidden,
    /// A card, and whether it is worth joining packets for. Single frames wait in a ring of their own for a full queue.
    Lan { superframes: bool },
}

/// The hidden end of a hub: where the packets of all its tunnels come from and go to; or that of an Ethernet tunnel's own pair.
pub(super) struct HubDevice {
    pub(super) device: PrivateDevice,
    pub(super) ends: Ends,
    /// The tunnel whose own it is.
    pub(super) of: Option<u16>,
}

/// What opened packets leave by.
pub(super) struct Private<'a> {
    pub(super) hubs: &'a mut [Option<HubDevice>],
    pub(super) lans: &'a mut [Option<PrivateDevice>],
}

impl Devices for Private<'_> {
    type Device = PrivateDevice;

    fn hub(&mut self, slot: usize) -> Option<&mut PrivateDevice> {
        Some(&mut self.hubs.get_mut(slot)?.as_mut()?.device)
    }

    fn lan(&mut self, slot: usize) -> Option<&mut PrivateDevice> {
        self.lans.get_mut(slot)?.as_mut()
    }
}

impl PrivateDevice {
    /// The hidden end of a veth pair, with the sockets of this worker's queues, and the way in for superframes.
    pub(super) fn hidden(ports: Vec<XskPort>, injector: Injector) -> Self {
        Self::new(ports, injector, Kind::Hidden)
    }

    /// A LAN card; `superframes`: it cuts such itself.
    pub(super) fn lan(ports: Vec<XskPort>, injector: Injector, superframes: bool) -> Self {
        Self::new(ports, injector, Kind::Lan { superframes })
    }

    fn new(ports: Vec<XskPort>, injector: Injector, kind: Kind) -> Self {
        Self { ports, turns: Turns::default(), injector, kind, refusals: Refusals::default() }
    }

    /// Takes one batch of frames; returns whether there may be more.
    pub(super) fn receive(&mut self, received: &mut Vec<Packet>, pool: &mut Pool) -> bool {
        let Self { ports, turns, .. } = self;
        let (_, more) = turns.take(ports.len(), BATCH, |port, most| ports[port].receive(received, most, pool));
        more
    }

    /// The sockets.
    pub(super) fn ports(&mut self) -> impl Iterator<Item = &mut XskPort> {
        self.ports.iter_mut()
    }

    /// The sockets, to be closed.
    pub(super) fn into_ports(self) -> Vec<XskPort> {
        self.ports
    }
}

impl Device for PrivateDevice {
    fn transmit(&mut self, packet: Packet, umem: &Umem, pool: &mut Pool) -> Result<(), Packet> {
        if let Some(port) = self.ports.first_mut() {
            return port.transmit(packet, pool);
        }
        // A device may have fewer queues than there are workers.
        match self.injector.send(&[IoSlice::new(&[0; VNET_HEADER]), IoSlice::new(packet.data(umem))]) {
            Ok(()) => {
                pool.put(packet.frame);
                Ok(())
            }
            Err(_) => Err(packet),
        }
    }

    fn takes_superframes(&self, headers: &[u8], now: Instant) -> bool {
        self.kind != Kind::Lan { superframes: false } && self.refusals.allow(headers, now)
    }

    fn inject(&mut self, headers: &[u8], pieces: &[IoSlice<'_>], pool: &mut Pool, now: Instant) -> Injected {
        // What waits in a port may belong to the same flow, and came before.
        for port in &mut self.ports {
            port.flush(pool);
        }
        let sent = self.injector.send(pieces);
        if let Some((what, errno, wait)) = self.refusals.take_in(headers, sent, now) {
            let (injector, wait) = (&self.injector, wait.as_secs());
            match self.kind {
                // Usual before Linux 6.2, for UDP.
                Kind::Hidden => {
                    tracing::debug!("{injector}: superframes of {what} refused: {errno}; single frames for {wait} s");
                }
                Kind::Lan { .. } => {
                    tracing::warn!("{injector}: superframes of {what} refused: {errno}; single frames for {wait} s");
                }
            }
        }
        match (sent, self.kind) {
            (Ok(()), _) => Injected::Sent,
            (Err(Errno::NOBUFS | Errno::AGAIN), Kind::Hidden) => Injected::Dropped,
            (Err(_), _) => Injected::Refused,
        }
    }
}

impl Worker {
    /// Takes one batch from a hub, seals it and sends it; returns whether there may be more.
    pub(super) fn outbound(&mut self, slot: usize) -> bool {
        let Some(Some(HubDevice { device, ends, of })) = self.hubs.get_mut(slot) else { return false };
        let more = device.receive(&mut self.received, &mut self.datapath.pool);
        match ends {
            Ends::Hub => self.datapath.seal(&mut self.received, &mut self.outgoing),
            Ends::Ethernet => self.datapath.seal_frames(*of, &mut self.received, &mut self.outgoing),
        }
        self.send_outgoing();
        more
    }

    /// Takes one batch from a LAN card, seals it and sends it; returns whether there may be more.
    pub(super) fn outbound_lan(&mut self, slot: usize) -> bool {
        let Some(Some(lan)) = self.lans.get_mut(slot) else { return false };
        let more = lan.receive(&mut self.received, &mut self.datapath.pool);
        for packet in &mut self.received {
            let frame = packet.data(&self.datapath.umem);
            let total = match frame.get(ETHERNET..) {
                Some([0x40..=0x4F, _, high, low, ..]) => usize::from(u16::from_be_bytes([*high, *low])),
                _ => continue,
            };
            // What follows is Ethernet's padding.
            packet.len = packet.len.min((ETHERNET + total) as u32);
        }
        self.datapath.seal(&mut self.received, &mut self.outgoing);
        self.send_outgoing();
        more
    }
}
