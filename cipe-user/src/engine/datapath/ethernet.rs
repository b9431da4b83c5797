//! Delivers opened frames of Ethernet tunnels (protocol 4) to the tunnel's own veth pair.

use cipe_common::Verdict;

use super::outlet::{Device, Outlet};
use super::packets::Delivery;
use crate::engine::carrier::outer::ETHERNET;
use crate::inner::coalesce::Coalescer;
use crate::inner::headers::IpVersion;
use crate::inner::mss;

/// Octets of a VLAN tag. The kernel accepts one tag beyond the MTU.
const TAG: usize = 4;

/// Delivers the opened frames of one tunnel to its device. A run of segments with the same Ethernet header becomes a superframe;
/// other frames are sent one by one.
pub(super) fn deliver<D: Device>(outlet: &mut Outlet<'_, D>, coalescer: &mut Coalescer, batch: &mut [Delivery]) {
    let (tunnel, umem) = (outlet.tunnel, outlet.umem);
    let mtu = tunnel.mtu.of(IpVersion::V4);
    for delivery in &mut *batch {
        // The kernel would drop such a frame without a count.
        if delivery.inner.len() > ETHERNET + TAG + tunnel.device_mtu {
            tunnel.counters.count(Verdict::PrivateFull);
            delivery.frame.take().into_iter().for_each(|frame| outlet.pool.put(frame));
        }
        if tunnel.clamp_mss
            && let Some(frame) = &mut delivery.frame
        {
            let octets = umem.chunk_mut(frame).get_mut(delivery.inner.clone()).unwrap_or_default();
            if let Some((packet, headers)) = delivery.headers.packet_mut(octets) {
                mss::clamp(packet, headers, mtu);
            }
        }
    }
    let header = |delivery: &Delivery| delivery.octets(umem).first_chunk::<ETHERNET>().copied();
    for alike in batch.chunk_by_mut(|a, b| header(a) == header(b)) {
        coalescer.clear();
        for delivery in &*alike {
            coalescer.push(delivery.headers.plain_packet(delivery.octets(umem)));
        }
        for run in coalescer.runs() {
            outlet.send(alike, &run);
        }
    }
}
