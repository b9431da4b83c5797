//! The UDP socket of a tunnel on the carrier. It keeps the port from other programs, and receives ICMP errors, even where AF_XDP
//! serves the tunnel.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use anyhow::{Context as _, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, socket, sockopt};

use super::platform::Platform;
use super::tunnels::Tunnels;
use crate::control::protocol::Attach;
use crate::engine::carrier::UdpCarrier;
use crate::kernel::netlink;
use crate::kernel::routes::Flow;
use crate::kernel::zone;

/// A socket that is bound.
pub(super) struct CarrierSocket {
    pub udp: UdpCarrier,
    /// The address that it is bound to: `me`, or any address of this host.
    pub listens: SocketAddr,
    /// The tunnel's own carrier address, as the peer sees it.
    pub me: SocketAddr,
}

/// Binds the socket of a tunnel. An address that may change is not bound to.
///
/// # Errors
/// The address or the port is not to be had, in words for an operator.
pub(super) async fn bind(attach: &Attach, platform: &Platform, tunnels: &Tunnels) -> anyhow::Result<CarrierSocket> {
    let towards = attach.socks.or(known(attach.peer));
    let is_ipv6 = towards.map_or(attach.me.is_ipv6(), |target| target.is_ipv6());
    // The connection to a SOCKS5 server is TCP; the server names the relay for datagrams later.
    let port = |target: SocketAddr| if attach.socks.is_some() { 0 } else { target.port() };
    let any = if is_ipv6 { IpAddr::from(Ipv6Addr::UNSPECIFIED) } else { Ipv4Addr::UNSPECIFIED.into() };
    let device = match &attach.carrier_device {
        Some(name) => {
            Some(platform.netlink.card_named(name).await.with_context(|| format!("carrier-device {name}"))?.ifindex)
        }
        None => None,
    };
    let route = |from: SocketAddr, target: SocketAddr| {
        let mut to = target;
        to.set_port(port(target));
        let flow = Flow::of_socket(from, to, attach.mark);
        platform.netlink.route_of(Flow { device: device.or(flow.device), ..flow })
    };
    let mut me = attach.me;
    // It is an error that this host does not have the address only if the socket cannot be bound to it either.
    let mut missing = None;
    if me.ip().is_unspecified() || attach.dynip {
        let port = me.port();
        me = match towards {
            Some(target) => match route(SocketAddr::new(any, port), target).await {
                Ok(route) => zone::socket_address(route.source, port, route.oif),
                // There is no route yet, as at boot: the address comes with the route.
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
    if !listens.ip().is_unspecified() && tunnels.iter().any(|(_, tenant)| tenant.listens == listens) {
        bail!("me {}: another tunnel has this address and port; choose another port with `me`", zone::Shown(me));
    }
    let shown = zone::Shown(me);
    let device = attach.carrier_device.as_deref();
    let udp = open(listens, attach.me_may_come, device).map_err(|error| match (error.kind(), missing) {
        (std::io::ErrorKind::AddrNotAvailable, Some(missing)) => missing.into(),
        (std::io::ErrorKind::AddrInUse, _) => {
            anyhow::anyhow!("me {shown}: the port is taken; stop the other program or choose another port with `me`")
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
    Ok(CarrierSocket { udp, listens, me })
}

/// Binds a UDP socket to an address, and to the device of this name if one is given. If the address `may_come`, this host need
/// not have it yet; where ip_nonlocal_bind is set, the kernel allows that in any case.
fn open(address: SocketAddr, may_come: bool, device: Option<&str>) -> std::io::Result<UdpSocket> {
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

/// The peer's address, or `None` if it is to be learned, which 0.0.0.0 and 127.0.0.1:9 stand for (protocol section 4).
pub(super) fn known(peer: SocketAddr) -> Option<SocketAddr> {
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
