//! The followers of the kernel's state: devices, addresses, IPsec policies and next hops. A follower that ends ends the engine, which
//! would go on with stale state without it.

use std::collections::HashSet;
use std::net::IpAddr;

use anyhow::Context as _;
use tokio::sync::{mpsc, watch};

use crate::kernel::links::LinkEvent;
use crate::kernel::netlink::Netlink;
use crate::kernel::nexthop::NextHops;
use crate::kernel::policies::{self, Policies};

/// A change of the host.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HostChange {
    /// A network device.
    Link(LinkEvent),
    /// The host's addresses: these are all of them now.
    Addresses(HashSet<IpAddr>),
    /// IPsec policies, which AF_XDP would bypass.
    Policies,
}

/// The followers.
pub(super) struct Followers {
    links: mpsc::UnboundedReceiver<LinkEvent>,
    addresses: watch::Receiver<HashSet<IpAddr>>,
    policies: watch::Receiver<Policies>,
    next_hops: NextHops,
}

impl Followers {
    /// Follows devices, addresses and policies from now on; `next_hops` are followed already.
    ///
    /// # Errors
    /// No netlink socket can be opened, or something cannot be listed.
    pub(super) async fn start(netlink: &Netlink, next_hops: NextHops) -> anyhow::Result<Self> {
        let addresses = netlink.watch_addresses().await?;
        let links = netlink.watch_links().await?;
        Ok(Self { links, addresses, policies: policies::follow(netlink).await?, next_hops })
    }

    /// The host's addresses, as they are now.
    pub(super) fn local_addresses(&mut self) -> HashSet<IpAddr> {
        self.addresses.borrow_and_update().clone()
    }

    /// The IPsec policies; the receiver always has the present ones.
    pub(super) fn policies(&self) -> watch::Receiver<Policies> {
        self.policies.clone()
    }

    /// Waits for the next change. Cancel safe.
    ///
    /// # Errors
    /// One of them has ended.
    pub(super) async fn next(&mut self) -> anyhow::Result<HostChange> {
        let ended = |what| format!("{what} cannot be followed any longer; the system log says why");
        tokio::select! {
            event = self.links.recv() => event.map(HostChange::Link).with_context(|| ended("network devices")),
            changed = self.addresses.changed() => {
                changed.with_context(|| ended("addresses"))?;
                Ok(HostChange::Addresses(self.local_addresses()))
            }
            changed = self.policies.changed() => {
                changed.with_context(|| ended("IPsec policies"))?;
                self.policies.mark_unchanged();
                Ok(HostChange::Policies)
            }
            () = self.next_hops.ended() => anyhow::bail!(ended("carrier routes")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testnet::in_namespace;

    /// B10 of the review: without a word, nothing was followed any longer.
    #[test]
    fn a_follower_that_ends_says_which_one_it_was() {
        in_namespace(|netlink| async move {
            let next_hops = NextHops::new(&netlink, Default::default()).await.unwrap();
            let mut followers = Followers::start(&netlink, next_hops.clone()).await.unwrap();
            let error = |followers: Followers| async move {
                let mut followers = followers;
                // What the kernel still had to tell comes first.
                loop {
                    if let Err(error) = followers.next().await {
                        return format!("{error:#}");
                    }
                }
            };
            let (_, links) = mpsc::unbounded_channel();
            followers.links = links;
            assert!(error(followers).await.starts_with("network devices cannot be followed"));

            let mut followers = Followers::start(&netlink, next_hops.clone()).await.unwrap();
            followers.addresses = watch::channel(HashSet::new()).1;
            assert!(error(followers).await.starts_with("addresses cannot be followed"));

            let mut followers = Followers::start(&netlink, next_hops.clone()).await.unwrap();
            followers.policies = watch::channel(Policies::default()).1;
            assert!(error(followers).await.starts_with("IPsec policies cannot be followed"));

            let ended = NextHops::that_has_ended();
            let followers = Followers::start(&netlink, ended).await.unwrap();
            assert!(error(followers).await.starts_with("carrier routes cannot be followed"));
        });
    }
}
