//! One test for each event.

use anyhow::{Context, Result, ensure};
use cipe_tests::SOON;
use cipe_tests::may_make_namespaces;
use cipe_tests::namespace::Namespace;
use cipe_tests::options::Options;
use cipe_tests::process;
use cipe_tests::topology::Side;
use rustix::process::Signal;

use super::bed::{Bed, ip, tempting};

/// One row of the table: an event, after which nothing may have left in clear.
pub(super) fn row(event: impl FnOnce(&mut Bed<'_>) -> Result<()>) -> Result<()> {
    row_with(|_, options| options, event)
}

fn row_with(change: impl Fn(Side, Options) -> Options, event: impl FnOnce(&mut Bed<'_>) -> Result<()>) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = tempting()?;
    let mut bed = Bed::new(&net, change)?;
    let clear = bed.clear_frames(event)?;
    ensure!(clear.is_empty(), "{} frames in clear, the first: {}", clear.len(), clear[0]);
    Ok(())
}

/// The event, and the tunnel comes back by itself.
fn heals(event: impl FnOnce(&mut Bed<'_>) -> Result<()>) -> Result<()> {
    row(|bed| {
        event(bed)?;
        bed.wait_for_ping()
    })
}

#[test]
fn engine_killed() -> Result<()> {
    heals(|bed| bed.kill_engine())
}

#[test]
fn engine_terminated() -> Result<()> {
    heals(|bed| {
        let engine = bed.engine()?;
        process::signal(engine, Signal::TERM)?;
        process::wait_gone(engine, SOON)
    })
}

#[test]
fn daemon_killed() -> Result<()> {
    row(|bed| {
        bed.kill_daemon()?;
        bed.wait_for_tunnel("orphaned", |status| status.is_orphaned).map(drop)
    })
}

#[test]
fn daemon_and_engine_killed() -> Result<()> {
    row(|bed| {
        process::signal(bed.daemon()?.pid(), Signal::STOP)?;
        bed.kill_engine()?;
        bed.kill_daemon()
    })
}

#[test]
fn daemon_killed_and_started_again() -> Result<()> {
    row(|bed| {
        bed.kill_daemon()?;
        bed.start_daemon(&Options::of(Side::A))?;
        bed.wait_for_ping()
    })
}

/// The next engine removes the device, and with it the routes.
#[test]
fn daemon_and_engine_killed_and_started_again() -> Result<()> {
    row(|bed| {
        process::signal(bed.daemon()?.pid(), Signal::STOP)?;
        bed.kill_engine()?;
        bed.kill_daemon()?;
        bed.start_daemon(&Options::of(Side::A))?;
        bed.wait_for_ping()
    })
}

#[test]
fn run_directory_removed_and_engine_killed() -> Result<()> {
    heals(|bed| {
        for entry in std::fs::read_dir(bed.net.directory().join("runA"))? {
            std::fs::remove_dir_all(entry?.path())?;
        }
        bed.kill_engine()
    })
}

#[test]
fn hub_deleted() -> Result<()> {
    heals(|bed| ip(bed, &["link", "del", "cipehub0"]))
}

#[test]
fn hidden_end_deleted() -> Result<()> {
    heals(|bed| ip(bed, &["link", "del", "cipehub0x"]))
}

#[test]
fn hub_moved_to_another_namespace() -> Result<()> {
    let other = if may_make_namespaces() { Some(Namespace::new("apart")?) } else { None };
    heals(|bed| ip(bed, &["link", "set", "cipehub0", "netns", other.as_ref().context("namespaces")?.name()]))
}

#[test]
fn hub_set_down() -> Result<()> {
    heals(|bed| ip(bed, &["link", "set", "cipehub0", "down"]))
}

#[test]
fn hub_set_down_and_up() -> Result<()> {
    heals(|bed| {
        ip(bed, &["link", "set", "cipehub0", "down"])?;
        ip(bed, &["link", "set", "cipehub0", "up"])
    })
}

#[test]
fn hidden_end_set_down_and_up() -> Result<()> {
    heals(|bed| {
        ip(bed, &["link", "set", "cipehub0x", "down"])?;
        ip(bed, &["link", "set", "cipehub0x", "up"])
    })
}

#[test]
fn interface_deleted() -> Result<()> {
    row(|bed| {
        ip(bed, &["link", "del", "cipcb0"])?;
        ensure!(bed.wait_for_end()? == Some(0), "it ends as if it was asked to");
        Ok(())
    })
}

#[test]
fn interface_set_down() -> Result<()> {
    row(|bed| {
        ip(bed, &["link", "set", "cipcb0", "down"])?;
        ensure!(bed.wait_for_end()? == Some(0), "it ends as if it was asked to");
        // The next daemon sets it up.
        bed.start_daemon(&Options::of(Side::A))?;
        bed.wait_for_ping()
    })
}

#[test]
fn interface_moved_to_another_namespace() -> Result<()> {
    let other = if may_make_namespaces() { Some(Namespace::new("apart")?) } else { None };
    row(|bed| {
        ip(bed, &["link", "set", "cipcb0", "netns", other.as_ref().context("namespaces")?.name()])?;
        bed.daemon()?.wait_for_line("of the move", |line| line.contains("moved to another network namespace"))?;
        Ok(())
    })
}

#[test]
fn xdp_taken_from_the_hidden_end() -> Result<()> {
    row(|bed| {
        // The kernel refuses to take a program away that is held by a link.
        let _ = ip(bed, &["link", "set", "dev", "cipehub0x", "xdpgeneric", "off"]);
        let _ = ip(bed, &["link", "set", "dev", "cipehub0x", "xdp", "off"]);
        Ok(())
    })
}

#[test]
fn carrier_set_down_and_up() -> Result<()> {
    heals(|bed| {
        ip(bed, &["link", "set", "wire0", "down"])?;
        ip(bed, &["link", "set", "wire0", "up"])?;
        ip(bed, &["route", "add", "default", "via", &Side::B.carrier().to_string()])
    })
}

/// The peer was stopped, its host answers with ICMP errors, and the daemon gives up.
#[test]
fn daemon_gives_up() -> Result<()> {
    let change = |side, options: Options| match side {
        Side::A => options.set("maxerr", 2).set("ping", 1),
        Side::B => options,
    };
    row_with(change, |bed| {
        ensure!(bed.b.take().context("B's daemon runs")?.stop()?.success(), "B stops");
        ensure!(bed.wait_for_end()? == Some(1), "A gives up");
        Ok(())
    })
}

/// What a unit of the service manager does at `systemctl restart`, with the policy that our units set.
#[test]
fn service_restarted() -> Result<()> {
    let always = |_, options: Options| options.set("guard", "always");
    row_with(always, |bed| {
        ensure!(bed.a.take().context("A's daemon runs")?.stop()?.success(), "A stops");
        bed.gw().wait_for_devices(&["lo", "lan0", "wire0"])?;
        bed.start_daemon(&Options::of(Side::A).set("guard", "always"))?;
        bed.wait_for_ping()
    })
}

#[test]
fn service_stopped() -> Result<()> {
    let always = |_, options: Options| options.set("guard", "always");
    row_with(always, |bed| {
        ensure!(bed.a.take().context("A's daemon runs")?.stop()?.success(), "A stops");
        bed.gw().wait_for_devices(&["lo", "lan0", "wire0"])
    })
}

/// The check itself: a stop that was asked for opens by default, and so does any end with `guard no`.
#[test]
fn a_stop_that_was_asked_for_and_guard_no_open() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = tempting()?;
    let mut bed = Bed::new(&net, |_, options| options)?;
    assert!(bed.guard_routes()?.contains("unreachable 10.210.2.0/24"), "{}", bed.guard_routes()?);
    let clear = bed.clear_frames(|bed| {
        ensure!(bed.a.take().context("A's daemon runs")?.stop()?.success(), "A stops");
        bed.gw().wait_for_devices(&["lo", "lan0", "wire0"])
    })?;
    assert!(!clear.is_empty() && bed.guard_routes()?.is_empty(), "{}", bed.guard_routes()?);
    drop(bed);
    let mut bed = Bed::new(&net, |_, options| options.set("guard", "no"))?;
    assert_eq!(bed.guard_routes()?, "");
    let clear = bed.clear_frames(|bed| {
        bed.kill_daemon()?;
        bed.gw().wait_for_devices(&["lo", "lan0", "wire0"])
    })?;
    assert!(!clear.is_empty());
    Ok(())
}
