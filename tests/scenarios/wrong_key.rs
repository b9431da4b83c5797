//! Two gateways with different static keys: nothing passes, and the counters show why.

use std::time::Duration;

use anyhow::Result;
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::may_make_namespaces;
use cipe_tests::offload::Offload;
use cipe_tests::ping::{self, Plan};
use cipe_tests::status::Status;
use cipe_tests::topology::{Carrier, Side, Topology};

fn sent(status: &Status) -> u64 {
    status.count("sent") + status.count("control-sent")
}

fn nothing_passes(daemon: Daemon) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    const PINGS: usize = 50;
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, daemon, |side, options| match side {
        Side::A => options,
        Side::B => options.set("key", "000102030405060708090a0b0c0d0e0e"),
    })?;
    let plan = Plan { timeout: Duration::from_millis(500), window: PINGS, ..Plan::count(PINGS) };
    let report = ping::run(net.lan(Side::A), Side::B.host(), &plan)?;
    assert_eq!((report.sent, report.received()), (PINGS, 0));

    // A keeps offering keys during the check: its counts before and after are the bounds of what B has refused in between.
    let before = pair.a.wait_for_status("all pings sent", |a| a.count("sent") >= PINGS as u64)?;
    let b = pair.b.wait_for_status("what A had sent refused", |b| b.count("bad-crc") >= sent(&before))?;
    let after = pair.a.status()?;
    for status in [&before, &b] {
        assert_eq!((status.count("delivered"), status.count("control-received")), (0, 0), "{status:?}");
        assert!(!status.has_key("send") && !status.has_key("receive"), "{status:?}");
    }
    assert!(before.count("sent") == PINGS as u64, "{before:?}");
    assert!((sent(&before)..=sent(&after)).contains(&b.count("bad-crc")), "A: {before:?}\nB: {b:?}");
    Ok(())
}

#[test]
fn a_wrong_key_lets_nothing_pass_and_is_counted_with_blowfish() -> Result<()> {
    nothing_passes(Daemon::Blowfish)
}

#[test]
fn a_wrong_key_lets_nothing_pass_and_is_counted_with_idea() -> Result<()> {
    nothing_passes(Daemon::Idea)
}
