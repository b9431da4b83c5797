//! LAN cards with a short cut (`lan`): a card is opened for the first tunnel that asks for it, and closed after the last.

mod card;
mod tables;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cipe_common::maps::{LanRoute, MAX_LANS};
use tokio::sync::watch;

use super::doors::Doors;
use super::hubs::Hubs;
use super::jobs::Jobs;
use super::platform::{Platform, log_failure};
use super::poll::PollTimer;
use super::shared::Shared;
use crate::engine::lan::LanTable;
use crate::kernel::bpf::XdpMode;
use crate::kernel::forwarding::{self, Picture, Prefix};
use crate::kernel::links::{Card, CardKind, LinkChange, LinkEvent};
use card::LanCard;

/// Interval between two polls of what the kernel does not notify of: neighbours in use, and whether forwarding is on.
const POLL_INTERVAL: Duration = Duration::from_secs(5);

/// The short cuts of an engine.
pub(super) struct Lans {
    platform: Arc<Platform>,
    /// Cards in use, by ifindex.
    open: HashMap<u32, LanCard>,
    /// Cards that are being opened, with their slots and the tunnels that wait for them.
    opening: HashMap<u32, (usize, BTreeSet<u16>)>,
    /// The kernel's forwarding tables, followed from the first tunnel on that asks for a short cut.
    pictures: Option<watch::Receiver<Picture>>,
    picture: Picture,
    /// The routes that the programs have.
    installed: HashMap<Prefix, LanRoute>,
    /// The table that the workers have.
    table: Arc<LanTable>,
    /// The tunnels that may use short cuts, as of the last tables.
    takers: Takers,
    /// Why a tunnel has no short cut.
    hindrances: BTreeMap<u16, String>,
    poll: PollTimer,
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

/// The result of opening a card for the tunnel `asker`.
pub(super) struct Opened {
    pub ifindex: u32,
    pub asker: u16,
    pub lan: anyhow::Result<Box<LanCard>>,
}

impl Lans {
    /// No card yet.
    pub(super) fn new(platform: Arc<Platform>) -> Self {
        Self {
            platform,
            open: HashMap::new(),
            opening: HashMap::new(),
            pictures: None,
            picture: Picture::default(),
            installed: HashMap::new(),
            table: Arc::default(),
            takers: Takers::new(),
            hindrances: BTreeMap::new(),
            poll: PollTimer::new(POLL_INTERVAL),
        }
    }

    /// Whether the device is a card with a short cut, or about to be.
    pub(super) fn has(&self, ifindex: u32) -> bool {
        self.open.contains_key(&ifindex) || self.opening.contains_key(&ifindex)
    }

    fn of_tunnel(&self, number: u16) -> Option<&LanCard> {
        self.open.values().find(|lan| lan.tunnels.contains(&number))
    }

    /// The status note on a tunnel's short cut.
    pub(super) fn note(&self, number: u16) -> Option<String> {
        match (self.of_tunnel(number), self.hindrances.get(&number)) {
            (Some(lan), None) => Some(lan.note.clone()),
            (Some(lan), Some(hindrance)) => Some(format!("{}; {hindrance}", lan.note)),
            (None, hindrance) => hindrance.cloned(),
        }
    }

    /// Waits for a change of the kernel's forwarding tables; for ever if no tunnel ever asked for a short cut. Cancel safe.
    ///
    /// # Errors
    /// The tables cannot be followed any longer.
    pub(super) async fn next_picture(&mut self) -> anyhow::Result<()> {
        let Some(pictures) = &mut self.pictures else { return std::future::pending().await };
        pictures
            .changed()
            .await
            .context("routes of short cuts cannot be followed any longer; the system log says why")?;
        self.picture = pictures.borrow_and_update().clone();
        Ok(())
    }

    /// Follows the kernel's forwarding tables, from the first call on.
    async fn follow(&mut self) -> anyhow::Result<()> {
        if self.pictures.is_none() {
            let mut pictures = forwarding::follow(&self.platform.netlink).await?;
            self.picture = pictures.borrow_and_update().clone();
            self.pictures = Some(pictures);
        }
        Ok(())
    }

    /// Adds a tunnel to the users of a card that is open, or to those that wait for one that is being opened; `None`: it is neither.
    fn join(&mut self, ifindex: u32, number: u16) -> Option<Joined> {
        if let Some(lan) = self.open.get_mut(&ifindex) {
            lan.tunnels.insert(number);
            return Some(Joined::Open(lan.note.clone()));
        }
        self.opening.get_mut(&ifindex)?.1.insert(number);
        Some(Joined::Opening)
    }

    /// Starts to open a card for a tunnel.
    fn begin(
        &mut self,
        card: Card,
        mode: XdpMode,
        asker: u16,
        jobs: &mut Jobs<impl From<Opened> + Send + 'static>,
    ) -> anyhow::Result<()> {
        let ifindex = card.ifindex;
        let opening = self.opening.values().map(|(slot, _)| *slot);
        let used: HashSet<usize> = self.open.values().map(|lan| lan.slot).chain(opening).collect();
        let slot = (0..MAX_LANS as usize).find(|slot| !used.contains(slot));
        let slot = slot.ok_or_else(|| anyhow::anyhow!("all {MAX_LANS} short cuts of the engine are in use"))?;
        self.opening.insert(ifindex, (slot, BTreeSet::from([asker])));
        let platform = self.platform.clone();
        jobs.start(async move {
            let lan = card::open(&platform, card, slot, mode).await.map(Box::new);
            Opened { ifindex, asker, lan }
        });
        Ok(())
    }

    /// Closes a card; the kernel forwards all its packets from then on. Returns the tunnels that used it.
    fn close(&mut self, ifindex: u32) -> BTreeSet<u16> {
        let Some(lan) = self.open.remove(&ifindex) else { return BTreeSet::new() };
        card::shut(&self.platform, ifindex, lan.slot);
        lan.tunnels
    }

    /// Opens the short cut of a tunnel that asks for one. If it cannot be opened, its daemon is told once, and the kernel forwards
    /// the tunnel's packets.
    pub(super) async fn enter(&mut self, number: u16, shared: &mut Shared, hubs: &Hubs, doors: &Doors) {
        let Some(tenant) = shared.tunnels.get(number) else { return };
        let (Some(name), mode) = (tenant.lan.clone(), tenant.xdp_mode) else { return };
        if self.of_tunnel(number).is_some() {
            return;
        }
        match self.use_card(&name, number, mode, shared, hubs, doors).await {
            Ok(Joined::Open(note)) => {
                self.hindrances.remove(&number);
                shared.daemons.news(number, note);
            }
            Ok(Joined::Opening) => return,
            Err(error) => self.hinder(number, &error, shared),
        }
        self.renew(&shared.tunnels, &shared.daemons);
    }

    fn hinder(&mut self, number: u16, error: &anyhow::Error, shared: &Shared) {
        let text = format!("no short cut: {error:#}");
        if self.hindrances.insert(number, text.clone()).as_ref() != Some(&text) {
            shared.daemons.notice(number, format!("{text}; packets take the kernel's way"));
        }
    }

    async fn use_card(
        &mut self,
        name: &str,
        number: u16,
        mode: XdpMode,
        shared: &mut Shared,
        hubs: &Hubs,
        doors: &Doors,
    ) -> anyhow::Result<Joined> {
        self.follow().await?;
        let card = self.platform.netlink.card_named(name).await?;
        let ifindex = card.ifindex;
        if let Some(joined) = self.join(ifindex, number) {
            return Ok(joined);
        }
        if card.kind != CardKind::Ethernet || card.mac.is_none() {
            anyhow::bail!("{name}: no Ethernet device, so AF_XDP cannot send on it");
        }
        if card.enslaved {
            anyhow::bail!("{name}: part of another device (bridge, bond or VRF); name that one");
        }
        if shared.tunnels.of_device(ifindex).is_some() || hubs.of_device(ifindex).is_some() {
            anyhow::bail!("{name}: a tunnel's own device; name the card of the LAN");
        }
        if doors.has(ifindex) {
            anyhow::bail!("{name}: AF_XDP serves it as a carrier already; set `carrier udp` for the tunnels over it");
        }
        self.begin(card, mode, number, &mut shared.jobs)?;
        Ok(Joined::Opening)
    }

    /// Handles the result of opening a card for a tunnel. Each tunnel that waits for the card gets it, or else asks again for itself.
    pub(super) async fn opened(&mut self, opened: Opened, shared: &mut Shared, hubs: &Hubs, doors: &Doors) {
        let Opened { ifindex, asker, lan } = opened;
        let waiting = self.opening.remove(&ifindex).map(|(_, tunnels)| tunnels).unwrap_or_default();
        let lan = match (lan, self.platform.netlink.card(ifindex).await) {
            // Its name may have changed while it was opened, or it has gone.
            (Ok(lan), Ok(card)) if card.name == lan.card.name => Ok(lan),
            (Ok(lan), card) => {
                card::shut(&self.platform, ifindex, lan.slot);
                Err(match card {
                    Ok(card) => anyhow::anyhow!("{}: it is called {} now", lan.card.name, card.name),
                    Err(error) => anyhow::anyhow!("{}: {error}", lan.card.name),
                })
            }
            (Err(error), _) => Err(error),
        };
        match lan {
            Ok(lan) => {
                tracing::info!("{}", lan.note);
                self.open.insert(ifindex, *lan);
            }
            Err(error) if shared.tunnels.get(asker).is_some() => self.hinder(asker, &error, shared),
            Err(error) => tracing::debug!("{error:#}; its tunnel has gone"),
        }
        let failed = !self.open.contains_key(&ifindex);
        for number in waiting.into_iter().filter(|number| !failed || *number != asker) {
            self.enter(number, shared, hubs, doors).await;
        }
        if self.open.get(&ifindex).is_some_and(|lan| lan.tunnels.is_empty()) {
            self.close(ifindex);
        }
        self.renew(&shared.tunnels, &shared.daemons);
    }

    /// Takes a tunnel off its short cut, and closes the card after the last.
    pub(super) fn leave(&mut self, number: u16, shared: &Shared) {
        self.hindrances.remove(&number);
        for (_, waiting) in self.opening.values_mut() {
            waiting.remove(&number);
        }
        let found = self.open.iter_mut().find(|(_, lan)| lan.tunnels.contains(&number));
        let Some((&ifindex, lan)) = found else { return };
        lan.tunnels.remove(&number);
        if lan.tunnels.is_empty() {
            self.close(ifindex);
        }
        self.renew(&shared.tunnels, &shared.daemons);
    }

    /// Handles a change of a network device: a card that has gone or has another name loses its short cut, and one that comes gets
    /// its tunnels.
    pub(super) async fn link_changed(&mut self, event: &LinkEvent, shared: &mut Shared, hubs: &Hubs, doors: &Doors) {
        // Without any short cut, thousands of tunnel devices may come and go at no cost.
        if self.pictures.is_none() {
            return;
        }
        let ifindex = event.ifindex;
        let known = self.open.get(&ifindex).map(|lan| lan.card.name.clone());
        match (event.change, known) {
            (LinkChange::Deleted, Some(name)) => self.lose(ifindex, &format!("{name}: it has gone"), shared),
            (LinkChange::Renamed, Some(name)) if name != event.name => {
                self.lose(ifindex, &format!("{name}: it is called {} now", event.name), shared);
            }
            (LinkChange::Changed, Some(name)) => {
                let card = self.platform.netlink.card(ifindex).await;
                match (card, self.open.get_mut(&ifindex)) {
                    (Ok(card), Some(lan)) if card.name == name => {
                        lan.card = card;
                        log_failure(self.platform.programs().set_lan_device(ifindex, lan.entry()));
                        self.renew(&shared.tunnels, &shared.daemons);
                    }
                    // A device that has gone or has another name loses its short cut by the event of that, which comes next.
                    (Ok(_), _) => {}
                    (Err(error), _) => tracing::debug!("{error}"),
                }
            }
            _ => {}
        }
        if matches!(event.change, LinkChange::Added | LinkChange::Up | LinkChange::Renamed) {
            for number in shared.tunnels.numbers(|tenant| tenant.is_open && tenant.lan.as_ref() == Some(&event.name)) {
                self.enter(number, shared, hubs, doors).await;
            }
        }
    }

    fn lose(&mut self, ifindex: u32, reason: &str, shared: &Shared) {
        for number in self.close(ifindex) {
            let text = format!("no short cut: {reason}");
            shared.daemons.notice(number, format!("{text}; packets take the kernel's way"));
            self.hindrances.insert(number, text);
        }
        self.renew(&shared.tunnels, &shared.daemons);
    }

    /// Reports to the kernel which neighbours are in use, and checks whether it still forwards.
    pub(super) async fn poll(&mut self, now: Instant, shared: &Shared) {
        if self.open.is_empty() || !self.poll.is_due(now) {
            return;
        }
        let used: Vec<(u32, IpAddr)> = self.table.take_used().collect();
        for (ifindex, address) in used {
            let near = self.picture.neighbours.get(&(ifindex, address));
            if near.is_some_and(|near| !near.fixed)
                && let Err(error) = self.platform.netlink.use_neighbour(ifindex, address).await
            {
                tracing::debug!("{error}");
            }
        }
        if self.takers_now(&shared.tunnels) != self.takers {
            self.renew(&shared.tunnels, &shared.daemons);
        }
    }
}

/// What a tunnel has of a card.
enum Joined {
    /// A short cut, and the note on it.
    Open(String),
    /// It waits for one.
    Opening,
}
