//! Datagrams of any content at the carrier port: each is counted under a verdict, and the tunnel is not affected.

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use cipe_tests::gateway::Daemon;
use cipe_tests::net::{UDP, checksum};
use cipe_tests::options::{KEY, Options};
use cipe_tests::peer::{Cipher, seal};
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::patient;
use cipe_tests::relayed::{Relayed, carrier_of, inbound};
use cipe_tests::status::Status;
use cipe_tests::stream::Stream;
use cipe_tests::topology::Side;
use cipe_tests::{SOON, may_make_namespaces};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use socket2::{Domain, Protocol, Socket, Type};

/// Datagrams in flight: fewer than any buffer between here and the engine holds.
const BATCH: usize = 48;

/// Octets of the largest datagram that fits one packet of the carrier.
const LARGEST: usize = 1500 - 28;

/// Packets that the test sends to gateway B, from an address that is not its peer's.
struct Thrower<'a> {
    link: &'a Relayed,
    socket: UdpSocket,
    /// Whole IP packets.
    raw: Socket,
}

impl<'a> Thrower<'a> {
    fn new(link: &'a Relayed) -> Result<Self> {
        let tap = link.net.tap().context("a relayed link has a tap")?;
        tap.run(|| {
            let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
            Ok(Self { link, socket: UdpSocket::bind("192.0.2.2:0")?, raw })
        })
    }

    /// Sends everything, and waits after each batch until the engine has counted it. Returns the increase of the counters, by
    /// verdict, without zeros.
    fn throw(&self, mut send: impl FnMut(&Self, usize) -> Result<()>, count: usize) -> Result<BTreeMap<String, u64>> {
        let start = self.link.pair.b.status()?;
        for first in (0..count).step_by(BATCH) {
            let last = count.min(first + BATCH);
            for number in first..last {
                send(self, number)?;
            }
            self.wait_for(thrown(&start) + last as u64)?;
        }
        let end = self.link.pair.b.status()?;
        let counted = end.verdicts.iter().map(|(name, count)| (name.clone(), count - start.count(name)));
        Ok(counted.filter(|(name, count)| *count > 0 && !name.starts_with("control-")).collect())
    }

    fn datagrams(&self, datagrams: &[Vec<u8>]) -> Result<BTreeMap<String, u64>> {
        let to = carrier_of(Side::B);
        self.throw(|this, number| Ok(_ = this.socket.send_to(&datagrams[number], to)?), datagrams.len())
    }

    fn wait_for(&self, count: u64) -> Result<Status> {
        let deadline = Instant::now() + patient(SOON);
        loop {
            let status = self.link.pair.b.status()?;
            match thrown(&status) {
                counted if counted == count => return Ok(status),
                counted if counted > count || Instant::now() > deadline => {
                    bail!("{counted} datagrams counted, {count} sent: {status:?}")
                }
                _ => {}
            }
        }
    }
}

/// Datagrams that an end has received, without control messages: the ends may exchange keys meanwhile, because an idle tunnel
/// renews them if no datagram decrypts. If the engine took one of the test's datagrams for a control message, the count would
/// be too low. Of a sealed tunnel, whose ends shake hands when noise comes, a repeated answer is a replay; the test sends none.
fn thrown(status: &Status) -> u64 {
    let repeated = if status.sealed.is_some() { status.count("replayed") } else { 0 };
    inbound(status) - status.count("control-received") - repeated
}

/// The keys of an end, without the previous receive key, which comes and goes with a renewal.
fn keys(status: &Status) -> Vec<&String> {
    status.keys.iter().filter(|key| *key != "previous").collect()
}

fn counts<const N: usize>(expected: [(&str, u64); N]) -> BTreeMap<String, u64> {
    expected.into_iter().filter(|(_, count)| *count > 0).map(|(name, count)| (name.to_owned(), count)).collect()
}

/// Octets that a datagram may have in an engine for usual MTUs.
const ROOM: usize = 1792;

/// Verdicts on datagrams made without a key, by their length alone.
fn refused(datagrams: &[Vec<u8>]) -> BTreeMap<String, u64> {
    let whole = |datagram: &&Vec<u8>| (16..=ROOM).contains(&datagram.len()) && datagram.len().is_multiple_of(8);
    let whole = datagrams.iter().filter(whole).count() as u64;
    let in_fragments = datagrams.iter().filter(|datagram| datagram.len() > LARGEST).count() as u64;
    counts([("bad-crc", whole), ("bad-length", datagrams.len() as u64 - whole), ("fragmented", in_fragments)])
}

fn is_dynamic(datagram: &[u8]) -> bool {
    datagram[0] & 0x80 != 0
}

/// Runs `attack` on gateway B of a link with keys, and checks that the tunnel is not affected. `carrier`: the door; before a
/// UDP socket the kernel checks datagrams itself.
fn survives(daemon: Daemon, carrier: &str, attack: impl FnOnce(&Thrower<'_>, &mut StdRng) -> Result<()>) -> Result<()> {
    survives_if(daemon, carrier, "no", attack)
}

/// The same with a value of `sealed`.
fn survives_if(
    daemon: Daemon,
    carrier: &str,
    sealed: &str,
    attack: impl FnOnce(&Thrower<'_>, &mut StdRng) -> Result<()>,
) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    // Keys are renewed at most once meanwhile, and the previous one is kept.
    let change = |options: Options| options.set("carrier", carrier).set("tokxc", 60).set("sealed", sealed);
    let link = Relayed::start(daemon, 1, change)?;
    link.pair.wait_for_keys(&link.net)?;
    let engine = link.pair.b.engine_pid().context("B has an engine")?;
    let [_, before] = link.settle()?.0;
    attack(&Thrower::new(&link)?, &mut StdRng::seed_from_u64(2026))?;
    // Only packets of a gateway were delivered, and the peer's address is the same: pings continue under dynamic keys.
    let plan = Plan { timeout: Duration::from_secs(5), ..Plan::count(50) };
    for side in [Side::A, Side::B] {
        let report = ping::run(link.net.lan(side), side.other().host(), &plan)?;
        assert_eq!((report.received(), report.damaged), (50, 0), "from {side:?}");
    }
    assert_eq!(keys(&link.pair.b.status()?), keys(&before));
    assert_eq!(link.pair.b.engine_pid(), Some(engine), "the engine is another one");
    assert!(!link.pair.b.log().text().contains("new peer"), "{}", link.pair.b.log().text());
    Ok(())
}

#[test]
fn noise_of_every_length_is_counted_and_does_no_harm() -> Result<()> {
    survives(Daemon::Blowfish, "xdp", |thrower, rng| {
        for round in 0..10 {
            let datagrams: Vec<Vec<u8>> =
                (0..=2000).map(|length| (0..length).map(|_| rng.random()).collect()).collect();
            assert_eq!(thrower.datagrams(&datagrams)?, refused(&datagrams), "round {round}");
        }
        Ok(())
    })
}

/// Sealed: noise of any kind and length is counted once, and nothing of it is delivered.
#[test]
fn noise_of_every_length_does_a_sealed_tunnel_no_harm() -> Result<()> {
    survives_if(Daemon::Blowfish, "xdp", "require", |thrower, rng| {
        let fronts: [&[u8]; 5] = [
            &[],
            &[0x80, 0, 0, 0, 0x40],
            &[0x80, 0, 0, 0, 0xC0],
            &[0x80, 0, 0, 0, 0, 0, 0, 1],
            &[0x80, 0, 0, 0, 0, 0, 0],
        ];
        for front in fronts {
            let random = |length: usize| (0..length).map(|_| rng.random::<u8>()).collect::<Vec<u8>>();
            let noise = (0..=2000).map(random).map(|noise| [front, &noise].concat());
            // Under these lengths and this front it is a message in clear or a handshake's; each is counted, too.
            let counted = thrower.datagrams(&noise.collect::<Vec<_>>())?;
            assert!(!counted.contains_key("delivered"), "{front:02x?}: {counted:?}");
        }
        Ok(())
    })
}

#[test]
fn real_packets_with_changes_are_counted_and_do_no_harm() -> Result<()> {
    survives(Daemon::Idea, "auto", |thrower, rng| {
        let link = thrower.link;
        let plan = Plan::sizes((28..=1442).step_by(29).collect());
        let report = ping::run(link.net.lan(Side::A), Side::B.host(), &plan)?;
        assert_eq!(report.received(), report.sent);
        link.settle()?;
        let (real, own) = (link.relay.recent(0), link.relay.recent(1));
        let small = real.iter().find(|datagram| datagram.len() == 48).context("a ping of 28 octets")?;

        let turned: Vec<Vec<u8>> = (0..small.len() * 8)
            .map(|bit| {
                let mut datagram = small.clone();
                datagram[bit / 8] ^= 1 << (bit % 8);
                datagram
            })
            .collect();
        assert_eq!(thrower.datagrams(&turned)?, counts([("bad-crc", turned.len() as u64)]), "one bit turned");

        let largest = real.iter().max_by_key(|datagram| datagram.len()).context("there were pings")?;
        let cut: Vec<Vec<u8>> = (0..largest.len()).map(|length| largest[..length].to_vec()).collect();
        assert_eq!(thrower.datagrams(&cut)?, refused(&cut), "cut short");

        let longer: Vec<Vec<u8>> =
            (1..=512).map(|more| small.iter().copied().chain((0..more).map(|_| rng.random())).collect()).collect();
        assert_eq!(thrower.datagrams(&longer)?, refused(&longer), "with something behind");

        let spliced: Vec<Vec<u8>> = (0..2000)
            .map(|_| {
                let mut pick = || real.choose(rng).map(Vec::as_slice).unwrap_or_default();
                let (head, tail) = (pick(), pick());
                let at = head.len().min(tail.len()) / 16 * 8;
                [&head[..at], &tail[at..]].concat()
            })
            .filter(|spliced| !real.contains(spliced))
            .collect();
        assert!(spliced.len() > 1000);
        assert_eq!(thrower.datagrams(&spliced)?, counts([("bad-crc", spliced.len() as u64)]), "spliced");

        assert_eq!(thrower.datagrams(&real)?, counts([("replayed", real.len() as u64)]), "as they were");

        let dynamic = own.iter().filter(|datagram| is_dynamic(datagram)).count() as u64;
        let expected = counts([("bad-crc", dynamic), ("reflected", own.len() as u64 - dynamic)]);
        assert!(dynamic > 0 && dynamic < own.len() as u64);
        assert_eq!(thrower.datagrams(&own)?, expected, "its own");
        Ok(())
    })
}

#[test]
fn what_a_holder_of_the_key_forges_is_checked_inside() -> Result<()> {
    survives(Daemon::Blowfish, "auto", |thrower, rng| {
        let mut key = [0; 16];
        hex::decode_to_slice(KEY, &mut key)?;
        let forged: Vec<Vec<u8>> = (0..2000)
            .map(|length| {
                let payload: Vec<u8> = (0..length % 1400).map(|_| rng.random::<u8>() | 0x80).collect();
                seal(Cipher::Blowfish, &key, false, false, &payload)
            })
            .collect();
        assert_eq!(thrower.datagrams(&forged)?, counts([("bad-inner", 2000)]));
        Ok(())
    })
}

#[test]
fn lengths_that_contradict_each_other_are_counted() -> Result<()> {
    survives(Daemon::Blowfish, "xdp", |thrower, _| {
        // The length field of UDP, compared with the 48 octets after its header.
        let lies: Vec<u16> = (0..8).chain(57..=700).chain(65_000..=65_535).collect();
        let to = carrier_of(Side::B);
        let counted =
            thrower.throw(|this, number| Ok(_ = this.raw.send_to(&packet(lies[number]), &to.into())?), lies.len())?;
        assert_eq!(counted, counts([("bad-length", lies.len() as u64)]));

        // Fewer than there are: the other octets do not belong to the datagram.
        let short: Vec<u16> = (8..=55).collect();
        let counted =
            thrower.throw(|this, number| Ok(_ = this.raw.send_to(&packet(short[number]), &to.into())?), short.len())?;
        let whole = short.iter().filter(|length| **length >= 24 && length.is_multiple_of(8)).count() as u64;
        assert_eq!(counted, counts([("bad-crc", whole), ("bad-length", short.len() as u64 - whole)]));
        Ok(())
    })
}

/// An IP packet to gateway B with 48 octets of UDP payload and `length` in the length field of UDP.
fn packet(length: u16) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 76, 0, 1, 0, 0, 64, UDP, 0, 0, 192, 0, 2, 2];
    packet.extend(Side::B.carrier().octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(7000_u16.to_be_bytes());
    packet.extend(carrier_of(Side::B).port().to_be_bytes());
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0]);
    packet.extend([0x5A; 48]);
    packet
}

/// Datagrams of a flood, a few hundred times as many as it takes until the shield is set.
const FLOOD: usize = 20_000;

/// What a flood consists of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Noise {
    /// Random octets, of either flag and of many lengths.
    Random,
    /// What looks like control messages in clear: four zero octets in front.
    InClear,
    /// What looks like first messages of a sealed handshake.
    FirstMessages,
    /// What looks like sealed packets of any epoch.
    SealedPackets,
}

impl Noise {
    fn datagram(self, rng: &mut StdRng) -> Vec<u8> {
        let mut noise: Vec<u8> = (0..8 * rng.random_range(2..182)).map(|_| rng.random()).collect();
        match self {
            Self::Random => noise[1] |= 1,
            Self::InClear => noise[..4].fill(0),
            Self::FirstMessages => {
                noise.resize(112, 7);
                noise[..8].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 0, 1]);
            }
            Self::SealedPackets => {
                noise.resize(noise.len() + 9, 7);
                noise[..4].copy_from_slice(&[0x80, 0, 0, 0]);
                noise[4] |= 0x40;
            }
        }
        noise
    }

    /// The value of `sealed` of the tunnel that gets it.
    fn sealed(self) -> &'static str {
        match self {
            Self::Random | Self::InClear => "no",
            Self::FirstMessages | Self::SealedPackets => "require",
        }
    }

    /// How many of them an end has counted.
    fn counted(self, status: &Status) -> u64 {
        let verdicts: &[&str] = match self {
            Self::Random => &["bad-crc"],
            Self::InClear => &["clear-control"],
            Self::FirstMessages => &["bad-tag"],
            Self::SealedPackets => &["bad-tag", "no-receive-key"],
        };
        verdicts.iter().map(|verdict| status.count(verdict)).sum()
    }
}

/// Throws a flood at a tunnel in use: each datagram is counted, a stream goes on, and no ping is lost. `is_told`: the log says so,
/// once; of the flood in clear XDP hands on so few that the engine sees none.
fn flood_is_survived(daemon: Daemon, carrier: &str, noise: Noise, is_told: bool) -> Result<()> {
    survives_if(daemon, carrier, noise.sealed(), |thrower, rng| {
        let Relayed { pair, net, .. } = thrower.link;
        let [from, to] = [net.lan(Side::A), net.lan(Side::B)];
        let stream = Stream::start(from, (to, Side::B.host()))?;
        let is_over = AtomicBool::new(false);
        let door = |status: &Status| status.doors.clone();
        let before = pair.b.status()?;
        let plan = Plan { window: 4, timeout: Duration::from_secs(10), ..Plan::count(1_000_000) };
        let report = std::thread::scope(|scope| -> Result<ping::Report> {
            let pings = scope.spawn(|| {
                let go_on = || !is_over.load(Ordering::Relaxed);
                ping::run_while(from, Side::B.host(), &plan, go_on)
            });
            let thrown = throw_noise(thrower, noise, rng, &before);
            is_over.store(true, Ordering::Relaxed);
            let report = pings.join().map_err(|_| anyhow!("the pings' thread panicked"))??;
            thrown.map(|()| report)
        })?;
        assert!(
            report.sent > 10 && report.lost.is_empty() && report.damaged == 0,
            "{} of {}",
            report.lost.len(),
            report.sent
        );
        stream.wait_for_more()?;
        assert!(stream.finish()? > 0);
        let is_set = |line: &str| line.contains("many datagrams come that no key opens");
        let lines = usize::from(is_told);
        assert_eq!(pair.b.log().wait_for_lines(lines, patient(SOON), is_set), lines, "{}", pair.b.log().text());
        let after = pair.b.status()?;
        assert_eq!(noise.counted(&after) - noise.counted(&before), FLOOD as u64, "{after:?}");
        if carrier != "auto" {
            assert_eq!(door(&after), door(&before));
        }
        Ok(())
    })
}

/// Sends [`FLOOD`] datagrams in batches, and waits until each batch is counted.
fn throw_noise(thrower: &Thrower<'_>, noise: Noise, rng: &mut StdRng, before: &Status) -> Result<()> {
    let (to, target) = (carrier_of(Side::B), &thrower.link.pair.b);
    for first in (0..FLOOD).step_by(BATCH) {
        let sent = FLOOD.min(first + BATCH);
        for _ in first..sent {
            thrower.socket.send_to(&noise.datagram(rng), to)?;
        }
        let deadline = Instant::now() + patient(SOON);
        while noise.counted(&target.status()?) < noise.counted(before) + sent as u64 {
            if Instant::now() > deadline {
                bail!("{sent} sent: {:?}", target.status()?);
            }
        }
    }
    Ok(())
}

#[test]
fn a_stream_and_pings_survive_a_flood_by_xdp() -> Result<()> {
    flood_is_survived(Daemon::Blowfish, "xdp", Noise::Random, true)
}

#[test]
fn a_stream_and_pings_survive_a_flood_by_the_udp_socket() -> Result<()> {
    flood_is_survived(Daemon::Idea, "udp", Noise::Random, true)
}

#[test]
fn a_stream_and_pings_survive_a_flood_in_clear_by_xdp() -> Result<()> {
    flood_is_survived(Daemon::Idea, "xdp", Noise::InClear, false)
}

#[test]
fn a_stream_and_pings_survive_a_flood_in_clear_by_the_udp_socket() -> Result<()> {
    flood_is_survived(Daemon::Blowfish, "udp", Noise::InClear, true)
}

#[test]
fn a_sealed_stream_and_pings_survive_a_flood_of_first_messages() -> Result<()> {
    flood_is_survived(Daemon::Idea, "udp", Noise::FirstMessages, false)
}

#[test]
fn a_sealed_stream_and_pings_survive_a_flood_of_packets() -> Result<()> {
    flood_is_survived(Daemon::Blowfish, "xdp", Noise::SealedPackets, false)
}
