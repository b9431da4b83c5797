//! The routes to the tunnels' peers: this room follows the next hop of each peer, and tells the workers by which egress to send.

use std::net::SocketAddr;

use cipe_common::Verdict;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::doors::Doors;
use super::lan::Lans;
use super::loops::PeerRoute;
use super::platform::log_failure;
use super::shared::Shared;
use super::sizes::TOO_SMALL;
use super::tunnels::Tenant;
use crate::control::protocol::Event;
use crate::engine::tunnel::Egress;
use crate::engine::worker::Command;
use crate::kernel::links;
use crate::kernel::nexthop::{NextHop, NextHopState, NextHops};
use crate::kernel::routes::Flow;
use crate::kernel::zone;

/// Changed next hops that may wait for the manager; followers wait for room.
const MAX_QUEUED_CHANGES: usize = 256;

/// The next hop of a tunnel's peer has changed.
pub(super) struct NextHopChange {
    tunnel: u16,
    /// The peer that was followed; the tunnel may have another one since.
    peer: SocketAddr,
    state: NextHopState,
}

/// Follows the routes to the tunnels' peers.
pub(super) struct CarrierRoutes {
    next_hops: NextHops,
    changes: mpsc::Sender<NextHopChange>,
}

impl CarrierRoutes {
    /// Returns also where the changes come, for [`Self::changed`].
    pub(super) fn new(next_hops: NextHops) -> (Self, mpsc::Receiver<NextHopChange>) {
        let (changes, changed) = mpsc::channel(MAX_QUEUED_CHANGES);
        (Self { next_hops, changes }, changed)
    }

    /// Follows the next hop of a flow until the task is aborted.
    fn watch(&self, tunnel: u16, peer: SocketAddr, flow: Flow) -> AbortHandle {
        let mut states = self.next_hops.watch(flow);
        let changes = self.changes.clone();
        let follower = tokio::spawn(async move {
            while states.changed().await.is_ok() {
                let state = states.borrow_and_update().clone();
                // The manager has ended.
                if changes.send(NextHopChange { tunnel, peer, state }).await.is_err() {
                    return;
                }
            }
        });
        follower.abort_handle()
    }

    /// Follows the route to a tunnel's peer from now on, instead of that to its peer before.
    pub(super) fn follow(&self, number: u16, peer: SocketAddr, shared: &mut Shared) {
        let Some(tenant) = shared.tunnels.get_mut(number) else { return };
        tenant.peer = Some(peer);
        tenant.name_zone();
        if tenant.socks.is_none() {
            self.follow_target(number, shared);
        }
    }

    /// Follows the route to a tunnel's new peer, and tells its daemon of the peer.
    pub(super) fn new_peer(&self, number: u16, peer: SocketAddr, shared: &mut Shared) {
        self.follow(number, peer, shared);
        shared.daemons.tell(number, Event::NewPeer { peer });
    }

    /// Sends a tunnel's datagrams to this relay of its SOCKS5 server, or to none.
    pub(super) fn set_relay(&self, number: u16, relay: Option<SocketAddr>, shared: &mut Shared) {
        let Some(tenant) = shared.tunnels.get_mut(number) else { return };
        let Some(socks) = tenant.socks.as_mut() else { return };
        socks.relay = relay;
        let server = socks.server;
        shared.platform.workers.tell_all(|_| Command::SetRelay(number, relay));
        if relay.is_none() {
            tenant.door = Some(format!("no relay of the SOCKS5 server {}", zone::Shown(server)));
        }
        self.follow_target(number, shared);
    }

    fn follow_target(&self, number: u16, shared: &mut Shared) {
        let Some(tenant) = shared.tunnels.get_mut(number) else { return };
        if let Some(old) = tenant.follower.take() {
            old.abort();
        }
        log_failure(shared.platform.programs().set_tunnel(number.into(), tenant.entry()));
        let Some(peer) = tenant.target() else { return };
        let device = tenant.carrier_device.as_deref().map(links::index_of);
        let flow = Flow::of_socket(tenant.listens, peer, tenant.mark);
        let flow = Flow { device: device.or(flow.device), ..flow };
        tenant.follower = Some(self.watch(number, peer, flow));
    }

    /// A device of this name has come: binds the sockets of the tunnels to it that were bound to the device of this name before, and
    /// moves their link-local addresses there.
    pub(super) fn device_came(&self, name: &str, ifindex: u32, shared: &mut Shared) {
        for number in shared.tunnels.numbers(|tenant| tenant.carrier_device.as_deref() == Some(name)) {
            let Some(tenant) = shared.tunnels.get(number) else { continue };
            if let Err(error) = tenant.carrier_socket.bind_to_device(name) {
                shared.daemons.notice(number, format!("carrier-device {name}: {error}; restart the tunnel"));
            }
            self.follow_target(number, shared);
        }
        let is_moved = |tenant: &Tenant| tenant.zone_name.as_deref() == Some(name) && tenant.zone() != Some(ifindex);
        for number in shared.tunnels.numbers(is_moved) {
            self.move_zone(number, ifindex, shared);
        }
    }

    /// Moves a tunnel's link-local addresses to the device of this index, which has the name of their device now.
    fn move_zone(&self, number: u16, ifindex: u32, shared: &mut Shared) {
        let Some(tenant) = shared.tunnels.get_mut(number) else { return };
        let (before, peer) = (tenant.me, tenant.peer);
        let is_bound = zone::of(tenant.listens).is_some();
        if is_bound && let Err(error) = tenant.carrier_socket.bind_to_device(&zone::name(ifindex)) {
            let address = zone::Shown(zone::moved(tenant.listens, ifindex));
            return shared.daemons.notice(number, format!("{address}: {error}; restart the tunnel"));
        }
        let listened = tenant.listens;
        for address in [&mut tenant.me, &mut tenant.listens] {
            *address = zone::moved(*address, ifindex);
        }
        let (me, listens, is_relayed) = (tenant.me, tenant.listens, tenant.socks.is_some());
        if is_bound && !is_relayed {
            log_failure(shared.platform.programs().remove_carrier_address(listened));
            log_failure(shared.platform.programs().add_carrier_address(listens, number.into()));
        }
        shared.platform.workers.tell_all(|_| Command::SetZone(number, ifindex));
        if me != before {
            shared.daemons.tell(number, Event::NewMe { me, before });
        }
        match peer.map(|peer| zone::moved(peer, ifindex)) {
            Some(moved) if Some(moved) != peer => self.new_peer(number, moved, shared),
            _ => self.follow_target(number, shared),
        }
    }

    /// Applies a change of a next hop, and its consequences for tunnels whose datagrams go through this one.
    pub(super) async fn changed(&self, change: NextHopChange, shared: &mut Shared, doors: &mut Doors, lans: &Lans) {
        self.apply(change, shared, doors, lans).await;
        for (number, peer, hop) in shared.tunnels.changed_by_others() {
            let change = NextHopChange { tunnel: number, peer, state: NextHopState::Found(hop) };
            self.apply(change, shared, doors, lans).await;
        }
    }

    async fn apply(&self, change: NextHopChange, shared: &mut Shared, doors: &mut Doors, lans: &Lans) {
        let NextHopChange { tunnel: number, peer, state } = change;
        let Shared { tunnels, platform, .. } = shared;
        let Some(tenant) = tunnels.get_mut(number).filter(|tenant| tenant.target() == Some(peer)) else { return };
        let hop = match state {
            NextHopState::Unknown => return,
            NextHopState::Unreachable(reason) => Err(reason.to_string()),
            NextHopState::Found(hop) => Ok(hop),
        };
        tenant.looked_up = hop.as_ref().ok().copied();
        let leads = hop.as_ref().map_or(PeerRoute::Out, |hop| tunnels.leads(number, hop.ifindex));
        let counted = platform.verdicts(number).map_or(0, |all| all[Verdict::RouteLoop as usize]);
        let loop_notice = tunnels.set_leads(number, leads, counted);
        let Some(tenant) = tunnels.get_mut(number) else { return };
        let (egress, notice) = match hop {
            // The carrier device stays open: the same route may come back at any moment. And there are drivers that take the link
            // down to attach XDP, which would never end.
            Err(reason) => {
                tenant.hop = None;
                (Egress::NoRoute, Some(reason))
            }
            Ok(_) if leads == PeerRoute::Round => (Egress::Looped, loop_notice),
            // A firewall may lead it elsewhere by a mark, which a look-up does not see. If not, the TC program drops it.
            Ok(_) if leads == PeerRoute::Inward => {
                tenant.hop = None;
                tenant.door = Some("UDP socket; the route leads into the tunnel itself".to_owned());
                (Egress::Socket, None)
            }
            Ok(hop) => {
                set_source(number, hop, shared);
                let is_too_small = set_path_mtu(number, hop, peer, shared);
                (doors.choose(hop, number, shared, lans).await, is_too_small.then(|| TOO_SMALL.to_owned()))
            }
        };
        // The daemon is told after the workers: what the notice says is in force then.
        shared.set_egress(number, peer, egress);
        if let Some(notice) = notice {
            shared.daemons.notice(number, notice);
        }
    }
}

/// Sets the source address of a tunnel's datagrams to that of the next hop, where the system chooses it.
fn set_source(number: u16, hop: NextHop, shared: &mut Shared) {
    let Some(tenant) = shared.tunnels.get_mut(number) else { return };
    let me = zone::socket_address(hop.source, tenant.me.port(), hop.ifindex);
    if tenant.listens.ip().is_unspecified() && tenant.me != me {
        let before = std::mem::replace(&mut tenant.me, me);
        shared.daemons.tell(number, Event::NewMe { me, before });
    }
}

/// Sets the MTU of a tunnel's carrier path; returns whether it has just become too small for any packet.
fn set_path_mtu(number: u16, hop: NextHop, peer: SocketAddr, shared: &mut Shared) -> bool {
    let Shared { tunnels, daemons, platform, .. } = shared;
    let Some(tenant) = tunnels.get_mut(number) else { return false };
    let change = tenant.set_path_mtu(number, hop.mtu as usize, peer.ip(), platform);
    change.notices.into_iter().for_each(|notice| daemons.notice(number, notice));
    change.is_too_small
}
