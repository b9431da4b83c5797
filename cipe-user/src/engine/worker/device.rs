//! A device of the private side, as used by one worker: the hidden end of a hub or of an Ethernet tunnel's pair, or a
//! LAN card with a short cut.

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

/// The sockets of one device.
pub(super) struct PrivateDevice {
    ports: Vec<XskPort>,
    turns: Turns,
    injector: Injector,
    kind: Kind,
    refusals: Refusals,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The hidden end of a veth pair. If its queue is full, single frames would be dropped as well.
    Hidden,
    /// A card, and whether superframes are useful on it. If its queue is full, single frames wait in the transmit ring.
    Lan { superframes: bool },
}

/// The hidden end of a hub, which carries the packets of all its tunnels; or of the pair of one Ethernet tunnel.
pub(super) struct HubDevice {
    pub(super) device: PrivateDevice,
    pub(super) ends: Ends,
    /// The Ethernet tunnel that owns the pair.
    pub(super) of: Option<u16>,
}

/// The devices for decrypted packets.
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
    /// Creates the hidden end of a veth pair, with the sockets of this worker's queues and the injector of superframes.
    pub(super) fn hidden(ports: Vec<XskPort>, injector: Injector) -> Self {
        Self::new(ports, injector, Kind::Hidden)
    }

    /// Creates a LAN card; `superframes`: whether it segments superframes.
    pub(super) fn lan(ports: Vec<XskPort>, injector: Injector, superframes: bool) -> Self {
        Self::new(ports, injector, Kind::Lan { superframes })
    }

    fn new(ports: Vec<XskPort>, injector: Injector, kind: Kind) -> Self {
        Self { ports, turns: Turns::default(), injector, kind, refusals: Refusals::default() }
    }

    /// Receives one batch of frames. Returns whether there may be more.
    pub(super) fn receive(&mut self, received: &mut Vec<Packet>, pool: &mut Pool) -> bool {
        let Self { ports, turns, .. } = self;
        let (_, more) = turns.take(ports.len(), BATCH, |port, most| ports[port].receive(received, most, pool));
        more
    }

    /// Returns the sockets.
    pub(super) fn ports(&mut self) -> impl Iterator<Item = &mut XskPort> {
        self.ports.iter_mut()
    }

    /// Returns the sockets, to be closed.
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
        // Queued packets may belong to the same flow, and are older.
        for port in &mut self.ports {
            port.flush(pool);
        }
        let sent = self.injector.send(pieces);
        if let Some((what, errno, wait)) = self.refusals.record(headers, sent, now) {
            let (injector, wait) = (&self.injector, wait.as_secs());
            match self.kind {
                // Usual for UDP before Linux 6.2.
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
    /// Receives one batch from a hub, seals it and sends it. Returns whether there may be more.
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

    /// Receives one batch from a LAN card, seals it and sends it. Returns whether there may be more.
    pub(super) fn outbound_lan(&mut self, slot: usize) -> bool {
        let Some(Some(lan)) = self.lans.get_mut(slot) else { return false };
        let more = lan.receive(&mut self.received, &mut self.datapath.pool);
        for packet in &mut self.received {
            let frame = packet.data(&self.datapath.umem);
            let total = match frame.get(ETHERNET..) {
                Some([0x40..=0x4F, _, high, low, ..]) => usize::from(u16::from_be_bytes([*high, *low])),
                _ => continue,
            };
            // The rest is Ethernet padding.
            packet.len = packet.len.min((ETHERNET + total) as u32);
        }
        self.datapath.seal(&mut self.received, &mut self.outgoing);
        self.send_outgoing();
        more
    }
}
