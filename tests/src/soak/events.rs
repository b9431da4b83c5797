//! What happens in an event.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::unix::fs::symlink;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::rngs::StdRng;
use rand::seq::IteratorRandom;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;

use super::clock::Clock;
use super::plan::{Event, Kind};
use super::world::{SIDES, World, index};
use crate::forged::{
    FRAGMENTATION_NEEDED, PORT_UNREACHABLE, Quoted, TO_ANYBODY, WITH_ANOTHER_IV, datagram, unreachable_to,
};
use crate::gateway::Gateway;
use crate::impair::Impairment;
use crate::namespace::Namespace;
use crate::options::PORT;
use crate::topology::{Side, Topology};
use crate::traffic::{self, Pace};
use crate::{SOON, forged, process};

/// Most datagrams of a flood, and of a replay.
const FLOOD: f64 = 20_000.0;
const REPLAY: f64 = 6000.0;
/// Forged datagrams between two ticks of the clock.
const BATCH: usize = 128;
/// Octets of the largest datagram that fits one packet of the carrier.
const LARGEST: usize = 1472;
/// Octets of UDP payload, datagrams a second, and octets of TCP, of [`Kind::Traffic`].
const UDP_LOAD: (usize, u64) = (600, 2000);
const TCP_OCTETS: usize = 1_000_000;

/// Lets an event happen, under the pings of `clock`.
///
/// # Errors
/// Something did not happen that must.
pub(super) fn act(world: &mut World, event: &Event, clock: &Clock) -> Result<()> {
    let mut scene = Scene {
        net: world.net.clone(),
        world,
        clock,
        side: event.side,
        dose: event.dose,
        rng: StdRng::seed_from_u64(event.seed),
    };
    match event.kind {
        Kind::Traffic => scene.traffic(),
        Kind::Keys => scene.keys(),
        Kind::DaemonRestart => scene.start_after(Signal::TERM),
        Kind::DaemonKill => scene.start_after(Signal::KILL),
        Kind::EngineKill => scene.end_engine(Signal::KILL),
        Kind::EngineTerm => scene.end_engine(Signal::TERM),
        Kind::BothKill => scene.kill_both(),
        Kind::Replace => scene.replace(),
        Kind::Hang => scene.hang(),
        Kind::HubDown => scene.hub_down(),
        Kind::HubDelete => scene.hub_delete(),
        Kind::Interface => scene.interface(),
        Kind::CarrierDown => scene.carrier_down(),
        Kind::Mtu => scene.mtu(),
        Kind::Address => scene.address(),
        Kind::Nat => scene.nat(),
        Kind::Impair => scene.impair(),
        Kind::Flood => scene.flood(),
        Kind::Icmp => scene.icmp(),
        Kind::Replay => scene.replay(None),
        Kind::ReplayElsewhere => scene.replay(Some(forged::ATTACKER)),
    }
}

/// An event at a gateway.
struct Scene<'a> {
    world: &'a mut World,
    net: Rc<Topology>,
    clock: &'a Clock,
    side: Side,
    dose: f64,
    rng: StdRng,
}

impl Scene<'_> {
    fn gw(&self) -> &Namespace {
        self.net.gw(self.side)
    }

    fn tap(&self) -> Result<&Namespace> {
        self.net.tap().context("a tapped carrier has a tap")
    }

    fn port(&self) -> String {
        format!("port{}", self.side.letter())
    }

    fn daemon(&mut self) -> &mut Gateway {
        match self.side {
            Side::A => &mut self.world.pair.a,
            Side::B => &mut self.world.pair.b,
        }
    }

    fn engine(&mut self) -> Result<u32> {
        self.daemon().engine_pid().context("an engine runs")
    }

    fn traffic(&mut self) -> Result<()> {
        for from in [self.side, self.side.other()] {
            let (lan, to) = (self.net.lan(from), (self.net.lan(from.other()), from.other().host()));
            let (length, rate) = UDP_LOAD;
            let report = traffic::udp(lan, to, length, Pace::Fixed(rate), Duration::from_millis(500), |_, _| {})?;
            ensure!(report.damaged == 0 && report.total.datagrams > 0, "UDP: {report:?}");
            let octets: Vec<u8> = (0..TCP_OCTETS).map(|_| self.rng.random()).collect();
            ensure!(traffic::tcp_transfer(lan, to, &octets)? == octets, "TCP arrived damaged");
        }
        Ok(())
    }

    fn keys(&mut self) -> Result<()> {
        // What grows as long as a key is in use.
        let ages = |world: &World| -> Result<[u64; 2]> {
            let age = |side| -> Result<u64> {
                let status = world.pair.of(side).status()?;
                let seconds = status.key_seconds.get("send").copied();
                Ok(if status.is_sealed() { status.send_counter() } else { seconds.unwrap_or_default() })
            };
            Ok([age(Side::A)?, age(Side::B)?])
        };
        let deadline = Instant::now() + process::patient(SOON);
        let (mut before, mut changed) = (ages(self.world)?, [false; 2]);
        while changed != [true; 2] {
            ensure!(Instant::now() < deadline, "keys of A and B were changed: {changed:?}");
            self.clock.wait(Duration::from_millis(200))?;
            let now = ages(self.world)?;
            for side in [0, 1] {
                changed[side] |= now[side] < before[side];
            }
            before = now;
        }
        Ok(())
    }

    /// Ends the daemon, unless it has ended, and starts it again.
    fn start_after(&mut self, how: Signal) -> Result<()> {
        let net = self.net.clone();
        let gw = net.gw(self.side);
        self.daemon().restart_after(how, gw)
    }

    fn end_engine(&mut self, how: Signal) -> Result<()> {
        let engine = self.engine()?;
        process::signal(engine, how)?;
        process::wait_gone(engine, SOON)
    }

    fn kill_both(&mut self) -> Result<()> {
        // A stopped daemon starts no other engine.
        process::signal(self.daemon().pid(), Signal::STOP)?;
        self.end_engine(Signal::KILL)?;
        self.start_after(Signal::KILL)
    }

    /// Leads the programs' names to the other build, and has daemon and engine started from it.
    fn replace(&mut self) -> Result<()> {
        self.world.builds.swap(0, 1);
        let folder = self.net.directory().join("bin");
        for entry in std::fs::read_dir(&folder)? {
            let (name, new) = (entry?.path(), folder.join("new"));
            symlink(&self.world.builds[0], &new)?;
            std::fs::rename(new, name)?;
        }
        let engine = self.engine()?;
        self.start_after(Signal::TERM)?;
        process::signal(engine, Signal::TERM)?;
        process::wait_gone(engine, SOON)
    }

    fn hang(&mut self) -> Result<()> {
        let engine = self.engine()?;
        process::signal(engine, Signal::STOP)?;
        let waited = self.clock.wait(Duration::from_millis(300) + Duration::from_secs(1).mul_f64(self.dose));
        process::signal(engine, Signal::CONT)?;
        waited
    }

    /// One end of the gateway's hub.
    fn hub(&self) -> Result<String> {
        let hidden = self.dose < 0.5;
        let devices = self.gw().devices()?;
        let found = devices.into_iter().find(|name| name.starts_with("cipehub") && name.ends_with('x') == hidden);
        found.context("the gateway has a hub")
    }

    fn hub_down(&mut self) -> Result<()> {
        let hub = self.hub()?;
        set(self.gw(), &hub, "down")?;
        self.clock.wait(Duration::from_millis(100))?;
        // It may have gone: the engine makes another one.
        let _ = set(self.gw(), &hub, "up");
        Ok(())
    }

    fn hub_delete(&mut self) -> Result<()> {
        self.gw().ip(&["link", "del", &self.hub()?]).map(drop)
    }

    fn interface(&mut self) -> Result<()> {
        let (daemon, device) = (self.daemon().pid(), "cipcb0");
        if self.dose < 0.5 {
            set(self.gw(), device, "down")?;
        } else {
            self.gw().ip(&["link", "del", device])?;
        }
        process::wait_gone(daemon, SOON)?;
        self.start_after(Signal::TERM)
    }

    /// Sets either end of the cable down and up, and the routes that the kernel removes with it.
    fn carrier_down(&mut self) -> Result<()> {
        let outage = Duration::from_millis(20) + Duration::from_millis(500).mul_f64(self.dose);
        let at_gateway = self.rng.random();
        let (tap, port) = (self.tap()?, self.port());
        if at_gateway {
            set(self.gw(), "wire0", "down")?;
            self.clock.wait(outage)?;
            set(self.gw(), "wire0", "up")?;
            let (far, via) =
                (self.world.far[index(self.side)].ip().to_string(), self.side.other().carrier().to_string());
            self.gw().ip(&["route", "replace", &far, "dev", "wire0"])?;
            self.gw().ip(&["route", "replace", "default", "via", &via])?;
        } else {
            set(tap, &port, "down")?;
            self.clock.wait(outage)?;
            set(tap, &port, "up")?;
            for address in [self.side.carrier(), another(self.side)] {
                tap.ip(&["route", "replace", &address.to_string(), "dev", &port])?;
            }
        }
        Ok(())
    }

    fn mtu(&mut self) -> Result<()> {
        let mtu = 1000 + (self.dose * 400.0) as u32;
        for mtu in [mtu, 1500] {
            for (namespace, device) in [(self.tap()?, self.port()), (self.gw(), "wire0".to_owned())] {
                namespace.ip(&["link", "set", &device, "mtu", &mtu.to_string()])?;
            }
            self.clock.wait(Duration::from_secs(1))?;
        }
        Ok(())
    }

    /// Gives the gateway its other address.
    fn address(&mut self) -> Result<()> {
        let old = *self.world.addresses[index(self.side)].ip();
        let new = if old == self.side.carrier() { another(self.side) } else { self.side.carrier() };
        self.gw().ip(&["addr", "add", &format!("{new}/24"), "dev", "wire0"])?;
        self.gw().ip(&["addr", "del", &format!("{old}/24"), "dev", "wire0"])?;
        self.world.addresses[index(self.side)] = SocketAddrV4::new(new, PORT);
        Ok(())
    }

    fn nat(&mut self) -> Result<()> {
        let far = self.world.far[index(self.side)];
        let socket = self.tap()?.run(|| UdpSocket::bind((*far.ip(), 0)))?;
        self.world.far[index(self.side)] = SocketAddrV4::new(*far.ip(), socket.local_addr()?.port());
        self.world.relay.rebind(index(self.side), socket)?;
        Ok(())
    }

    fn impair(&mut self) -> Result<()> {
        let mut share = |most: f64| self.rng.random::<f64>() * most * self.dose;
        let (loss, duplication, corruption, reorder) = (share(0.3), share(0.3), share(0.1), share(0.3));
        let delay = Duration::from_millis(20).mul_f64(self.dose);
        let span = self.rng.random_range(1..8);
        self.world.relay.impair(Impairment { loss, duplication, corruption, reorder, span, delay, rate: None });
        let waited = self.clock.wait(Duration::from_secs(3));
        self.world.relay.impair(Impairment::default());
        waited
    }

    /// Sends a packet to the gateway; counts it if the kernel takes it and it is a datagram for the tunnel.
    fn throw(&mut self, from: SocketAddrV4, payload: &[u8]) {
        let to = self.world.addresses[index(self.side)];
        if self.world.attacker.send_to(&datagram(from, to, payload), *to.ip()).is_ok() {
            self.world.thrown[index(self.side)] += 1;
        }
    }

    fn flood(&mut self) -> Result<()> {
        let (count, far) = ((2000.0 + self.dose * (FLOOD - 2000.0)) as usize, self.world.far[index(self.side)]);
        for number in 0..count {
            let length =
                if self.rng.random() { self.rng.random_range(0..=LARGEST) } else { self.rng.random_range(2..=184) * 8 };
            let payload: Vec<u8> = (0..length).map(|_| self.rng.random()).collect();
            let elsewhere = SocketAddrV4::new(forged::ATTACKER, self.rng.random_range(1024..=65_535));
            let from = if self.rng.random() { far } else { elsewhere };
            self.throw(from, &payload);
            if number % BATCH == 0 {
                self.clock.ticks(1)?;
            }
        }
        Ok(())
    }

    fn icmp(&mut self) -> Result<()> {
        let (gateway, far) = (*self.world.addresses[index(self.side)].ip(), *self.world.far[index(self.side)].ip());
        let quotes = [TO_ANYBODY, Quoted { to: far, payload: &[] }, Quoted { to: far, ..WITH_ANOTHER_IV }];
        for _ in 0..10 + (self.dose * 40.0) as usize {
            for quoted in quotes {
                for (code, mtu) in [(PORT_UNREACHABLE, 0), (FRAGMENTATION_NEEDED, 576), (0, 0), (1, 0)] {
                    self.world.attacker.send_to(&unreachable_to(gateway, code, mtu, quoted), gateway)?;
                }
            }
            self.clock.ticks(5)?;
        }
        Ok(())
    }

    /// Sends datagrams that either side has sent, and not only lately, to the gateway.
    fn replay(&mut self, from: Option<Ipv4Addr>) -> Result<()> {
        let far = self.world.far[index(self.side)];
        let from = from.map_or(far, |from| SocketAddrV4::new(from, PORT));
        let count = 500 + (self.dose * (REPLAY - 500.0)) as usize;
        let (theirs, own) = (index(self.side.other()), index(self.side));
        let mut chosen = Vec::new();
        for (recorded, share) in [(theirs, count), (own, count / 8)] {
            chosen.extend(self.world.recorded[recorded].iter().cloned().sample(&mut self.rng, share));
        }
        // The newest ones, which are the most likely to be taken.
        chosen.extend(self.world.relay.recent(theirs));
        for (number, payload) in chosen.iter().enumerate() {
            self.throw(from, payload);
            if number % BATCH == 0 {
                self.clock.ticks(1)?;
            }
        }
        Ok(())
    }
}

fn set(namespace: &Namespace, device: &str, state: &str) -> Result<()> {
    namespace.ip(&["link", "set", device, state]).map(drop)
}

/// Another address of a gateway in the carrier's network.
fn another(side: Side) -> Ipv4Addr {
    let [a, b, c, d] = side.carrier().octets();
    Ipv4Addr::new(a, b, c, d + 20)
}

/// Makes the gateways' other addresses known to the tap, as [`Scene::carrier_down`] does again.
///
/// # Errors
/// `ip` fails.
pub(super) fn announce_addresses(net: &Topology) -> Result<()> {
    let tap = net.tap().context("a tapped carrier has a tap")?;
    for side in SIDES {
        tap.ip(&["route", "replace", &another(side).to_string(), "dev", &format!("port{}", side.letter())])?;
    }
    Ok(())
}
