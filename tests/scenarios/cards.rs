//! Cards that are not veth: two cards of this machine, joined by a cable or a hub, carry the tunnel. This is for guests; a
//! machine without two such spare cards skips it. CIPE_CARDS="eth1 eth2" names the cards; otherwise the test takes cards that
//! are down and have no address.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use cipe_tests::exercise::{Device, Line, changes_are_borne, everything_passes};
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::may_make_namespaces;
use cipe_tests::namespace::ip;
use cipe_tests::offload::Offload;
use cipe_tests::topology::{Carrier, Side, Topology};

/// Names of the two cards, and their driver.
fn cards() -> Result<Option<([String; 2], String)>> {
    let named: Vec<String> = match std::env::var("CIPE_CARDS") {
        Ok(names) => names.split_whitespace().map(str::to_owned).collect(),
        Err(_) => {
            let mut found = Vec::new();
            for entry in fs::read_dir("/sys/class/net")?.flatten() {
                let down = fs::read_to_string(entry.path().join("flags")).is_ok_and(|flags| {
                    u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).is_ok_and(|flags| flags & 1 == 0)
                });
                if down && entry.path().join("device/driver").exists() {
                    found.extend(entry.file_name().into_string().ok());
                }
            }
            found.sort();
            found
        }
    };
    let [one, other, ..] = &named[..] else { return Ok(None) };
    let driver = fs::read_link(Path::new("/sys/class/net").join(one).join("device/driver"))?;
    let driver = driver.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(Some(([one.clone(), other.clone()], driver)))
}

/// A topology with the two cards as its carrier, in place of a veth pair.
struct BetweenCards {
    net: Topology,
    names: [String; 2],
    driver: String,
}

/// Returns the cards for the next test: the kernel would do it only some time after the namespaces are removed.
impl Drop for BetweenCards {
    fn drop(&mut self) {
        for (side, name) in [Side::A, Side::B].into_iter().zip(&self.names) {
            let own = std::process::id().to_string();
            if let Err(error) = self.net.gw(side).ip(&["link", "set", "wire0", "netns", &own, "name", name]) {
                eprintln!("{name} does not come back: {error:#}");
            }
        }
    }
}

fn between_cards() -> Result<Option<BetweenCards>> {
    if !may_make_namespaces() {
        return Ok(None);
    }
    let Some((names, driver)) = cards()? else {
        eprintln!("skipped: this machine has no two cards that are down, and CIPE_CARDS names none");
        return Ok(None);
    };
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    net.gw(Side::A).ip(&["link", "del", "wire0"])?;
    let between = BetweenCards { net, names, driver };
    for (side, name) in [Side::A, Side::B].into_iter().zip(&between.names) {
        let gateway = between.net.gw(side);
        ip(&["link", "set", name, "netns", gateway.name(), "name", "wire0"])?;
        gateway.sysctl("net.ipv6.conf.wire0.disable_ipv6", "1")?;
        gateway.ip(&["addr", "add", &format!("{}/24", side.carrier()), "dev", "wire0"])?;
        gateway.ip(&["link", "set", "wire0", "up"])?;
        // The previous test has switched them off.
        Offload::restore(gateway, "wire0")?;
    }
    Ok(Some(between))
}

fn card_carries(carrier: &str, xdp_mode: &str) -> Result<()> {
    let Some(between) = between_cards()? else { return Ok(()) };
    let BetweenCards { net, driver, .. } = &between;
    let pair = Pair::start(net, Daemon::Idea, |_, options| options.set("carrier", carrier).set("xdp-mode", xdp_mode))?;
    pair.wait_for_keys(net)?;
    let tell = || format!("{driver}, carrier {carrier}, xdp-mode {xdp_mode}");
    everything_passes(net, Line::Sound).with_context(tell)?;
    let doors = pair.a.status()?.doors.join(", ");
    changes_are_borne(net, &pair, Device { name: "wire0", mtu: 1500 }).with_context(tell)?;
    println!("{driver} | carrier {carrier}, xdp-mode {xdp_mode} | passes | {doors}");
    Ok(())
}

#[test]
fn a_card_carries_by_the_door_of_its_choice() -> Result<()> {
    card_carries("auto", "auto")
}

#[test]
fn a_card_carries_by_the_udp_socket() -> Result<()> {
    card_carries("udp", "auto")
}

#[test]
fn a_card_carries_by_af_xdp() -> Result<()> {
    card_carries("xdp", "auto")
}

#[test]
fn a_card_carries_by_af_xdp_in_the_stack() -> Result<()> {
    card_carries("xdp", "generic")
}
