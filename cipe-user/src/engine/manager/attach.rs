//! Making and removing tunnels.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use cipe_common::maps::{EthernetDevice, MAX_TUNNELS, Slot};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, socket, sockopt};

use super::sizes::Sizes;
use super::{Leads, Loops, Manager, Socks, Tenant};
use crate::cipher::Algorithm;
use crate::control::protocol::{Attach, Carrier, Cipher, MAX_MTU, MIN_MTU, Protocol, VERSION, XdpMode};
use crate::engine::carrier::UdpCarrier;
use crate::engine::carrier::outer::Hop;
use crate::engine::frames;
use crate::engine::tunnel::counters::Tally;
use crate::engine::tunnel::keys::Keys;
use crate::engine::tunnel::{IpIds, Limits, Tunnel, Way};
use crate::engine::worker::Command;
use crate::kernel::addresses::Configuration;
use crate::kernel::bpf::XdpPreference;
use crate::kernel::device::{Device, TunnelDevice};
use crate::kernel::features::Feature;
use crate::kernel::netlink;
use crate::kernel::routes::Flow;
use crate::kernel::zone;
use crate::xsk::{MultiBuffer, Socket, SocketConfig};

impl Manager {
    /// Makes the tunnel that a daemon asked for and returns its number; on an error nothing of it stays.
    ///
    /// # Errors
    /// What was refused, where, and how to go on.
    pub(super) async fn attach(&mut self, connection: u64, attach: &Attach) -> anyhow::Result<u16> {
        let owner = self.connections.get(&connection).context("the daemon has gone")?.pid;
        if attach.version != VERSION {
            bail!("the engine speaks control protocol {VERSION}, the daemon {}; restart the older one", attach.version);
        }
        if self.tunnel_of(connection).is_some() {
            bail!("this daemon has a tunnel already; start another daemon for another tunnel");
        }
        if !(MIN_MTU..=MAX_MTU).contains(&attach.mtu) {
            bail!("mtu {}: must be between {MIN_MTU} and {MAX_MTU}", attach.mtu);
        }
        if attach.protocol == Protocol::Ethernet && attach.lan.is_some() {
            bail!("lan: protocol 4 has no short cut, frames are not routed; remove `lan`, or use protocol 3");
        }
        let largest = frames::largest_mtu(self.umem.frame_size()) - attach.protocol.header() as u32;
        if attach.mtu > largest {
            bail!(
                "mtu {}: this engine was started for up to {largest}; end its daemons, and start this one first or all \
                 of them with CIPE_LARGEST_MTU={} in the environment",
                attach.mtu,
                attach.mtu as usize + attach.protocol.header()
            );
        }
        let number = free_number(self.last_number, |number| self.tenants.contains_key(&number));
        let number = number.with_context(|| format!("all {MAX_TUNNELS} tunnels of the engine are in use"))?;
        self.last_number = number;

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
            mac: attach.interface.mac.unwrap_or_else(|| self.private_mac(number)),
            mtu: attach.mtu,
            owner,
            configuration: Configuration {
                addresses: attach.interface.configure,
                metric: attach.interface.metric,
                prefix: attach.interface.prefix,
                broadcast: attach.interface.broadcast,
            },
        };
        let (hub, device) = self.device(device, attach.xdp_mode).await?;
        let mut tenant = Tenant {
            connection,
            hub,
            device: device.clone(),
            cipher: attach.cipher,
            protocol: attach.protocol,
            carrier_door: if attach.socks.is_some() { Carrier::Udp } else { attach.carrier },
            xdp_mode: preference(attach.xdp_mode),
            me,
            listens,
            peer: known(attach.peer),
            socks: attach.socks.map(|server| Socks { server, relay: None }),
            counters: Tally::new(self.workers.count()),
            sizes: Sizes::new(attach),
            hop: None,
            lan: attach.lan.clone(),
            busy_poll: Duration::from_micros(attach.busy_poll_us.into()),
            carrier: None,
            refused: None,
            mark: attach.mark,
            looked_up: None,
            leads: Leads::default(),
            loops: Loops::default(),
            rounds: Loops::default(),
            previous: None,
            notes: Vec::new(),
            bogus: (0, 0),
            door: None,
            carrier_device: attach.carrier_device.clone(),
            carrier_socket: udp.for_another_worker(),
            zone_name: None,
            follower: None,
        };
        tenant.name_zone();
        self.tenants.insert(number, tenant);
        self.set_busy_poll();
        self.devices.insert(device.index, number);
        if let Some(daemon) = self.connections.get_mut(&connection) {
            daemon.tunnel = Some(number);
        }
        match self.open(number, attach, udp, &device).await {
            Ok(()) => {
                self.enter_lan(number).await;
                Ok(number)
            }
            Err(error) => {
                self.detach(number).await;
                Err(error)
            }
        }
    }

    /// Everything of a new tunnel that [`Self::detach`] can take back.
    async fn open(&mut self, number: u16, attach: &Attach, udp: UdpCarrier, device: &Device) -> anyhow::Result<()> {
        let tunnel = u32::from(number);
        self.programs.reset_verdicts(tunnel)?;
        self.keys.clear_tunnel(tunnel);
        if let Some(key) = &attach.key {
            self.keys.set(tunnel, Slot::Static, &key.0);
        }
        let tenant = self.tenants.get_mut(&number).expect("the caller has just put it there");
        let (hub, peer, sizes) = (tenant.hub, tenant.peer, tenant.sizes);
        let (listens, socks) = (tenant.listens, tenant.socks.is_some());
        tenant.notes.extend(self.hubs.note(hub).map(str::to_owned));
        let pair = self.hubs.get(hub).context("its hub has gone")?;
        let hidden_mac = pair.hidden_mac;
        match attach.protocol {
            Protocol::Ip => self.programs.set_private_address(device.mac, tunnel)?,
            Protocol::Ethernet => {
                let ends = [pair.index, pair.hidden_index];
                self.programs.set_ethernet_device(ends, EthernetDevice { tunnel, hub: hub as u32 })?;
            }
        }
        if !socks {
            self.programs.add_carrier_address(listens, tunnel)?;
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
            way: if socks { Way::NoRoute } else { Way::Socket },
            is_move_untold: false,
            is_ours: false,
            pinned: attach.pin_peer,
            static_data: attach.static_data,
            ignore_df: attach.ignore_df,
            protocol: attach.protocol,
            device_mtu: attach.mtu as usize,
            clamp_mss: attach.mss_clamp,
            private_hop: Hop { source: hidden_mac, destination: device.mac },
            mtu: sizes.mtu(),
            cttl: attach.cttl,
            checksum: attach.checksum,
            paced: attach.paced,
            limits: Limits {
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
        let take = self.workers.ask_all(|worker, done| {
            let state = Box::new(state.for_worker(worker, tally));
            Command::AddTunnel(state, udp.for_another_worker(), vec![listens], done)
        });
        // Not alive before the workers know whose packets these are.
        ensure!(
            take.in_time().await,
            "the workers do not take the tunnel: the machine is too busy, or one hangs; try again"
        );
        if let Some(peer) = peer {
            self.follow(number, peer);
        }
        let tenant = self.tenants.get(&number).context("it has gone")?;
        self.programs.set_tunnel(tunnel, tenant.entry())?;
        Ok(())
    }

    /// Lets the workers stay awake as long as the tunnel that wants most.
    fn set_busy_poll(&mut self) {
        let most = self.tenants.values().map(|tenant| tenant.busy_poll).max().unwrap_or_default();
        if std::mem::replace(&mut self.busy_poll, most) != most {
            self.workers.tell_all(|_| Command::BusyPoll(most));
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
            Some(name) => {
                Some(self.netlink.card_named(name).await.with_context(|| format!("carrier-device {name}"))?.ifindex)
            }
            None => None,
        };
        let route = |from: SocketAddr, target: SocketAddr| {
            let mut to = target;
            to.set_port(port(target));
            let flow = Flow::of_socket(from, to, attach.mark);
            self.netlink.route_of(Flow { device: device.or(flow.device), ..flow })
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
        if !listens.ip().is_unspecified() && self.tenants.values().any(|tenant| tenant.listens == listens) {
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

    /// Binds an AF_XDP socket on a thread of its own: it may wait 2 s for a queue that is busy, and the control sockets
    /// and netlink must not.
    pub(super) async fn bind_queue(
        &self,
        ifindex: u32,
        queue: u32,
        mut config: SocketConfig,
    ) -> anyhow::Result<Socket> {
        if self.lacks.contains(&Feature::MultiBuffer) {
            config.multi_buffer = MultiBuffer::No;
        }
        let umem = self.umem.clone();
        let bound = tokio::task::spawn_blocking(move || Socket::bind(&umem, ifindex, queue, config));
        Ok(bound.await.context("binding an AF_XDP socket was broken off")??)
    }

    /// Removes a tunnel and everything that it had, in the order that lets no packet out unsealed.
    pub(super) async fn detach(&mut self, number: u16) {
        self.detach_all(&[number]).await;
    }

    /// The same for several tunnels.
    pub(super) async fn detach_all(&mut self, numbers: &[u16]) {
        let mut gone = Vec::new();
        for number in numbers {
            gone.extend(self.disconnect(*number).await);
        }
        let devices: Vec<&Device> = gone.iter().map(|tenant| &tenant.device).collect();
        log_failure(self.netlink.remove_all(&devices).await);
        for tenant in gone {
            match (tenant.protocol, self.hubs.ends(tenant.hub)) {
                (Protocol::Ip, _) => log_failure(self.programs.remove_private_address(tenant.device.mac)),
                (Protocol::Ethernet, Some(ends)) => log_failure(self.programs.remove_ethernet_device(ends)),
                (Protocol::Ethernet, None) => {}
            }
            self.leave_hub(tenant.hub).await;
            if tenant.protocol == Protocol::Ethernet {
                self.set_ethernet_devices();
            }
        }
    }

    /// Takes a tunnel out of service; its device stays and drops everything.
    pub(super) async fn disconnect(&mut self, number: u16) -> Option<Tenant> {
        let tenant = self.tenants.remove(&number)?;
        if tenant.lan.is_some() {
            self.leave_lan(number).await;
        }
        self.set_busy_poll();
        let tunnel = u32::from(number);
        self.devices.remove(&tenant.device.index);
        self.aging.remove(&number);
        if let Some(daemon) = self.connections.get_mut(&tenant.connection) {
            daemon.tunnel = None;
        }
        log_failure(self.programs.clear_tunnel(tunnel));
        if let Some(follower) = &tenant.follower {
            follower.abort();
        }
        self.workers.ask_all(|_, done| Command::RemoveTunnel(number, done)).in_time().await;
        if tenant.socks.is_none() {
            log_failure(self.programs.remove_carrier_address(tenant.listens));
        }
        self.keys.clear_tunnel(tunnel);
        if let Some(carrier) = tenant.carrier {
            self.release_carrier(carrier, number).await;
        }
        Some(tenant)
    }
}

/// Binds a UDP socket, also to the device of this name if one is given; to an address that this host does not have, if it `may_come`. Where ip_nonlocal_bind is set, the
/// kernel allows that in any case.
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

/// The next free tunnel number after `last`. Freed ones are used again as late as possible: news of the tunnel before
/// may still be on its way.
pub(super) fn free_number(last: u16, in_use: impl Fn(u16) -> bool) -> Option<u16> {
    let max = MAX_TUNNELS as u16;
    let next = if last < max { last + 1 } else { 0 };
    (next..max).chain(0..next).find(|number| !in_use(*number))
}

/// The peer's address if it is not to be learned: 0.0.0.0 or 127.0.0.1:9 say that it is (protocol section 4).
pub(super) fn known(peer: SocketAddr) -> Option<SocketAddr> {
    let learn = peer.ip().is_unspecified() || peer == SocketAddr::from((Ipv4Addr::LOCALHOST, 9));
    (!learn).then_some(peer)
}

pub(super) fn preference(mode: XdpMode) -> XdpPreference {
    match mode {
        XdpMode::Auto => XdpPreference::Auto,
        XdpMode::Native => XdpPreference::Native,
        XdpMode::Generic => XdpPreference::Generic,
    }
}

pub(super) fn log_failure<E: std::fmt::Display>(result: Result<(), E>) {
    if let Err(error) = result {
        tracing::warn!("while removing a tunnel: {error}");
    }
}
