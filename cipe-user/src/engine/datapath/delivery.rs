//! Delivers opened packets to their devices. A run of TCP segments or UDP datagrams becomes one superframe; any other packet is
//! sent in its own frame. Packets that may take the short cut leave directly by a LAN card.

use cipe_common::Verdict;

use super::outlet::{Device, Devices, Link, Outlet};
use super::packets::Delivery;
use super::{Datapath, ethernet};
use crate::control::protocol::Protocol;
use crate::engine::lan::{self, Exit, Exits};
use crate::xsk::Umem;

impl Datapath {
    /// Delivers all opened packets to the devices of their tunnels.
    pub fn deliver(&mut self, devices: &mut impl Devices) {
        let Self { tunnels, exits, umem, pool, coalescer, deliveries, now, .. } = self;
        let (umem, now) = (&*umem, *now);
        for batch in deliveries.chunk_by_mut(|a, b| a.tunnel == b.tunnel) {
            let Some(tunnel) = tunnels.get(&batch[0].tunnel) else { continue };
            let Some(device) = devices.hub(tunnel.hub) else {
                tunnel.counters.count_all(Verdict::PrivateFull, batch.len() as u64);
                continue;
            };
            if tunnel.protocol == Protocol::Ethernet {
                let mut outlet = Outlet { device, tunnel, link: Link::Whole, umem, pool, now };
                ethernet::deliver(&mut outlet, coalescer, batch);
                continue;
            }
            let mut left = batch.len();
            let some_may_exit = if exits.is_empty() { &mut [] } else { &mut *batch };
            for delivery in some_may_exit {
                if let Some(exit) = exit_of(exits, delivery, umem)
                    && let Some(device) = devices.lan(exit.slot)
                    // A device that takes superframes copies each frame anyway, so one superframe of many segments costs less.
                    && !device.takes_superframes(delivery.octets(umem), now)
                {
                    Outlet { device, tunnel, link: Link::Lan(exit.hop), umem, pool, now }.transmit(delivery);
                    left -= 1;
                }
            }
            if left == 0 {
                continue;
            }
            coalescer.clear();
            for delivery in &*batch {
                coalescer.push(delivery.headers.plain_packet(delivery.octets(umem)));
            }
            for run in coalescer.runs() {
                // All packets of a run have the addresses and the TTL of the first, and are not longer.
                let first = run.packets().next().map(|index| &batch[index]);
                if let Some(exit) = first.and_then(|first| exit_of(exits, first, umem))
                    && let Some(device) = devices.lan(exit.slot)
                {
                    Outlet { device, tunnel, link: Link::Lan(exit.hop), umem, pool, now }.send(batch, &run);
                } else if let Some(device) = devices.hub(tunnel.hub) {
                    Outlet { device, tunnel, link: Link::Hidden(tunnel.private_hop), umem, pool, now }
                        .send(batch, &run);
                }
            }
        }
        deliveries.drain(..).filter_map(|delivery| delivery.frame).for_each(|frame| pool.put(frame));
    }
}

/// Returns the LAN card and next hop of a packet that may take the short cut.
fn exit_of(exits: &mut Exits, delivery: &Delivery, umem: &Umem) -> Option<Exit> {
    if exits.is_empty() {
        return None;
    }
    let (packet, headers) = delivery.headers.packet(delivery.octets(umem))?;
    let (source, destination) = lan::plain(packet, headers)?;
    exits.find(delivery.tunnel, source, destination).filter(|exit| packet.len() <= exit.mtu)
}
