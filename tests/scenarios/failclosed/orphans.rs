//! Tunnels without a daemon, guard routes, and the commands for them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cipe_tests::gateway::{Daemon, Gateway};
use cipe_tests::may_make_namespaces;
use cipe_tests::options::Options;
use cipe_tests::ping::{self, Plan};
use cipe_tests::status::Status;
use cipe_tests::topology::Side;

use super::bed::{Bed, ip, tempting};
use super::events::row;

/// An orphan drops packets both ways, says so, holds no key, and is taken up again with its routes.
#[test]
fn an_orphan_drops_and_counts_both_ways_until_its_daemon_is_back() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = tempting()?;
    let mut bed = Bed::new(&net, |_, options| options)?;
    ip(&bed, &["route", "add", "192.0.2.128/25", "dev", "cipcb0"])?;
    let index = |bed: &Bed<'_>| -> Result<Option<String>> {
        let shown = bed.gw().ip(&["-o", "link", "show", "cipcb0"])?;
        Ok(shown.split(':').next().map(str::to_owned))
    };
    let (before, mut orphan) = (index(&bed)?, Status::default());
    let clear = bed.clear_frames(|bed| {
        bed.kill_daemon()?;
        orphan = bed.wait_for_tunnel("orphaned", |status| status.is_orphaned)?;
        let dropped = |status: &Status| status.count("tunnel-dead");
        let outward = bed.wait_for_tunnel("dropping packets to the carrier", |status| dropped(status) > 0)?;
        // B's engine does not know, and sends.
        let plan = Plan { timeout: Duration::from_millis(100), ..Plan::count(1) };
        let (b, sent) = (bed.b.as_ref().context("B's daemon runs")?, 20);
        let before = b.status()?.count("sent");
        ping::run(bed.net.lan(Side::B), Side::A.host(), &Plan { window: sent, ..plan.clone() })?;
        b.wait_for_status("a ping sent", |status| status.count("sent") > before)?;
        bed.wait_for_tunnel("dropping datagrams of the carrier", |status| dropped(status) > dropped(&outward))?;
        Ok(())
    })?;
    assert!(clear.is_empty(), "{} frames in clear", clear.len());
    assert_eq!(orphan.keys, [] as [&str; 0]);
    let text = bed.cipe(&["show", "cipcb0"])?;
    assert!(text.contains("orphaned: daemon gone since") && text.contains("cipe down cipcb0"), "{text}");
    bed.start_daemon(&Options::of(Side::A))?;
    bed.wait_for_ping()?;
    assert_eq!(index(&bed)?, before, "another interface");
    assert!(bed.gw().ip(&["route", "show", "dev", "cipcb0"])?.contains("192.0.2.128/25"));
    assert!(!bed.tunnel()?.context("the tunnel")?.is_orphaned);
    Ok(())
}

/// Another tunnel that wants an orphan's port gets it; the orphan's packets do not leave even so.
#[test]
fn an_orphan_makes_way_for_a_tunnel_that_needs_its_port() -> Result<()> {
    row(|bed| {
        bed.kill_daemon()?;
        bed.wait_for_tunnel("orphaned", |status| status.is_orphaned)?;
        let mut other = Gateway::start_in(bed.net, (bed.gw(), "A"), &[], Daemon::Idea, &Options::of(Side::A))?;
        ensure!(other.wait_up()? == "cipci0", "the other cipher's interface");
        bed.gw().wait_for_devices(&["lo", "lan0", "wire0", "cipehub0x", "cipehub0", "cipci0"])?;
        bed.a = Some(other);
        Ok(())
    })
}

#[test]
fn an_operator_ends_tunnels_and_takes_guard_routes_away() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = tempting()?;
    let nothing = ["lo", "lan0", "wire0"];
    // One that runs, by its interface: its daemon ends well.
    let mut bed = Bed::new(&net, |_, options| options)?;
    bed.cipe(&["down", "cipcb0"])?;
    assert_eq!(bed.wait_for_end()?, Some(0));
    bed.gw().wait_for_devices(&nothing)?;
    assert_eq!(bed.guard_routes()?, "");
    // An orphan, by the name of its option file.
    bed.start_daemon(&Options::of(Side::A))?;
    bed.kill_daemon()?;
    bed.wait_for_tunnel("orphaned", |status| status.is_orphaned)?;
    bed.cipe(&["down", "options"])?;
    bed.gw().wait_for_devices(&nothing)?;
    assert_eq!(bed.guard_routes()?, "");
    // With `always` guard routes stay after a stop, until they are taken away, and not while the daemon runs.
    bed.start_daemon(&Options::of(Side::A).set("guard", "always"))?;
    let error = bed.cipe(&["unguard", "cipcb0"]).err().context("refused")?.to_string();
    assert!(error.contains("its daemon runs"), "{error}");
    bed.cipe(&["down", "cipcb0"])?;
    assert_eq!(bed.wait_for_end()?, Some(0));
    assert!(bed.guard_routes()?.contains("10.210.2.0/24"), "{}", bed.guard_routes()?);
    bed.cipe(&["unguard", "options"])?;
    assert_eq!(bed.guard_routes()?, "");
    assert!(bed.cipe(&["unguard", "options"]).is_err());
    // All, also those that no record tells of.
    bed.start_daemon(&Options::of(Side::A).set("guard", "always"))?;
    assert!(bed.a.take().context("A's daemon runs")?.stop()?.success());
    std::fs::remove_dir_all(net.directory().join("runA"))?;
    bed.cipe(&["unguard", "--all"])?;
    assert_eq!(bed.guard_routes()?, "");
    Ok(())
}

/// Routes of every table and IP version, whoever sets them, as long as they are there.
#[test]
fn every_route_into_the_interface_is_guarded() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = tempting()?;
    for device in ["default", "lan0"] {
        net.gw(Side::A).sysctl(&format!("net.ipv6.conf.{device}.disable_ipv6"), "0")?;
    }
    let bed = Bed::new(&net, |_, options| options)?;
    let routes = [
        ("-4", "192.0.2.128/25", "main", "192.0.2.128/25"),
        ("-4", "default", "100", "default table 100"),
        ("-6", "2001:db8:7::/48", "main", "2001:db8:7::/48"),
    ];
    for (family, to, table, _) in routes {
        ip(&bed, &[family, "route", "add", to, "dev", "cipcb0", "table", table])?;
    }
    ip(&bed, &["-6", "route", "add", "fe80:7::/64", "dev", "cipcb0"])?;
    bed.wait_for_guard_routes("of all routes", |shown| routes.iter().all(|(.., text)| shown.contains(text)))?;
    assert!(!bed.guard_routes()?.contains("fe80"), "{}", bed.guard_routes()?);
    // Of one that is removed, or led elsewhere, none stays.
    for (family, to, table, _) in routes {
        ip(&bed, &[family, "route", "replace", to, "dev", "lan0", "table", table])?;
    }
    ip(&bed, &["route", "del", "10.210.2.0/24", "dev", "cipcb0"])?;
    bed.wait_for_guard_routes("of none of them", |shown| {
        !shown.contains("10.210.2.0/24") && routes.iter().all(|(.., text)| !shown.contains(text))
    })?;
    Ok(())
}
