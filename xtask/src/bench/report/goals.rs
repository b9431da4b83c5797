//! The goals, and the distance of the measurements from them.

use super::number;
use super::table::Table;
use crate::bench::record::{Metric, Offloads, Results, Topology};
use crate::bench::tunnel::{Kind, Tunnel};

/// A goal.
#[derive(Clone, Copy, Debug)]
enum Asked {
    AtLeast(f64),
    AtMost(f64),
}

struct Goal {
    what: String,
    /// Unit of the measured value and the goal, "x" for a ratio.
    unit: &'static str,
    measured: f64,
    asked: Asked,
}

impl Goal {
    fn verdict(&self) -> String {
        let (kept, ratio) = match self.asked {
            Asked::AtLeast(limit) => (self.measured >= limit, self.measured / limit),
            Asked::AtMost(limit) => (self.measured <= limit, self.measured / limit),
        };
        match (kept, self.asked) {
            (true, _) => "reached".to_owned(),
            (false, Asked::AtLeast(_)) => format!("missed: {:.0} % of it", ratio * 100.0),
            (false, Asked::AtMost(_)) => format!("missed: {ratio:.2} times that"),
        }
    }
}

/// A table of every goal whose quantities were all measured; `None` if there is none.
pub(super) fn table(results: &Results) -> Option<String> {
    let goals = goals(results);
    if goals.is_empty() {
        return None;
    }
    let mut table = Table::new(4, &["goal", "asked", "measured", "verdict"]);
    for goal in &goals {
        let asked = match goal.asked {
            Asked::AtLeast(limit) => format!("at least {} {}", number(limit), goal.unit),
            Asked::AtMost(limit) => format!("at most {} {}", number(limit), goal.unit),
        };
        table.row(vec![goal.what.clone(), asked, format!("{} {}", number(goal.measured), goal.unit), goal.verdict()]);
    }
    Some(table.markdown())
}

const CIPHERS: [(Tunnel, &str); 2] = [(Tunnel::CipeBlowfish, "Blowfish"), (Tunnel::CipeIdea, "IDEA")];
const TOPOLOGIES: [Topology; 2] = [Topology::P2p, Topology::Gw];

fn goals(results: &Results) -> Vec<Goal> {
    let mut goals = Vec::new();
    for topology in TOPOLOGIES {
        // Times gotatun with Blowfish, times OpenVPN with Blowfish, times gotatun with IDEA.
        let (blowfish, old, idea) = if topology == Topology::P2p { (2.2, 6.0, 2.8) } else { (1.7, 4.0, 2.0) };
        let tcp = Against { results, offloads: Offloads::Raw, topology, metric: Metric::Tcp1, name: "TCP" };
        goals.extend(tcp.at_least(Tunnel::CipeBlowfish, blowfish, Tunnel::Gotatun));
        goals.extend(tcp.at_least(Tunnel::CipeBlowfish, old, Tunnel::OpenvpnBf));
        goals.extend(tcp.at_least(Tunnel::CipeIdea, idea, Tunnel::Gotatun));
    }
    for topology in TOPOLOGIES {
        let tcp = Against { results, offloads: Offloads::On, topology, metric: Metric::Tcp1, name: "TCP" };
        goals.extend(tcp.at_least(Tunnel::CipeBlowfish, 2.5, Tunnel::Gotatun));
        goals.extend(tcp.at_least(Tunnel::CipeIdea, 3.4, Tunnel::Gotatun));
    }
    for topology in TOPOLOGIES {
        let raw = |metric, name| Against { results, offloads: Offloads::Raw, topology, metric, name };
        let large = raw(Metric::Udp1400, "UDP 1400");
        goals.extend(large.at_least(Tunnel::CipeBlowfish, 1.8, Tunnel::Gotatun));
        goals.extend(large.at_least(Tunnel::CipeIdea, 2.2, Tunnel::Gotatun));
        let (small, cpu) = (raw(Metric::Udp64, "UDP 64"), raw(Metric::CpuTunnel, "CPU s/GB"));
        for (ours, _) in CIPHERS {
            goals.extend(small.at_least(ours, 1.5, Tunnel::Gotatun));
            goals.extend(cpu.at_most(ours, 0.5, Tunnel::Gotatun));
        }
    }
    goals.extend(sealed(results));
    goals.extend(round_trips(results));
    goals.extend(idle(results));
    goals
}

/// Those of sealed packets.
fn sealed(results: &Results) -> Vec<Goal> {
    let ours = Tunnel::CipeSealed;
    let mut goals = Vec::new();
    for topology in TOPOLOGIES {
        let of = |offloads, metric, name| Against { results, offloads, topology, metric, name };
        // Times gotatun with single frames, with superframes, and its CPU time.
        let (raw, on, cpu) = if topology == Topology::P2p { (2.9, 3.9, 0.30) } else { (2.3, 4.2, 0.36) };
        let tcp = of(Offloads::Raw, Metric::Tcp1, "TCP");
        goals.extend(tcp.at_least(ours, raw, Tunnel::Gotatun));
        goals.extend(of(Offloads::On, Metric::Tcp1, "TCP").at_least(ours, on, Tunnel::Gotatun));
        goals.extend(tcp.at_least(ours, 0.88, Tunnel::CipeNokey));
        goals.extend(of(Offloads::Raw, Metric::Udp1400, "UDP 1400").at_least(ours, 2.4, Tunnel::Gotatun));
        goals.extend(of(Offloads::Raw, Metric::CpuTunnel, "CPU s/GB").at_most(ours, cpu, Tunnel::Gotatun));
        goals.extend(of(Offloads::Raw, Metric::PingIdle, "ping, idle, median").at_most(
            ours,
            1.0,
            Tunnel::CipeBlowfish,
        ));
    }
    goals
}

/// Median of a tunnel against the median of another.
struct Against<'a> {
    results: &'a Results,
    offloads: Offloads,
    topology: Topology,
    metric: Metric,
    name: &'a str,
}

impl Against<'_> {
    fn median(&self, tunnel: Tunnel) -> Option<f64> {
        Some(self.results.get(self.offloads, self.topology, self.metric, tunnel)?.median())
    }

    fn at_least(&self, ours: Tunnel, times: f64, other: Tunnel) -> Option<Goal> {
        self.ratio(ours, other, Asked::AtLeast(times))
    }

    fn at_most(&self, ours: Tunnel, times: f64, other: Tunnel) -> Option<Goal> {
        self.ratio(ours, other, Asked::AtMost(times))
    }

    fn ratio(&self, ours: Tunnel, other: Tunnel, asked: Asked) -> Option<Goal> {
        let measured = self.median(ours)? / self.median(other)?;
        // A peer that lost every datagram has a rate of 0, and a ratio to it has no meaning.
        if !measured.is_finite() {
            return None;
        }
        let what = format!("{}: {} to {}", self.place(), ours.name(), other.name());
        Some(Goal { what, unit: "x", measured, asked })
    }

    fn place(&self) -> String {
        format!("{}, {}, offloads {}", self.name, self.topology.name(), self.offloads.name())
    }

    /// The best of the peers: their lowest median.
    fn lowest_of_peers(&self) -> Option<f64> {
        let peers = self.results.tunnels().into_iter().filter(|tunnel| tunnel.kind() == Kind::Peer);
        peers.filter_map(|peer| self.median(peer)).min_by(f64::total_cmp)
    }
}

fn round_trips(results: &Results) -> Vec<Goal> {
    let mut goals = Vec::new();
    let raw = |topology, metric, name| Against { results, offloads: Offloads::Raw, topology, metric, name };
    let idle = raw(Topology::P2p, Metric::PingIdle, "ping, idle, median");
    for (tunnel, _) in CIPHERS {
        let Some(ours) = idle.median(tunnel) else { continue };
        let what = |against: &Against, to| format!("{}: {} {to}", against.place(), tunnel.name());
        if let Some(plain) = idle.median(Tunnel::Veth) {
            let asked = Asked::AtMost(60.0);
            goals.push(Goal { what: what(&idle, "over veth"), unit: "µs", measured: ours - plain, asked });
        }
        if let Some(best) = idle.lowest_of_peers() {
            let asked = Asked::AtMost(best);
            goals.push(Goal { what: what(&idle, "to the best peer"), unit: "µs", measured: ours, asked });
        }
        for topology in TOPOLOGIES {
            let load = raw(topology, Metric::PingLoadP99, "ping, load, p99");
            if let (Some(ours), Some(best)) = (load.median(tunnel), load.lowest_of_peers()) {
                let asked = Asked::AtMost(best);
                goals.push(Goal { what: what(&load, "to the best peer"), unit: "µs", measured: ours, asked });
            }
        }
    }
    goals
}

fn idle(results: &Results) -> Vec<Goal> {
    let of = |(tunnel, name): (Tunnel, &str)| {
        let series = results.get(Offloads::Raw, Topology::P2p, Metric::CpuIdle, tunnel)?;
        let what = format!("idle engine, {name}");
        Some(Goal { what, unit: "% of a core", measured: series.median(), asked: Asked::AtMost(0.1) })
    };
    CIPHERS.into_iter().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::record::Record;

    fn results(values: &[(Tunnel, Metric, f64)]) -> Results {
        let mut results = Results::default();
        for &(tunnel, test, value) in values {
            let (topology, offloads) = (Topology::P2p, Offloads::Raw);
            results.add(&Record { tunnel, topology, offloads, test, round: 1, value, unit: test.unit().to_owned() });
        }
        results
    }

    #[test]
    fn only_what_was_measured_is_judged() {
        assert!(table(&results(&[(Tunnel::CipeBlowfish, Metric::Tcp1, 900.0)])).is_none());
    }

    #[test]
    fn a_goal_is_reached_or_says_by_how_much_it_is_missed() {
        let text = table(&results(&[
            (Tunnel::CipeBlowfish, Metric::Tcp1, 1100.0),
            (Tunnel::Gotatun, Metric::Tcp1, 1000.0),
            (Tunnel::CipeBlowfish, Metric::CpuTunnel, 6.0),
            (Tunnel::Gotatun, Metric::CpuTunnel, 8.0),
            (Tunnel::CipeBlowfish, Metric::CpuIdle, 0.02),
        ]))
        .expect("three goals");
        assert!(text.contains("missed: 50 % of it"), "{text}");
        assert!(text.contains("missed: 1.50 times that"), "{text}");
        assert!(text.contains("reached"), "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with('|')).count(), 5, "{text}");
    }
}
