//! What the kernel's network stack does with a carrier flow and AF_XDP passes by: IPsec policies (xfrm), and routing rules by
//! marks that netfilter may set.
//!
//! Netfilter is not looked at: its rules say nothing that could be asked for one flow.

mod xfrm;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NLM_F_DUMP;
use rustix::io::Errno;
use tokio::sync::watch;
use tokio::time::Instant;

use super::events::Events;
use super::netlink::{Netlink, Result};
use xfrm::{Direction, Ipsec};

/// From the first change to the reading of all that came with it.
const SETTLE: Duration = Duration::from_millis(10);

/// Datagrams between two ends, as this host sends them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CarrierFlow {
    /// Own carrier address.
    pub me: SocketAddr,
    /// The peer's.
    pub peer: SocketAddr,
    /// Device that they leave and come by.
    pub ifindex: u32,
    /// Mark of their socket; 0: none.
    pub mark: u32,
}

/// What there is at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policies {
    ipsec: Arc<Ipsec>,
    /// Rules for IPv4 and IPv6 that look at a mark: their preference, and the mark.
    rules: Arc<[Vec<(u32, u32)>; 2]>,
}

impl Policies {
    /// What AF_XDP would pass by for a flow, in words for an operator.
    pub fn passed_by(&self, flow: &CarrierFlow) -> Option<String> {
        let ipsec = [Direction::Out, Direction::In].iter().find_map(|direction| self.ipsec.on(flow, *direction));
        let rule = || {
            let rules = &self.rules[usize::from(flow.peer.is_ipv6())];
            // The mark of the socket itself is known to the look-up of the way.
            let (preference, mark) = rules.iter().find(|(_, mark)| *mark != flow.mark)?;
            Some(format!("netfilter may set the mark of the routing rule `{preference}: fwmark {mark:#x}`"))
        };
        ipsec.or_else(rule)
    }
}

/// Follows the policies from now on. The task behind it ends when the receiver is dropped.
///
/// # Errors
/// No netlink socket can be opened.
pub async fn follow(netlink: &Netlink) -> Result<watch::Receiver<Policies>> {
    let mut rule_events = Events::open(&[MulticastGroup::Ipv4Rule, MulticastGroup::Ipv6Rule])?;
    // A kernel without xfrm has no policies, and none will come.
    let mut ipsec_events = xfrm::Events::open();
    if let Err(error) = &ipsec_events {
        tracing::debug!("xfrm: {error}; this kernel has no IPsec");
    }
    let netlink = netlink.clone();
    let (sender, receiver) = watch::channel(read(&netlink, ipsec_events.is_ok()).await);
    tokio::spawn(async move {
        loop {
            let ipsec = async {
                match &mut ipsec_events {
                    Ok(events) => events.next().await,
                    Err(_) => std::future::pending().await,
                }
            };
            tokio::select! {
                event = rule_events.next() => if event.is_none() {
                    tracing::error!("netlink notifications ended: routing rules are not followed any longer");
                    return;
                },
                result = ipsec => if let Err(error) = result {
                    tracing::error!("xfrm notifications: {error}; IPsec policies are not followed any longer");
                    ipsec_events = Err(error);
                },
                () = sender.closed() => return,
            }
            // What comes together is read together.
            tokio::time::sleep_until(Instant::now() + SETTLE).await;
            let policies = read(&netlink, ipsec_events.is_ok()).await;
            sender.send_if_modified(|old| std::mem::replace(old, policies.clone()) != policies);
        }
    });
    Ok(receiver)
}

/// What cannot be read is not there: a carrier that works is worth more than a guess.
async fn read(netlink: &Netlink, has_ipsec: bool) -> Policies {
    let ipsec = if has_ipsec { xfrm::read() } else { Ok(Ipsec::default()) };
    let ipsec = ipsec.unwrap_or_else(|error| {
        tracing::warn!("IPsec policies cannot be read: {error}; AF_XDP may pass some by");
        Ipsec::default()
    });
    let mut rules = [Vec::new(), Vec::new()];
    for (rules, family) in rules.iter_mut().zip([AddressFamily::Inet, AddressFamily::Inet6]) {
        match read_rules(netlink, family).await {
            Ok(found) => *rules = found,
            Err(error) => tracing::warn!("{error}; AF_XDP may pass some by"),
        }
    }
    Policies { ipsec: Arc::new(ipsec), rules: Arc::new(rules) }
}

async fn read_rules(netlink: &Netlink, family: AddressFamily) -> Result<Vec<(u32, u32)>> {
    let mut message = RuleMessage::default();
    message.header.family = family;
    let request = RouteNetlinkMessage::GetRule(message);
    let answers = match netlink.request(|| "cannot read the routing rules".to_owned(), request, NLM_F_DUMP).await {
        // The kernel has no policy routing, or no IPv6: then there are no rules.
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

/// Preference and mark of a rule that looks at one.
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
