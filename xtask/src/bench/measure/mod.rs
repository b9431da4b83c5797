//! The tests: the load of each, its duration, and its measurements.

pub(super) mod account;
pub(super) mod search;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use cipe_tests::namespace::Namespace;
use cipe_tests::ping::{self, Plan};
use cipe_tests::topology::{Side, Topology as Net};
use cipe_tests::traffic;

use super::record::{Metric, Topology};
use account::{Moment, Used};

/// A test, each with one or more metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Test {
    /// Round trips on an idle tunnel
    Ping,
    /// One TCP stream with round trips during it, and CPU time
    Tcp1,
    /// Four TCP streams
    Tcp4,
    /// Datagrams of 64 octets without loss
    Udp64,
    /// Datagrams of 1400 octets without loss
    Udp1400,
    /// CPU time of an idle tunnel, and memory
    Idle,
}

impl Test {
    /// Its name on the command line.
    pub(super) fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self).map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Durations of the tests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Effort {
    /// A TCP test.
    pub tcp: Duration,
    /// A trial of a UDP rate.
    pub trial: Duration,
    /// Trials of UDP rates, without the flood.
    pub steps: usize,
    /// Round trips on an idle tunnel.
    pub pings: usize,
    /// The idle test.
    pub idle: Duration,
    /// Longest wait for a quiet machine before each test.
    pub quiet: Duration,
}

impl Effort {
    /// For figures that go into a report.
    pub(super) const FULL: Self = Self {
        tcp: Duration::from_secs(4),
        trial: Duration::from_millis(600),
        steps: 8,
        pings: 300,
        idle: Duration::from_secs(2),
        quiet: Duration::from_secs(15),
    };
    /// For a first look.
    pub(super) const QUICK: Self = Self {
        tcp: Duration::from_millis(1000),
        trial: Duration::from_millis(200),
        steps: 4,
        pings: 100,
        idle: Duration::from_millis(500),
        quiet: Duration::from_millis(300),
    };

    /// Approximate duration of a test.
    pub(super) fn of(&self, test: Test) -> Duration {
        // A search mostly ends early; each trial waits for late datagrams.
        let search = (self.trial + Duration::from_millis(330)) * (self.steps as u32);
        let own = match test {
            Test::Ping => PING_INTERVAL * self.pings as u32,
            Test::Tcp1 | Test::Tcp4 => self.tcp,
            Test::Udp64 | Test::Udp1400 => search,
            Test::Idle => self.idle,
        };
        own + Duration::from_millis(300)
    }
}

/// Time between two pings of an idle tunnel, long enough that it is really idle.
const PING_INTERVAL: Duration = Duration::from_millis(5);
/// Time between two pings under load.
const LOAD_INTERVAL: Duration = Duration::from_millis(10);

/// The result of a test: values and CPU time.
pub(super) type Values = Vec<(Metric, f64)>;

/// A network with a started tunnel.
pub(super) struct Bench<'a> {
    /// The network.
    pub net: &'a Net,
    /// The hosts at both ends of the load.
    pub topology: Topology,
    /// The durations.
    pub effort: Effort,
}

impl Bench<'_> {
    /// Runs a test.
    ///
    /// # Errors
    /// A load cannot be started, or nothing of it arrives.
    pub(super) fn run(&self, test: Test) -> Result<Values> {
        account::wait_until_quiet(self.effort.quiet)?;
        let start = Moment::now()?;
        let mut values = match test {
            Test::Ping => self.ping()?,
            Test::Tcp1 => self.tcp_1()?,
            Test::Tcp4 => vec![(Metric::Tcp4, self.tcp(4)?.0)],
            Test::Udp64 => self.udp(64, Metric::Udp64, Metric::Udp64Flood)?,
            Test::Udp1400 => self.udp(1400, Metric::Udp1400, Metric::Udp1400Flood)?,
            Test::Idle => self.idle()?,
        };
        let foreign = start.used(&self.tunnel()?)?.foreign;
        if !values.is_empty() {
            values.push((Metric::Foreign, foreign * 100.0));
        }
        Ok(values)
    }

    fn from(&self) -> &Namespace {
        match self.topology {
            Topology::P2p => self.net.gw(Side::A),
            Topology::Gw => self.net.lan(Side::A),
        }
    }

    fn to(&self) -> (&Namespace, std::net::Ipv4Addr) {
        match self.topology {
            Topology::P2p => (self.net.gw(Side::B), Side::B.tunnel()),
            Topology::Gw => (self.net.lan(Side::B), Side::B.host()),
        }
    }

    /// Processes of both ends.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub(super) fn tunnel(&self) -> Result<Vec<u32>> {
        Ok([account::tunnel(self.net, Side::A)?, account::tunnel(self.net, Side::B)?].concat())
    }

    fn ping(&self) -> Result<Values> {
        let plan = Plan { interval: PING_INTERVAL, ..Plan::count(self.effort.pings) };
        let report = ping::run(self.from(), self.to().1, &plan)?;
        times(&report, Metric::PingIdle, Metric::PingIdleP99)
    }

    fn tcp_1(&self) -> Result<Values> {
        let ended = AtomicBool::new(false);
        let ((rate, octets, used), report) = std::thread::scope(|scope| -> Result<_> {
            let pings = scope.spawn(|| {
                // More than the test has time for; a ping that waits in a queue must not delay the next one.
                let plan = Plan { interval: LOAD_INTERVAL, window: 64, ..Plan::count(100_000) };
                ping::run_while(self.from(), self.to().1, &plan, || !ended.load(Ordering::Relaxed))
            });
            let load = self.tcp(1);
            ended.store(true, Ordering::Relaxed);
            let report = pings.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            Ok((load?, report))
        })?;
        let gigabytes = octets as f64 / 1e9;
        let mut values = vec![
            (Metric::Tcp1, rate),
            (Metric::CpuUser, used.user / gigabytes),
            (Metric::CpuSystem, used.system / gigabytes),
            (Metric::CpuTunnel, (used.user + used.system) / gigabytes),
            (Metric::CpuSoftirq, used.softirq / gigabytes),
            (Metric::CpuMachine, used.machine / gigabytes),
        ];
        values.extend(times(&report, Metric::PingLoad, Metric::PingLoadP99)?);
        Ok(values)
    }

    /// Mbit/s, octets, CPU time.
    fn tcp(&self, streams: usize) -> Result<(f64, u64, Used)> {
        let start = Moment::now()?;
        let total = traffic::tcp(self.from(), self.to(), streams, self.effort.tcp, |_, _| {})?.total;
        let used = start.used(&self.tunnel()?)?;
        ensure!(total.octets > 0, "no octet of a TCP stream arrived");
        Ok((total.mbit(), total.octets, used))
    }

    fn udp(&self, length: usize, rate: Metric, flood: Metric) -> Result<Values> {
        let found = search::loss_free(self.effort.steps, |pace| {
            let report = traffic::udp(self.from(), self.to(), length, pace, self.effort.trial, |_, _| {})?;
            ensure!(report.damaged == 0, "{} datagrams were damaged", report.damaged);
            Ok((&report).into())
        })?;
        Ok(vec![(rate, found.rate), (flood, found.flood)])
    }

    fn idle(&self) -> Result<Values> {
        let ends = [account::tunnel(self.net, Side::A)?, account::tunnel(self.net, Side::B)?];
        if ends.iter().all(Vec::is_empty) {
            return Ok(Vec::new());
        }
        let before = [account::run_time(&ends[0])?, account::run_time(&ends[1])?];
        std::thread::sleep(self.effort.idle);
        let mut share: f64 = 0.0;
        for (pids, before) in ends.iter().zip(before) {
            let used = account::run_time(pids)?.saturating_sub(before);
            share = share.max(used.as_secs_f64() / self.effort.idle.as_secs_f64());
        }
        let memory = ends.iter().map(|pids| account::peak_memory(pids)).fold(0.0, f64::max);
        Ok(vec![(Metric::CpuIdle, share * 100.0), (Metric::Memory, memory)])
    }
}

fn times(report: &ping::Report, median: Metric, p99: Metric) -> Result<Values> {
    let micros = |p| Some(report.quantile(p)?.as_secs_f64() * 1e6);
    let (Some(at_half), Some(at_99)) = (micros(0.5), micros(0.99)) else {
        anyhow::bail!("none of {} pings was answered", report.sent)
    };
    Ok(vec![(median, at_half), (p99, at_99)])
}
