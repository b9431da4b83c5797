//! The ways to the tunnels' peers, and by which door each leaves.

use std::net::SocketAddr;

use cipe_common::Verdict;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::Manager;
use super::carriers::{Carrier, Served, is_unlikely};
use super::loops::PeerRoute;
use super::platform::log_failure;
use super::sizes::TOO_SMALL;
use super::tunnels::{Socks, Tenant};
use crate::control::protocol::{CarrierChoice as Door, Event};
use crate::engine::carrier::outer::Hop;
use crate::engine::carrier::{Path, Share};
use crate::engine::tunnel::Egress;
use crate::engine::worker::Command;
use crate::kernel::bpf::XdpMode;
use crate::kernel::links::{self, CardKind};
use crate::kernel::nexthop::{NextHop, NextHopState, NextHops};
use crate::kernel::policies::CarrierFlow;
use crate::kernel::routes::Flow;
use crate::kernel::zone;

/// The way to a tunnel's peer has changed.
pub(super) struct News {
    tunnel: u16,
    /// The peer that was followed; the tunnel may have another by now.
    peer: SocketAddr,
    state: NextHopState,
}

/// Follows the ways to the tunnels' peers.
pub(super) struct Ways {
    next_hops: NextHops,
    news: mpsc::Sender<News>,
}

impl Ways {
    /// Followers that tell of new ways there.
    pub(super) fn new(next_hops: NextHops, news: mpsc::Sender<News>) -> Self {
        Self { next_hops, news }
    }

    /// Follows the way of a tunnel's datagrams to a peer, until the task is aborted.
    fn follow(&self, tunnel: u16, peer: SocketAddr, flow: Flow) -> AbortHandle {
        let mut states = self.next_hops.watch(flow);
        let news = self.news.clone();
        let follower = tokio::spawn(async move {
            while states.changed().await.is_ok() {
                let state = states.borrow_and_update().clone();
                if news.send(News { tunnel, peer, state }).await.is_err() {
                    return;
                }
            }
        });
        follower.abort_handle()
    }
}

impl Manager {
    /// Follows the way to a tunnel's peer from now on, in place of another peer's.
    pub(super) fn follow(&mut self, number: u16, peer: SocketAddr) {
        let Some(tenant) = self.tunnels.get_mut(number) else { return };
        tenant.peer = Some(peer);
        tenant.name_zone();
        if tenant.socks.is_none() {
            self.follow_target(number);
        }
    }

    /// Takes up the relay of a tunnel's SOCKS5 server, or that there is none.
    pub(super) fn set_relay(&mut self, number: u16, relay: Option<SocketAddr>) {
        let Some(socks) = self.tunnels.get_mut(number).and_then(|tenant| tenant.socks.as_mut()) else { return };
        let server = socks.server;
        socks.relay = relay;
        self.platform.workers.tell_all(|_| Command::SetRelay(number, relay));
        let Some(tenant) = self.tunnels.get_mut(number) else { return };
        if relay.is_none() {
            tenant.door = Some(format!("no relay of the SOCKS5 server {}", zone::Shown(server)));
        }
        self.follow_target(number);
    }

    fn follow_target(&mut self, number: u16) {
        let Some(tenant) = self.tunnels.get_mut(number) else { return };
        if let Some(old) = tenant.follower.take() {
            old.abort();
        }
        log_failure(self.platform.programs().set_tunnel(number.into(), tenant.entry()));
        let Some(peer) = tenant.target() else { return };
        let device = tenant.carrier_device.as_deref().map(links::index_of);
        let flow = Flow::of_socket(tenant.listens, peer, tenant.mark);
        let flow = Flow { device: device.or(flow.device), ..flow };
        tenant.follower = Some(self.ways.follow(number, peer, flow));
    }

    /// Binds the sockets of tunnels to the device of this name, which came, anew: that of this name before is another one.
    pub(super) fn carrier_device_came(&mut self, name: &str, ifindex: u32) {
        for number in self.tunnels.numbers(|tenant| tenant.carrier_device.as_deref() == Some(name)) {
            let Some(tenant) = self.tunnels.get(number) else { continue };
            if let Err(error) = tenant.carrier_socket.bind_to_device(name) {
                self.daemons.notice(number, format!("carrier-device {name}: {error}; restart the tunnel"));
            }
            self.follow_target(number);
        }
        let is_moved = |tenant: &Tenant| tenant.zone_name.as_deref() == Some(name) && tenant.zone() != Some(ifindex);
        for number in self.tunnels.numbers(is_moved) {
            self.move_zone(number, ifindex);
        }
    }

    /// Moves a tunnel's link-local addresses to the device of this index, which has taken the name of theirs.
    fn move_zone(&mut self, number: u16, ifindex: u32) {
        let Some(tenant) = self.tunnels.get_mut(number) else { return };
        let (before, peer) = (tenant.me, tenant.peer);
        let is_bound = zone::of(tenant.listens).is_some();
        if is_bound && let Err(error) = tenant.carrier_socket.bind_to_device(&zone::name(ifindex)) {
            let address = zone::Shown(zone::moved(tenant.listens, ifindex));
            return self.daemons.notice(number, format!("{address}: {error}; restart the tunnel"));
        }
        let listened = tenant.listens;
        for address in [&mut tenant.me, &mut tenant.listens] {
            *address = zone::moved(*address, ifindex);
        }
        let (me, listens, is_relayed) = (tenant.me, tenant.listens, tenant.socks.is_some());
        if is_bound && !is_relayed {
            log_failure(self.platform.programs().remove_carrier_address(listened));
            log_failure(self.platform.programs().add_carrier_address(listens, number.into()));
        }
        self.platform.workers.tell_all(|_| Command::SetZone(number, ifindex));
        if me != before {
            self.daemons.tell(number, Event::NewMe { me, before });
        }
        match peer.map(|peer| zone::moved(peer, ifindex)) {
            Some(moved) if Some(moved) != peer => self.new_peer(number, moved),
            _ => self.follow_target(number),
        }
    }

    /// Takes up a new way to a tunnel's peer, or that there is none, and what follows for tunnels through this one.
    pub(super) async fn take_in(&mut self, news: News) {
        self.take_in_one(news).await;
        for (number, peer, hop) in self.tunnels.changed_by_others() {
            self.take_in_one(News { tunnel: number, peer, state: NextHopState::Found(hop) }).await;
        }
    }

    async fn take_in_one(&mut self, News { tunnel: number, peer, state }: News) {
        let Some(tenant) = self.tunnels.get_mut(number).filter(|tenant| tenant.target() == Some(peer)) else { return };
        let hop = match state {
            NextHopState::Unknown => return,
            NextHopState::Unreachable(reason) => Err(reason.to_string()),
            NextHopState::Found(hop) => Ok(hop),
        };
        tenant.looked_up = hop.as_ref().ok().copied();
        let leads = hop.as_ref().map_or(PeerRoute::Out, |hop| self.tunnels.leads(number, hop.ifindex));
        let counted = self.platform.verdicts(number).map_or(0, |all| all[Verdict::RouteLoop as usize]);
        let news_of_loop = self.tunnels.set_leads(number, leads, counted);
        // The news is said when the worker acts by it.
        let (way, news) = match hop {
            // The carrier device stays open: the same way may come back at any moment, and there are drivers that take
            // the link down to attach XDP, which would never end.
            Err(reason) => {
                if let Some(tenant) = self.tunnels.get_mut(number) {
                    tenant.hop = None;
                }
                (Egress::NoRoute, Some(reason))
            }
            Ok(_) if leads == PeerRoute::Round => (Egress::Looped, news_of_loop),
            // A firewall may lead it elsewhere by a mark, of which a look-up knows nothing. If not, the TC program drops it.
            Ok(_) if leads == PeerRoute::Inward => {
                if let Some(tenant) = self.tunnels.get_mut(number) {
                    tenant.hop = None;
                    tenant.door = Some("UDP socket; the route leads into the tunnel itself".to_owned());
                }
                (Egress::Socket, None)
            }
            Ok(hop) => {
                self.set_source(number, hop);
                let too_small = self.set_path_mtu(number, hop.mtu as usize, peer.ip());
                (self.way_over(hop, number).await, too_small.then(|| TOO_SMALL.to_owned()))
            }
        };
        if let Some(tenant) = self.tunnels.get(number) {
            self.platform.workers.tell_all(|_| Command::SetWay(number, peer.ip(), way, tenant.sizes.mtu()));
        }
        if let Some(news) = news {
            self.daemons.notice(number, news);
        }
    }

    /// Takes up the address that packets to the peer leave with, where the system picks it.
    fn set_source(&mut self, number: u16, hop: NextHop) {
        let Some(tenant) = self.tunnels.get_mut(number) else { return };
        let me = zone::socket_address(hop.source, tenant.me.port(), hop.ifindex);
        if tenant.listens.ip().is_unspecified() && tenant.me != me {
            let before = std::mem::replace(&mut tenant.me, me);
            self.daemons.tell(number, Event::NewMe { me, before });
        }
    }

    /// What the way out of a tunnel is, where its carrier device is not open.
    async fn door_by_socket(&self, ifindex: u32, tenant: &Tenant) -> String {
        let card = self.platform.netlink.card(ifindex).await;
        let (name, other) = match &card {
            Ok(card) => (card.name.as_str(), card.kind == CardKind::Other),
            Err(_) => ("a device that has gone", false),
        };
        match (tenant.socks, tenant.carrier_door) {
            (Some(Socks { server, relay: Some(relay) }), _) => {
                let (relay, server) = (zone::Shown(relay), zone::Shown(server));
                format!("{name}: UDP socket, by the relay {relay} of the SOCKS5 server {server}")
            }
            (Some(Socks { server, relay: None }), _) => {
                format!("no relay of the SOCKS5 server {}", zone::Shown(server))
            }
            (None, Door::Udp) => format!("{name}: UDP socket, as `carrier` says"),
            (None, Door::Auto) if let Some(policy) = self.passed_by(tenant, ifindex) => {
                format!("{name}: UDP socket, {policy}")
            }
            (None, _) if other => format!("{name}: UDP socket, no Ethernet device"),
            (None, _) if self.tunnels.of_device(ifindex).is_some() => {
                format!("{name}: UDP socket, through that tunnel")
            }
            (None, _) if tenant.refused == Some(ifindex) && self.lans.has(ifindex) => {
                format!("{name}: UDP socket, the short cut (`lan`) has its AF_XDP sockets")
            }
            (None, _) if tenant.refused == Some(ifindex) => match self.rivals.on(ifindex) {
                Some(program) => format!("{name}: UDP socket, while another XDP program (id {program}) is attached"),
                None => format!("{name}: UDP socket, AF_XDP refused"),
            },
            (None, _) => format!("{name}: UDP socket, until single frames come in numbers"),
        }
    }

    /// Moves a tunnel to the carrier device of a way, and chooses the door. While that device changes between the doors, the UDP
    /// socket serves.
    pub(super) async fn way_over(&mut self, hop: NextHop, number: u16) -> Egress {
        let is_open = self.use_carrier(hop.ifindex, number).await;
        let door = match self.tunnels.get(number) {
            Some(tenant) if !is_open => Some(self.door_by_socket(hop.ifindex, tenant).await),
            _ => None,
        };
        let Some(tenant) = self.tunnels.get_mut(number) else { return Egress::Socket };
        tenant.door = door;
        let before = tenant.hop.replace(hop);
        if before.is_some_and(|before| before.ifindex != hop.ifindex) {
            tenant.carrier_socket.segmentation().start_over();
        }
        let (me, door) = (tenant.me, tenant.carrier_door);
        let after = is_open.then_some(hop.ifindex);
        let before = std::mem::replace(&mut tenant.carrier, after);
        if let Some(unused) = before.filter(|_| before != after) {
            self.carriers.release(unused, number, &mut self.jobs);
        }
        after.and_then(|_| self.path(hop, me, door)).map_or(Egress::Socket, Egress::Carrier)
    }

    /// The way out by a card, where that is wanted: with copies, UDP_SEGMENT is faster than AF_XDP, but for what leaves one a
    /// call, and live frames are faster than either (docs/BENCHMARKS.md).
    fn path(&self, hop: NextHop, me: SocketAddr, door: Door) -> Option<Path> {
        let carrier = self.carriers.get(hop.ifindex)?;
        let share = match door {
            Door::Auto if carrier.sends_live() => Share::Many,
            Door::Auto if !carrier.zero_copy => Share::Alone,
            _ => Share::All,
        };
        Some(Path {
            carrier: carrier.slot,
            hop: Hop { source: hop.source_mac?, destination: hop.destination_mac? },
            source: SocketAddr::new(if me.ip().is_unspecified() { hop.source } else { me.ip() }, me.port()),
            mtu: hop.mtu as usize,
            share,
        })
    }

    /// What of the host's policies a tunnel's datagrams would pass by through AF_XDP on a device.
    fn passed_by(&self, tenant: &Tenant, ifindex: u32) -> Option<String> {
        let flow = CarrierFlow { me: tenant.me, peer: tenant.target()?, ifindex, mark: tenant.mark };
        self.policies.borrow().passed_by(&flow)
    }

    /// Joins a carrier device for a tunnel, or begins to open it; whether AF_XDP serves it.
    async fn use_carrier(&mut self, ifindex: u32, number: u16) -> bool {
        let Some(tenant) = self.tunnels.get(number) else { return false };
        // What goes through another tunnel goes into its device as anybody's packets do.
        let is_through = self.tunnels.of_device(ifindex).is_some();
        if tenant.carrier_door == Door::Udp || tenant.refused == Some(ifindex) || is_through {
            return false;
        }
        let passed_by = self.passed_by(tenant, ifindex);
        if passed_by.is_some() && tenant.carrier_door == Door::Auto {
            return false;
        }
        match self.carriers.join(ifindex, number) {
            Served::Open => return true,
            Served::Changing => return false,
            Served::No => {}
        }
        if let Some(policy) = passed_by {
            self.daemons.notice(number, format!("{policy}, and `carrier xdp` passes it by; use carrier auto or udp"));
        }
        let (door, mut mode) = (tenant.carrier_door, tenant.xdp_mode);
        let card = match self.platform.netlink.card(ifindex).await {
            Ok(card) => card,
            Err(error) => {
                self.daemons.notice(number, format!("{error}; sending by UDP socket"));
                return false;
            }
        };
        let by_sight = door == Door::Auto && card.superframes;
        if by_sight {
            // In the stack a superframe would still come now and then, and pass for one large datagram.
            if mode == XdpMode::Generic || !self.carriers.has_single_frames(ifindex) {
                return false;
            }
            mode = XdpMode::Native;
        }
        let unlikely = is_unlikely(&card);
        let begun = match self.lans.has(ifindex) {
            true => Err(anyhow::anyhow!("{}: the short cut (`lan`) has its AF_XDP sockets", card.name)),
            false => self.carriers.begin(card, mode, by_sight, number, &mut self.jobs),
        };
        if let Err(error) = begun {
            self.carrier_refused(ifindex, number, unlikely, &error).await;
        }
        false
    }

    /// Takes up that a carrier device was opened for a tunnel, or could not be, and chooses the doors of all tunnels over it.
    pub(super) async fn carrier_opened(
        &mut self,
        ifindex: u32,
        asker: u16,
        unlikely: bool,
        carrier: anyhow::Result<Carrier>,
    ) {
        match carrier {
            Ok(carrier) => {
                tracing::info!("{}", carrier.note);
                self.daemons.news(asker, carrier.note.clone());
                if carrier.loses_superframes() {
                    let why = "generic XDP loses what the other end sends in superframes";
                    let message = format!("{}: {why}; use xdp-mode native, or carrier auto or udp", carrier.name);
                    self.daemons.notice(asker, message);
                }
                self.carriers.opened(ifindex, Some(carrier), &mut self.jobs);
            }
            Err(error) => {
                self.carriers.opened(ifindex, None, &mut self.jobs);
                self.carrier_refused(ifindex, asker, unlikely, &error).await;
            }
        }
        self.choose_doors(ifindex).await;
        self.carriers.close_unused(ifindex, &mut self.jobs);
    }

    /// A carrier device could not be opened for a tunnel.
    async fn carrier_refused(&mut self, ifindex: u32, number: u16, unlikely: bool, error: &anyhow::Error) {
        self.tunnels.refuse(number, ifindex);
        self.rivals.note(ifindex).await;
        let Some(tenant) = self.tunnels.get(number) else { return };
        let message = format!("{error:#}; sending by UDP socket");
        // Where the choice is ours, that is no fault of anybody's.
        match unlikely && tenant.carrier_door == Door::Auto {
            true => self.daemons.news(number, message),
            false => self.daemons.notice(number, message),
        }
    }
}
