//! Making and removing tunnels.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use anyhow::{Context as _, bail};
use cipe_common::maps::{MAX_TUNNELS, Slot, private_socket_index};
use nix::sys::socket::{setsockopt, sockopt};

use super::sizes::Sizes;
use super::{Manager, Socks, Tenant};
use crate::cipher::Algorithm;
use crate::control::protocol::{Attach, Carrier, Cipher, VERSION, XdpMode};
use crate::engine::counters::Counters;
use crate::engine::keys::Keys;
use crate::engine::outer::Hop;
use crate::engine::replay::SentIvs;
use crate::engine::tunnel::{Limits, Tunnel, Way};
use crate::engine::worker::Command;
use crate::kernel::addresses::Configuration;
use crate::kernel::bpf::XdpPreference;
use crate::kernel::device::{Device, TunnelDevice};
use crate::kernel::ethtool::{Offloads, set_offloads};
use crate::xsk::{Injector, Mode, Socket, SocketConfig};

/// Smallest and largest device MTU in octets: RFC 791's minimum, and what fits a UMEM frame with all headers.
const MTU: std::ops::RangeInclusive<u32> = 68..=3500;

/// Queues of a tunnel device: one worker serves them all.
const QUEUES: u32 = 1;

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
        if self.tenants.values().any(|tenant| tenant.connection == connection) {
            bail!("this daemon has a tunnel already; start another daemon for another tunnel");
        }
        if !MTU.contains(&attach.mtu) {
            bail!("mtu {}: must be between {} and {}", attach.mtu, MTU.start(), MTU.end());
        }
        let number = free_number(self.last_number, |number| self.tenants.contains_key(&number));
        let number = number.with_context(|| format!("all {MAX_TUNNELS} tunnels of the engine are in use"))?;
        self.last_number = number;

        let (udp, listens, me) = self.bind(attach).await?;
        let device = TunnelDevice {
            name: attach.device.clone(),
            prefix: attach.prefix.clone(),
            local: attach.ipaddr,
            peer: attach.ptpaddr,
            mtu: attach.mtu,
            queues: QUEUES,
            owner,
            configuration: Configuration {
                addresses: attach.interface.configure,
                metric: attach.interface.metric,
                prefix: attach.interface.prefix,
                broadcast: attach.interface.broadcast,
                mac: attach.interface.mac,
            },
        };
        let left = match &device.name {
            Some(name) => self.netlink.adopt(name, &device).await?,
            None => None,
        };
        let device = match left {
            Some(device) => device,
            None => self.netlink.make(&device).await?,
        };
        let tenant = Tenant {
            connection,
            device: device.clone(),
            cipher: attach.cipher,
            carrier_door: if attach.socks.is_some() { Carrier::Udp } else { attach.carrier },
            xdp_mode: preference(attach.xdp_mode),
            me,
            listens,
            peer: known(attach.peer),
            socks: attach.socks.map(|server| Socks { server, relay: None }),
            counters: Arc::default(),
            sizes: Sizes::new(attach),
            carrier: None,
            refused: None,
            looped: false,
            previous: None,
            notes: Vec::new(),
            bogus: (0, 0),
            door: None,
            follower: None,
        };
        let counters = tenant.counters.clone();
        self.tenants.insert(number, tenant);
        match self.open(number, attach, udp, &device, counters).await {
            Ok(()) => Ok(number),
            Err(error) => {
                self.detach(number).await;
                Err(error)
            }
        }
    }

    /// Everything of a new tunnel that [`Self::detach`] can take back.
    async fn open(
        &mut self,
        number: u16,
        attach: &Attach,
        udp: UdpSocket,
        device: &Device,
        counters: Arc<Counters>,
    ) -> anyhow::Result<()> {
        let tunnel = u32::from(number);
        self.programs.reset_verdicts(tunnel)?;
        self.keys.clear_tunnel(tunnel);
        if let Some(key) = &attach.key {
            self.keys.set(tunnel, Slot::Static, &key.0);
        }
        self.programs.set_private_device(device.index, tunnel)?;
        self.programs.set_private_device(device.hidden_index, tunnel)?;
        // Native XDP takes no superframes; generic XDP does, and the engine cuts them at less cost than the kernel.
        let (offloads, mode) = match preference(attach.xdp_mode) {
            XdpPreference::Native => (Offloads::SINGLE_FRAMES, XdpPreference::Native),
            XdpPreference::Auto | XdpPreference::Generic => (Offloads::SUPERFRAMES, XdpPreference::Generic),
        };
        set_offloads(&device.name, device.index, offloads)?;
        let mode = self.programs.attach_private(device.index, device.hidden_index, mode)?;
        let mut sockets = Vec::new();
        for queue in 0..QUEUES {
            // No veth has zero copy: asking for it costs a bind that fails.
            let config = SocketConfig { mode: Mode::Copy, ..SocketConfig::default() };
            let socket = self.bind_queue(device.hidden_index, queue, config).await?;
            self.programs.set_private_socket(private_socket_index(tunnel, queue), &socket)?;
            sockets.push(socket);
        }
        let tenant = self.tenants.get_mut(&number).expect("the caller has just put it there");
        tenant.notes.push(format!("private side: {mode} XDP, {} queue(s)", sockets.len()));
        let (listens, peer, sizes, socks) = (tenant.listens, tenant.peer, tenant.sizes, tenant.socks.is_some());
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
            counters,
            udp,
            socket_df: None,
            peer,
            asker: None,
            socks,
            relay: None,
            way: if socks { Way::NoRoute } else { Way::Socket },
            pinned: attach.pin_peer,
            static_data: attach.static_data,
            ignore_df: attach.ignore_df,
            private_hop: Hop { source: device.hidden_mac, destination: device.mac },
            mtu: sizes.mtu(),
            cttl: attach.cttl,
            checksum: attach.checksum,
            limits: Limits {
                send_packets: attach.send_packets,
                send_octets: attach.send_octets,
                send_age: Duration::from_secs(attach.send_seconds),
                receive_packets: attach.receive_packets,
                // A request a packet helps nobody.
                retry: Duration::from_secs(attach.retry_seconds.max(1)),
            },
            sent_ivs: SentIvs::default(),
            ip_id: 0,
            asked: [None; 2],
        };
        let injector = Injector::open(device.hidden_index)?;
        let (done, listening) = std::sync::mpsc::channel();
        self.worker.send(Command::AddTunnel(Box::new(state), sockets, injector, vec![listens], done));
        // Not alive before the worker has put frames where packets go.
        let _ = listening.recv_timeout(Duration::from_secs(1));
        if let Some(peer) = peer {
            self.follow(number, peer);
        }
        self.programs.set_tunnel(tunnel, sizes.entry())?;
        Ok(())
    }

    /// Binds the carrier port, which keeps others off it and hears ICMP errors; returns it with the address that it is bound
    /// to, and the one that the peer will see. An address that may change is not bound to.
    async fn bind(&self, attach: &Attach) -> anyhow::Result<(UdpSocket, SocketAddr, SocketAddr)> {
        let towards = attach.socks.or(known(attach.peer)).map(|target| target.ip());
        let is_ipv6 = towards.map_or(attach.me.is_ipv6(), |target| target.is_ipv6());
        let any = if is_ipv6 { IpAddr::from(Ipv6Addr::UNSPECIFIED) } else { Ipv4Addr::UNSPECIFIED.into() };
        let mut me = attach.me;
        if me.ip().is_unspecified() || attach.dynip {
            me.set_ip(match towards {
                Some(target) => self.netlink.route(target, None).await?.source,
                None => any,
            });
        } else if let Some(target) = towards {
            self.netlink.route(target, Some(me.ip())).await?;
        }
        let listens = if attach.dynip { SocketAddr::new(any, me.port()) } else { me };
        let udp = UdpSocket::bind(listens).map_err(|error| match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                anyhow::anyhow!("me {me}: the port is taken; stop the other program or choose another port with `me`")
            }
            std::io::ErrorKind::AddrNotAvailable => {
                anyhow::anyhow!("me {me}: no interface has this address; correct `me` or leave it out")
            }
            _ => anyhow::anyhow!("me {me}: {error}"),
        })?;
        udp.set_nonblocking(true)?;
        // ICMP errors are wanted as events; without them the tunnel works all the same.
        let wants_errors = match me.ip() {
            IpAddr::V4(_) => setsockopt(&udp, sockopt::Ipv4RecvErr, &true),
            IpAddr::V6(_) => setsockopt(&udp, sockopt::Ipv6RecvErr, &true),
        };
        if let Err(error) = wants_errors {
            tracing::debug!("{me}: {error}; ICMP errors of the carrier will not be seen");
        }
        let listens = udp.local_addr()?;
        me.set_port(listens.port());
        Ok((udp, listens, me))
    }

    /// Binds an AF_XDP socket on a thread of its own: it may wait 2 s for a queue that is busy, and the control sockets
    /// and netlink must not.
    pub(super) async fn bind_queue(&self, ifindex: u32, queue: u32, config: SocketConfig) -> anyhow::Result<Socket> {
        let umem = self.umem.clone();
        let bound = tokio::task::spawn_blocking(move || Socket::bind(&umem, ifindex, queue, config));
        Ok(bound.await.context("binding an AF_XDP socket was broken off")??)
    }

    /// Removes a tunnel and everything that it had, in the order that lets no packet out unsealed.
    pub(super) async fn detach(&mut self, number: u16) {
        let Some(tenant) = self.disconnect(number).await else { return };
        match self.netlink.remove(&tenant.device).await {
            Ok(()) => self.programs.detach_private(tenant.device.index),
            // The programs stay, and drop what is routed into it.
            Err(error) => tracing::warn!("while removing a tunnel: {error}"),
        }
        log_failure(self.programs.remove_private_device(tenant.device.index));
        log_failure(self.programs.remove_private_device(tenant.device.hidden_index));
    }

    /// Takes a tunnel out of service; its device stays and drops everything.
    pub(super) async fn disconnect(&mut self, number: u16) -> Option<Tenant> {
        let tenant = self.tenants.remove(&number)?;
        let tunnel = u32::from(number);
        log_failure(self.programs.clear_tunnel(tunnel));
        if let Some(follower) = &tenant.follower {
            follower.abort();
        }
        let (done, gone) = std::sync::mpsc::channel();
        self.worker.send(Command::RemoveTunnel(number, done));
        dropped(gone).await;
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

/// Waits until the worker has dropped its end, which it does when the sockets are closed: 100 ms each at most.
pub(super) async fn dropped(gone: std::sync::mpsc::Receiver<()>) {
    let waited = tokio::task::spawn_blocking(move || gone.recv_timeout(Duration::from_secs(1))).await;
    if waited.is_ok_and(|outcome| outcome == Err(RecvTimeoutError::Timeout)) {
        tracing::warn!("the worker did not close its sockets in time");
    }
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

fn log_failure<E: std::fmt::Display>(result: Result<(), E>) {
    if let Err(error) = result {
        tracing::warn!("while removing a tunnel: {error}");
    }
}
