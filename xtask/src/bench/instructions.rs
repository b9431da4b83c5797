//! `cargo xtask bench instructions`: the cost of a packet in a guest whose clock counts instructions.
//!
//! Times of an emulated guest have no meaning, and other load of the host changes them. The count of instructions that the
//! guest executes is exact and the same on each host, so we can compare ours with tunnels of a kernel that this machine does
//! not run.

use std::io::Write;
use std::path::Path;

use anyhow::{Result, ensure};

use super::files::Files;
use super::record::{Metric, Offloads, Record, Results, Topology};
use super::report::{Table, number, replace_section};
use super::tunnel::{INNER_MTU, Tunnel};
use crate::guest::plan::Step;
use crate::guest::{Shape, Wanted, command};

/// Arguments of the measurement.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The kernel: the latest of a line, such as 6.12, or newest
    #[arg(long, default_value = "6.12")]
    kernel: Wanted,
    /// Only these tunnels; veth, the plain wire, shows the cost of the load itself
    #[arg(long, value_enum, value_delimiter = ',', value_name = "TUNNEL,...",
        default_values_t = [Tunnel::CipeBlowfish, Tunnel::CipeIdea, Tunnel::Wireguard, Tunnel::Esp, Tunnel::Veth])]
    only: Vec<Tunnel>,
    /// How many times everything is measured, one tunnel after the other each time
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    shape: Shape,
}

/// TCP payload of a full packet: IP, TCP and its timestamps take the rest.
const PAYLOAD: f64 = (INNER_MTU - 20 - 20 - 12) as f64;

/// Time limit of a round, in seconds of the guest's clock.
const DEADLINE: u64 = 3600;

/// Loads the modules for this CPU that udev would load, with its instructions for AES. Prints the kernel's AES-GCM.
const CPU_MODULES: &str = "modprobe -qa $(cat /sys/devices/system/cpu/modalias); modprobe -q esp4; modprobe -q 'crypto-rfc4106(gcm(aes))'; \
                           echo \"AES-GCM: $(grep -o '^driver.*rfc4106-gcm-[a-z0-9-]*' /proc/crypto | sort -u | tr '\\n' ' ')\"";

const NOTE: &str = "In an emulated guest with one CPU, whose clock counts instructions (qemu's `-icount`): other load of the host changes nothing. \
     Thousand instructions of the whole guest for each full packet of one TCP stream, medians of the rounds, in brackets the least and the \
     greatest: both ends, both kernels and the load. `above` is the value less the median of `veth`, which is the load itself. \
     **Instructions are not cycles.** One instruction of AES or of a vector counts as one, as a plain addition does; waiting for memory \
     or for the result before counts nothing.";

/// Measures and reports.
///
/// # Errors
/// A guest does not run, or a tunnel carries nothing in it; earlier measurements are reported all the same.
pub(super) fn run(args: &Args) -> Result<()> {
    let mut results = Results::default();
    for file in &args.files.from {
        results.read(file)?;
    }
    let failure = if args.files.from.is_empty() { measure(args, &mut results).err() } else { None };
    if !results.is_empty() {
        let text =
            format!("## Beside the kernel's own (`cargo xtask bench instructions`)\n\n{NOTE}\n\n{}", table(&results));
        println!("\n{text}");
        if args.files.write {
            replace_section("cargo xtask bench instructions", &text)?;
        }
    }
    failure.map_or(Ok(()), Err)
}

fn measure(args: &Args, results: &mut Results) -> Result<()> {
    let cipe = args.files.binary()?;
    let mut json = args.files.journal()?;
    // `cipe doctor` prints which of our cipher kernels are used.
    let mut steps =
        vec![step("modules", Path::new("/bin/sh"), &["-c", CPU_MODULES])?, step("doctor", &cipe, &["doctor"])?];
    let this = std::env::current_exe()?;
    let only: Vec<String> = args.only.iter().map(|tunnel| tunnel.name()).collect();
    let (only, cipe) = (only.join(","), cipe.display().to_string());
    for round in 1..=args.rounds {
        // Standard output is a pipe to the host, and files that a guest writes are lost when it ends.
        let bench = [
            "bench",
            "--quick",
            "--offloads",
            "raw,on",
            "--tests",
            "tcp1",
            "--json",
            "/proc/self/fd/1",
            "--cipe",
            &cipe,
        ];
        steps.push(step(&format!("round {round}"), &this, &[&bench[..], &["--only", &only]].concat())?);
    }
    let mut failed = None;
    let result = command::run_steps(args.kernel, &args.shape.counting_instructions(), steps, |line| {
        let Ok(record) = serde_json::from_str::<Record>(line) else { return println!("{line}") };
        results.add(&record);
        if let Some(Err(error)) = json.as_mut().map(|file| writeln!(file, "{line}")) {
            failed = Some(error);
        }
    });
    ensure!(failed.is_none(), "{failed:?}");
    result
}

fn step(name: &str, program: &Path, arguments: &[&str]) -> Result<Step> {
    Ok(Step {
        name: name.to_owned(),
        program: program.to_owned(),
        arguments: arguments.iter().copied().map(str::to_owned).collect(),
        folder: std::env::current_dir()?,
        environment: Vec::new(),
        deadline: DEADLINE,
    })
}

/// Thousand instructions a packet.
fn table(results: &Results) -> String {
    // A second of the guest's CPU is 10^9 instructions, a GB 10^9 octets.
    let thousands = PAYLOAD / 1000.0;
    let ways = || {
        let pairs = [Topology::P2p, Topology::Gw]
            .map(|topology| [Offloads::Raw, Offloads::On].map(|offloads| (offloads, topology)));
        pairs.into_iter().flatten()
    };
    let mut head = vec!["tunnel".to_owned()];
    for (offloads, topology) in ways() {
        head.extend([format!("{}, {}", topology.name(), offloads.name()), "above".to_owned()]);
    }
    let mut rows = Table::new(1, &head.iter().map(String::as_str).collect::<Vec<_>>());
    for tunnel in results.tunnels() {
        let mut row = vec![tunnel.name()];
        for (offloads, topology) in ways() {
            let of = |tunnel| {
                results.get(offloads, topology, Metric::CpuMachine, tunnel).map(|series| series.scaled(thousands))
            };
            let plain = of(Tunnel::Veth).map(|series| series.median()).filter(|_| tunnel != Tunnel::Veth);
            let cell = |series: &super::record::Series| {
                format!("{} ({}-{})", number(series.median()), number(series.min()), number(series.max()))
            };
            row.push(of(tunnel).as_ref().map_or_else(|| "-".to_owned(), cell));
            let above = of(tunnel).zip(plain).map(|(series, plain)| number(series.median() - plain));
            row.push(above.unwrap_or_else(|| "-".to_owned()));
        }
        rows.row(row);
    }
    rows.markdown()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One second for a GB is one instruction for an octet.
    #[test]
    fn cpu_seconds_become_instructions_a_packet() {
        let mut results = Results::default();
        for (tunnel, value) in [(Tunnel::CipeIdea, 30.0), (Tunnel::CipeIdea, 32.0), (Tunnel::Veth, 1.0)] {
            let (topology, offloads, test) = (Topology::P2p, Offloads::On, Metric::CpuMachine);
            let unit = test.unit().to_owned();
            results.add(&Record { tunnel, topology, offloads, test, round: 1, value, unit });
        }
        let text = table(&results);
        assert!(text.contains("42.7 (41.3-44.0) |  41.3"), "{text}");
        assert!(text.contains("1.38 (1.38-1.38) |     - "), "{text}");
    }
}
