//! Two gateways whose default routes lead over the carrier, and the frames that leave there in clear.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cipe_tests::SOON;
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::leak;
use cipe_tests::namespace::Namespace;
use cipe_tests::offload::Offload;
use cipe_tests::options::Options;
use cipe_tests::ping::{self, Plan};
use cipe_tests::process;
use cipe_tests::status::Status;
use cipe_tests::topology::{Carrier, Side, Topology};
use rustix::process::Signal;

/// Pings that are sent after an event and all that follows it.
const PINGS_AFTER: usize = 300;

/// Two gateways of which A may be left without a daemon.
pub(super) struct Bed<'a> {
    pub(super) net: &'a Topology,
    pub(super) a: Option<Gateway>,
    pub(super) b: Option<Gateway>,
}

/// The network. A packet that does not enter the tunnel leaves in clear.
pub(super) fn tempting() -> Result<Topology> {
    let net = Topology::new(Carrier::Tapped, Offload::On)?;
    leak::tempt(&net)?;
    Ok(net)
}

impl<'a> Bed<'a> {
    pub(super) fn new(net: &'a Topology, change: impl Fn(Side, Options) -> Options) -> Result<Self> {
        let pair = Pair::start(net, Daemon::Blowfish, change)?;
        pair.wait_for_keys(net)?;
        let Pair { a, b } = pair;
        Ok(Self { net, a: Some(a), b: Some(b) })
    }

    pub(super) fn gw(&self) -> &Namespace {
        self.net.gw(Side::A)
    }

    pub(super) fn daemon(&self) -> Result<&Gateway> {
        self.a.as_ref().context("A's daemon runs")
    }

    pub(super) fn engine(&self) -> Result<u32> {
        self.daemon()?.engine_pid().context("an engine runs")
    }

    pub(super) fn kill_engine(&self) -> Result<()> {
        let engine = self.engine()?;
        process::signal(engine, Signal::KILL)?;
        process::wait_gone(engine, SOON)
    }

    pub(super) fn kill_daemon(&mut self) -> Result<()> {
        self.a.take().context("A's daemon runs")?.kill()?;
        Ok(())
    }

    pub(super) fn start_daemon(&mut self, options: &Options) -> Result<()> {
        let mut daemon = Gateway::start(self.net, Side::A, Daemon::Blowfish, options)?;
        daemon.wait_up()?;
        self.a = Some(daemon);
        Ok(())
    }

    /// Waits until A's daemon has ended by itself, and returns its exit code.
    pub(super) fn wait_for_end(&mut self) -> Result<Option<i32>> {
        let daemon = self.a.take().context("A's daemon runs")?;
        process::wait_gone(daemon.pid(), SOON).with_context(|| daemon.log().text())?;
        Ok(daemon.stop()?.code())
    }

    pub(super) fn wait_for_ping(&self) -> Result<()> {
        let answered = ping::wait_for_answer(self.net.lan(Side::A), Side::B.host(), Duration::from_millis(20), SOON)?;
        if !answered {
            let log = self.a.as_ref().map(|daemon| daemon.log().text()).unwrap_or_default();
            bail!("no answer\nroutes:\n{}log:\n{log}", self.gw().ip(&["route", "show", "table", "all"])?);
        }
        Ok(())
    }

    /// A's guard routes, as `ip route` shows them.
    pub(super) fn guard_routes(&self) -> Result<String> {
        self.gw().ip(&["route", "show", "table", "all", "proto", "67"])
    }

    pub(super) fn cipe(&self, arguments: &[&str]) -> Result<String> {
        let run = self.net.directory().join("runA");
        let mut command = self.gw().command(cipe_tests::gateway::binary()?);
        let output = command.args(arguments).env("CIPE_RUN_DIR", &run).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "cipe {arguments:?}: {text}");
        Ok(text)
    }

    /// The tunnel of A's engine.
    pub(super) fn tunnel(&self) -> Result<Option<Status>> {
        Ok(Status::parse(&self.cipe(&["show", "--json"])?)?.pop())
    }

    pub(super) fn wait_for_tunnel(&self, what: &str, wanted: impl Fn(&Status) -> bool) -> Result<Status> {
        let deadline = Instant::now() + process::patient(SOON);
        loop {
            let tunnel = self.tunnel()?;
            if let Some(tunnel) = tunnel.as_ref().filter(|tunnel| wanted(tunnel)) {
                return Ok(tunnel.clone());
            }
            ensure!(Instant::now() < deadline, "not {what}: {tunnel:?}");
        }
    }

    pub(super) fn wait_for_guard_routes(&self, what: &str, wanted: impl Fn(&str) -> bool) -> Result<()> {
        let deadline = Instant::now() + process::patient(SOON);
        loop {
            // `ip` shows the routes of both IP versions only one at a time.
            let shown =
                self.guard_routes()? + &self.gw().ip(&["-6", "route", "show", "table", "all", "proto", "67"])?;
            if wanted(&shown) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "no guard routes {what}:\n{shown}");
        }
    }

    /// Lets pings run from LAN A to LAN B during an event and all that follows; returns the frames in clear on the carrier.
    pub(super) fn clear_frames(&mut self, event: impl FnOnce(&mut Self) -> Result<()>) -> Result<Vec<String>> {
        let net = self.net;
        let capture = net.capture_carrier(1_000_000)?;
        let stop = AtomicBool::new(false);
        let (sent, pings) = mpsc::channel();
        let outcome = std::thread::scope(|scope| -> Result<()> {
            let stop = &stop;
            let pinging = scope.spawn(move || {
                let plan = Plan {
                    window: 10_000,
                    interval: Duration::from_millis(2),
                    timeout: Duration::from_millis(200),
                    ..Plan::count(1_000_000)
                };
                ping::run_while(net.lan(Side::A), Side::B.host(), &plan, || {
                    // Nobody counts them at the end.
                    let _ = sent.send(());
                    !stop.load(Ordering::Relaxed)
                })
            });
            let mut outcome = event(self);
            pings.try_iter().for_each(drop);
            for _ in 0..PINGS_AFTER {
                outcome = outcome.and(pings.recv().context("the pings go on"));
            }
            stop.store(true, Ordering::Relaxed);
            pinging.join().expect("the pinging thread does not panic")?;
            outcome
        });
        outcome?;
        Ok(leak::clear(&capture.finish()?))
    }
}

pub(super) fn ip(bed: &Bed<'_>, arguments: &[&str]) -> Result<()> {
    bed.gw().ip(arguments).map(drop)
}
