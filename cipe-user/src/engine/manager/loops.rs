//! Carrier routes that lead into tunnels: one tunnel through another is as good as any carrier, round is not.

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

/// Time without a datagram of its own in a tunnel after which the next one is news.
const QUIET: Duration = Duration::from_secs(60);

/// What is known of a tunnel's own datagrams that came into it.
#[derive(Debug, Default)]
pub(super) struct Loops {
    counted: u64,
    last: Option<Instant>,
}

impl Loops {
    /// Takes up how many there were so far; whether that is news.
    pub(super) fn see(&mut self, counted: u64, now: Instant) -> bool {
        if std::mem::replace(&mut self.counted, counted) == counted {
            return false;
        }
        let last = self.last.replace(now);
        counted > 0 && last.is_none_or(|last| now.duration_since(last) >= QUIET)
    }

    /// The way is another one: the next datagram is news, those until now are not.
    pub(super) fn forget(&mut self, counted: u64) {
        *self = Self { counted, last: None };
    }
}

/// What is said of them.
pub(super) fn line(target: SocketAddr, protocol: Protocol) -> String {
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

/// What is said of datagrams that go round.
pub(super) fn line_of_round(target: SocketAddr) -> String {
    let (ip, target) = (target.ip(), Shown(target));
    format!(
        "looped route: datagrams to {target} go round through other tunnels; add a route to {ip} over the carrier device"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_is_told_once_until_it_was_quiet_or_the_way_has_changed() {
        let (mut loops, start) = (Loops::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!loops.see(0, at(0)));
        assert!(loops.see(5, at(1)));
        for second in 2..200 {
            assert!(!loops.see(5 + second, at(second)));
        }
        assert!(!loops.see(204, at(250)), "nothing came");
        assert!(loops.see(205, at(260)));
        loops.forget(207);
        assert!(!loops.see(207, at(261)));
        assert!(loops.see(208, at(262)));
    }
}
