//! `cipe doctor`: reports what this machine offers, and what would stop or slow down a tunnel. Changes nothing.

mod host;

use std::process::ExitCode;

use anyhow::Context;

use crate::cipher::{KernelReport, Lanes};
use crate::kernel::bpf::{LoadOptions, Programs};
use crate::kernel::ethtool;
use crate::kernel::features;
use crate::kernel::links::{Card, CardKind};
use crate::kernel::netlink::Netlink;
use crate::sealed::cipher::{Suite, has_fast_aes};
use crate::xsk::{Umem, UmemConfig};

/// Octets around an inner packet over IPv4: IP, UDP, IV, the largest tail, and SOCKS5's header, for which space is
/// always reserved (protocol section 2).
const OVERHEAD_OCTETS: u32 = 20 + 8 + 8 + 12 + 10;

/// Arguments of `cipe doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cipe doctor
  cipe doctor eth0")]
pub(super) struct Args {
    /// Carrier cards to check; all that are up if none is given.
    cards: Vec<String>,
}

/// How good a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grade {
    Good,
    /// Works, but may be slow or have unexpected effects.
    Note,
    /// No tunnel can come up.
    Bad,
}

/// A result of a check.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    grade: Grade,
    text: String,
}

impl Finding {
    fn new(grade: Grade, text: impl Into<String>) -> Self {
        Self { grade, text: text.into() }
    }
}

/// Prints the findings; exits with 1 if one of them prevents tunnels from coming up.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut findings = host::findings();
    if rustix::process::geteuid().is_root() {
        findings.extend(trials());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no event loop")?;
    findings.extend(runtime.block_on(cards(&args.cards))?);
    findings.extend(ciphers());
    findings.push(sealed(has_fast_aes()));
    let mut good = true;
    for Finding { grade, text } in findings {
        let word = match grade {
            Grade::Good => "ok",
            Grade::Note => "note",
            Grade::Bad => "BAD",
        };
        println!("{word:<5} {text}");
        good &= grade != Grade::Bad;
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Tries the first steps of an engine, and undoes them.
fn trials() -> Vec<Finding> {
    let programs = match Programs::load(&LoadOptions::default()).and_then(|mut programs| programs.load_lan()) {
        Ok(()) => Finding::new(Grade::Good, "the kernel takes the eBPF programs"),
        Err(error) => Finding::new(Grade::Bad, format!("eBPF programs: {error}")),
    };
    let umem = match Umem::new(UmemConfig { frames: 64, ..UmemConfig::default() }) {
        Ok(_) => Finding::new(Grade::Good, "AF_XDP is available"),
        Err(error) => Finding::new(Grade::Bad, format!("AF_XDP: {error}")),
    };
    let lacks =
        features::missing().into_iter().map(|lack| Finding::new(Grade::Note, format!("the kernel lacks {lack}")));
    [programs, umem].into_iter().chain(lacks).collect()
}

async fn cards(names: &[String]) -> anyhow::Result<Vec<Finding>> {
    let netlink = Netlink::new()?;
    let mut cards = Vec::new();
    for name in names {
        cards.push(netlink.card_named(name).await?);
    }
    if names.is_empty() {
        for name in host::devices() {
            // A card that has just been removed, or is down, carries nothing.
            cards.extend(netlink.card_named(&name).await.ok().filter(|card| card.up && card.name != "lo"));
        }
    }
    let mut findings = Vec::new();
    for card in cards {
        let (program, kind) = netlink.attached(card.ifindex).await.unwrap_or_default();
        let driver = host::driver(&card.name).or(kind).unwrap_or_else(|| "unknown".to_owned());
        findings.extend(judge(&card, &driver, program, ethtool::has_gro(card.ifindex)));
    }
    Ok(findings)
}

/// Findings on a card as a carrier, or below one.
fn judge(card: &Card, driver: &str, program: Option<u32>, gro: Option<bool>) -> Vec<Finding> {
    let name = &card.name;
    let mut findings = Vec::new();
    match card.kind {
        CardKind::Other => {
            findings
                .push(Finding::new(Grade::Note, format!("{name}: no Ethernet device; carries tunnels by UDP socket")));
        }
        CardKind::Ethernet => {
            let queues = card.receive_queues;
            findings.push(Finding::new(
                Grade::Good,
                format!("{name}: Ethernet, driver {driver}, {queues} receive queue(s)"),
            ));
        }
    }
    if let Some(number) = program {
        let text = format!(
            "{name}: XDP program {number} is on it; if that is not an engine's, remove it (ip link set {name} xdp off), \
             or tunnels go by UDP socket"
        );
        findings.push(Finding::new(Grade::Note, text));
    }
    if driver == "veth" {
        let text = format!("{name}: a veth has no zero copy; native XDP on it takes segmentation off its other end");
        findings.push(Finding::new(Grade::Note, text));
    }
    if gro == Some(false) {
        let text = format!(
            "{name}: GRO is off; with it on the LAN card, TCP through a gateway gained 14 % in a measurement, on the \
             carrier 6 %: ethtool -K {name} gro on"
        );
        findings.push(Finding::new(Grade::Note, text));
    }
    let left = card.mtu.saturating_sub(OVERHEAD_OCTETS);
    findings.push(match left {
        0..68 => Finding::new(Grade::Bad, format!("{name}: MTU {} leaves {left} octets, too few for a link", card.mtu)),
        68..1280 => {
            Finding::new(Grade::Note, format!("{name}: MTU {} leaves {left} octets; IPv6 wants 1280", card.mtu))
        }
        _ => Finding::new(
            Grade::Good,
            format!("{name}: MTU {} leaves {left} octets over IPv4, {} over IPv6", card.mtu, left - 20),
        ),
    });
    findings
}

/// The kernels that the engine would choose, measured as the engine does.
fn ciphers() -> Vec<Finding> {
    let lanes = Lanes::new();
    let chosen = lanes.report().into_iter().filter(|kernel| kernel.encrypts_from.is_some());
    let line = |kernel: &KernelReport| {
        let ([seal, open], from) = (kernel.rate, kernel.encrypts_from.unwrap_or(1));
        format!(
            "{} by `{}` for {from} or more packets at once: {seal:.0} MB/s sealed, {open:.0} MB/s opened",
            kernel.cipher, kernel.kernel
        )
    };
    chosen.map(|kernel| Finding::new(Grade::Good, line(&kernel))).collect()
}

/// The cipher of sealed packets.
fn sealed(fast_aes: bool) -> Finding {
    let suite = Suite::of([fast_aes; 2]);
    Finding::new(
        Grade::Good,
        match fast_aes {
            true => format!("sealed packets: by {suite}, if the peer's CPU has AES instructions, too, as this one"),
            false => format!("sealed packets: by {suite}, because this CPU has no AES instructions that are known"),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(kind: CardKind, mtu: u32) -> Card {
        Card {
            ifindex: 1,
            name: "eth0".to_owned(),
            mac: None,
            mtu,
            kind,
            driver: None,
            vlan: None,
            receive_queues: 4,
            superframes: false,
            veth: false,
            running: true,
            up: true,
            enslaved: false,
        }
    }

    fn grades(findings: &[Finding]) -> Vec<Grade> {
        findings.iter().map(|finding| finding.grade).collect()
    }

    #[test]
    fn the_cipher_of_sealed_packets_follows_from_the_cpu() {
        assert!(sealed(true).text.contains("by AES-256-GCM, if the peer"));
        assert!(sealed(false).text.contains("by ChaCha20-Poly1305, because"));
    }

    #[test]
    fn a_card_is_judged_as_a_carrier() {
        let good = judge(&card(CardKind::Ethernet, 1500), "virtio_net", None, Some(true));
        assert_eq!(grades(&good), [Grade::Good, Grade::Good]);
        assert!(good[1].text.contains("leaves 1442 octets over IPv4, 1422 over IPv6"), "{good:?}");
        let shared = judge(&card(CardKind::Ethernet, 1500), "veth", Some(7), Some(false));
        assert_eq!(grades(&shared), [Grade::Good, Grade::Note, Grade::Note, Grade::Note, Grade::Good]);
        assert!(shared[1].text.contains("program 7"), "{shared:?}");
        assert!(shared[3].text.contains("ethtool -K eth0 gro on"), "{shared:?}");
        assert_eq!(grades(&judge(&card(CardKind::Other, 1280), "tun", None, None)), [Grade::Note, Grade::Note]);
        assert_eq!(judge(&card(CardKind::Other, 120), "tun", None, None)[1].grade, Grade::Bad);
    }
}
