//! The door of each tunnel: AF_XDP on its carrier device, or its UDP socket. This room chooses it, and chooses anew when something
//! that it depends on changes: the next hop, the kind of traffic, IPsec policies, XDP programs of others, a driver's zero copy.

mod choice;
mod rivals;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use super::carriers::{self, Carrier, Carriers};
use super::lan::Lans;
use super::loops::PeerRoute;
use super::platform::Platform;
use super::shared::Shared;
use super::trial::TrialChange;
use super::tunnels::Tenant;
use crate::control::protocol::CarrierChoice;
use crate::kernel::nexthop::NextHop;
use crate::kernel::policies::Policies;
use crate::kernel::{ethtool, netdev};
use rivals::Rivals;

/// Chooses doors, and opens and closes carrier devices for them.
pub(super) struct Doors {
    platform: Arc<Platform>,
    carriers: Carriers,
    rivals: Rivals,
    /// The host's IPsec policies, which AF_XDP would bypass.
    policies: watch::Receiver<Policies>,
}

impl Doors {
    /// All tunnels use their UDP sockets.
    pub(super) fn new(platform: Arc<Platform>, policies: watch::Receiver<Policies>) -> Self {
        Self { carriers: Carriers::new(platform.clone()), rivals: Rivals::new(platform.clone()), platform, policies }
    }

    /// Whether AF_XDP serves a device as a carrier, or is about to, or still does.
    pub(super) fn has(&self, ifindex: u32) -> bool {
        self.carriers.has(ifindex)
    }

    /// The modes got on the carrier device of a tunnel, for its status.
    pub(super) fn carrier_note(&self, tenant: &Tenant) -> Option<String> {
        let carrier = self.carriers.get(tenant.carrier?)?;
        let sends_live = carrier.sends_live() && tenant.carrier_choice == CarrierChoice::Auto;
        let sends = if sends_live { ", sends live frames" } else { "" };
        Some(format!("{}{sends}", carrier.note))
    }

    /// Handles a worker's report that a tunnel's UDP socket gets single frames: for them AF_XDP is the faster door, on the same
    /// device for all tunnels without a `carrier` option.
    pub(super) async fn saw_single_frames(&mut self, number: u16, shared: &mut Shared, lans: &Lans) {
        let hop = shared.tunnels.get(number).and_then(|tenant| tenant.hop);
        let Some(ifindex) = hop.map(|hop| hop.ifindex).filter(|ifindex| shared.tunnels.of_device(*ifindex).is_none())
        else {
            return;
        };
        if self.carriers.see_single_frames(ifindex) {
            self.choose_over(ifindex, shared, lans).await;
        }
    }

    /// Handles a worker's report that many datagrams leave by a tunnel's UDP socket: where the other end of a veth runs native XDP,
    /// the kernel cuts superframes on the way anyway, and live frames cost less.
    pub(super) async fn saw_many_sent(&mut self, number: u16, shared: &mut Shared, lans: &Lans) {
        let Some(tenant) = shared.tunnels.get(number).filter(|tenant| tenant.carrier.is_none()) else { return };
        let Some(ifindex) = tenant.hop.map(|hop| hop.ifindex) else { return };
        let is_cut = || ethtool::takes_udp_superframes(ifindex) == Some(false);
        if tenant.carrier_choice != CarrierChoice::Auto || !netdev::takes_xdp_frames(ifindex) || !is_cut() {
            return;
        }
        match self.platform.netlink.card(ifindex).await {
            Ok(card) if self.carriers.may_send_live(&card) => self.saw_single_frames(number, shared, lans).await,
            Ok(_) => {}
            Err(error) => tracing::debug!("{error}"),
        }
    }

    /// Polls what the kernel does not notify of: other XDP programs, live frames, traffic, and zero copy.
    pub(super) async fn poll(&mut self, now: Instant, shared: &mut Shared, lans: &Lans) {
        if self.rivals.is_due(now) {
            self.poll_programs(shared, lans).await;
        }
        for ifindex in self.carriers.poll_live_frames() {
            self.choose_over(ifindex, shared, lans).await;
        }
        self.close_calm(now, shared);
        self.poll_zero_copy(now, shared);
    }

    /// Polls the XDP programs on carrier devices: AF_XDP is tried again when another program has gone, and opened anew where its own
    /// program was detached.
    async fn poll_programs(&mut self, shared: &mut Shared, lans: &Lans) {
        for (ifindex, present) in self.rivals.poll().await {
            if present.is_none() {
                shared.tunnels.forget_refusal(ifindex);
            }
            self.choose_over(ifindex, shared, lans).await;
        }
        for (ifindex, own) in self.carriers.programs() {
            match self.platform.netlink.attached(ifindex).await {
                Ok((present, _)) if present == Some(own) => {}
                Ok(_) => self.reopen(ifindex, shared),
                // A device that is gone is closed when the kernel notifies of that.
                Err(error) => tracing::debug!("{error}"),
            }
        }
    }

    /// Closes a carrier device whose program somebody has detached, so that it is opened again: its sockets get nothing any more.
    fn reopen(&mut self, ifindex: u32, shared: &mut Shared) {
        let Some(carrier) = self.carriers.get(ifindex) else { return };
        let message = format!("{}: somebody has detached the engine's XDP program; attaching it again", carrier.name);
        tracing::warn!("{message}");
        for number in self.close_to_choose(ifindex, shared) {
            shared.daemons.notice(number, message.clone());
        }
    }

    /// Gives calm devices back to the UDP sockets, if no tunnel on them has a `carrier` option: as long as XDP is attached, the
    /// other end cuts all superframes, and only without it shows whether it would send any. Not under load: a veth drops the
    /// frames in its rings then, uncounted.
    fn close_calm(&mut self, now: Instant, shared: &mut Shared) {
        for ifindex in self.carriers.calm(now) {
            let Some(carrier) = self.carriers.get(ifindex) else { continue };
            let is_auto = |number: &u16| {
                shared.tunnels.get(*number).is_some_and(|tenant| tenant.carrier_choice == CarrierChoice::Auto)
            };
            if !carrier.tunnels.iter().all(is_auto) {
                continue;
            }
            let name = carrier.name.clone();
            let seconds = self.carriers.leave_calm(ifindex, now);
            let message = format!("{name}: calm for {seconds} s; UDP socket, until single frames come in numbers");
            tracing::info!("{message}");
            for number in self.close_to_choose(ifindex, shared) {
                shared.daemons.news(number, message.clone());
            }
        }
    }

    /// Opens devices anew in copy mode if nothing comes by their zero copy, and with zero copy again later.
    fn poll_zero_copy(&mut self, now: Instant, shared: &mut Shared) {
        for (ifindex, change) in self.carriers.poll_zero_copy(now) {
            let Some(carrier) = self.carriers.get(ifindex) else { continue };
            let name = &carrier.name;
            let message = match change {
                TrialChange::GiveUp(wait) => {
                    let wait = wait.as_secs() / 3600;
                    format!(
                        "{name}: nothing comes by zero copy; the kernel copies, and zero copy is tried again in {wait} h"
                    )
                }
                TrialChange::TryAgain => format!("{name}: zero copy is tried again"),
            };
            tracing::info!("{message}");
            // A tunnel without a route to its peer uses the device again when it has a route.
            for number in self.close_to_choose(ifindex, shared) {
                match change {
                    TrialChange::GiveUp(_) => shared.daemons.notice(number, message.clone()),
                    TrialChange::TryAgain => shared.daemons.news(number, message.clone()),
                }
            }
        }
    }

    /// Closes a carrier device, after which doors are chosen anew; returns the tunnels that used it.
    fn close_to_choose(&mut self, ifindex: u32, shared: &mut Shared) -> BTreeSet<u16> {
        let numbers = self.carriers.shut(ifindex, true, &mut shared.jobs);
        forget_carrier(&numbers, shared);
        numbers
    }

    /// Closes a carrier device that has gone; tunnels that used it send by their UDP sockets.
    pub(super) fn device_gone(&mut self, ifindex: u32, shared: &mut Shared) {
        let numbers = self.carriers.close(ifindex, &mut shared.jobs);
        forget_carrier(&numbers, shared);
    }

    /// A tunnel that ends uses this carrier device no longer.
    pub(super) fn release(&mut self, ifindex: u32, number: u16, shared: &mut Shared) {
        self.carriers.release(ifindex, number, &mut shared.jobs);
    }

    /// Handles the end of a job that has opened or closed a carrier device: chooses the doors of all tunnels over it.
    pub(super) async fn finish(&mut self, ended: carriers::Ended, shared: &mut Shared, lans: &Lans) {
        match ended {
            carriers::Ended::Opened { ifindex, asker, unlikely, carrier } => {
                match carrier {
                    Ok(carrier) => self.opened(ifindex, asker, carrier, shared),
                    Err(error) => {
                        self.carriers.opened(ifindex, None, &mut shared.jobs);
                        self.refused(ifindex, asker, unlikely, &error, shared).await;
                    }
                }
                self.choose_over(ifindex, shared, lans).await;
                self.carriers.close_unused(ifindex, &mut shared.jobs);
            }
            carriers::Ended::Closed { ifindex } => {
                if self.carriers.closed(ifindex) {
                    self.choose_over(ifindex, shared, lans).await;
                }
            }
        }
    }

    fn opened(&mut self, ifindex: u32, asker: u16, carrier: Carrier, shared: &mut Shared) {
        tracing::info!("{}", carrier.note);
        shared.daemons.news(asker, carrier.note.clone());
        if carrier.loses_superframes() {
            let why = "generic XDP loses what the other end sends in superframes";
            let message = format!("{}: {why}; use xdp-mode native, or carrier auto or udp", carrier.name);
            shared.daemons.notice(asker, message);
        }
        self.carriers.opened(ifindex, Some(carrier), &mut shared.jobs);
    }

    /// Notes and tells that a carrier device could not be opened for a tunnel.
    async fn refused(&mut self, ifindex: u32, number: u16, unlikely: bool, error: &anyhow::Error, shared: &mut Shared) {
        shared.tunnels.refuse(number, ifindex);
        self.rivals.note(ifindex).await;
        let Some(tenant) = shared.tunnels.get(number) else { return };
        let message = format!("{error:#}; sending by UDP socket");
        // If nobody asked for AF_XDP, and it was unlikely to work, that is no fault.
        match unlikely && tenant.carrier_choice == CarrierChoice::Auto {
            true => shared.daemons.news(number, message),
            false => shared.daemons.notice(number, message),
        }
    }

    /// Chooses the doors of all tunnels over a device anew.
    async fn choose_over(&mut self, ifindex: u32, shared: &mut Shared, lans: &Lans) {
        self.choose_where(|hop| hop.ifindex == ifindex, shared, lans).await;
    }

    /// Chooses the doors of all tunnels anew: the host's IPsec policies have changed.
    pub(super) async fn choose_all(&mut self, shared: &mut Shared, lans: &Lans) {
        self.choose_where(|_| true, shared, lans).await;
    }

    async fn choose_where(&mut self, concerns: impl Fn(&NextHop) -> bool, shared: &mut Shared, lans: &Lans) {
        let over = |tenant: &Tenant| {
            tenant.hop.filter(|hop| tenant.leads == PeerRoute::Out && concerns(hop)).zip(tenant.target())
        };
        let tunnels: Vec<_> =
            shared.tunnels.iter().filter_map(|(number, tenant)| Some((number, over(tenant)?))).collect();
        for (number, (hop, peer)) in tunnels {
            let egress = self.choose(hop, number, shared, lans).await;
            shared.set_egress(number, peer, egress);
        }
    }
}

/// Notes in the tunnels that AF_XDP does not serve them any more.
fn forget_carrier(numbers: &BTreeSet<u16>, shared: &mut Shared) {
    for number in numbers {
        if let Some(tenant) = shared.tunnels.get_mut(*number) {
            tenant.carrier = None;
        }
    }
}
