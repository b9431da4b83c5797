//! How a tunnel is made: everything that can be refused first, then the workers take it, and it is alive when all of them have.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use cipe_common::maps::{EthernetDevice, MAX_TUNNELS, Slot};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, socket, sockopt};

use super::departure::Begun;
use super::hubs::Refused;
use super::loops::{Loops, PeerRoute};
use super::sizes::Sizes;
use super::tunnels::{Socks, Tenant};
use super::workers::Answers;
use super::{Manager, Outcome};
use crate::cipher::Algorithm;
use crate::control::protocol::{Attach, CarrierChoice, Cipher, Event, MAX_MTU, MIN_MTU, Protocol, VERSION};
use crate::engine::carrier::UdpCarrier;
use crate::engine::carrier::outer::Hop;
use crate::engine::tunnel::counters::Tally;
use crate::engine::tunnel::keys::Keys;
use crate::engine::tunnel::{Egress, IpIds, KeyLimits, Tunnel};
use crate::engine::worker::Command;
use crate::kernel::addresses::AddressConfiguration;
use crate::kernel::device::TunnelDevice;
use crate::kernel::netlink;
use crate::kernel::routes::Flow;
use crate::kernel::zone;

impl Manager {
    /// Begins to make the tunnel that a daemon asked for; [`Self::taken`] ends it. On an error nothing of it stays, and the daemon
    /// is told what was refused, where, and how to go on.
    pub(super) async fn attach(&mut self, connection: u64, attach: &Attach) {
        let begun = self.begin_tunnel(connection, attach).await;
        match begun {
            Ok((number, taken)) => {
                self.jobs.start(async move { Outcome::Taken { number, connection, in_time: taken.in_time().await } });
            }
            Err(Refused { error, begun: Some(begun) }) => self.take_back(begun, connection, error),
            Err(Refused { error, begun: None }) => {
                self.daemons.say(connection, Event::Failed { message: format!("{error:#}") });
            }
        }
    }

    /// The workers have taken a tunnel, or not in time: now it is alive, or goes again.
    pub(super) async fn taken(&mut self, number: u16, connection: u64, in_time: bool) {
        let is_it = |tenant: &&mut Tenant| tenant.connection == connection;
        // Its daemon may have gone meanwhile, and the tunnel with it.
        let Some(tenant) = self.tunnels.get_mut(number).filter(is_it) else { return };
        tenant.is_open = in_time;
        let early = std::mem::take(&mut tenant.early);
        if let Err(error) = self.bring_up(number, in_time) {
            return self.take_back(Begun::Tunnel(number), connection, error);
        }
        self.enter_lan(number).await;
        let event = self.attached(number);
        self.daemons.say(connection, event);
        for report in early {
            self.hear_worker(number, report).await;
        }
    }

    fn bring_up(&mut self, number: u16, in_time: bool) -> anyhow::Result<()> {
        anyhow::ensure!(
            in_time,
            "the workers do not take the tunnel: the machine is too busy, or one hangs; try again"
        );
        let tenant = self.tunnels.get(number).context("it has gone")?;
        self.platform.programs().set_tunnel(number.into(), tenant.entry())?;
        if let Some(peer) = tenant.peer {
            self.follow(number, peer);
        }
        Ok(())
    }

    fn attached(&self, number: u16) -> Event {
        match self.tunnels.get(number) {
            Some(tenant) => {
                let mut notes = tenant.notes.clone();
                notes.extend(self.carrier_note(tenant));
                Event::Attached { device: tenant.device.name.clone(), me: tenant.me, notes }
            }
            None => Event::Failed { message: "the tunnel went while it was made".into() },
        }
    }

    /// Makes what a tunnel needs, and has the workers take it; returns its number and what the workers answer.
    async fn begin_tunnel(&mut self, connection: u64, attach: &Attach) -> Result<(u16, Answers), Refused> {
        let owner = self.daemons.pid(connection).context("the daemon has gone")?;
        self.check(connection, attach)?;
        let number = self.tunnels.new_number();
        let number = number.with_context(|| format!("all {MAX_TUNNELS} tunnels of the engine are in use"))?;
        let (udp, listens, me) = self.bind(attach).await?;
        let device = TunnelDevice {
            name: attach.device.clone(),
            prefix: attach.prefix.clone(),
            ethernet: attach.protocol == Protocol::Ethernet,
            local: attach.ipaddr,
            // In a network of its own the address has no other end.
            peer: match (attach.protocol, attach.interface.prefix) {
                (Protocol::Ethernet, Some(_)) => Ipv4Addr::UNSPECIFIED.into(),
                _ => attach.ptpaddr,
            },
            mac: attach.interface.mac.unwrap_or_else(|| self.hubs.private_mac(number)),
            mtu: attach.mtu,
            owner,
            configuration: AddressConfiguration {
                addresses: attach.interface.configure,
                metric: attach.interface.metric,
                prefix: attach.interface.prefix,
                broadcast: attach.interface.broadcast,
            },
        };
        let (hub, device) = self.hubs.device(device, attach.xdp_mode).await?;
        let mut tenant = Tenant {
            connection,
            is_open: false,
            early: Vec::new(),
            hub,
            device,
            cipher: attach.cipher,
            protocol: attach.protocol,
            carrier_door: if attach.socks.is_some() { CarrierChoice::Udp } else { attach.carrier },
            xdp_mode: attach.xdp_mode,
            me,
            listens,
            peer: known(attach.peer),
            socks: attach.socks.map(|server| Socks { server, relay: None }),
            counters: Tally::new(self.platform.workers.count()),
            sizes: Sizes::new(attach),
            hop: None,
            lan: attach.lan.clone(),
            busy_poll: Duration::from_micros(attach.busy_poll_us.into()),
            carrier: None,
            refused: None,
            mark: attach.mark,
            looked_up: None,
            leads: PeerRoute::default(),
            loops: Loops::default(),
            rounds: Loops::default(),
            notes: Vec::new(),
            bogus: (0, 0),
            door: None,
            carrier_device: attach.carrier_device.clone(),
            carrier_socket: udp.for_another_worker(),
            zone_name: None,
            follower: None,
        };
        tenant.name_zone();
        self.tunnels.insert(number, tenant);
        self.set_busy_poll();
        self.daemons.join(connection, number);
        match self.hand_over(number, attach, udp) {
            Ok(taken) => Ok((number, taken)),
            Err(error) => Err(Refused { error, begun: Some(Begun::Tunnel(number)) }),
        }
    }

    /// Whether a tunnel can be as it is asked for.
    fn check(&self, connection: u64, attach: &Attach) -> anyhow::Result<()> {
        if attach.version != VERSION {
            bail!("the engine speaks control protocol {VERSION}, the daemon {}; restart the older one", attach.version);
        }
        if self.daemons.tunnel_of(connection).is_some() {
            bail!("this daemon has a tunnel already; start another daemon for another tunnel");
        }
        if !(MIN_MTU..=MAX_MTU).contains(&attach.mtu) {
            bail!("mtu {}: must be between {MIN_MTU} and {MAX_MTU}", attach.mtu);
        }
        if attach.protocol == Protocol::Ethernet && attach.lan.is_some() {
            bail!("lan: protocol 4 has no short cut, frames are not routed; remove `lan`, or use protocol 3");
        }
        let largest = self.platform.largest_mtu(attach.protocol);
        if attach.mtu as usize > largest {
            bail!(
                "mtu {}: this engine was started for up to {largest}; end its daemons, and start this one first or all \
                 of them with CIPE_LARGEST_MTU={} in the environment",
                attach.mtu,
                attach.mtu as usize + attach.protocol.header()
            );
        }
        Ok(())
    }

    /// Tells the programs and the workers of a new tunnel; returns what the workers answer. [`Self::take_back`] takes all of it back.
    fn hand_over(&mut self, number: u16, attach: &Attach, udp: UdpCarrier) -> anyhow::Result<Answers> {
        let tunnel = u32::from(number);
        let mut programs = self.platform.programs();
        programs.reset_verdicts(tunnel)?;
        self.keys.clear_tunnel(number);
        if let Some(key) = &attach.key {
            self.keys.set(number, Slot::Static, &key.0);
        }
        let tenant = self.tunnels.get_mut(number).context("it has gone")?;
        let (hub, peer, sizes) = (tenant.hub, tenant.peer, tenant.sizes);
        let (listens, socks) = (tenant.listens, tenant.socks.is_some());
        tenant.notes.extend(self.hubs.note(hub).map(str::to_owned));
        let pair = self.hubs.get(hub).context("its hub has gone")?;
        match attach.protocol {
            Protocol::Ip => programs.set_private_address(tenant.device.mac, tunnel)?,
            Protocol::Ethernet => {
                let ends = [pair.index, pair.hidden_index];
                programs.set_ethernet_device(ends, EthernetDevice { tunnel, hub: hub as u32 })?;
            }
        }
        if !socks {
            programs.add_carrier_address(listens, tunnel)?;
        }
        let algorithm = match attach.cipher {
            Cipher::Blowfish => Algorithm::Blowfish,
            Cipher::Idea => Algorithm::Idea,
            Cipher::IdeaLittle => Algorithm::IdeaLittle,
        };
        let state = Tunnel {
            number,
            keys: Keys::new(algorithm, self.keys.reader(), number),
            nokey: attach.key.is_none(),
            counters: tenant.counters.of_worker(0).clone(),
            common: Arc::default(),
            segmentation: udp.segmentation().clone(),
            hub,
            peer,
            socks,
            relay: None,
            way: if socks { Egress::NoRoute } else { Egress::Socket },
            is_move_untold: false,
            is_ours: false,
            pinned: attach.pin_peer,
            static_data: attach.static_data,
            ignore_df: attach.ignore_df,
            protocol: attach.protocol,
            device_mtu: attach.mtu as usize,
            clamp_mss: attach.mss_clamp,
            private_hop: Hop { source: pair.hidden_mac, destination: tenant.device.mac },
            mtu: sizes.mtu(),
            cttl: attach.cttl,
            checksum: attach.checksum,
            paced: attach.paced,
            limits: KeyLimits {
                send_packets: attach.send_packets,
                send_octets: attach.send_octets,
                send_age: Duration::from_secs(attach.send_seconds),
                receive_packets: attach.receive_packets,
                // Protocol section 3.
                receive_age: Duration::from_secs(attach.send_seconds.saturating_mul(2)),
                // A request a packet helps nobody.
                retry: Duration::from_secs(attach.retry_seconds.max(1)),
            },
            ip_ids: IpIds::of_worker(0, 1),
        };
        let tally = &tenant.counters;
        Ok(self.platform.workers.ask_all(|worker, done| {
            let state = Box::new(state.for_worker(worker, tally));
            Command::AddTunnel(state, udp.for_another_worker(), vec![listens], done)
        }))
    }

    /// Lets the workers stay awake as long as the tunnel that wants most.
    pub(super) fn set_busy_poll(&mut self) {
        let most = self.tunnels.busy_poll();
        if std::mem::replace(&mut self.busy_poll, most) != most {
            self.platform.workers.tell_all(|_| Command::BusyPoll(most));
        }
    }

    /// Binds the carrier port, which keeps others off it and hears ICMP errors; returns it with the address that it is bound
    /// to, and the one that the peer will see. An address that may change is not bound to.
    async fn bind(&self, attach: &Attach) -> anyhow::Result<(UdpCarrier, SocketAddr, SocketAddr)> {
        let towards = attach.socks.or(known(attach.peer));
        let is_ipv6 = towards.map_or(attach.me.is_ipv6(), |target| target.is_ipv6());
        // To a SOCKS5 server it is TCP first; where it relays datagrams it says then.
        let port = |target: SocketAddr| if attach.socks.is_some() { 0 } else { target.port() };
        let any = if is_ipv6 { IpAddr::from(Ipv6Addr::UNSPECIFIED) } else { Ipv4Addr::UNSPECIFIED.into() };
        let device = match &attach.carrier_device {
            Some(name) => Some(
                self.platform.netlink.card_named(name).await.with_context(|| format!("carrier-device {name}"))?.ifindex,
            ),
            None => None,
        };
        let route = |from: SocketAddr, target: SocketAddr| {
            let mut to = target;
            to.set_port(port(target));
            let flow = Flow::of_socket(from, to, attach.mark);
            self.platform.netlink.route_of(Flow { device: device.or(flow.device), ..flow })
        };
        let mut me = attach.me;
        // That this host does not have the address is an error only if it cannot be bound to either.
        let mut missing = None;
        if me.ip().is_unspecified() || attach.dynip {
            let port = me.port();
            me = match towards {
                Some(target) => match route(SocketAddr::new(any, port), target).await {
                    Ok(route) => zone::socket_address(route.source, port, route.oif),
                    // The network is not there yet, as at boot: the route that comes brings the address.
                    Err(netlink::Error::NoRoute { .. }) => SocketAddr::new(any, port),
                    Err(error) => return Err(error.into()),
                },
                None => SocketAddr::new(any, port),
            };
        } else if let Some(target) = towards {
            match route(me, target).await {
                Ok(_) => {}
                Err(error @ netlink::Error::NotOurAddress { .. }) => missing = Some(error),
                Err(error) if attach.me_may_come => tracing::info!("{error}; waiting for it"),
                Err(error) => return Err(error.into()),
            }
        }
        let listens = if attach.dynip { SocketAddr::new(any, me.port()) } else { me };
        if !listens.ip().is_unspecified() && self.tunnels.iter().any(|(_, tenant)| tenant.listens == listens) {
            bail!("me {}: another tunnel has this address and port; choose another port with `me`", zone::Shown(me));
        }
        let shown = zone::Shown(me);
        let device = attach.carrier_device.as_deref();
        let udp = bind(listens, attach.me_may_come, device).map_err(|error| match (error.kind(), missing) {
            (std::io::ErrorKind::AddrNotAvailable, Some(missing)) => missing.into(),
            (std::io::ErrorKind::AddrInUse, _) => {
                anyhow::anyhow!(
                    "me {shown}: the port is taken; stop the other program or choose another port with `me`"
                )
            }
            (std::io::ErrorKind::AddrNotAvailable, None) => {
                anyhow::anyhow!("me {shown}: no interface has this address; correct `me` or leave it out")
            }
            _ => anyhow::anyhow!("me {shown}: {error}"),
        })?;
        if attach.mark != 0 {
            setsockopt(&udp, sockopt::Mark, &attach.mark).with_context(|| format!("mark {:#x}", attach.mark))?;
        }
        // ICMP errors are wanted as events; without them the tunnel works all the same.
        let wants_errors = match me.ip() {
            IpAddr::V4(_) => setsockopt(&udp, sockopt::Ipv4RecvErr, &true),
            IpAddr::V6(_) => setsockopt(&udp, sockopt::Ipv6RecvErr, &true),
        };
        if let Err(error) = wants_errors {
            tracing::debug!("{shown}: {error}; ICMP errors of the carrier will not be seen");
        }
        let listens = udp.local_addr()?;
        me.set_port(listens.port());
        let udp = UdpCarrier::new(udp).with_context(|| format!("me {shown}"))?;
        Ok((udp, listens, me))
    }
}

/// Binds a UDP socket to an address, and to the device of this name if one is given. If the address `may_come`, this host need
/// not have it yet; where ip_nonlocal_bind is set, the kernel allows that in any case.
fn bind(address: SocketAddr, may_come: bool, device: Option<&str>) -> std::io::Result<UdpSocket> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    if may_come {
        setsockopt(&socket, sockopt::IpFreebind, &true)?;
    }
    if let Some(device) = device {
        setsockopt(&socket, sockopt::BindToDevice, &device.into())?;
    }
    nix::sys::socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(socket.into())
}

/// The peer's address if it is not to be learned: 0.0.0.0 or 127.0.0.1:9 say that it is (protocol section 4).
fn known(peer: SocketAddr) -> Option<SocketAddr> {
    let learn = peer.ip().is_unspecified() || peer == SocketAddr::from((Ipv4Addr::LOCALHOST, 9));
    (!learn).then_some(peer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_without_an_address_is_learned() {
        for (text, is_known) in [
            ("0.0.0.0:0", false),
            ("0.0.0.0:6789", false),
            ("[::]:0", false),
            ("127.0.0.1:9", false),
            ("127.0.0.1:6789", true),
            ("192.0.2.1:9", true),
        ] {
            let peer: SocketAddr = text.parse().unwrap();
            assert_eq!(known(peer), is_known.then_some(peer), "{text}");
        }
    }
}
