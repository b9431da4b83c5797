//! The choice of one tunnel's door.

use std::net::SocketAddr;

use super::super::carriers::{Served, is_unlikely};
use super::super::lan::Lans;
use super::super::shared::Shared;
use super::super::tunnels::{Socks, Tenant, Tunnels};
use super::Doors;
use crate::control::protocol::CarrierChoice;
use crate::engine::carrier::outer::Hop;
use crate::engine::carrier::{Path, Share};
use crate::engine::tunnel::Egress;
use crate::kernel::bpf::XdpMode;
use crate::kernel::links::CardKind;
use crate::kernel::nexthop::NextHop;
use crate::kernel::policies::CarrierFlow;
use crate::kernel::zone;

impl Doors {
    /// Chooses the door of a tunnel for this next hop, and moves the tunnel to the hop's carrier device. While that device is being
    /// opened or closed, the UDP socket serves.
    pub(in crate::engine::manager) async fn choose(
        &mut self,
        hop: NextHop,
        number: u16,
        shared: &mut Shared,
        lans: &Lans,
    ) -> Egress {
        let is_open = self.use_carrier(hop.ifindex, number, shared, lans).await;
        let door = match shared.tunnels.get(number) {
            Some(tenant) if !is_open => Some(self.socket_note(hop.ifindex, tenant, &shared.tunnels, lans).await),
            _ => None,
        };
        let Some(tenant) = shared.tunnels.get_mut(number) else { return Egress::Socket };
        tenant.door = door;
        let before = tenant.hop.replace(hop);
        if before.is_some_and(|before| before.ifindex != hop.ifindex) {
            tenant.carrier_socket.segmentation().start_over();
        }
        let (me, choice) = (tenant.me, tenant.carrier_choice);
        let after = is_open.then_some(hop.ifindex);
        let before = std::mem::replace(&mut tenant.carrier, after);
        if let Some(unused) = before.filter(|_| before != after) {
            self.carriers.release(unused, number, &mut shared.jobs);
        }
        after.and_then(|_| self.path(hop, me, choice)).map_or(Egress::Socket, Egress::Carrier)
    }

    /// Adds a tunnel to the users of a carrier device, or starts to open the device; returns whether AF_XDP serves it now.
    async fn use_carrier(&mut self, ifindex: u32, number: u16, shared: &mut Shared, lans: &Lans) -> bool {
        let Some(tenant) = shared.tunnels.get(number) else { return false };
        // Datagrams through another tunnel enter its device as any host's packets do.
        let is_through = shared.tunnels.of_device(ifindex).is_some();
        if tenant.carrier_choice == CarrierChoice::Udp || tenant.refused == Some(ifindex) || is_through {
            return false;
        }
        let bypassed = self.bypassed_policy(tenant, ifindex);
        if bypassed.is_some() && tenant.carrier_choice == CarrierChoice::Auto {
            return false;
        }
        match self.carriers.join(ifindex, number) {
            Served::Open => return true,
            Served::Changing => return false,
            Served::No => {}
        }
        if let Some(policy) = bypassed {
            shared.daemons.notice(number, format!("{policy}, and `carrier xdp` passes it by; use carrier auto or udp"));
        }
        let (choice, mut mode) = (tenant.carrier_choice, tenant.xdp_mode);
        let card = match self.platform.netlink.card(ifindex).await {
            Ok(card) => card,
            Err(error) => {
                shared.daemons.notice(number, format!("{error}; sending by UDP socket"));
                return false;
            }
        };
        let by_sight = choice == CarrierChoice::Auto && card.superframes;
        if by_sight {
            // With generic XDP a superframe would still come now and then, and pass for one large datagram.
            if mode == XdpMode::Generic || !self.carriers.has_single_frames(ifindex) {
                return false;
            }
            mode = XdpMode::Native;
        }
        let unlikely = is_unlikely(&card);
        let begun = match lans.has(ifindex) {
            true => Err(anyhow::anyhow!("{}: the short cut (`lan`) has its AF_XDP sockets", card.name)),
            false => self.carriers.begin(card, mode, by_sight, number, &mut shared.jobs),
        };
        if let Err(error) = begun {
            self.refused(ifindex, number, unlikely, &error, shared).await;
        }
        false
    }

    /// The egress by a card, if AF_XDP serves it. With copies, UDP_SEGMENT is faster than AF_XDP, except for datagrams that leave
    /// one a call, and live frames are faster than either (docs/BENCHMARKS.md).
    fn path(&self, hop: NextHop, me: SocketAddr, choice: CarrierChoice) -> Option<Path> {
        let carrier = self.carriers.get(hop.ifindex)?;
        let share = match choice {
            CarrierChoice::Auto if carrier.sends_live() => Share::Many,
            CarrierChoice::Auto if !carrier.zero_copy => Share::Alone,
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

    /// The IPsec policy of the host that a tunnel's datagrams would bypass by AF_XDP on a device.
    fn bypassed_policy(&self, tenant: &Tenant, ifindex: u32) -> Option<String> {
        let flow = CarrierFlow { me: tenant.me, peer: tenant.target()?, ifindex, mark: tenant.mark };
        self.policies.borrow().passed_by(&flow)
    }

    /// The status note that a tunnel uses its UDP socket on this device, and why.
    async fn socket_note(&self, ifindex: u32, tenant: &Tenant, tunnels: &Tunnels, lans: &Lans) -> String {
        let card = self.platform.netlink.card(ifindex).await.inspect_err(|error| tracing::debug!("{error}"));
        let (name, other) = match &card {
            Ok(card) => (card.name.as_str(), card.kind == CardKind::Other),
            Err(_) => ("a device that has gone", false),
        };
        match (tenant.socks, tenant.carrier_choice) {
            (Some(Socks { server, relay: Some(relay) }), _) => {
                let (relay, server) = (zone::Shown(relay), zone::Shown(server));
                format!("{name}: UDP socket, by the relay {relay} of the SOCKS5 server {server}")
            }
            (Some(Socks { server, relay: None }), _) => {
                format!("no relay of the SOCKS5 server {}", zone::Shown(server))
            }
            (None, CarrierChoice::Udp) => format!("{name}: UDP socket, as `carrier` says"),
            (None, CarrierChoice::Auto) if let Some(policy) = self.bypassed_policy(tenant, ifindex) => {
                format!("{name}: UDP socket, {policy}")
            }
            (None, _) if other => format!("{name}: UDP socket, no Ethernet device"),
            (None, _) if tunnels.of_device(ifindex).is_some() => {
                format!("{name}: UDP socket, through that tunnel")
            }
            (None, _) if tenant.refused == Some(ifindex) && lans.has(ifindex) => {
                format!("{name}: UDP socket, the short cut (`lan`) has its AF_XDP sockets")
            }
            (None, _) if tenant.refused == Some(ifindex) => match self.rivals.on(ifindex) {
                Some(program) => format!("{name}: UDP socket, while another XDP program (id {program}) is attached"),
                None => format!("{name}: UDP socket, AF_XDP refused"),
            },
            (None, _) => format!("{name}: UDP socket, until single frames come in numbers"),
        }
    }
}
