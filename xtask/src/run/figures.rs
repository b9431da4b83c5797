//! The second part: ping, TCP and UDP with figures every second, counters, and the table at the end.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result};
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::namespace::{DeviceCounters, Namespace};
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::CpuTime;
use cipe_tests::topology::{Side, Topology};
use cipe_tests::traffic::{self, Pace, Second};

use super::paint::{self, Table, grouped};

/// UDP payload octets of the load: with headers just below the tunnel's MTU.
const UDP_PAYLOAD: usize = 1400;
const PINGS: usize = 500;

/// The measurements of one network.
pub(super) struct Figures {
    ping: ping::Report,
    tcp: traffic::Report,
    tcp_seconds: Vec<Second>,
    tcp_cpu: Option<[CpuTime; 2]>,
    udp: traffic::Report,
    udp_seconds: Vec<Second>,
    udp_cpu: Option<[CpuTime; 2]>,
}

/// Pings and loads the network from lanA to lanB; prints more for a tunnel than for plain routes.
pub(super) fn measure(net: &Topology, pair: Option<&Pair>, duration: Duration) -> Result<Figures> {
    let (from, to) = (net.lan(Side::A), (net.lan(Side::B), Side::B.host()));
    let way = if pair.is_some() { "through the tunnel" } else { "plain veth, no tunnel" };

    paint::heading(&format!("Ping, lanA to lanB, {way}"));
    let ping = ping::run(from, Side::B.host(), &Plan::count(PINGS))?;
    println!(
        "  {} of {} answered; round trip min {} µs, median {} µs, p99 {} µs",
        ping.received(),
        ping.sent,
        micros(&ping, 0.0),
        micros(&ping, 0.5),
        micros(&ping, 0.99)
    );

    paint::heading(&format!("TCP, one stream, lanA to lanB, {way}"));
    let mut rows = Rows::new(net, pair)?;
    let tcp = traffic::tcp(from, to, 1, duration, |number, second| rows.row(number, second))?;
    let (tcp_cpu, tcp_seconds) = (rows.cpu(), rows.seconds);

    paint::heading(&format!("UDP, {UDP_PAYLOAD} octets, as fast as it arrives, {way}"));
    let mut rows = Rows::new(net, pair)?;
    let found = Pace::Found(20_000);
    let udp = traffic::udp(from, to, UDP_PAYLOAD, found, duration, |number, second| rows.row(number, second))?;
    let (udp_cpu, udp_seconds) = (rows.cpu(), rows.seconds);
    println!(
        "  {} sent, {} arrived: {:.2} % lost while looking for the rate, {} out of order",
        grouped(udp.sent),
        grouped(udp.total.datagrams),
        udp.loss() * 100.0,
        grouped(udp.reordered)
    );
    Ok(Figures { ping, tcp, tcp_seconds, tcp_cpu, udp, udp_seconds, udp_cpu })
}

fn micros(report: &ping::Report, p: f64) -> String {
    report.quantile(p).map_or("-".to_owned(), |time| time.as_micros().to_string())
}

/// Prints a row every second; keeps the counters of the previous second.
struct Rows<'a> {
    receiver: &'a Namespace,
    before: DeviceCounters,
    engines: Option<[u32; 2]>,
    start: Vec<CpuTime>,
    last: Vec<CpuTime>,
    seconds: Vec<Second>,
}

const COLUMNS: [usize; 5] = [6, 10, 17, 16, 16];

impl<'a> Rows<'a> {
    fn new(net: &'a Topology, pair: Option<&Pair>) -> Result<Self> {
        let engine = |side| pair.map(|pair| pair.of(side).engine_pid().context("an engine runs")).transpose();
        let engines = engine(Side::A)?.zip(engine(Side::B)?).map(|(a, b)| [a, b]);
        let receiver = net.gw(Side::B);
        let before = receiver.counters("wire0")?;
        let mut head = vec!["second", "Mbit/s", "carrier packets/s"];
        if engines.is_some() {
            head.extend(["engine A usr+sys", "engine B usr+sys"]);
        }
        let head: Vec<String> = head.into_iter().map(str::to_owned).collect();
        println!("{}", paint::faint(&paint::line(&head, &COLUMNS)));
        let start = cpu_of(engines);
        Ok(Self { receiver, before, engines, last: start.clone(), start, seconds: Vec::new() })
    }

    fn row(&mut self, number: usize, second: Second) {
        let now = self.receiver.counters("wire0").unwrap_or(self.before);
        let packets = (now.rx_packets - self.before.rx_packets) as f64 / second.length.as_secs_f64();
        self.before = now;
        self.seconds.push(second);
        let mut row = vec![number.to_string(), format!("{:.0}", second.mbit()), grouped(packets as u64)];
        let cpu = cpu_of(self.engines);
        row.extend(cpu.iter().zip(&self.last).map(|(now, last)| share(now.since(*last), second.length)));
        self.last = cpu;
        println!("{}", paint::line(&row, &COLUMNS));
    }

    /// CPU time of both engines since the start.
    fn cpu(&self) -> Option<[CpuTime; 2]> {
        match (&cpu_of(self.engines)[..], &self.start[..]) {
            ([a, b], [start_a, start_b]) => Some([a.since(*start_a), b.since(*start_b)]),
            _ => None,
        }
    }
}

fn cpu_of(engines: Option<[u32; 2]>) -> Vec<CpuTime> {
    engines.into_iter().flatten().filter_map(CpuTime::of).collect()
}

fn share(cpu: CpuTime, length: Duration) -> String {
    let percent = |time: Duration| time.as_secs_f64() * 100.0 / length.as_secs_f64();
    format!("{:.0} + {:.0} %", percent(cpu.user), percent(cpu.system))
}

/// Prints both ends' packets by verdict.
pub(super) fn verdicts(pair: &Pair) -> Result<()> {
    paint::heading("Packets by verdict (cipe show --json)");
    let (a, b) = (pair.a.status()?, pair.b.status()?);
    let mut table = Table::new(&["verdict", "gwA", "gwB"]);
    let names: BTreeSet<&String> = a.verdicts.keys().chain(b.verdicts.keys()).collect();
    for name in names {
        table.row(vec![name.clone(), grouped(a.count(name)), grouped(b.count(name))]);
    }
    table.print();
    for (name, status) in [("gwA", &a), ("gwB", &b)] {
        println!("  {name}: keys {}; {}", status.keys.join(", "), status.doors.join("; "));
    }
    Ok(())
}

/// The median of all seconds but the first, in which a load finds its rate.
fn middle(seconds: &[Second], figure: fn(&Second) -> f64) -> f64 {
    let mut figures: Vec<f64> = seconds.iter().skip(usize::from(seconds.len() > 1)).map(figure).collect();
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or_default()
}

/// Prints tunnel and plain routes side by side.
pub(super) fn compare(daemon: Daemon, tunnel: &Figures, plain: &Figures) {
    paint::heading("Side by side: the same hosts, with the tunnel and with plain routes over the same veth");
    let cipher = match daemon {
        Daemon::Blowfish => "CIPE, Blowfish",
        Daemon::Idea => "CIPE, IDEA",
        Daemon::EthernetBlowfish => "CIPE, Ethernet, Blowfish",
        Daemon::EthernetIdea => "CIPE, Ethernet, IDEA",
    };
    let mut table = Table::new(&["", cipher, "plain veth", "ratio"]);
    let mut row = |name: &str, places: usize, tunnel: f64, plain: f64| {
        let ratio = if plain > 0.0 { format!("{:.3}", tunnel / plain) } else { "-".to_owned() };
        table.row(vec![name.to_owned(), format!("{tunnel:.places$}"), format!("{plain:.places$}"), ratio]);
    };
    let median = |figures: &Figures| figures.ping.quantile(0.5).unwrap_or_default().as_secs_f64() * 1e6;
    let p99 = |figures: &Figures| figures.ping.quantile(0.99).unwrap_or_default().as_secs_f64() * 1e6;
    row("ping median, µs", 0, median(tunnel), median(plain));
    row("ping p99, µs", 0, p99(tunnel), p99(plain));
    let of = |figure: fn(&Second) -> f64| move |seconds: &[Second]| middle(seconds, figure);
    let (mbit, datagrams) = (of(Second::mbit), of(Second::datagrams_a_second));
    row("TCP goodput, Mbit/s", 0, mbit(&tunnel.tcp_seconds), mbit(&plain.tcp_seconds));
    row("UDP arrived, Mbit/s", 0, mbit(&tunnel.udp_seconds), mbit(&plain.udp_seconds));
    row("UDP arrived, datagrams/s", 0, datagrams(&tunnel.udp_seconds), datagrams(&plain.udp_seconds));
    row("UDP lost while looking for the rate, %", 2, tunnel.udp.loss() * 100.0, plain.udp.loss() * 100.0);
    table.print();
    println!();
    for (name, report, cpu) in [("TCP", &tunnel.tcp, tunnel.tcp_cpu), ("UDP", &tunnel.udp, tunnel.udp_cpu)] {
        let Some(cpu) = cpu else { continue };
        for (end, cpu) in ["gwA", "gwB"].into_iter().zip(cpu) {
            let gigabytes = report.total.octets as f64 / 1e9;
            let per = (cpu.user + cpu.system).as_secs_f64() / gigabytes.max(1e-9);
            let share = share(cpu, report.total.length);
            println!("  {name}: engine of {end} used {share} of a CPU (user + system), {per:.1} CPU s/GB");
        }
    }
    println!(
        "\n  TCP and UDP are medians of all seconds but the first. Hosts, gateways and load share this machine's CPUs."
    );
}
