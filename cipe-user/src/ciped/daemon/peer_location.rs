//! The peer's location: behind a SOCKS5 server's relay, or at the current address of its name.

use std::net::SocketAddr;

use super::Daemon;
use crate::ciped::options::{Mistake, Options};
use crate::ciped::peer_name::PeerName;
use crate::ciped::session::{End, Level, Step, Topic};
use crate::ciped::socks;
use crate::control::protocol::Request;
use crate::kernel::zone::{self, Shown};

/// Requests a relay from the SOCKS5 server, if the options name one. This is the first step of the start.
pub(super) async fn first_relay(options: &Options) -> anyhow::Result<Option<(socks::Relay, SocketAddr)>> {
    let Some((server, _)) = &options.socks else { return Ok(None) };
    let credentials = socks::Credentials::of_environment().map_err(anyhow::Error::msg)?;
    let mut relay = socks::Relay::follow(server.clone(), credentials, options.mark);
    match relay.news().await {
        socks::News::Relay(at) => Ok(Some((relay, at))),
        socks::News::Lost(error) => Err(error.into()),
    }
}

impl Daemon {
    /// Uses a new relay of the SOCKS5 server, or handles its loss, which counts as a network error.
    pub(super) fn relayed(&mut self, news: socks::News) -> Vec<Step> {
        let device = &self.facts.device;
        let (relay, steps) = match news {
            socks::News::Relay(relay) => {
                tracing::info!("{device}: the SOCKS5 server relays at {}", Shown(relay));
                (Some(relay), Vec::new())
            }
            socks::News::Lost(error) => (None, self.session.network_error(&error.to_string(), false, self.clock.now())),
        };
        self.relay_at = relay;
        self.facts.relay = relay;
        self.send(&Request::SetRelay { relay });
        steps
    }

    /// Sends to the configured address of a peer that does not answer: what has moved it may have been a recorded datagram.
    pub(super) fn fall_back(&mut self) {
        let peer = self.setup.options.peer.address;
        if peer != self.peer && !peer.ip().is_unspecified() && peer.is_ipv4() == self.peer.is_ipv4() {
            let (device, silent) = (&self.facts.device, Shown(self.peer));
            tracing::warn!("{device}: no answer from {silent}; trying the configured peer {}", Shown(peer));
            self.send(&Request::SetPeer { peer });
        }
    }

    /// Sends to the current address of the peer's name. If the IP address is the same, the peer's port stays, because
    /// it may have been learned. If the IP version changes, the tunnel starts over, because it needs another socket and
    /// own address.
    pub(super) fn resolved(&mut self, answer: Result<SocketAddr, Mistake>) -> Result<Vec<Step>, End> {
        let Some(name) = self.peer_name.as_ref().map(PeerName::text) else { return Ok(Vec::new()) };
        let (topic, level, text) = match answer {
            Ok(peer) if peer.is_ipv4() != self.peer.is_ipv4() => {
                let (now, before) = if peer.is_ipv4() { ("IPv4", "IPv6") } else { ("IPv6", "IPv4") };
                let text = format!("{name} is at {} now", Shown(peer));
                if self.setup.draft.me.value.as_ref().is_none_or(|me| me.host.is_empty()) {
                    return Err(End::Again(format!("{text}; the tunnel starts over with {now}")));
                }
                let text = format!("{text}, but `me` is {before}; correct `me`, or omit its address");
                (Topic::PeerIsAt, Level::Warning, text)
            }
            Ok(peer) if (peer.ip(), zone::of(peer)) != (self.peer.ip(), zone::of(self.peer)) => {
                self.send(&Request::SetPeer { peer });
                (Topic::PeerIsAt, Level::Info, format!("{name} is at {} now", Shown(peer)))
            }
            Ok(peer) => (Topic::PeerStaysAt, Level::Debug, format!("{name} is still at {}", Shown(peer))),
            Err(mistake) => {
                let text = format!("{}; the peer stays at {}", mistake.what, Shown(self.peer));
                (Topic::PeerNameLost, Level::Warning, text)
            }
        };
        Ok(self.session.tell(topic, level, &text, self.clock.now()))
    }
}
