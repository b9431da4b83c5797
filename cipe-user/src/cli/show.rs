//! `cipe show`.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};

use super::status::{self, Rates, age, count, scaled};
use crate::control::client::Client;
use crate::control::protocol::{Cipher, Protocol, SealedStatus, Status, WorkerShare};
use crate::kernel::zone::Shown;

/// Time over which rates are measured.
const RATE_INTERVAL: Duration = Duration::from_secs(1);

/// Arguments of `cipe show`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cipe show
  cipe show cipcb0
  cipe show --json | jq '.[].verdicts'")]
pub(super) struct Args {
    /// Only this interface.
    device: Option<String>,
    /// Print the engine's answer as JSON, at once and without rates.
    #[arg(long)]
    json: bool,
}

/// Asks the engine and prints its answer.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no event loop")?;
    runtime.block_on(show(args))
}

async fn show(args: Args) -> anyhow::Result<ExitCode> {
    let Some(mut engine) = status::connect()? else {
        if let Some(device) = args.device {
            bail!("no tunnel {device}; no engine runs in this network namespace; start it with ciped-cb or ciped-ci");
        }
        println!("{}", if args.json { "[]" } else { "no tunnels: no engine runs in this network namespace" });
        return Ok(ExitCode::SUCCESS);
    };
    let first = query(&mut engine, args.device.as_deref()).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&json(&first)?)?);
        return Ok(ExitCode::SUCCESS);
    }
    if first.is_empty() {
        println!("no tunnels");
        return Ok(ExitCode::SUCCESS);
    }
    let start = tokio::time::Instant::now();
    tokio::time::sleep(RATE_INTERVAL).await;
    let second = query(&mut engine, args.device.as_deref()).await?;
    let seconds = start.elapsed().as_secs_f64();
    for status in &second {
        let before = first.iter().find(|before| before.device == status.device);
        print!("{}", text(status, before.map(|before| Rates::between(before, status, seconds))));
    }
    Ok(ExitCode::SUCCESS)
}

/// The status of all tunnels, or of the one requested.
async fn query(engine: &mut Client, device: Option<&str>) -> anyhow::Result<Vec<Status>> {
    let mut all = status::query(engine).await?;
    if let Some(device) = device {
        all.retain(|status| status.device == device);
        if all.is_empty() {
            bail!("no tunnel {device}; `cipe show` lists all tunnels");
        }
    }
    Ok(all)
}

/// The same as JSON, with carrier addresses in the form of [`text`]: on the control socket their zones are numbers.
fn json(all: &[Status]) -> serde_json::Result<serde_json::Value> {
    let shown = |status: &Status| {
        let mut object = serde_json::to_value(status)?;
        object["me"] = Shown(status.me).to_string().into();
        object["peer"] = status.peer.map(|peer| Shown(peer).to_string()).into();
        Ok(object)
    };
    all.iter().map(shown).collect()
}

fn text(status: &Status, rates: Option<Rates>) -> String {
    let cipher = match status.cipher {
        Cipher::Blowfish => "blowfish",
        Cipher::Idea => "idea",
        Cipher::IdeaLittle => "idea, little-endian words",
    };
    let peer = status.peer.map_or_else(|| "not known yet".to_owned(), |peer| Shown(peer).to_string());
    let key = |name: &String| match status.key_seconds.get(name).filter(|_| name != "static") {
        Some(seconds) => format!("{name} ({})", age(*seconds)),
        None => name.clone(),
    };
    let keys = match status.keys.iter().map(key).collect::<Vec<_>>().join(", ") {
        none if none.is_empty() && status.orphaned_seconds.is_some() => "none".to_owned(),
        none if none.is_empty() => "none: NO ENCRYPTION".to_owned(),
        keys => keys,
    };
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        // Writing to a String does not fail.
        let _ = writeln!(text, "  {name:<8}  {value}");
    };
    if let Some(seconds) = status.orphaned_seconds {
        let device = &status.device;
        line(
            "state",
            &format!("orphaned: daemon gone since {}; drops all traffic; `cipe down {device}` ends it", age(seconds)),
        );
    }
    if !status.name.is_empty() {
        line("options", &status.name);
    }
    line("peer", &peer);
    line("me", &Shown(status.me).to_string());
    let protocol = match status.protocol {
        Protocol::Ip => "3, IP packets",
        Protocol::Ethernet => "4, Ethernet frames",
    };
    line("protocol", protocol);
    line("cipher", cipher);
    line("keys", &keys);
    if let Some(sealed) = &status.sealed {
        line("sealed", &sealed_line(sealed, count(status, "unsealed")));
    }
    for door in &status.doors {
        line("door", door);
    }
    for lack in &status.lacks {
        line("lacks", lack);
    }
    let (out, inward) = (rates.as_ref().map(|rates| rates.out), rates.as_ref().map(|rates| rates.inward));
    for (name, octets, verdict, flow) in
        [("sent", status.octets.0, "sent", out), ("received", status.octets.1, "delivered", inward)]
    {
        let packets = count(status, verdict);
        let rate = flow.map_or_else(String::new, |flow| {
            format!("; now {}bit/s, {}packets/s", scaled(flow.bits), scaled(flow.packets))
        });
        line(name, &format!("{packets} packets, {}octets{rate}", scaled(octets as f64)));
    }
    if status.workers.len() > 1 {
        line("workers", &shares(&status.workers));
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

/// Whether packets are sealed. `refused`: packets of protocol 3 that were not accepted.
fn sealed_line(sealed: &SealedStatus, refused: u64) -> String {
    match (sealed.suite, sealed.send_seconds) {
        (Some(suite), Some(seconds)) => {
            let confirmed = if sealed.unsealed.accepts {
                "; not confirmed yet, or just now: protocol 3 is still accepted"
            } else {
                ""
            };
            format!("by {suite}, key {} old{confirmed}", age(seconds))
        }
        _ if sealed.unsealed.sends => "no: protocol 3, since the peer has not sealed".to_owned(),
        _ if refused > 0 => {
            format!("no key: packets wait for a handshake; {refused} packets of protocol 3 were refused")
        }
        _ => "no key: packets wait for a handshake".to_owned(),
    }
}

/// The share of each of several workers, in percent.
fn shares(workers: &[WorkerShare]) -> String {
    let total = |of: fn(&WorkerShare) -> u64| workers.iter().map(of).sum::<u64>();
    let (sent, delivered) = (total(|share| share.sent).max(1), total(|share| share.delivered).max(1));
    let each = workers.iter().enumerate().map(|(number, share)| {
        let (sent, delivered) = (100 * share.sent / sent, 100 * share.delivered / delivered);
        format!("{number}: {sent} % of sent, {delivered} % of received")
    });
    let each: Vec<String> = each.collect();
    format!("{}; helped each other with {} packets", each.join("; "), total(|share| share.helped))
}

#[cfg(test)]
mod tests {
    use super::super::status::{example, example_sealed};
    use super::*;
    use crate::control::protocol::Unsealed;

    #[test]
    fn a_tunnel_is_a_few_lines() {
        let before = example("cipcb0", (0, 0), &[("bad-crc", 3)]);
        let now = example("cipcb0", (2_500_000, 0), &[("sent", 2000), ("bad-crc", 3)]);
        let text = text(&now, Some(Rates::between(&before, &now, 2.0)));
        let expected = "cipcb0\n  options   gateway-b\n  peer      192.0.2.2:6789\n  me        192.0.2.1:6789\n  protocol  3, IP packets\n  cipher    blowfish\n  \
                        keys      static, send (12 s)\n  door      wire0: native XDP\n  \
                        sent      2000 packets, 2.5 Moctets; now 10.0 Mbit/s, 1.0 kpackets/s\n  \
                        received  0 packets, 0 octets; now 0 bit/s, 0 packets/s\n  other     bad-crc 3\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_link_local_address_has_its_zone_by_name() {
        // The loopback device has the same index in each network namespace.
        let (me, peer) = ("[fe80::1%1]:6789".parse().unwrap(), "[fe80::2%1]:6789".parse().unwrap());
        let status = Status { me, peer: Some(peer), ..example("cipcb0", (0, 0), &[]) };
        let text = text(&status, None);
        assert!(text.contains("peer      [fe80::2%lo]:6789\n  me        [fe80::1%lo]:6789\n"), "{text}");
        let json = json(&[status, example("cipcb1", (0, 0), &[])]).unwrap();
        assert_eq!((&json[0]["me"], &json[0]["peer"]), (&"[fe80::1%lo]:6789".into(), &"[fe80::2%lo]:6789".into()));
        assert_eq!((&json[1]["me"], &json[1]["keys"][0]), (&"192.0.2.1:6789".into(), &"static".into()));
    }

    #[test]
    fn an_orphan_says_what_it_does_and_how_to_end_it() {
        let orphan = Status { orphaned_seconds: Some(75), keys: Vec::new(), ..example("cipcb0", (0, 0), &[]) };
        let text = text(&orphan, None);
        let state = "  state     orphaned: daemon gone since 1 min; drops all traffic; `cipe down cipcb0` ends it\n";
        assert!(text.contains(state) && text.contains("  keys      none\n"), "{text}");
    }

    #[test]
    fn a_tunnel_that_may_seal_says_whether_it_does() {
        let keyless = example_sealed(None);
        let accepts = Unsealed { sends: false, accepts: true };
        let unconfirmed = SealedStatus { unsealed: accepts, ..example_sealed(Some(12)) };
        let only_sealed = SealedStatus { unsealed: Unsealed { sends: false, accepts: false }, ..keyless.clone() };
        for (sealed, refused, expected) in [
            (example_sealed(Some(12)), 0, "by AES-256-GCM, key 12 s old"),
            (
                unconfirmed,
                0,
                "by AES-256-GCM, key 12 s old; not confirmed yet, or just now: protocol 3 is still accepted",
            ),
            (keyless, 0, "no: protocol 3, since the peer has not sealed"),
            (only_sealed.clone(), 0, "no key: packets wait for a handshake"),
            (only_sealed, 7, "no key: packets wait for a handshake; 7 packets of protocol 3 were refused"),
        ] {
            let status = Status { sealed: Some(sealed), ..example("cipcb0", (0, 0), &[("unsealed", refused)]) };
            let text = text(&status, None);
            assert!(text.contains(&format!("  keys      static, send (12 s)\n  sealed    {expected}\n")), "{text}");
        }
        let status = Status { sealed: Some(example_sealed(Some(12))), ..example("cipcb0", (0, 0), &[]) };
        let json = &json(&[status]).unwrap()[0]["sealed"];
        assert_eq!((&json["suite"], &json["send_seconds"]), (&"aes256-gcm".into(), &12.into()));
    }

    #[test]
    fn several_workers_are_one_line_more() {
        let share = |sent, delivered, helped| WorkerShare { sent, delivered, helped };
        let workers = [share(300, 0, 0), share(100, 0, 64)];
        let expected =
            "0: 75 % of sent, 0 % of received; 1: 25 % of sent, 0 % of received; helped each other with 64 packets";
        assert_eq!(shares(&workers), expected);
        let status = Status { workers: workers.to_vec(), ..example("cipcb0", (0, 0), &[]) };
        assert!(text(&status, None).contains(&format!("  workers   {expected}\n")));
    }
}
