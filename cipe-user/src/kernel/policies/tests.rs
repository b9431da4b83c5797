use std::process::Command;

use super::*;
use crate::kernel::testnet::{in_namespace, until};

const CARRIER: &str = "src 192.0.2.1/32 dst 192.0.2.2/32";

fn flow(me: &str, peer: &str) -> CarrierFlow {
    CarrierFlow { mark: 0, me: me.parse().unwrap(), peer: peer.parse().unwrap(), ifindex: 7 }
}

fn ours() -> CarrierFlow {
    flow("192.0.2.1:6789", "192.0.2.2:6790")
}

/// Runs `ip` in this thread's namespace; `false` if the kernel does not have that.
fn ip(words: &str) -> bool {
    Command::new("ip").args(words.split_whitespace()).status().is_ok_and(|status| status.success())
}

fn has_ipsec() -> bool {
    let has = ip("xfrm policy flush");
    if !has {
        eprintln!("skipped: this kernel has no xfrm");
    }
    has
}

const ESP: &str = "tmpl src 192.0.2.1 dst 192.0.2.2 proto esp mode transport";

fn reason(flow: &CarrierFlow) -> Option<String> {
    let policies = Policies { ipsec: Arc::new(xfrm::read().unwrap()), ..Policies::default() };
    policies.passed_by(flow)
}

#[test]
fn a_policy_holds_for_the_flows_that_its_selector_has() {
    in_namespace(|_| async {
        if !has_ipsec() {
            return;
        }
        assert_eq!(reason(&ours()), None);
        assert!(ip(&format!("xfrm policy add {CARRIER} proto udp sport 6789 dir out priority 10 {ESP}")));
        assert!(reason(&ours()).is_some_and(|reason| reason.contains("dir out, priority 10)")));
        for other in [
            flow("192.0.2.1:6788", "192.0.2.2:6790"),
            flow("192.0.2.9:6789", "192.0.2.2:6790"),
            flow("192.0.2.1:6789", "192.0.2.3:6790"),
            flow("[2001:db8::1]:6789", "[2001:db8::2]:6790"),
        ] {
            assert_eq!(reason(&other), None, "{other:?}");
        }
        // A policy with a lower priority number that lets packets pass unchanged.
        assert!(ip(&format!("xfrm policy add {CARRIER} proto udp dir out priority 5")));
        assert_eq!(reason(&ours()), None);
    });
}

#[test]
fn policies_for_what_comes_in_and_those_that_block_hold_as_well() {
    in_namespace(|_| async {
        if !has_ipsec() {
            return;
        }
        assert!(ip("xfrm policy add src 192.0.2.0/24 dst 192.0.2.0/25 dir in action block"));
        assert!(reason(&ours()).is_some_and(|reason| reason.contains("dir in") && reason.contains("blocks")));
        assert_eq!(reason(&flow("192.0.2.200:6789", "192.0.2.2:6790")), None);
        assert!(ip("xfrm policy flush"));
        let six = flow("[2001:db8::1]:6789", "[2001:db8::2]:6790");
        assert!(ip("xfrm policy add src 2001:db8::/127 dst ::/0 dir out action block"));
        assert!(reason(&six).is_some_and(|reason| reason.contains("dir out")));
        assert_eq!(reason(&flow("[2001:db8::2]:6789", "[2001:db8::1]:6790")), None);
    });
}

#[test]
fn policies_of_forwarded_packets_marks_and_interfaces_are_no_hindrance() {
    in_namespace(|_| async {
        if !has_ipsec() {
            return;
        }
        assert!(ip(&format!("xfrm policy add {CARRIER} dir fwd {ESP}")));
        assert!(ip(&format!("xfrm policy add {CARRIER} dir out mark 5 {ESP}")));
        assert!(ip(&format!("xfrm policy add {CARRIER} dir out if_id 9 {ESP}")));
        assert_eq!(reason(&ours()), None);
    });
}

#[test]
fn what_no_policy_allows_may_be_blocked() {
    in_namespace(|_| async {
        if !has_ipsec() || !ip("xfrm policy setdefault out block") {
            return;
        }
        assert!(reason(&ours()).is_some_and(|reason| reason.contains("no policy allows them (dir out)")));
        assert!(ip(&format!("xfrm policy add {CARRIER} dir out")));
        assert_eq!(reason(&ours()), None);
    });
}

#[test]
fn changes_are_told() {
    in_namespace(|netlink| async move {
        let mut policies = follow(&netlink).await.unwrap();
        assert_eq!(policies.borrow().passed_by(&ours()), None);
        assert!(ip("rule add fwmark 5 lookup main priority 77"));
        let found = until(&mut policies, |policies| policies.passed_by(&ours()).is_some()).await;
        assert!(found.passed_by(&ours()).is_some_and(|reason| reason.contains("`77: fwmark 0x5`")));
        assert_eq!(found.passed_by(&flow("[::1]:1", "[::2]:2")), None);
        assert_eq!(found.passed_by(&CarrierFlow { mark: 5, ..ours() }), None, "the look-up has this mark");
        assert!(ip("rule del priority 77"));
        until(&mut policies, |policies| policies.passed_by(&ours()).is_none()).await;
        if has_ipsec() {
            assert!(ip(&format!("xfrm policy add {CARRIER} dir out {ESP}")));
            until(&mut policies, |policies| policies.passed_by(&ours()).is_some()).await;
            assert!(ip("xfrm policy flush"));
            until(&mut policies, |policies| policies.passed_by(&ours()).is_none()).await;
        }
    });
}

#[test]
fn rules_that_look_at_addresses_alone_are_seen_by_every_look_up() {
    in_namespace(|netlink| async move {
        assert!(ip("rule add from 192.0.2.1 lookup main priority 78"));
        let policies = follow(&netlink).await.unwrap();
        assert_eq!(policies.borrow().passed_by(&ours()), None);
    });
}
