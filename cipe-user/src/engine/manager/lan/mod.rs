//! LAN cards with a short cut (`lan`): opened with the first tunnel that wants one, closed after the last.

mod tables;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cipe_common::maps::{LAN_QUEUES, Lan as LanEntry, LanRoute, MAX_LANS};
use tokio::sync::mpsc;

use super::Manager;
use super::attach::log_failure;
use super::copying::{Copying, Got};
use super::workers::share_of;
use crate::engine::lan::Table;
use crate::engine::worker::Command;
use crate::kernel::bpf::{XdpMode, XdpPreference};
use crate::kernel::forwarding::{self, Picture, Prefix};
use crate::kernel::links::{Card, CardKind, LinkChange, LinkEvent};
use crate::xsk::{Injector, MultiBuffer, SocketConfig};

/// Between two looks at what the kernel does not tell: neighbours in use, and whether it forwards at all.
const LOOK: Duration = Duration::from_secs(5);

/// The short cuts of an engine.
pub struct Lans {
    /// Cards in use, by ifindex.
    open: HashMap<u32, Lan>,
    /// Where the follower of routes and neighbours tells.
    pictures: mpsc::Sender<Picture>,
    follows: bool,
    picture: Picture,
    /// What the programs have.
    installed: HashMap<Prefix, LanRoute>,
    /// What the workers have.
    table: Arc<Table>,
    /// Whose packets may go by it, as the tables were made.
    takers: Takers,
    /// Why a tunnel has no short cut.
    hindrances: BTreeMap<u16, String>,
    looked: Instant,
}

/// Tunnels that have a short cut, by the ifindex of their devices.
type Takers = HashMap<u32, Taker>;

/// A tunnel that has a short cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Taker {
    number: u16,
    /// Its LAN card, by ifindex.
    lan: u32,
    /// Whether the kernel would forward its packets, IPv4 and IPv6, by prefixes of destinations alone.
    forwards: [bool; 2],
}

/// A LAN card with a short cut.
struct Lan {
    card: Card,
    /// Index in the worker's table, and of its first socket in the map when multiplied by [`LAN_QUEUES`].
    slot: usize,
    flags: u32,
    tunnels: BTreeSet<u16>,
    /// Modes got, for people.
    note: String,
}

impl Lan {
    fn entry(&self) -> LanEntry {
        LanEntry {
            sockets: self.slot as u32 * LAN_QUEUES,
            flags: self.flags,
            mac: self.card.mac.unwrap_or_default(),
            ..LanEntry::default()
        }
    }
}

impl Lans {
    /// None yet; pictures of what the kernel forwards by are to be sent there, for [`Manager::take_picture`].
    pub fn new(pictures: mpsc::Sender<Picture>) -> Self {
        Self {
            open: HashMap::new(),
            pictures,
            follows: false,
            picture: Picture::default(),
            installed: HashMap::new(),
            table: Arc::default(),
            takers: Takers::new(),
            hindrances: BTreeMap::new(),
            looked: Instant::now(),
        }
    }

    /// Whether the device is a card with a short cut.
    pub fn has(&self, ifindex: u32) -> bool {
        self.open.contains_key(&ifindex)
    }

    fn of_tunnel(&self, number: u16) -> Option<&Lan> {
        self.open.values().find(|lan| lan.tunnels.contains(&number))
    }

    /// What there is to say of a tunnel's short cut.
    pub fn note(&self, number: u16) -> Option<String> {
        match (self.of_tunnel(number), self.hindrances.get(&number)) {
            (Some(lan), None) => Some(lan.note.clone()),
            (Some(lan), Some(hindrance)) => Some(format!("{}; {hindrance}", lan.note)),
            (None, hindrance) => hindrance.cloned(),
        }
    }
}

impl Manager {
    /// Opens the short cut of a tunnel that wants one, if that can be. What hinders it is said once; its packets take the
    /// kernel's way then.
    pub(super) async fn enter_lan(&mut self, number: u16) {
        let Some(tenant) = self.tenants.get(&number) else { return };
        let (Some(name), mode) = (tenant.lan.clone(), tenant.xdp_mode) else { return };
        if self.lans.of_tunnel(number).is_some() {
            return;
        }
        match self.use_lan(&name, number, mode).await {
            Ok(note) => {
                self.lans.hindrances.remove(&number);
                self.news(number, note);
            }
            Err(error) => {
                let text = format!("no short cut: {error:#}");
                if self.lans.hindrances.insert(number, text.clone()).as_ref() != Some(&text) {
                    self.notice(number, format!("{text}; packets take the kernel's way"));
                }
            }
        }
        self.renew_lans();
    }

    async fn use_lan(&mut self, name: &str, number: u16, mode: XdpPreference) -> anyhow::Result<String> {
        if !self.lans.follows {
            let mut pictures = forwarding::follow(&self.netlink).await?;
            self.lans.picture = pictures.borrow_and_update().clone();
            self.lans.follows = true;
            let sender = self.lans.pictures.clone();
            tokio::spawn(async move {
                while pictures.changed().await.is_ok() {
                    let picture = pictures.borrow_and_update().clone();
                    if sender.send(picture).await.is_err() {
                        return;
                    }
                }
            });
        }
        let card = self.netlink.card_named(name).await?;
        let ifindex = card.ifindex;
        if !self.lans.open.contains_key(&ifindex) {
            let lan = self.open_lan(card, mode).await?;
            tracing::info!("{}", lan.note);
            self.lans.open.insert(ifindex, lan);
        }
        let lan = self.lans.open.get_mut(&ifindex).ok_or_else(|| anyhow::anyhow!("{name}: it has gone"))?;
        lan.tunnels.insert(number);
        Ok(lan.note.clone())
    }

    async fn open_lan(&mut self, card: Card, mode: XdpPreference) -> anyhow::Result<Lan> {
        let (ifindex, name) = (card.ifindex, card.name.clone());
        if card.kind != CardKind::Ethernet || card.mac.is_none() {
            anyhow::bail!("{name}: no Ethernet device, so AF_XDP cannot send on it");
        }
        if card.enslaved {
            anyhow::bail!("{name}: part of another device (bridge, bond or VRF); name that one");
        }
        if self.devices.contains_key(&ifindex) || self.hubs.of_device(ifindex).is_some() {
            anyhow::bail!("{name}: a tunnel's own device; name the card of the LAN");
        }
        if self.carriers.has(ifindex) {
            anyhow::bail!("{name}: AF_XDP serves it as a carrier already; set `carrier udp` for the tunnels over it");
        }
        let used: HashSet<usize> = self.lans.open.values().map(|lan| lan.slot).collect();
        let slot = (0..MAX_LANS as usize).find(|slot| !used.contains(slot));
        let slot = slot.ok_or_else(|| anyhow::anyhow!("all {MAX_LANS} short cuts of the engine are in use"))?;
        let mode = self.programs.attach_lan(ifindex, mode)?;
        let flags = if matches!(mode, XdpMode::Generic { .. }) { LanEntry::GENERIC } else { 0 };
        let queues = card.receive_queues.clamp(1, LAN_QUEUES);
        let copying = Copying::of(&card, flags == LanEntry::GENERIC, self.umem.frame_size(), false);
        match self.open_lan_queues(&card, slot, queues, copying).await {
            Ok(copying) => {
                let note = format!("{name}: short cut, {mode} XDP, {copying}, {queues} queue(s)");
                let lan = Lan { card, slot, flags, tunnels: BTreeSet::new(), note };
                match self.programs.set_lan_device(ifindex, lan.entry()) {
                    Ok(()) => Ok(lan),
                    Err(error) => {
                        self.shut_lan(ifindex, slot).await;
                        Err(error.into())
                    }
                }
            }
            Err(error) => {
                self.programs.detach_lan(ifindex);
                Err(error)
            }
        }
    }

    /// Opens the queues of a LAN card; how packets pass between it and us.
    async fn open_lan_queues(
        &mut self,
        card: &Card,
        slot: usize,
        queues: u32,
        copying: Copying,
    ) -> anyhow::Result<String> {
        let mut sockets = Vec::new();
        // What needs several frames is larger than a tunnel takes, and not redirected.
        let multi_buffer = MultiBuffer::Wanted;
        let config = SocketConfig { mode: copying.mode, multi_buffer, ..SocketConfig::default() };
        for queue in 0..queues {
            let socket = self.bind_queue(card.ifindex, queue, config).await?;
            self.programs.set_lan_socket(slot as u32 * LAN_QUEUES + queue, &socket)?;
            sockets.push(socket);
        }
        let got = Got::of(&sockets);
        let zero_copy = got.zero_copy == got.queues;
        let count = self.workers.count();
        let injectors = (0..count).map(|_| Injector::open(card.ifindex)).collect::<Result<Vec<_>, _>>()?;
        let mut shares = share_of(sockets, count).into_iter().zip(injectors);
        // Until then nothing is redirected; a ring without frames would lose it.
        let listen = self.workers.ask_all(|_, done| {
            let (sockets, injector) = shares.next().expect("a share for each worker");
            Command::AddLan(slot, sockets, injector, !zero_copy, done)
        });
        if !listen.in_time().await {
            // They hear it behind the other command.
            self.shut_lan(card.ifindex, slot).await;
            anyhow::bail!("the workers do not take the card: the machine is too busy, or one hangs");
        }
        Ok(copying.note(got))
    }

    /// Takes a tunnel off its short cut, and closes the card after the last.
    pub(super) async fn leave_lan(&mut self, number: u16) {
        self.lans.hindrances.remove(&number);
        let found = self.lans.open.iter_mut().find(|(_, lan)| lan.tunnels.contains(&number));
        let Some((&ifindex, lan)) = found else { return };
        lan.tunnels.remove(&number);
        if lan.tunnels.is_empty() {
            self.close_lan(ifindex).await;
        }
        self.renew_lans();
    }

    /// Closes a card; everything goes the kernel's way. Returns the tunnels that used it.
    async fn close_lan(&mut self, ifindex: u32) -> BTreeSet<u16> {
        let Some(lan) = self.lans.open.remove(&ifindex) else { return BTreeSet::new() };
        self.shut_lan(ifindex, lan.slot).await;
        lan.tunnels
    }

    async fn shut_lan(&mut self, ifindex: u32, slot: usize) {
        log_failure(self.programs.remove_lan_device(ifindex));
        self.programs.detach_lan(ifindex);
        self.workers.ask_all(|_, done| Command::RemoveLan(slot, done)).in_time().await;
    }

    /// Takes up what has happened to a device.
    pub(super) async fn lan_changed(&mut self, event: &LinkEvent) {
        // Nobody ever wanted a short cut: thousands of tunnel devices may come and go at no cost.
        if !self.lans.follows {
            return;
        }
        let ifindex = event.ifindex;
        let known = self.lans.open.get(&ifindex).map(|lan| lan.card.name.clone());
        match (event.change, known) {
            (LinkChange::Deleted, Some(name)) => self.lose_lan(ifindex, &format!("{name}: it has gone")).await,
            (LinkChange::Renamed, Some(name)) if name != event.name => {
                self.lose_lan(ifindex, &format!("{name}: it is called {} now", event.name)).await;
            }
            (LinkChange::Changed, Some(name)) => {
                // One that has another name by now is lost by the event that tells it, which is to come.
                if let Ok(card) = self.netlink.card(ifindex).await
                    && card.name == name
                    && let Some(lan) = self.lans.open.get_mut(&ifindex)
                {
                    lan.card = card;
                    log_failure(self.programs.set_lan_device(ifindex, lan.entry()));
                    self.renew_lans();
                }
            }
            _ => {}
        }
        if matches!(event.change, LinkChange::Added | LinkChange::Up | LinkChange::Renamed) {
            let wanting = self.tenants.iter().filter(|(_, tenant)| tenant.lan.as_ref() == Some(&event.name));
            for number in wanting.map(|(number, _)| *number).collect::<Vec<_>>() {
                self.enter_lan(number).await;
            }
        }
    }

    async fn lose_lan(&mut self, ifindex: u32, reason: &str) {
        for number in self.close_lan(ifindex).await {
            let text = format!("no short cut: {reason}");
            self.notice(number, format!("{text}; packets take the kernel's way"));
            self.lans.hindrances.insert(number, text);
        }
        self.renew_lans();
    }

    /// Takes up what the kernel forwards by now.
    pub(super) fn take_picture(&mut self, picture: Picture) {
        self.lans.picture = picture;
        self.renew_lans();
    }

    /// Tells the kernel which neighbours are in use, and looks whether it still forwards.
    pub(super) async fn tend_lans(&mut self, now: Instant) {
        if self.lans.open.is_empty() || now.duration_since(self.lans.looked) < LOOK {
            return;
        }
        self.lans.looked = now;
        let used: Vec<(u32, IpAddr)> = self.lans.table.take_used().collect();
        for (ifindex, address) in used {
            let near = self.lans.picture.neighbours.get(&(ifindex, address));
            if near.is_some_and(|near| !near.fixed)
                && let Err(error) = self.netlink.use_neighbour(ifindex, address).await
            {
                tracing::debug!("{error}");
            }
        }
        if self.takers() != self.lans.takers {
            self.renew_lans();
        }
    }
}
