//! A peer given by name: its address is looked up again when it does not answer.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::options::{self, EndpointName, Mistake};

/// Minimum time between two look-ups: a dead peer must not cause many requests to the resolver.
const MIN_LOOK_UP_INTERVAL: Duration = Duration::from_secs(5);

/// The name, and the look-up in progress.
pub(super) struct PeerName {
    name: EndpointName,
    /// Prefer an address of this family.
    like: IpAddr,
    lookup: Option<JoinHandle<Result<SocketAddr, Mistake>>>,
    next: Instant,
}

impl PeerName {
    pub(super) fn new(name: EndpointName, like: IpAddr) -> Self {
        Self { name, like, lookup: None, next: Instant::now() }
    }

    /// The name as written.
    pub(super) fn text(&self) -> String {
        self.name.to_string()
    }

    /// Starts a look-up, unless one is in progress or has just ended. Resolvers may block for half a minute, so a
    /// thread of the pool does it.
    pub(super) fn look_up(&mut self) {
        if self.lookup.is_some() || Instant::now() < self.next {
            return;
        }
        let (name, like) = (self.name.clone(), self.like);
        self.lookup = Some(tokio::task::spawn_blocking(move || {
            // A name with addresses of the other IP version only is no mistake: that version may have a route.
            options::address_of(&name, Some(like))
                .or_else(|mistake| options::address_of(&name, None).map_err(|_| mistake))
        }));
    }

    /// Waits for the end of a look-up. Cancel safe.
    pub(super) async fn answer(&mut self) -> Result<SocketAddr, Mistake> {
        let Some(lookup) = &mut self.lookup else { return std::future::pending().await };
        let answer = lookup.await;
        self.lookup = None;
        self.next = Instant::now() + MIN_LOOK_UP_INTERVAL;
        answer.unwrap_or_else(|error| Err(Mistake::new(format!("look-up of {}: {error}", self.name), "wait")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn one_look_up_runs_at_a_time_and_not_too_often() {
        let name = EndpointName { host: "localhost".to_owned(), port: "6789".to_owned() };
        let mut peer = PeerName::new(name, IpAddr::from([0, 0, 0, 0]));
        peer.look_up();
        peer.look_up();
        assert_eq!(peer.answer().await.unwrap(), SocketAddr::from(([127, 0, 0, 1], 6789)));
        peer.look_up();
        assert!(peer.lookup.is_none(), "at once again");
    }
}
