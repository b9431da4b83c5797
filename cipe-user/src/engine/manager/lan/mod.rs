//! LAN cards with a short cut (`lan`): opened with the first tunnel that wants one, closed after the last.

mod card;
mod tables;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cipe_common::maps::{LanRoute, MAX_LANS};
use tokio::sync::watch;

use super::Manager;
use super::jobs::Jobs;
use super::platform::Platform;
use super::platform::log_failure;
use crate::engine::lan::LanTable;
use crate::kernel::bpf::XdpMode;
use crate::kernel::forwarding::{self, Picture, Prefix};
use crate::kernel::links::{Card, CardKind, LinkChange, LinkEvent};
use card::LanCard;

/// Between two looks at what the kernel does not tell: neighbours in use, and whether it forwards at all.
const LOOK: Duration = Duration::from_secs(5);

/// The short cuts of an engine.
pub(super) struct Lans {
    platform: Arc<Platform>,
    /// Cards in use, by ifindex.
    open: HashMap<u32, LanCard>,
    /// Cards that are being opened, with their slots and the tunnels that wait for them.
    opening: HashMap<u32, (usize, BTreeSet<u16>)>,
    /// What the kernel forwards by, followed from the first wish for a short cut on.
    pictures: Option<watch::Receiver<Picture>>,
    picture: Picture,
    /// What the programs have.
    installed: HashMap<Prefix, LanRoute>,
    /// What the workers have.
    table: Arc<LanTable>,
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

/// What has come of opening a card for this tunnel.
pub(super) struct Opened {
    pub ifindex: u32,
    pub asker: u16,
    pub lan: anyhow::Result<Box<LanCard>>,
}

impl Lans {
    /// None yet.
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
            looked: Instant::now(),
        }
    }

    /// Whether the device is a card with a short cut, or about to be.
    pub(super) fn has(&self, ifindex: u32) -> bool {
        self.open.contains_key(&ifindex) || self.opening.contains_key(&ifindex)
    }

    fn of_tunnel(&self, number: u16) -> Option<&LanCard> {
        self.open.values().find(|lan| lan.tunnels.contains(&number))
    }

    /// What there is to say of a tunnel's short cut.
    pub(super) fn note(&self, number: u16) -> Option<String> {
        match (self.of_tunnel(number), self.hindrances.get(&number)) {
            (Some(lan), None) => Some(lan.note.clone()),
            (Some(lan), Some(hindrance)) => Some(format!("{}; {hindrance}", lan.note)),
            (None, hindrance) => hindrance.cloned(),
        }
    }

    /// Waits until the kernel forwards by something else; for ever if nobody ever wanted a short cut. Cancel safe.
    ///
    /// # Errors
    /// It cannot be followed any longer.
    pub(super) async fn next_picture(&mut self) -> anyhow::Result<()> {
        let Some(pictures) = &mut self.pictures else { return std::future::pending().await };
        pictures
            .changed()
            .await
            .context("routes of short cuts cannot be followed any longer; the system log says why")?;
        self.picture = pictures.borrow_and_update().clone();
        Ok(())
    }

    /// Follows what the kernel forwards by, from the first call on.
    async fn follow(&mut self) -> anyhow::Result<()> {
        if self.pictures.is_none() {
            let mut pictures = forwarding::follow(&self.platform.netlink).await?;
            self.picture = pictures.borrow_and_update().clone();
            self.pictures = Some(pictures);
        }
        Ok(())
    }

    /// Has a tunnel use the card if that is open, or wait for it if it is being opened; what it has then.
    fn join(&mut self, ifindex: u32, number: u16) -> Option<Joined> {
        if let Some(lan) = self.open.get_mut(&ifindex) {
            lan.tunnels.insert(number);
            return Some(Joined::Open(lan.note.clone()));
        }
        self.opening.get_mut(&ifindex)?.1.insert(number);
        Some(Joined::Opening)
    }

    /// Begins to open a card for a tunnel.
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

    /// Closes a card; everything goes the kernel's way. Returns the tunnels that used it.
    fn close(&mut self, ifindex: u32) -> BTreeSet<u16> {
        let Some(lan) = self.open.remove(&ifindex) else { return BTreeSet::new() };
        card::shut(&self.platform, ifindex, lan.slot);
        lan.tunnels
    }
}

/// What a tunnel has of a card.
enum Joined {
    /// A short cut, and what there is to say of it.
    Open(String),
    /// It waits for one.
    Opening,
}

impl Manager {
    /// Opens the short cut of a tunnel that wants one, if that can be. What hinders it is said once; its packets take the
    /// kernel's way then.
    pub(super) async fn enter_lan(&mut self, number: u16) {
        let Some(tenant) = self.tunnels.get(number) else { return };
        let (Some(name), mode) = (tenant.lan.clone(), tenant.xdp_mode) else { return };
        if self.lans.of_tunnel(number).is_some() {
            return;
        }
        match self.use_lan(&name, number, mode).await {
            Ok(Joined::Open(note)) => self.entered_lan(number, note),
            Ok(Joined::Opening) => return,
            Err(error) => self.hinder(number, &error),
        }
        self.renew_lans();
    }

    fn entered_lan(&mut self, number: u16, note: String) {
        self.lans.hindrances.remove(&number);
        self.daemons.news(number, note);
    }

    fn hinder(&mut self, number: u16, error: &anyhow::Error) {
        let text = format!("no short cut: {error:#}");
        if self.lans.hindrances.insert(number, text.clone()).as_ref() != Some(&text) {
            self.daemons.notice(number, format!("{text}; packets take the kernel's way"));
        }
    }

    async fn use_lan(&mut self, name: &str, number: u16, mode: XdpMode) -> anyhow::Result<Joined> {
        self.lans.follow().await?;
        let card = self.platform.netlink.card_named(name).await?;
        let ifindex = card.ifindex;
        if let Some(joined) = self.lans.join(ifindex, number) {
            return Ok(joined);
        }
        if card.kind != CardKind::Ethernet || card.mac.is_none() {
            anyhow::bail!("{name}: no Ethernet device, so AF_XDP cannot send on it");
        }
        if card.enslaved {
            anyhow::bail!("{name}: part of another device (bridge, bond or VRF); name that one");
        }
        if self.tunnels.of_device(ifindex).is_some() || self.hubs.of_device(ifindex).is_some() {
            anyhow::bail!("{name}: a tunnel's own device; name the card of the LAN");
        }
        if self.carriers.has(ifindex) {
            anyhow::bail!("{name}: AF_XDP serves it as a carrier already; set `carrier udp` for the tunnels over it");
        }
        self.lans.begin(card, mode, number, &mut self.jobs)?;
        Ok(Joined::Opening)
    }

    /// Takes up that a card was opened for a tunnel, or could not be: each tunnel that waits for it then is served by it, or tries
    /// for itself.
    pub(super) async fn lan_opened(&mut self, ifindex: u32, asker: u16, lan: anyhow::Result<Box<LanCard>>) {
        let waiting = self.lans.opening.remove(&ifindex).map(|(_, tunnels)| tunnels).unwrap_or_default();
        let lan = match (lan, self.platform.netlink.card(ifindex).await) {
            // Its name may have changed while it was opened, or it has gone.
            (Ok(lan), Ok(card)) if card.name == lan.card.name => Ok(lan),
            (Ok(lan), _) => {
                card::shut(&self.platform, ifindex, lan.slot);
                Err(anyhow::anyhow!("{}: it has gone, or has another name", lan.card.name))
            }
            (Err(error), _) => Err(error),
        };
        match lan {
            Ok(lan) => {
                tracing::info!("{}", lan.note);
                self.lans.open.insert(ifindex, *lan);
            }
            Err(error) if self.tunnels.get(asker).is_some() => self.hinder(asker, &error),
            Err(_) => {}
        }
        let failed = !self.lans.open.contains_key(&ifindex);
        for number in waiting.into_iter().filter(|number| !failed || *number != asker) {
            self.enter_lan(number).await;
        }
        if self.lans.open.get(&ifindex).is_some_and(|lan| lan.tunnels.is_empty()) {
            self.lans.close(ifindex);
        }
        self.renew_lans();
    }

    /// Takes a tunnel off its short cut, and closes the card after the last.
    pub(super) fn leave_lan(&mut self, number: u16) {
        self.lans.hindrances.remove(&number);
        for (_, waiting) in self.lans.opening.values_mut() {
            waiting.remove(&number);
        }
        let found = self.lans.open.iter_mut().find(|(_, lan)| lan.tunnels.contains(&number));
        let Some((&ifindex, lan)) = found else { return };
        lan.tunnels.remove(&number);
        if lan.tunnels.is_empty() {
            self.lans.close(ifindex);
        }
        self.renew_lans();
    }

    /// Takes up what has happened to a device.
    pub(super) async fn lan_changed(&mut self, event: &LinkEvent) {
        // Nobody ever wanted a short cut: thousands of tunnel devices may come and go at no cost.
        if self.lans.pictures.is_none() {
            return;
        }
        let ifindex = event.ifindex;
        let known = self.lans.open.get(&ifindex).map(|lan| lan.card.name.clone());
        match (event.change, known) {
            (LinkChange::Deleted, Some(name)) => self.lose_lan(ifindex, &format!("{name}: it has gone")),
            (LinkChange::Renamed, Some(name)) if name != event.name => {
                self.lose_lan(ifindex, &format!("{name}: it is called {} now", event.name));
            }
            (LinkChange::Changed, Some(name)) => {
                // One that has another name by now is lost by the event that tells it, which is to come.
                if let Ok(card) = self.platform.netlink.card(ifindex).await
                    && card.name == name
                    && let Some(lan) = self.lans.open.get_mut(&ifindex)
                {
                    lan.card = card;
                    log_failure(self.platform.programs().set_lan_device(ifindex, lan.entry()));
                    self.renew_lans();
                }
            }
            _ => {}
        }
        if matches!(event.change, LinkChange::Added | LinkChange::Up | LinkChange::Renamed) {
            for number in self.tunnels.numbers(|tenant| tenant.is_open && tenant.lan.as_ref() == Some(&event.name)) {
                self.enter_lan(number).await;
            }
        }
    }

    fn lose_lan(&mut self, ifindex: u32, reason: &str) {
        for number in self.lans.close(ifindex) {
            let text = format!("no short cut: {reason}");
            self.daemons.notice(number, format!("{text}; packets take the kernel's way"));
            self.lans.hindrances.insert(number, text);
        }
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
                && let Err(error) = self.platform.netlink.use_neighbour(ifindex, address).await
            {
                tracing::debug!("{error}");
            }
        }
        if self.lans.takers_now(&self.tunnels) != self.lans.takers {
            self.renew_lans();
        }
    }
}
