//! Where the peer is: behind a SOCKS5 server's relay, or where its name leads now.

use std::net::SocketAddr;

use super::Daemon;
use crate::ciped::options::{Mistake, Options};
use crate::ciped::session::Step;
use crate::ciped::socks;
use crate::control::protocol::Request;

/// Asks the SOCKS5 server, if there is one, before anything is made.
pub(super) async fn first_relay(options: &Options) -> anyhow::Result<Option<(socks::Relay, SocketAddr)>> {
    let Some((server, _)) = &options.socks else { return Ok(None) };
    let credentials = socks::Credentials::of_environment().map_err(anyhow::Error::msg)?;
    let mut relay = socks::Relay::follow(server.clone(), credentials);
    match relay.news().await {
        socks::News::Relay(at) => Ok(Some((relay, at))),
        socks::News::Lost(error) => Err(error.into()),
    }
}

impl Daemon {
    /// Takes up a relay of the SOCKS5 server, or its loss, which is an error of the network.
    pub(super) fn relayed(&mut self, news: socks::News) -> Vec<Step> {
        let device = &self.facts.device;
        let (relay, steps) = match news {
            socks::News::Relay(relay) => {
                tracing::info!("{device}: the SOCKS5 server relays at {relay}");
                (Some(relay), Vec::new())
            }
            socks::News::Lost(error) => (None, self.session.network_error(&error.to_string())),
        };
        self.relay_at = relay;
        self.facts.relay = relay;
        self.send(&Request::SetRelay { relay });
        steps
    }

    /// Goes where the peer's name leads now. Where it leads to the same host, its port may well have been learned.
    pub(super) fn resolved(&mut self, answer: Result<SocketAddr, Mistake>) {
        let (device, Some(name)) = (&self.facts.device, &self.peer_name) else { return };
        match answer {
            Ok(peer) if peer.ip() != self.peer.ip() => {
                tracing::info!("{device}: {} is at {peer} now", name.text());
                self.send(&Request::SetPeer { peer });
            }
            Ok(peer) => tracing::debug!("{device}: {} is still at {peer}", name.text()),
            Err(mistake) => tracing::warn!("{device}: {}; the peer stays at {}", mistake.what, self.peer),
        }
    }
}
