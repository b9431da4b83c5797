//! Carrier routes that lead into tunnels. A tunnel may be the carrier of another one, but not its own, straight or through others.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::control::protocol::Protocol;
use crate::kernel::zone::Shown;

/// Where the route to a tunnel's peer leads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum PeerRoute {
    /// Out of this host, straight or through other tunnels.
    #[default]
    Out,
    /// Into the tunnel itself.
    Inward,
    /// Through other tunnels and back into the tunnel itself.
    Round,
}

/// How long no datagram of its own has to come into a tunnel until the next one is reported again.
const MIN_QUIET_TIME: Duration = Duration::from_secs(60);

/// The count of a tunnel's own datagrams that came into it.
#[derive(Debug, Default)]
pub(super) struct Loops {
    counted: u64,
    last: Option<Instant>,
}

impl Loops {
    /// Takes their number so far; returns whether it is to be reported.
    pub(super) fn is_news(&mut self, counted: u64, now: Instant) -> bool {
        if std::mem::replace(&mut self.counted, counted) == counted {
            return false;
        }
        let last = self.last.replace(now);
        counted > 0 && last.is_none_or(|last| now.duration_since(last) >= MIN_QUIET_TIME)
    }

    /// The route has changed: the next datagram is to be reported, those until now are not.
    pub(super) fn restart(&mut self, counted: u64) {
        *self = Self { counted, last: None };
    }
}

/// The notice of datagrams that came into their own tunnel.
pub(super) fn inward_notice(target: SocketAddr, protocol: Protocol) -> String {
    let (ip, port, target) = (target.ip(), target.port(), Shown(target));
    let bridge = match protocol {
        Protocol::Ip => "",
        Protocol::Ethernet => {
            "; a bridge that the tunnel stands in may lead them here, too: the carrier wants a way past it"
        }
    };
    format!(
        "looped route: datagrams to {target} are led into the tunnel that sends them, and dropped; add a route to {ip} over the \
         carrier device, or a rule before the one that leads them here (ip rule add ipproto udp dport {port}, or fwmark with the \
         option `mark`){bridge}"
    )
}

/// The notice of datagrams that go round through other tunnels.
pub(super) fn round_notice(target: SocketAddr) -> String {
    let (ip, target) = (target.ip(), Shown(target));
    format!(
        "looped route: datagrams to {target} go round through other tunnels; add a route to {ip} over the carrier device"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_is_told_once_until_it_was_quiet_or_the_route_has_changed() {
        let (mut loops, start) = (Loops::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!loops.is_news(0, at(0)));
        assert!(loops.is_news(5, at(1)));
        for second in 2..200 {
            assert!(!loops.is_news(5 + second, at(second)));
        }
        assert!(!loops.is_news(204, at(250)), "nothing came");
        assert!(loops.is_news(205, at(260)));
        loops.restart(207);
        assert!(!loops.is_news(207, at(261)));
        assert!(loops.is_news(208, at(262)));
    }
}
