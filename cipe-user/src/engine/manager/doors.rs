//! By which door the datagrams of each tunnel come and go, AF_XDP or its UDP socket, and when that is chosen anew.

use std::collections::BTreeSet;
use std::time::Instant;

use super::Manager;
use super::loops::PeerRoute;
use super::trial::TrialChange;
use super::tunnels::Tenant;
use crate::control::protocol::CarrierChoice as Door;
use crate::engine::worker::Command;
use crate::kernel::nexthop::NextHop;
use crate::kernel::{ethtool, netdev};

impl Manager {
    /// Takes up that a tunnel's UDP socket gets single frames: AF_XDP is the faster door for them, on the same device for
    /// all tunnels that choose by themselves.
    pub(super) async fn saw_single_frames(&mut self, number: u16) {
        let hop = self.tunnels.get(number).and_then(|tenant| tenant.hop);
        let Some(ifindex) = hop.map(|hop| hop.ifindex).filter(|ifindex| self.tunnels.of_device(*ifindex).is_none())
        else {
            return;
        };
        if self.carriers.see_single_frames(ifindex) {
            self.choose_doors(ifindex).await;
        }
    }

    /// Takes up that much leaves by a tunnel's UDP socket: where the other end of a veth runs native XDP, superframes are cut
    /// on the way anyway, and live frames cost less.
    pub(super) async fn saw_many_sent(&mut self, number: u16) {
        let Some(tenant) = self.tunnels.get(number).filter(|tenant| tenant.carrier.is_none()) else { return };
        let Some(ifindex) = tenant.hop.map(|hop| hop.ifindex) else { return };
        let cuts = || ethtool::takes_udp_superframes(ifindex) == Some(false);
        if tenant.carrier_door == Door::Auto
            && netdev::takes_xdp_frames(ifindex)
            && cuts()
            && self.platform.netlink.card(ifindex).await.is_ok_and(|card| self.carriers.may_send_live(&card))
        {
            self.saw_single_frames(number).await;
        }
    }

    /// Leaves devices to the UDP sockets that are calm, where all tunnels choose by themselves: as long as XDP is there, the
    /// other end cuts all superframes, and whether it would send any shows without it alone. Not under load: a veth loses what
    /// waits in its rings then, and tells nobody.
    pub(super) async fn tend_carriers(&mut self, now: Instant) {
        for ifindex in self.carriers.follow_live_frames() {
            self.choose_doors(ifindex).await;
        }
        for ifindex in self.carriers.calm(now) {
            let Some(carrier) = self.carriers.get(ifindex) else { continue };
            let chooses =
                |number: &u16| self.tunnels.get(*number).is_some_and(|tenant| tenant.carrier_door == Door::Auto);
            if !carrier.tunnels.iter().all(chooses) {
                continue;
            }
            let name = carrier.name.clone();
            let seconds = self.carriers.leave_calm(ifindex, now);
            let message = format!("{name}: calm for {seconds} s; UDP socket, until single frames come in numbers");
            tracing::info!("{message}");
            for number in self.shut_carrier(ifindex) {
                self.daemons.news(number, message.clone());
            }
        }
    }

    /// Lets the kernel copy for devices by whose zero copy nothing comes, and tries it again later.
    pub(super) fn tend_zero_copy(&mut self, now: Instant) {
        for (ifindex, change) in self.carriers.look_at_zero_copy(now) {
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
            // A tunnel without a way to its peer comes back with the way.
            for number in self.shut_carrier(ifindex) {
                match change {
                    TrialChange::GiveUp(_) => self.daemons.notice(number, message.clone()),
                    TrialChange::TryAgain => self.daemons.news(number, message.clone()),
                }
            }
        }
    }

    /// Closes a carrier device and has doors chosen anew after that; returns the tunnels that used it.
    pub(super) fn shut_carrier(&mut self, ifindex: u32) -> BTreeSet<u16> {
        let numbers = self.carriers.shut(ifindex, true, &mut self.jobs);
        self.left_carrier(&numbers);
        numbers
    }

    /// Closes a carrier device that has gone; tunnels that used it send by their UDP sockets.
    pub(super) fn close_carrier(&mut self, ifindex: u32) {
        let numbers = self.carriers.close(ifindex, &mut self.jobs);
        self.left_carrier(&numbers);
    }

    fn left_carrier(&mut self, numbers: &BTreeSet<u16>) {
        for number in numbers {
            if let Some(tenant) = self.tunnels.get_mut(*number) {
                tenant.carrier = None;
            }
        }
    }

    /// Takes up that a carrier device is closed.
    pub(super) async fn carrier_closed(&mut self, ifindex: u32) {
        if self.carriers.closed(ifindex) {
            self.choose_doors(ifindex).await;
        }
    }

    /// Chooses the doors of all tunnels over a device anew.
    pub(super) async fn choose_doors(&mut self, ifindex: u32) {
        self.choose_doors_of(|hop| hop.ifindex == ifindex).await;
    }

    /// Chooses the doors of all tunnels anew: the host's policies have changed.
    pub(super) async fn choose_all_doors(&mut self) {
        self.choose_doors_of(|_| true).await;
    }

    async fn choose_doors_of(&mut self, concerns: impl Fn(&NextHop) -> bool) {
        let over = |tenant: &Tenant| {
            tenant.hop.filter(|hop| tenant.leads == PeerRoute::Out && concerns(hop)).zip(tenant.target())
        };
        let tunnels: Vec<_> =
            self.tunnels.iter().filter_map(|(number, tenant)| Some((number, over(tenant)?))).collect();
        for (number, (hop, peer)) in tunnels {
            let way = self.way_over(hop, number).await;
            if let Some(tenant) = self.tunnels.get(number) {
                self.platform.workers.tell_all(|_| Command::SetWay(number, peer.ip(), way, tenant.sizes.mtu()));
            }
        }
    }

    /// Modes got on the carrier device of a tunnel.
    pub(super) fn carrier_note(&self, tenant: &Tenant) -> Option<String> {
        let carrier = self.carriers.get(tenant.carrier?)?;
        let sends_live = carrier.sends_live() && tenant.carrier_door == Door::Auto;
        let sends = if sends_live { ", sends live frames" } else { "" };
        Some(format!("{}{sends}", carrier.note))
    }
}
