//! `cargo xtask run`: the tunnel at work, in one terminal.

mod figures;
mod paint;
mod story;

use std::io::Read;
use std::time::Duration;

use anyhow::{Context, Result};
use cipe_tests::gateway::{self, Daemon, Pair};
use cipe_tests::offload::Offload;
use cipe_tests::topology::{Carrier, Side, Topology};

use crate::tools;

/// Arguments of the demonstration.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Cipher of the tunnel
    #[arg(long, value_enum, default_value_t = Cipher::Blowfish)]
    cipher: Cipher,
    /// Doors to the carrier: `xdp` is AF_XDP both ways, `auto` the fastest for the device
    #[arg(long, default_value = "xdp", value_parser = ["auto", "xdp", "udp"])]
    carrier: String,
    /// Seconds of TCP, and of UDP
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Leave everything running afterwards and print commands to try
    #[arg(long)]
    hold: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Cipher {
    Blowfish,
    Idea,
}

impl Cipher {
    fn daemon(self) -> Daemon {
        match self {
            Self::Blowfish => Daemon::Blowfish,
            Self::Idea => Daemon::Idea,
        }
    }
}

/// Builds, makes the network, shows the tunnel at work, and removes everything again.
///
/// # Errors
/// The first failure that keeps the tunnel from working.
pub(crate) fn run(args: &Args) -> Result<()> {
    tools::need_namespaces()?;
    println!("Building cipe (release) ...");
    gateway::use_binary(&tools::build_cipe(true)?)?;
    tools::clean_up_on_signals(|| {})?;
    let daemon = args.cipher.daemon();
    let duration = Duration::from_secs(args.seconds.max(1));

    story::introduce(daemon)?;
    story::exchange_and_packet(daemon)?;

    // The plain routes come first: starting the tunnel replaces them.
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    net.route_plainly()?;
    let plain = figures::measure(&net, None, duration.min(Duration::from_secs(5)))?;
    let pair = Pair::start(&net, daemon, |_, options| options.set("carrier", &args.carrier))?;
    pair.wait_for_keys(&net)?;
    let tunnel = figures::measure(&net, Some(&pair), duration)?;
    figures::verdicts(&pair)?;
    figures::compare(daemon, &tunnel, &plain);
    if args.hold {
        hold(&net, &pair)?;
    }
    for status in pair.stop()? {
        anyhow::ensure!(status.success(), "a daemon ended with {status}");
    }
    Ok(())
}

fn hold(net: &Topology, pair: &Pair) -> Result<()> {
    paint::heading("It goes on running; things to try in another terminal, as root");
    let on = |side: Side, command: &str| println!("  ip netns exec {} {command}", net.lan(side).name());
    on(Side::A, &format!("ping {}", Side::B.host()));
    println!("  {}", pair.a.cipe_text("show"));
    println!("  {}", pair.b.cipe_text("show --json"));
    println!("  ip netns exec {} ip addr show", net.gw(Side::A).name());
    on(Side::B, "iperf3 -s -1 -D");
    on(Side::A, &format!("iperf3 -c {}", Side::B.host()));
    for side in [Side::A, Side::B] {
        let engine = pair.of(side).engine_pid().context("an engine runs")?;
        println!(
            "  kill -9 {engine}   {}",
            paint::faint(&format!("# the engine of gw{}: the daemon starts it again", side.letter()))
        );
    }
    println!("\nEnter, or Ctrl-C, ends it and removes everything.");
    if std::io::stdin().read(&mut [0])? == 0 {
        // There is no terminal for Enter: wait for the signal.
        loop {
            std::thread::park();
        }
    }
    Ok(())
}
