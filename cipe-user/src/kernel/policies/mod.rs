//! The kernel's policies for a carrier flow that AF_XDP bypasses: IPsec policies (xfrm), and routing rules for marks
//! that netfilter may set.
//!
//! Netfilter rules are not examined: the kernel cannot be asked what they do with one flow.

mod xfrm;

use std::net::SocketAddr;
use std::sync::Arc;

use futures_util::StreamExt;
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NLM_F_DUMP;
use rustix::io::Errno;
use tokio::sync::watch;

use super::events::NetlinkEvents;
use super::netlink::{Netlink, Result};
use super::whole::{self, KernelTable};
use xfrm::{Direction, Ipsec};

/// A carrier flow: datagrams between two ends, as this host sends them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CarrierFlow {
    /// Own carrier address.
    pub me: SocketAddr,
    /// The peer's carrier address.
    pub peer: SocketAddr,
    /// Index of the device that sends and receives them.
    pub ifindex: u32,
    /// Mark of their socket; 0: none.
    pub mark: u32,
}

/// The policies at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policies {
    ipsec: Arc<Ipsec>,
    /// Rules for IPv4 and IPv6 with a mark: the preference and the mark of each.
    rules: Arc<[Vec<(u32, u32)>; 2]>,
}

impl Policies {
    /// Returns the policy that AF_XDP would bypass for a flow, in words for an operator; `None` if there is none.
    pub fn passed_by(&self, flow: &CarrierFlow) -> Option<String> {
        let ipsec = [Direction::Out, Direction::In].iter().find_map(|direction| self.ipsec.on(flow, *direction));
        let rule = || {
            let rules = &self.rules[usize::from(flow.peer.is_ipv6())];
            // The look-up of the next hop takes the mark of the socket itself into account.
            let (preference, mark) = rules.iter().find(|(_, mark)| *mark != flow.mark)?;
            Some(format!("netfilter may set the mark of the routing rule `{preference}: fwmark {mark:#x}`"))
        };
        ipsec.or_else(rule)
    }
}

/// Follows the policies from now on. The task ends when the receiver is dropped.
///
/// # Errors
/// No netlink socket can be opened.
pub async fn follow(netlink: &Netlink) -> Result<watch::Receiver<Policies>> {
    let rules = NetlinkEvents::open(&[MulticastGroup::Ipv4Rule, MulticastGroup::Ipv6Rule])?;
    // A kernel without xfrm never has IPsec policies.
    let ipsec =
        xfrm::XfrmEvents::open().inspect_err(|error| tracing::debug!("xfrm: {error}; this kernel has no IPsec"));
    whole::follow(Followed { netlink: netlink.clone(), rules, ipsec: ipsec.ok() }).await
}

struct Followed {
    netlink: Netlink,
    rules: NetlinkEvents,
    ipsec: Option<xfrm::XfrmEvents>,
}

impl KernelTable for Followed {
    type Content = Policies;
    const NAME: &'static str = "IPsec policies and routing rules";

    async fn changed(&mut self) -> Option<()> {
        let ipsec = async {
            match &mut self.ipsec {
                Some(events) => events.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = self.rules.next() => event.map(drop),
            result = ipsec => {
                if let Err(error) = result {
                    tracing::error!("xfrm notifications: {error}; IPsec policies are not followed any longer");
                    return None;
                }
                Some(())
            }
        }
    }

    async fn read(&mut self) -> Result<Policies> {
        Ok(read(&self.netlink, self.ipsec.is_some()).await)
    }
}

/// Reads all policies. If they cannot be read, they count as absent: a working carrier is more important.
async fn read(netlink: &Netlink, has_ipsec: bool) -> Policies {
    let ipsec = if has_ipsec { xfrm::read() } else { Ok(Ipsec::default()) };
    let ipsec = ipsec.unwrap_or_else(|error| {
        tracing::warn!("IPsec policies cannot be read: {error}; AF_XDP may bypass some");
        Ipsec::default()
    });
    let mut rules = [Vec::new(), Vec::new()];
    for (rules, family) in rules.iter_mut().zip([AddressFamily::Inet, AddressFamily::Inet6]) {
        match read_rules(netlink, family).await {
            Ok(found) => *rules = found,
            Err(error) => tracing::warn!("{error}; AF_XDP may bypass some"),
        }
    }
    Policies { ipsec: Arc::new(ipsec), rules: Arc::new(rules) }
}

async fn read_rules(netlink: &Netlink, family: AddressFamily) -> Result<Vec<(u32, u32)>> {
    let mut message = RuleMessage::default();
    message.header.family = family;
    let request = RouteNetlinkMessage::GetRule(message);
    let answers = match netlink.request(|| "cannot read the routing rules".to_owned(), request, NLM_F_DUMP).await {
        // The kernel has no policy routing, or no IPv6, so there are no rules.
        Err(error) if error.is(Errno::OPNOTSUPP) || error.is(Errno::AFNOSUPPORT) => return Ok(Vec::new()),
        answers => answers?,
    };
    Ok(answers
        .iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRule(rule) => marked(rule),
            _ => None,
        })
        .collect())
}

/// Returns preference and mark of a rule with a mark.
fn marked(rule: &RuleMessage) -> Option<(u32, u32)> {
    let mark = rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::FwMark(mark) if *mark != 0 => Some(*mark),
        _ => None,
    })?;
    let preference = rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Priority(preference) => Some(*preference),
        _ => None,
    });
    Some((preference.unwrap_or(0), mark))
}

#[cfg(test)]
mod tests;
