//! Addresses of the tunnel, the carrier and the interface, and a SOCKS5 server between the ends.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::super::endpoint::EndpointName;
use super::super::problem::{Mistake, Origin, Problem};
use super::super::resolve;
use super::{Endpoint, Settle};
use crate::control::protocol::{CarrierChoice, Interface, Protocol};
use crate::kernel::{links, zone};

impl Settle<'_> {
    /// Returns the own and the peer's address on the tunnel. An Ethernet tunnel needs none, because its interface may
    /// be a port of a bridge.
    pub(super) fn tunnel_addresses(&mut self) -> Option<(IpAddr, IpAddr)> {
        let (own, peer) = (&self.draft.ipaddr, &self.draft.ptpaddr);
        if self.draft.protocol == Protocol::Ethernet {
            let refused = |problem: &Problem| {
                ["option `ipaddr`", "option `ptpaddr`"].iter().any(|told| problem.mistake.what.starts_with(told))
            };
            match (&own.value, &peer.value) {
                _ if self.problems.iter().any(refused) => return None,
                (None, None) => return Some((Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into())),
                (Some(name), None) => {
                    let ipaddr = self.resolved("ipaddr", resolve::one_host(name, None), &own.origin)?;
                    return Some((ipaddr, unspecified(ipaddr)));
                }
                (_, Some(_)) => {}
            }
        }
        let own_name = self.set(own, "ipaddr", "10.0.0.1");
        let peer_name = self.set(peer, "ptpaddr", "10.0.0.2");
        let ipaddr = self.resolved("ipaddr", resolve::one_host(own_name?, None), &own.origin)?;
        let ptpaddr = self.resolved("ptpaddr", resolve::one_host(peer_name?, Some(ipaddr)), &peer.origin)?;
        if ipaddr.is_unspecified() {
            let mistake = Mistake::new(
                format!("option `ipaddr`: {ipaddr} is not a usable address"),
                "write this end's address on the tunnel",
            );
            return self.error(mistake, &own.origin);
        }
        if ipaddr == ptpaddr {
            let mistake =
                Mistake::new(format!("`ipaddr` and `ptpaddr` are both {ipaddr}"), "give each end its own address");
            return self.error(mistake, &peer.origin);
        }
        Some((ipaddr, ptpaddr))
    }

    /// Returns the SOCKS5 server and its address, if there is one. The outer `None` means that the option is wrong.
    pub(super) fn socks(&mut self) -> Option<Option<(EndpointName, SocketAddr)>> {
        let socks = &self.draft.socks;
        let Some(name) = &socks.value else { return Some(None) };
        let address = self.resolved("socks", resolve::endpoint(name, None), &socks.origin)?;
        if self.draft.carrier.value == CarrierChoice::Xdp {
            let mistake = Mistake::new(
                "`socks` and `carrier xdp` exclude each other: a SOCKS5 server is reached by UDP socket",
                "remove one of them",
            );
            return self.error(mistake, &self.draft.carrier.origin);
        }
        if self.draft.carrier_device.value.is_some() {
            let mistake = Mistake::new(
                "`socks` and `carrier-device` exclude each other: the connection to a SOCKS5 server is bound to no device",
                "remove one of them, and route the server's address over the device",
            );
            return self.error(mistake, &self.draft.carrier_device.origin);
        }
        Some(Some((name.clone(), address)))
    }

    pub(super) fn interface(&mut self, ipaddr: Option<IpAddr>) -> Option<Interface> {
        let draft = self.draft;
        let broadcast = match &draft.bcast.value {
            Some(name) => Some(self.resolved("bcast", resolve::one_host(name, None), &draft.bcast.origin)?),
            None => None,
        };
        if ipaddr.is_some_and(|address| address.is_ipv6()) {
            for (name, origin) in [("mask", &draft.mask.origin), ("bcast", &draft.bcast.origin)] {
                if *origin != Origin::Default {
                    self.warn(format!("`{name}` has no effect on IPv6 addresses"), "remove it", origin);
                }
            }
        }
        if draft.ifconfig.value {
            for (name, origin) in
                [("mask", &draft.mask.origin), ("bcast", &draft.bcast.origin), ("metric", &draft.metric.origin)]
            {
                if *origin != Origin::Default {
                    self.warn(format!("`{name}` has no effect with `ifconfig`"), "let ip-up set it", origin);
                }
            }
        }
        let ipv4 = |address: Option<IpAddr>| match address {
            Some(IpAddr::V4(address)) => Some(address),
            _ => None,
        };
        let own = ipv4(ipaddr).filter(|address| !address.is_unspecified());
        let has_ipv4 = own.is_some();
        let mut broadcast = broadcast;
        if let (Protocol::Ethernet, Some(mask), None) = (draft.protocol, &draft.mask.value, broadcast) {
            // The broadcast address that ifconfig chooses; a network of one or two addresses has none.
            let hosts = u32::MAX.checked_shr(mask.0.into()).unwrap_or(0);
            broadcast = own.filter(|_| mask.0 < 31).map(|own| Ipv4Addr::from_bits(own.to_bits() | hosts).into());
        }
        if ipaddr.is_some_and(|address| address.is_unspecified()) {
            for (name, origin) in
                [("mask", &draft.mask.origin), ("bcast", &draft.bcast.origin), ("metric", &draft.metric.origin)]
            {
                if *origin != Origin::Default {
                    self.warn(format!("`{name}` has no effect without `ipaddr`"), "set `ipaddr`, or remove it", origin);
                }
            }
        }
        Some(Interface {
            configure: !draft.ifconfig.value,
            metric: draft.metric.value,
            prefix: draft.mask.value.map(|mask| mask.0).filter(|_| has_ipv4),
            broadcast: ipv4(broadcast).filter(|_| has_ipv4),
            mac: draft.hwaddr.value.map(|mac| mac.0),
        })
    }

    /// Returns the own and the peer's carrier address. `socks`: address of the SOCKS5 server; the own address must be
    /// of its family.
    pub(super) fn carrier_addresses(&mut self, socks: Option<IpAddr>) -> Option<(Endpoint, Endpoint)> {
        let (me, peer) = (&self.draft.me, &self.draft.peer);
        let peer_name = self.set(peer, "peer", "192.0.2.2:6789");
        // Without an address, it is of the peer's family, so the peer's address is needed first.
        let own = match me.value.as_ref().filter(|name| !name.host.is_empty()) {
            Some(name) => Some(self.resolved("me", endpoint(name, socks), &me.origin)?),
            None => None,
        };
        // An address in the options decides the family, and a wildcard does too. Behind a SOCKS5 server it is always
        // IPv4: the header of 10 octets has no space for IPv6 (protocol section 4).
        let like = match socks {
            Some(_) => Some(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            None => own.as_ref().map(|own| own.address.ip()),
        };
        let mut peer_end = self.resolved("peer", endpoint(peer_name?, like), &peer.origin)?;
        if is_learned(peer_end.address) {
            peer_end.address = SocketAddr::new(unspecified(peer_end.address.ip()), 0);
        } else if peer_end.address.port() == 0 {
            let mistake =
                Mistake::new("option `peer`: the port is 0", "write the peer's UDP port, or 0.0.0.0:0 to learn both");
            return self.error(mistake, &peer.origin);
        }
        if socks.is_some() && peer_end.address.ip().is_unspecified() {
            let mistake = Mistake::new(
                "`socks` needs a known peer: nothing reaches us before we have sent to it",
                "write the peer's address, or remove `socks`",
            );
            return self.error(mistake, &peer.origin);
        }
        if self.draft.pinpeer.value && peer_end.address.ip().is_unspecified() {
            let mistake = Mistake::new(
                "`pinpeer` needs a known peer, but `peer` is learned",
                "write the peer's address, or remove `pinpeer`",
            );
            return self.error(mistake, &self.draft.pinpeer.origin);
        }
        let own = match own {
            Some(own) => self.reachable_from(own, peer_end.address.ip())?,
            None => {
                let port = match &me.value {
                    Some(name) => self.resolved("me", resolve::port(&name.port), &me.origin)?,
                    None => 0,
                };
                let address = SocketAddr::new(unspecified(socks.unwrap_or(peer_end.address.ip())), port);
                Endpoint { text: address.to_string(), address }
            }
        };
        self.one_zone(own.address, peer_end.address)?;
        Some((own, peer_end))
    }

    /// A link-local address is usable on its own device only.
    fn one_zone(&mut self, own: SocketAddr, peer: SocketAddr) -> Option<()> {
        let draft = self.draft;
        let by_device = draft.carrier_device.value.as_deref().map(|name| (name.to_owned(), links::index_of(name)));
        let zones = [("me", own, &draft.me.origin), ("peer", peer, &draft.peer.origin)];
        let mut zones =
            zones.into_iter().filter_map(|(option, address, origin)| Some((option, zone::of(address)?, origin)));
        let Some((option, zone, origin)) = zones.next() else { return Some(()) };
        if let Some((_, other, origin)) = zones.next().filter(|(_, other, _)| *other != zone) {
            let what = format!("`me` is on {}, and `peer` on {}", zone::name(zone), zone::name(other));
            return self.error(Mistake::new(what, "write the same device behind both link-local addresses"), origin);
        }
        if let Some((name, _)) = by_device.filter(|(_, index)| *index != zone) {
            let what = format!("`{option}` is on {}, and `carrier-device` is {name}", zone::name(zone));
            let fix = "remove `carrier-device`: datagrams between link-local addresses use no other device";
            return self.error(Mistake::new(what, fix), origin);
        }
        Some(())
    }

    /// Checks that packets from `own` can reach `peer`: a packet with a loopback address never reaches another host.
    /// Debian gives a loopback address to the host's own name in /etc/hosts, so a name with such an address is not a
    /// mistake of the operator.
    fn reachable_from(&mut self, own: Endpoint, peer: IpAddr) -> Option<Endpoint> {
        let (me, ip) = (&self.draft.me, own.address.ip());
        if !ip.is_loopback() || peer.is_loopback() {
            return Some(own);
        }
        let is_name = me.value.as_ref().is_some_and(|name| !name.is_address());
        if is_name {
            self.warn(
                format!("option `me`: `{}` is {ip}, a loopback address; the system chooses another one", own.text),
                "write the address itself, omit it, or correct /etc/hosts",
                &me.origin,
            );
            return Some(Endpoint { address: SocketAddr::new(unspecified(ip), own.address.port()), ..own });
        }
        if peer.is_unspecified() {
            return Some(own);
        }
        let what = format!("option `me`: {ip} is a loopback address, and the peer {peer} is on another host");
        self.error(Mistake::new(what, "write the address of a network card, or leave it out"), &me.origin)
    }
}

fn endpoint(name: &EndpointName, like: Option<IpAddr>) -> Result<Endpoint, Mistake> {
    Ok(Endpoint { text: name.to_string(), address: resolve::endpoint(name, like)? })
}

/// Protocol section 4: 0.0.0.0, or the later form, the discard port of the loopback address.
fn is_learned(peer: SocketAddr) -> bool {
    peer.ip().is_unspecified() || (peer.ip() == IpAddr::V4(Ipv4Addr::LOCALHOST) && peer.port() == 9)
}

/// The wildcard address of the family of `like`.
fn unspecified(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}
