//! The sums that must match: what came to a gateway, and what its engine counted.

use std::collections::BTreeMap;

use super::plan::Rule;
use crate::status::INBOUND;

/// Verdicts on packets of the private side.
const OUTBOUND: &[&str] = &[
    "sent",
    "private-not-ip",
    "private-unstamped",
    "private-malformed",
    "no-engine",
    "no-peer",
    "no-route",
    "route-loop",
    "too-big",
    "no-send-key",
    "carrier-full",
];
/// Verdicts on packets of either side.
const EITHER: &[&str] = &["tunnel-dead", "no-frame", "ring-full"];
/// Verdicts on datagrams that were accepted as data of the peer. A control message is judged by the daemon, which this does not
/// see.
const ACCEPTED: &[&str] = &["delivered", "private-full", "congestion-drop"];

/// What came to a gateway and left it, and the counters of its tunnel.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Account {
    /// Engine and daemon.
    pub(super) lives: [u32; 2],
    /// Datagrams that were sent to it.
    pub(super) arrived: u64,
    /// Frames that the cable from the carrier lost, also those that are no datagrams.
    pub(super) dropped: u64,
    /// Those of them that the peer has sent, without damage and without copies.
    pub(super) genuine: u64,
    /// Datagrams that the relay got from it.
    pub(super) relayed: u64,
    /// Frames that its own end of the cable lost, each with a datagram or several.
    pub(super) cut: u64,
    /// Packets that its LAN card received.
    pub(super) entered: u64,
    /// Counters by verdict.
    pub(super) verdicts: BTreeMap<String, u64>,
}

impl Account {
    /// What happened since `earlier`; `None` if another engine or daemon counts, or the tunnel was made again.
    pub(super) fn since(&self, earlier: &Self) -> Option<Self> {
        let count = |name: &String| self.verdicts.get(name).copied().unwrap_or_default();
        if self.lives != earlier.lives || earlier.verdicts.iter().any(|(name, before)| count(name) < *before) {
            return None;
        }
        let before = |name: &String| earlier.verdicts.get(name).copied().unwrap_or_default();
        let verdicts = self.verdicts.iter().map(|(name, count)| (name.clone(), count - before(name)));
        Some(Self {
            lives: self.lives,
            arrived: self.arrived - earlier.arrived,
            dropped: self.dropped - earlier.dropped,
            genuine: self.genuine.saturating_sub(earlier.genuine),
            relayed: self.relayed - earlier.relayed,
            cut: self.cut - earlier.cut,
            entered: self.entered - earlier.entered,
            verdicts: verdicts.filter(|(_, count)| *count > 0).collect(),
        })
    }

    fn sum(&self, names: &[&str]) -> i128 {
        names.iter().filter_map(|name| self.verdicts.get(*name)).map(|count| i128::from(*count)).sum()
    }

    /// Packets that the engine lost for lack of room.
    pub(super) fn lost(&self) -> i128 {
        self.sum(EITHER)
    }

    /// The sums that do not match, in words.
    pub(super) fn faults(&self, rule: Rule) -> Vec<String> {
        let mut faults = Vec::new();
        if rule == Rule::Anew {
            return faults;
        }
        let mut check = |right: bool, text: String| {
            if !right {
                faults.push(text);
            }
        };
        let dropped = if rule == Rule::AtMost { 0 } else { i128::from(self.dropped) };
        let (arrived, entered, either) = (i128::from(self.arrived) - dropped, i128::from(self.entered), self.lost());
        let (inbound, outbound) = (self.sum(INBOUND), self.sum(OUTBOUND));
        let (from_carrier, from_lan) = (arrived - inbound, entered - outbound);
        let left = self.sum(&["sent", "control-sent"]);
        let relayed = i128::from(self.relayed);
        check(from_carrier >= 0, format!("{arrived} datagrams came, {inbound} were counted"));
        // A LAN card counts a superframe once; the engine counts its segments.
        check(from_lan >= 0 || rule == Rule::Carrier, format!("{entered} packets came, {outbound} were counted"));
        match rule {
            Rule::Exact => check(
                from_carrier + from_lan == either,
                format!(
                    "of {arrived} datagrams {from_carrier}, of {entered} packets {from_lan} are uncounted, but {either}"
                ),
            ),
            Rule::Carrier => check(
                from_carrier <= either,
                format!("of {arrived} datagrams {from_carrier} are uncounted, but {either}"),
            ),
            Rule::AtMost | Rule::Anew => {}
        }
        if rule == Rule::AtMost || self.cut > 0 {
            check(relayed <= left, format!("{left} datagrams sent, the relay got {relayed}"));
        } else {
            check(relayed == left, format!("{left} datagrams sent, the relay got {relayed}"));
        }
        faults
    }

    /// Data that was accepted although the peer has not sent it, or once more. `peer`: what happened there, if it is known.
    pub(super) fn forged(&self, peer: Option<&Self>) -> u64 {
        let genuine = i128::from(self.genuine);
        let sent = peer.map_or(genuine, |peer| peer.sum(&["sent"]).min(genuine));
        (self.sum(ACCEPTED) - sent).max(0) as u64
    }

    /// The counters in a line, the largest first.
    pub(super) fn text(&self) -> String {
        let mut counts: Vec<_> = self.verdicts.iter().collect();
        counts.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        counts.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(verdicts: &[(&str, u64)]) -> Account {
        let verdicts = verdicts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
        Account { lives: [1, 2], arrived: 11, dropped: 1, genuine: 8, relayed: 5, cut: 0, entered: 6, verdicts }
    }

    #[test]
    fn sums_that_match_are_no_fault() {
        let whole = account(&[
            ("sent", 4),
            ("control-sent", 1),
            ("too-big", 1),
            ("delivered", 8),
            ("bad-crc", 2),
            ("no-frame", 1),
        ]);
        for rule in [Rule::Exact, Rule::Carrier, Rule::AtMost, Rule::Anew] {
            assert_eq!(whole.faults(rule), [""; 0], "{rule:?}");
        }
        assert_eq!((whole.forged(None), whole.text().starts_with("delivered 8, sent 4")), (0, true));
    }

    #[test]
    fn a_packet_without_a_verdict_is_a_fault_unless_it_may_be_lost_outside() {
        let short = account(&[("sent", 5), ("delivered", 8), ("bad-crc", 1)]);
        assert_eq!(short.faults(Rule::Exact).len(), 1);
        assert_eq!(short.faults(Rule::Carrier).len(), 1);
        assert_eq!(short.faults(Rule::AtMost), [""; 0]);
    }

    #[test]
    fn a_packet_counted_twice_is_a_fault_after_any_loss() {
        let twice = account(&[("sent", 5), ("delivered", 8), ("bad-crc", 4)]);
        assert_eq!(twice.faults(Rule::AtMost).len(), 1);
        assert_eq!(Account { dropped: 5, ..account(&[("sent", 5), ("delivered", 8)]) }.faults(Rule::AtMost), [""; 0]);
        let sent = account(&[("sent", 4), ("delivered", 8)]);
        assert_eq!(sent.faults(Rule::AtMost).len(), 1);
        assert_eq!(account(&[("sent", 6), ("delivered", 8), ("bad-crc", 2)]).faults(Rule::Carrier).len(), 1);
        let cut = Account { cut: 1, ..account(&[("sent", 6), ("delivered", 8), ("bad-crc", 2)]) };
        assert_eq!(cut.faults(Rule::Carrier), [""; 0]);
    }

    #[test]
    fn more_than_the_peer_has_sent_is_forged() {
        let end = account(&[("delivered", 9), ("control-received", 3)]);
        assert_eq!(end.forged(None), 1);
        assert_eq!(end.forged(Some(&account(&[("sent", 7), ("control-sent", 3)]))), 2);
    }

    #[test]
    fn another_engine_counts_anew() {
        let before = account(&[("sent", 4), ("delivered", 3)]);
        assert_eq!(
            account(&[("sent", 5), ("delivered", 3)]).since(&before).map(|now| now.text()),
            Some("sent 1".to_owned())
        );
        assert_eq!(account(&[("sent", 5), ("delivered", 2)]).since(&before), None);
        assert_eq!(account(&[("sent", 5)]).since(&before), None);
        assert_eq!(Account { lives: [3, 2], ..before.clone() }.since(&before), None);
    }
}
