//! An operator renames tunnel devices, or moves them to another network namespace, as with other kinds of tunnels.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::namespace::Namespace;
use cipe_tests::offload::Offload;
use cipe_tests::ping::{self, Plan};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, process};

fn wait_for_ping(from: &Namespace, to: Ipv4Addr, gateway: &Gateway) -> Result<()> {
    let (deadline, one) =
        (Instant::now() + process::patient(SOON), Plan { timeout: Duration::from_millis(500), ..Plan::count(1) });
    while ping::run(from, to, &one)?.received() == 0 {
        if Instant::now() > deadline {
            bail!("no answer\n{}", gateway.log().text());
        }
    }
    Ok(())
}

/// Each protocol has devices of its own kind.
const DAEMONS: [Daemon; 2] = [Daemon::Blowfish, Daemon::EthernetBlowfish];

/// The carrier stays in its namespace; processes in the other namespace have the tunnel and nothing else.
#[test]
fn a_device_in_another_namespace_goes_on_and_its_end_is_the_tunnel_s() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    for (daemon, end_by_stop, index_is_taken) in
        DAEMONS.into_iter().flat_map(|daemon| [(daemon, true, false), (daemon, false, true)])
    {
        let device = daemon.device();
        let pair = Pair::start(&net, daemon, |_, options| options)?;
        wait_for_ping(net.gw(Side::A), Side::B.tunnel(), &pair.a)?;
        let other = Namespace::new("apart")?;
        if index_is_taken {
            let index = index_of(net.gw(Side::A), device)?;
            other.ip(&["link", "add", "taken0", "index", &index, "type", "bridge"])?;
        }
        net.gw(Side::A).ip(&["link", "set", device, "netns", other.name()])?;
        pair.a.wait_for_line("of the move", |line| line.contains("moved to another network namespace"))?;
        other.ip(&["link", "set", device, "up"])?;
        let (own, peer) = (Side::A.tunnel().to_string(), Side::B.tunnel().to_string());
        other.ip(&["addr", "add", &own, "peer", &peer, "dev", device])?;
        wait_for_ping(&other, Side::B.tunnel(), &pair.a)?;
        let status = pair.a.wait_for_status("the note", |status| {
            status.doors.iter().any(|door| door.contains("another network namespace"))
        })?;
        assert_eq!(status.device, device);
        assert_eq!(net.gw(Side::A).devices()?.iter().filter(|name| *name == device).count(), 0);
        if index_is_taken {
            other.ip(&["link", "del", "taken0"])?;
        }
        if end_by_stop {
            assert!(pair.a.stop()?.success());
            other.wait_for_devices(&["lo"])?;
        } else {
            other.ip(&["link", "del", device])?;
            process::wait_gone(pair.a.pid(), SOON)?;
            assert!(pair.a.stop()?.success());
        }
        net.gw(Side::A).wait_for_devices(&["lo", "lan0", "wire0"])?;
    }
    Ok(())
}

fn index_of(namespace: &Namespace, device: &str) -> Result<String> {
    let links: serde_json::Value = serde_json::from_str(&namespace.ip(&["-j", "link", "show", "dev", device])?)?;
    Ok(links[0]["ifindex"].to_string())
}

/// Renames a veth device that is up. Kernels before 6.2 refuse that, and a tunnel ends when its device goes down.
fn rename_a_device_that_is_up(net: &Topology) -> Result<()> {
    let gateway = net.gw(Side::A);
    gateway.ip(&["link", "add", "before", "up", "type", "veth", "peer", "name", "other"])?;
    let renamed = gateway.ip(&["link", "set", "before", "name", "after"]);
    gateway.ip(&["link", "del", "other"])?;
    renamed.map(drop)
}

#[test]
fn a_renamed_device_is_called_by_its_new_name() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    if let Err(error) = rename_a_device_that_is_up(&net) {
        eprintln!("skipped: this kernel renames no device that is up: {error:#}");
        return Ok(());
    }
    for daemon in DAEMONS {
        let device = daemon.device();
        let pair = Pair::start(&net, daemon, |_, options| options)?;
        wait_for_ping(net.gw(Side::A), Side::B.tunnel(), &pair.a)?;
        net.gw(Side::A).ip(&["link", "set", device, "name", "vpn7"])?;
        pair.a.wait_for_line("of the name", |line| line.ends_with(&format!("{device}: is called vpn7 now")))?;
        let shown = pair.a.cipe(&["show"]).output()?;
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        assert!(shown.contains("vpn7") && !shown.contains(device), "{shown}");
        wait_for_ping(net.gw(Side::A), Side::B.tunnel(), &pair.a)?;
        net.gw(Side::A).ip(&["link", "set", "vpn7", "down"])?;
        process::wait_gone(pair.a.pid(), SOON)?;
        let log = pair.a.log().clone();
        assert!(pair.a.stop()?.success());
        // The log is read beside the test, which may be the faster one.
        let said = log.wait_for_line(0, SOON, |line| line.contains("vpn7: down"));
        assert!(said.is_some(), "{}", log.text());
    }
    Ok(())
}
