//! The network of a soak: two gateways, an impaired carrier, and somebody on it.

use std::collections::{BTreeSet, VecDeque};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::account::Account;
use super::carrier::Watch;
use super::events;
use super::levels::{Level, Levels};
use super::plan::Rule;
use crate::forged::Attacker;
use crate::gateway::{self, Daemon, Pair};
use crate::impair::Relay;
use crate::leak;
use crate::offload::Offload;
use crate::options::PORT;
use crate::process;
use crate::relayed::{Relayed, port_of};
use crate::topology::{Carrier, Side, Topology};
use crate::traces::Traces;

/// Datagrams kept for replays, from each side.
const RECORDED: usize = 20_000;
/// Equal looks at all counters, one after the other, after which nothing is in flight.
const STILL: usize = 3;
/// How long counters may take to match.
const SETTLED_WITHIN: Duration = Duration::from_secs(20);

/// What happened at a gateway between two quiet points, and the sums that do not match.
pub(super) struct Settled {
    pub(super) account: Account,
    pub(super) faults: Vec<String>,
}

/// Both sides.
pub(super) const SIDES: [Side; 2] = [Side::A, Side::B];

/// The index of a side in pairs of things.
pub(super) fn index(side: Side) -> usize {
    usize::from(side == Side::B)
}

/// The network, and what is known of it.
pub(super) struct World {
    /// The gateways.
    pub(super) pair: Pair,
    /// The relay between them; side 0 is A.
    pub(super) relay: Relay,
    /// The one on the carrier.
    pub(super) attacker: Attacker,
    /// The look at each frame.
    pub(super) watch: Watch,
    /// Datagrams that the attacker has sent to each gateway.
    pub(super) thrown: [u64; 2],
    /// The gateways' carrier addresses.
    pub(super) addresses: [SocketAddrV4; 2],
    /// The relay's addresses, each the peer of a gateway.
    pub(super) far: [SocketAddrV4; 2],
    /// Datagrams that each side has sent, for replays.
    pub(super) recorded: [VecDeque<Vec<u8>>; 2],
    /// The two builds; the first one is in use.
    pub(super) builds: [PathBuf; 2],
    accounts: [Option<Account>; 2],
    traces: [BTreeSet<String>; 2],
    /// The network; shared with pings that run while the rest changes.
    pub(super) net: Rc<Topology>,
}

impl World {
    /// Makes the network, starts the gateways, and waits for keys.
    ///
    /// # Errors
    /// Something cannot be made, or a gateway does not start.
    pub(super) fn new(seed: u64, other: Option<&Path>, is_sealed: bool) -> Result<Self> {
        let net = Topology::new(Carrier::Tapped, Offload::On)?;
        leak::tempt(&net)?;
        for side in SIDES {
            let (gw, lan) = (net.gw(side), net.lan(side));
            // A new carrier address becomes the first when the old one is removed, and the routes stay.
            gw.sysctl("net.ipv4.conf.wire0.promote_secondaries", "1")?;
            // Without ARP, a LAN card receives nothing but packets for the tunnel.
            for (namespace, device, of, address) in
                [(lan, "eth0", gw.mac("lan0")?, side.gateway()), (gw, "lan0", lan.mac("eth0")?, side.host())]
            {
                let mac = of.map(|octet| format!("{octet:02x}")).join(":");
                let address = address.to_string();
                namespace.ip(&["neigh", "replace", &address, "lladdr", &mac, "dev", device, "nud", "permanent"])?;
            }
        }
        events::announce_addresses(&net)?;
        let watch = Watch::start(&net)?;
        let attacker = Attacker::new(&net)?;
        let link = Relayed::over(net, Daemon::Blowfish, seed, |options| {
            // Data under the static key can be replayed to a new engine: `staticdata no` promises that there is none.
            let options = options.set("guard", "always").set("staticdata", "no").flag("dynip");
            if is_sealed { options.sealed_anew("5000") } else { options.set("tokey", 5).set("tokxc", 3) }
        })?;
        link.pair.wait_for_keys(&link.net)?;
        let own = gateway::binary()?.to_owned();
        let other = other.map_or_else(|| Ok(own.clone()), std::fs::canonicalize)?;
        let Relayed { pair, relay, net } = link;
        let traces = |side| traces_of(&net, &pair, side, Side::carrier(side));
        let traces = [traces(Side::A)?, traces(Side::B)?];
        let far = SIDES.map(|side| match port_of(side) {
            std::net::SocketAddr::V4(address) => address,
            std::net::SocketAddr::V6(_) => unreachable!("the bed's carrier is IPv4"),
        });
        let mut world = Self {
            pair,
            relay,
            attacker,
            watch,
            thrown: [0; 2],
            addresses: SIDES.map(|side| SocketAddrV4::new(side.carrier(), PORT)),
            far,
            recorded: Default::default(),
            builds: [own, other],
            accounts: [None, None],
            traces,
            net: Rc::new(net),
        };
        world.settle(Rule::Anew)?;
        world.record(true);
        Ok(world)
    }

    /// What a gateway and its surroundings have counted.
    fn account(&self, side: Side) -> Result<Account> {
        let Self { pair, relay, net, .. } = self;
        let (gateway, [to, from]) = (pair.of(side), [index(side), index(side.other())]);
        let tap = net.tap().context("a tapped carrier has a tap")?;
        let port = format!("port{}", side.letter());
        let verdicts = gateway.status()?.verdicts;
        let (passed, dropped) = (relay.passed(), tap.counters(&port)?.tx_dropped);
        Ok(Account {
            lives: [gateway.engine_pid().context("an engine runs")?, gateway.pid()],
            arrived: passed[from].sent + self.thrown[to],
            dropped,
            genuine: passed[from].sent.saturating_sub(passed[from].doubled + passed[from].damaged),
            relayed: passed[to].received,
            cut: net.gw(side).counters("wire0")?.tx_dropped,
            entered: net.gw(side).counters("lan0")?.rx_packets,
            verdicts,
        })
    }

    /// Waits until nothing is in flight, and returns what happened at each gateway since the last time; `None` where counting starts anew.
    ///
    /// # Errors
    /// The counters cannot be read, or do not come to rest.
    pub(super) fn settle(&mut self, rule: Rule) -> Result<[Option<Settled>; 2]> {
        let deadline = Instant::now() + process::patient(SETTLED_WITHIN);
        let (mut still, mut last) = (0, None);
        loop {
            let before = self.relay.passed();
            let now = self.account(Side::A).and_then(|a| Ok([a, self.account(Side::B)?]));
            let at_rest = before == self.relay.passed() && self.relay.waiting() == 0;
            let late = Instant::now() > deadline;
            let now = match now {
                Ok(now) => now,
                // An engine that comes back does not answer yet.
                Err(_) if !late => continue,
                Err(error) => return Err(error).context("counters cannot be read"),
            };
            let outcome = [0, 1].map(|side| {
                let happened = self.accounts[side].as_ref().and_then(|earlier| now[side].since(earlier))?;
                let faults = happened.faults(rule);
                (rule != Rule::Anew).then_some(Settled { account: happened, faults })
            });
            still = if at_rest && last.as_ref() == Some(&now) { still + 1 } else { 0 };
            let matches = outcome.iter().flatten().all(|settled| settled.faults.is_empty());
            if (still >= STILL && matches) || late {
                ensure!(still > 0 || at_rest, "the counters do not come to rest: {now:?}");
                self.accounts = now.map(Some);
                return Ok(outcome);
            }
            last = Some(now);
        }
    }

    /// Keeps what was sent lately for replays, if all of it has arrived: what has not may be accepted once.
    pub(super) fn record(&mut self, all_arrived: bool) {
        for (side, recorded) in self.recorded.iter_mut().enumerate() {
            recorded.extend(self.relay.recent(side).into_iter().filter(|_| all_arrived));
            recorded.drain(..recorded.len().saturating_sub(RECORDED));
        }
        self.relay.forget_recent();
    }

    /// Adds what the processes hold now.
    pub(super) fn measure(&self, levels: &mut Levels) {
        for side in SIDES {
            let gateway = self.pair.of(side);
            for (role, pid) in [("daemon", Some(gateway.pid())), ("engine", gateway.engine_pid())] {
                if let Some((pid, level)) = pid.and_then(|pid| Some((pid, Level::of(pid)?))) {
                    levels.add(&format!("{role} {}", side.letter()), pid, level);
                }
            }
        }
    }

    /// What a gateway has now and did not have at the last look (`+`), or the other way round (`-`); empty if nothing.
    ///
    /// # Errors
    /// `ip` fails.
    pub(super) fn left_over(&mut self, side: Side) -> Result<Vec<String>> {
        let now = traces_of(&self.net, &self.pair, side, *self.addresses[index(side)].ip())?;
        let before = std::mem::replace(&mut self.traces[index(side)], now.clone());
        let more = now.difference(&before).map(|trace| format!("+ {trace}"));
        Ok(more.chain(before.difference(&now).map(|trace| format!("- {trace}"))).collect())
    }

    /// Stops everything and returns what is left over.
    ///
    /// # Errors
    /// A gateway does not stop, or something cannot be read.
    pub(super) fn end(self) -> Result<Vec<String>> {
        let Self { pair, relay, net, watch, attacker, .. } = self;
        drop((relay, watch, attacker));
        let mut left = Vec::new();
        let unguards = SIDES.map(|side| pair.of(side).cipe(&["unguard", "--all"]));
        let directories = SIDES.map(|side| pair.of(side).run_directory().to_owned());
        for status in pair.stop()? {
            if !status.success() {
                left.push(format!("a daemon ended with {status}"));
            }
        }
        for (side, (mut unguard, directory)) in SIDES.into_iter().zip(unguards.into_iter().zip(directories)) {
            let output = unguard.output()?;
            ensure!(output.status.success(), "cipe unguard: {}", String::from_utf8_lossy(&output.stderr));
            let gw = net.gw(side);
            if let Err(error) = gw.wait_for_devices(&["lo", "lan0", "wire0"]) {
                left.push(format!("devices: {error:#}"));
            }
            for pid in gw.processes()? {
                if let Err(error) = process::wait_gone(pid, crate::SOON) {
                    left.push(format!("{error:#}"));
                }
            }
            let traces = Traces::of(gw, &directory)?;
            let ours = traces.routes.lines().filter(|line| line.contains("cip") || line.contains("proto 67"));
            left.extend(ours.map(|route| format!("route {route}")));
            left.extend(traces.files.iter().map(|file| format!("{}/{file}", directory.display())));
        }
        let (number, names) = (format!("-{}-", std::process::id()), ["/run/netns", "/run"]);
        drop(net);
        for folder in names {
            let entries =
                std::fs::read_dir(folder)?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
            left.extend(entries.filter(|name| name.starts_with("cipe-") && (name.contains(&number))));
        }
        Ok(left)
    }

    /// Both logs, for people who look for the cause of a failure.
    pub(super) fn logs(&self) -> String {
        let log = |side: Side| {
            let lines = self.pair.of(side).log().lines();
            let last = lines[lines.len().saturating_sub(60)..].iter().map(|line| format!("{}\n", line.text));
            format!("--- end of the log of {}\n{}", side.letter(), last.collect::<String>())
        };
        SIDES.map(log).concat()
    }

    /// Fails if a daemon has ended by itself.
    ///
    /// # Errors
    /// It has.
    pub(super) fn daemons_live(&mut self) -> Result<()> {
        for (name, gateway) in [("A", &mut self.pair.a), ("B", &mut self.pair.b)] {
            if let Some(status) = gateway.ended()? {
                bail!("the daemon of {name} has ended by itself: {status}");
            }
        }
        Ok(())
    }
}

/// Traces without numbers that change: of processes, of hubs, and the carrier's address. An engine that stands by comes and goes.
fn traces_of(net: &Topology, pair: &Pair, side: Side, carrier: Ipv4Addr) -> Result<BTreeSet<String>> {
    let traces = Traces::of(net.gw(side), pair.of(side).run_directory())?;
    let lines = traces.addresses.lines().chain(traces.routes.lines()).map(|line| plain(line, carrier));
    let files = traces.files.iter().map(|file| format!("file {file}"));
    // It has that name a moment after it was started, and another one once it has taken over.
    let stands_by = |pid: &&u32| {
        let name = process::name(**pid).unwrap_or_default();
        name == "cipe-standby"
            || name != "cipe-engine" && process::arguments(**pid).iter().any(|argument| argument == "--standby")
    };
    let processes = traces.processes.iter().filter(|pid| !stands_by(pid)).count();
    Ok(lines.chain(files).chain([format!("{processes} processes")]).collect())
}

/// A line in single spaces, without the numbers of hubs, and with a word for the carrier's address.
fn plain(line: &str, carrier: Ipv4Addr) -> String {
    let carrier = carrier.to_string();
    let word = |word: &str| match word.split_once('/') {
        _ if word == carrier => "CARRIER".to_owned(),
        Some((address, length)) if address == carrier => format!("CARRIER/{length}"),
        _ if word.starts_with("cipehub") => word.replace(|c: char| c.is_ascii_digit(), ""),
        _ => word.to_owned(),
    };
    line.split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::plain;

    #[test]
    fn traces_are_compared_without_what_may_change() {
        let text = |line| plain(line, Ipv4Addr::new(10, 200, 0, 2));
        assert_eq!(text("cipehub12x@cipehub12  UP 10.0.0.1/24"), "cipehubx@cipehub UP 10.0.0.1/24");
        assert_eq!(text("wire0 UP 10.200.0.2/24"), "wire0 UP CARRIER/24");
        assert_eq!(text("broadcast 10.200.0.255 src 10.200.0.2"), "broadcast 10.200.0.255 src CARRIER");
    }
}
