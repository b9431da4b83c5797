//! How a tunnel is made. This file is a part of the manager, not a room, because a tunnel needs all rooms in a fixed order:
//!
//! 1. [`Manager::attach`] checks the request, binds the carrier socket, and finds a hub. A hub that is not open yet is opened by a job.
//! 2. [`Manager::continue_attach`] makes the device, and hands the tunnel to the programs and the workers.
//! 3. [`Manager::taken`] brings the tunnel up when all workers have it, and answers the daemon.
//!
//! What was made before a step fails is removed by a departure, and then the daemon is told why.

use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use cipe_common::maps::{EthernetDevice, MAX_TUNNELS, Slot};

use super::carrier_socket::{self, CarrierSocket, known};
use super::departure::Begun;
use super::jobs::Outcome;
use super::tunnels::Tenant;
use super::workers::Answers;
use super::{Manager, hubs};
use crate::cipher::Algorithm;
use crate::control::protocol::{Attach, Cipher, Descriptor, Event, MAX_MTU, MIN_MTU, Protocol, SealedEvent, VERSION};
use crate::engine::carrier::UdpCarrier;
use crate::engine::carrier::outer::Hop;
use crate::engine::ledger::Ledger;
use crate::engine::report::WorkerReport;
use crate::engine::tunnel::keys::Keys;
use crate::engine::tunnel::replay::Journal;
use crate::engine::tunnel::sealed::{SealedTunnel, SealedView};
use crate::engine::tunnel::{Common, Egress, IpIds, KeyLimits, Tunnel};
use crate::engine::worker::{Command, ORIGINAL_PACKETS};
use crate::kernel::addresses::AddressConfiguration;
use crate::kernel::device::{Device, TunnelDevice};
use crate::kernel::hub::Hub;
use crate::kernel::keys::KeyReader;
use crate::wire::packet;

/// A tunnel that has a carrier socket and a hub, and no more yet.
pub(super) struct Attaching {
    pub connection: u64,
    attach: Box<Attach>,
    number: u16,
    socket: CarrierSocket,
    wanted: TunnelDevice,
    /// Slot of its hub, which it has entered.
    hub: usize,
    /// Its device, if that was there already.
    device: Option<Device>,
    ledger: TunnelLedger,
}

/// The ledger of a tunnel.
pub(super) struct TunnelLedger {
    pub ledger: Arc<Ledger>,
    /// It is of the engine before this one, and readable.
    pub is_known: bool,
    /// Of a new one, for the daemon to hold.
    memory: Option<Descriptor>,
}

impl TunnelLedger {
    /// Takes over the ledger that the daemon has held, or makes a new one.
    fn of(attach: &Attach) -> anyhow::Result<Self> {
        if let Some(handle) = &attach.ledger {
            match Ledger::take_over(handle.0.as_fd()) {
                Ok(ledger) => return Ok(Self { ledger, is_known: true, memory: None }),
                Err(error) => tracing::warn!(
                    "{}: keys are exchanged again, since the last engine's record of their use is of no use: {error:#}",
                    attach.device.as_deref().unwrap_or_default()
                ),
            }
        }
        let (ledger, memory) = Ledger::new()?;
        Ok(Self { ledger, is_known: false, memory: Some(Descriptor(Arc::new(memory))) })
    }
}

impl Manager {
    /// Starts to make the tunnel that a daemon asks for. If it is refused, the daemon is told what was refused, where, and how to go
    /// on.
    pub(super) async fn attach(&mut self, connection: u64, attach: Box<Attach>) {
        match self.begin_attach(connection, attach).await {
            Ok(attaching) => {
                let mode = attaching.attach.xdp_mode;
                match self.hubs.begin_to_open(attaching.hub, mode, &mut self.shared.jobs) {
                    true => self.attaching = Some(attaching),
                    false => self.continue_attach(attaching).await,
                }
            }
            Err(error) => match self.kept.remove(&connection) {
                Some((slot, device)) => self.take_back(Begun::Device(slot, Some(device)), connection, error),
                None => _ = self.shared.daemons.send(connection, Event::Failed { message: format!("{error:#}") }),
            },
        }
    }

    /// Binds the carrier socket of a tunnel, and finds its hub.
    async fn begin_attach(&mut self, connection: u64, attach: Box<Attach>) -> anyhow::Result<Attaching> {
        let owner = self.shared.daemons.pid(connection).context("the daemon has gone")?;
        self.check(connection, &attach)?;
        let ledger = TunnelLedger::of(&attach)?;
        let number = self.shared.tunnels.new_number();
        let number = number.with_context(|| format!("all {MAX_TUNNELS} tunnels of the engine are in use"))?;
        let socket = carrier_socket::bind(&attach, &self.shared.platform, &self.shared.tunnels).await?;
        let wanted = TunnelDevice {
            name: attach.device.clone(),
            prefix: attach.prefix.clone(),
            ethernet: attach.protocol == Protocol::Ethernet,
            local: attach.ipaddr,
            // The address of an Ethernet device with a prefix has no peer address.
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
        let (hub, device) = match self.kept.get(&connection) {
            Some((slot, device)) => {
                self.shared.platform.netlink.take_over(device, &wanted).await?;
                (*slot, Some(device.clone()))
            }
            None => self.hubs.enter(&wanted, attach.xdp_mode).await?,
        };
        self.kept.remove(&connection);
        Ok(Attaching { connection, attach, number, socket, wanted, hub, device, ledger })
    }

    /// Whether a tunnel can be made as it is asked for.
    fn check(&self, connection: u64, attach: &Attach) -> anyhow::Result<()> {
        if attach.version != VERSION {
            bail!("the engine speaks control protocol {VERSION}, the daemon {}; restart the older one", attach.version);
        }
        if self.shared.daemons.tunnel_of(connection).is_some() {
            bail!("this daemon has a tunnel already; start another daemon for another tunnel");
        }
        if !(MIN_MTU..=MAX_MTU).contains(&attach.mtu) {
            bail!("mtu {}: must be between {MIN_MTU} and {MAX_MTU}", attach.mtu);
        }
        if attach.protocol == Protocol::Ethernet && attach.lan.is_some() {
            bail!("lan: protocol 4 has no short cut, frames are not routed; remove `lan`, or use protocol 3");
        }
        let largest = self.shared.platform.largest_mtu(attach.protocol);
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

    /// Handles the result of opening a hub: the tunnel that waits for it is made, and after it those that were deferred.
    pub(super) async fn hub_opened(&mut self, hubs::Opened { slot, hub }: hubs::Opened) {
        let Some(attaching) = self.attaching.take_if(|attaching| attaching.hub == slot) else {
            return tracing::warn!("hub {slot}: opened for no tunnel");
        };
        match hub.and_then(|hub| self.hubs.opened(slot, hub)) {
            Ok(()) => {
                self.shared.daemons.tell_successor(self.hubs.tell_of(slot));
                self.continue_attach(attaching).await;
            }
            Err(error) => self.take_back(Begun::Device(slot, attaching.device), attaching.connection, error),
        }
        self.carry_out_deferred().await;
    }

    /// Makes a tunnel on its hub, which is open, and has the workers take it.
    async fn continue_attach(&mut self, attaching: Attaching) {
        let Attaching { connection, attach, number, socket, wanted, hub, device, ledger } = attaching;
        if self.shared.daemons.pid(connection).is_none() {
            let error = anyhow::anyhow!("the daemon has gone");
            return self.take_back(Begun::Device(hub, device), connection, error);
        }
        let device = match device {
            Some(device) => device,
            None => match self.hubs.make_device(hub, &wanted).await {
                Ok(device) => device,
                Err(error) => return self.take_back(Begun::Device(hub, None), connection, error),
            },
        };
        let workers = self.shared.platform.workers.count();
        let tenant = Tenant::new(connection, &attach, &socket, (hub, device), ledger, workers);
        self.shared.tunnels.insert(number, tenant);
        self.shared.update_busy_poll();
        self.shared.daemons.assign(connection, number);
        match self.hand_over(number, &attach, &socket.udp) {
            Ok(taken) => self
                .shared
                .jobs
                .start(async move { Outcome::Taken { number, connection, in_time: taken.in_time().await } }),
            Err(error) => self.take_back(Begun::Tunnel(number), connection, error),
        }
    }

    /// Writes a new tunnel into the programs' maps, and gives it to the workers; returns their answers. A departure takes all of it
    /// back.
    fn hand_over(&mut self, number: u16, attach: &Attach, udp: &UdpCarrier) -> anyhow::Result<Answers> {
        let tunnel = u32::from(number);
        let mut programs = self.shared.platform.programs();
        programs.reset_verdicts(tunnel)?;
        self.keys.clear_tunnel(number);
        if let Some(key) = &attach.key {
            self.keys.set(number, Slot::Static, key);
        }
        let tenant = self.shared.tunnels.get_mut(number).context("it has gone")?;
        if let Some(keys) = attach.resume.as_ref().filter(|_| tenant.ledger.is_known) {
            let used = self.keys.resume(number, keys, &tenant.ledger.ledger);
            tenant.counters.of_worker(0).use_receive_key(used);
            tenant.is_resumed = true;
        }
        if let Some(sealed) = &attach.sealed {
            let key = attach.key.as_ref().context("sealed packets need a static key")?;
            let (sealed, resumed) = SealedTunnel::attach(key, sealed, tenant.ledger.ledger.clone())?;
            tenant.sealed = Some(sealed);
            if resumed.is_err() {
                tenant.early.push(WorkerReport::Event(Event::Sealed(SealedEvent::KeysLost)));
            }
        }
        tenant.notes.extend(self.hubs.note(tenant.hub).map(str::to_owned));
        let hub = self.hubs.get(tenant.hub).context("its hub has gone")?;
        match attach.protocol {
            Protocol::Ip => programs.set_private_address(tenant.device.mac, tunnel)?,
            Protocol::Ethernet => {
                let ends = [hub.index, hub.hidden_index];
                programs.set_ethernet_device(ends, EthernetDevice { tunnel, hub: tenant.hub as u32 })?;
            }
        }
        if tenant.socks.is_none() {
            programs.add_carrier_address(tenant.listens, tunnel)?;
        }
        let (listens, tally) = (tenant.listens, &tenant.counters);
        let state = worker_state(number, attach, tenant, hub, udp, self.keys.reader());
        Ok(self.shared.platform.workers.ask_all(|worker, done| {
            let state = Box::new(state.for_worker(worker, tally));
            Command::AddTunnel(state, udp.for_another_worker(), vec![listens], done)
        }))
    }

    /// Handles the workers' answers: the tunnel comes up if all of them have taken it in time, or is removed again.
    pub(super) async fn taken(&mut self, number: u16, connection: u64, in_time: bool) {
        let is_it = |tenant: &&mut Tenant| tenant.connection == connection;
        // Its daemon may have gone meanwhile, and the tunnel with it.
        let Some(tenant) = self.shared.tunnels.get_mut(number).filter(is_it) else { return };
        tenant.is_open = in_time;
        let early = std::mem::take(&mut tenant.early);
        if let Err(error) = self.bring_up(number, in_time) {
            return self.take_back(Begun::Tunnel(number), connection, error);
        }
        self.lans.enter(number, &mut self.shared, &self.hubs, &self.doors).await;
        let event = self.attached(number);
        self.shared.daemons.send(connection, event);
        for report in early {
            self.worker_reported(number, report).await;
        }
    }

    fn bring_up(&mut self, number: u16, in_time: bool) -> anyhow::Result<()> {
        anyhow::ensure!(
            in_time,
            "the workers do not take the tunnel: the machine is too busy, or one hangs; try again"
        );
        let tenant = self.shared.tunnels.get(number).context("it has gone")?;
        self.shared.platform.programs().set_tunnel(number.into(), tenant.entry())?;
        if let Some(peer) = tenant.peer {
            self.routes.follow(number, peer, &mut self.shared);
        }
        Ok(())
    }

    fn attached(&mut self, number: u16) -> Event {
        match self.shared.tunnels.get_mut(number) {
            Some(tenant) => {
                let mut notes = tenant.notes.clone();
                notes.extend(self.doors.carrier_note(tenant));
                Event::Attached {
                    device: tenant.device.name.clone(),
                    me: tenant.me,
                    notes,
                    resumed: tenant.is_resumed,
                    beats: true,
                    keeps_ledger: tenant.ledger.is_known,
                    ledger: tenant.ledger.memory.take(),
                }
            }
            None => Event::Failed { message: "the tunnel went while it was made".into() },
        }
    }
}

impl From<Cipher> for Algorithm {
    fn from(cipher: Cipher) -> Self {
        match cipher {
            Cipher::Blowfish => Self::Blowfish,
            Cipher::Idea => Self::Idea,
            Cipher::IdeaLittle => Self::IdeaLittle,
        }
    }
}

/// A new tunnel as the workers get it.
fn worker_state(number: u16, attach: &Attach, tenant: &Tenant, hub: &Hub, udp: &UdpCarrier, keys: KeyReader) -> Tunnel {
    let algorithm = Algorithm::from(attach.cipher);
    let socks = tenant.socks.is_some();
    let ledger = &tenant.ledger.ledger;
    let keys = Keys::new(algorithm, keys, number, ledger.clone());
    let journal = attach.journal.as_deref().and_then(|path| continue_journal(path, &keys));
    Tunnel {
        number,
        keys,
        sealed: tenant.sealed.clone().map(SealedView::new),
        nokey: attach.key.is_none(),
        is_orphaned: false,
        counters: tenant.counters.of_worker(0).clone(),
        common: Arc::new(Common::with(ledger.clone(), journal)),
        segmentation: udp.segmentation().clone(),
        hub: tenant.hub,
        peer: known(attach.peer),
        socks,
        relay: None,
        egress: if socks { Egress::NoRoute } else { Egress::Socket },
        is_move_untold: false,
        // An engine before this one was told.
        is_ours: tenant.is_resumed && attach.send_packets > ORIGINAL_PACKETS,
        pinned: attach.pin_peer,
        static_data: attach.static_data,
        ignore_df: attach.ignore_df,
        protocol: attach.protocol,
        device_mtu: attach.mtu as usize,
        clamp_mss: attach.mss_clamp,
        private_hop: Hop { source: hub.hidden_mac, destination: tenant.device.mac },
        mtu: tenant.sizes.mtu(),
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
            // With 0 every packet would cause a request.
            retry: Duration::from_secs(attach.retry_seconds.max(1)),
        },
        ip_ids: IpIds::of_worker(0, 1),
    }
}

/// Opens the journal of packets under the static key; `None` if that fails: the tunnel works without it.
fn continue_journal(path: &Path, keys: &Keys) -> Option<(Journal, Vec<[u8; packet::IV]>)> {
    match Journal::open(path) {
        Ok((journal, past)) => {
            keys.refuse(&past.accepted);
            Some((journal, past.sent))
        }
        Err(error) => {
            let path = path.display();
            tracing::warn!("{path}: {error}; recorded packets under the static key may be accepted after a restart");
            None
        }
    }
}
