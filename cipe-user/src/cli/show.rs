//! `cipe show`.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::control::client::{Client, ConnectError};
use crate::control::protocol::{Cipher, Event, Request, Status};
use crate::control::run_dir::RunDir;

/// How long the engine may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// What rates are measured over.
const INTERVAL: Duration = Duration::from_secs(1);

/// Arguments of `cipe show`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cipe show
  cipe show cipcb0
  cipe show --json | jq '.[].verdicts'")]
pub struct Args {
    /// Only this interface.
    device: Option<String>,
    /// Print the engine's own words, at once and without rates.
    #[arg(long)]
    json: bool,
}

/// Asks the engine and prints.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no event loop")?;
    runtime.block_on(show(args))
}

async fn show(args: Args) -> anyhow::Result<ExitCode> {
    let run_dir = RunDir::of_this_namespace().context("own network namespace not found; is /proc mounted?")?;
    let engine = match Client::connect(&run_dir) {
        Ok(engine) => Some(engine),
        Err(ConnectError::NotRunning { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let Some(mut engine) = engine else {
        if let Some(device) = args.device {
            bail!("no tunnel {device}; no engine runs in this network namespace; start it with ciped-cb or ciped-ci");
        }
        println!("{}", if args.json { "[]" } else { "no tunnels: no engine runs in this network namespace" });
        return Ok(ExitCode::SUCCESS);
    };
    let first = query(&mut engine, args.device.as_deref()).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&first)?);
        return Ok(ExitCode::SUCCESS);
    }
    if first.is_empty() {
        println!("no tunnels");
        return Ok(ExitCode::SUCCESS);
    }
    let start = tokio::time::Instant::now();
    tokio::time::sleep(INTERVAL).await;
    let second = query(&mut engine, args.device.as_deref()).await?;
    let seconds = start.elapsed().as_secs_f64();
    for status in &second {
        let before = first.iter().find(|before| before.device == status.device);
        print!("{}", text(status, before.map(|before| (before, seconds))));
    }
    Ok(ExitCode::SUCCESS)
}

async fn query(engine: &mut Client, device: Option<&str>) -> anyhow::Result<Vec<Status>> {
    engine.send(&Request::Status).context("the engine does not take requests; restart it")?;
    let collect = async {
        let mut all = Vec::new();
        loop {
            match engine.receive().await? {
                Some(Event::Status(status)) => all.push(*status),
                Some(Event::StatusEnd) => break Ok(all),
                Some(Event::Failed { message }) => bail!("{message}"),
                Some(_) => {}
                None => bail!("the engine has gone; start it with ciped-cb or ciped-ci"),
            }
        }
    };
    let mut all = tokio::time::timeout(DEADLINE, collect).await.context("the engine does not answer; restart it")??;
    if let Some(device) = device {
        all.retain(|status| status.device == device);
        if all.is_empty() {
            bail!("no tunnel {device}; `cipe show` names those that there are");
        }
    }
    all.sort_by(|a, b| a.device.cmp(&b.device));
    Ok(all)
}

fn text(status: &Status, before: Option<(&Status, f64)>) -> String {
    let cipher = match status.cipher {
        Cipher::Blowfish => "blowfish",
        Cipher::Idea => "idea",
        Cipher::IdeaLittle => "idea, little-endian words",
    };
    let peer = status.peer.map_or_else(|| "not known yet".to_owned(), |peer| peer.to_string());
    let keys = if status.keys.is_empty() { "none: NO ENCRYPTION".to_owned() } else { status.keys.join(", ") };
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        // Writing to a String does not fail.
        let _ = writeln!(text, "  {name:<8}  {value}");
    };
    line("peer", &peer);
    line("me", &status.me.to_string());
    line("cipher", cipher);
    line("keys", &keys);
    for door in &status.doors {
        line("door", door);
    }
    for (name, octets, verdict) in [("sent", status.octets.0, "sent"), ("received", status.octets.1, "delivered")] {
        let packets = count(status, verdict);
        let rate = before.map_or_else(String::new, |(before, seconds)| {
            let old_octets = if verdict == "sent" { before.octets.0 } else { before.octets.1 };
            let bits = octets.saturating_sub(old_octets) as f64 * 8.0 / seconds;
            let packet_rate = packets.saturating_sub(count(before, verdict)) as f64 / seconds;
            format!("; now {}bit/s, {}packets/s", scaled(bits), scaled(packet_rate))
        });
        line(name, &format!("{packets} packets, {}octets{rate}", scaled(octets as f64)));
    }
    let rest: Vec<String> = status
        .verdicts
        .iter()
        .filter(|(name, _)| !matches!(name.as_str(), "sent" | "delivered"))
        .map(|(name, packets)| format!("{name} {packets}"))
        .collect();
    if !rest.is_empty() {
        line("other", &rest.join(", "));
    }
    format!("{}\n{text}", status.device)
}

fn count(status: &Status, verdict: &str) -> u64 {
    status.verdicts.get(verdict).copied().unwrap_or_default()
}

/// A number with three digits and a decimal prefix, and a blank behind it.
fn scaled(value: f64) -> String {
    let mut value = value;
    for prefix in ["", "k", "M", "G", "T"] {
        if value < 999.5 {
            let digits = if value >= 99.95 || prefix.is_empty() { 0 } else { 1 };
            return format!("{value:.digits$} {prefix}");
        }
        value /= 1000.0;
    }
    format!("{value:.0} P")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(octets: (u64, u64), sent: u64) -> Status {
        Status {
            device: "cipcb0".to_owned(),
            cipher: Cipher::Blowfish,
            me: "192.0.2.1:6789".parse().unwrap(),
            peer: Some("192.0.2.2:6789".parse().unwrap()),
            keys: vec!["static".to_owned(), "send".to_owned()],
            verdicts: [("sent".to_owned(), sent), ("bad-crc".to_owned(), 3)].into(),
            octets,
            doors: vec!["wire0: native XDP".to_owned()],
        }
    }

    #[test]
    fn a_tunnel_is_a_few_lines() {
        let (before, now) = (status((0, 0), 0), status((2_500_000, 0), 2000));
        let text = text(&now, Some((&before, 2.0)));
        let expected = "cipcb0\n  peer      192.0.2.2:6789\n  me        192.0.2.1:6789\n  cipher    blowfish\n  \
                        keys      static, send\n  door      wire0: native XDP\n  \
                        sent      2000 packets, 2.5 Moctets; now 10.0 Mbit/s, 1.0 kpackets/s\n  \
                        received  0 packets, 0 octets; now 0 bit/s, 0 packets/s\n  other     bad-crc 3\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn numbers_have_three_digits() {
        for (value, expected) in [
            (0.0, "0 "),
            (999.0, "999 "),
            (999.6, "1.0 k"),
            (12_345.0, "12.3 k"),
            (123_456.0, "123 k"),
            (9.4e9, "9.4 G"),
        ] {
            assert_eq!(scaled(value), expected);
        }
    }
}
