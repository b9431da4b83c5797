//! `cipe bench-cipher`: measures the cipher engine on this CPU, with packets as in a tunnel.

use crate::cipher::{Algorithm, Job, Key, Lanes};
use crate::wire::packet;
use clap::Args;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Octets between the starts of two frames, as in a UMEM. At this distance, packets collide most in the cache sets.
const STRIDE: usize = 2048;

/// Octets in front of the datagram: Ethernet, IPv4 and UDP.
const HEADROOM: usize = 42;

/// The engine's choice of kernels, with a separate key for each packet of a batch.
const MANY_KEYS: &str = "auto-many-keys";

/// Measure the cipher kernels of this CPU
#[derive(Args, Clone, Debug)]
pub struct BenchCipher {
    /// Payload octets of a packet (several: separate with commas)
    #[arg(long, value_delimiter = ',', default_values_t = [64, 576, 1440])]
    packet: Vec<usize>,
    /// Packets of a batch (several: separate with commas)
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16, 32, 48, 64, 128])]
    batch: Vec<usize>,
    /// Only this cipher: blowfish or idea
    #[arg(long)]
    cipher: Option<String>,
    /// Only this kernel, or `auto` for the choice among all, or `auto-many-keys` for the same with a key for each
    /// packet
    #[arg(long)]
    kernel: Option<String>,
    /// Keys that the packets of a batch use in turn; not for `auto-many-keys`
    #[arg(long, default_value_t = 1)]
    keys: usize,
    /// Milliseconds of each measurement; the best of five parts counts
    #[arg(long, default_value_t = 20)]
    millis: u64,
    /// Write one JSON object per line instead of a table
    #[arg(long)]
    json: bool,
}

/// One measurement.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Row {
    /// `blowfish` or `idea`.
    pub cipher: String,
    /// The kernel's name; or `auto` for the engine's choice, `auto-many-keys` for the same with a key for each packet
    /// of a batch; or an alternative implementation's name.
    pub kernel: String,
    /// `encrypt` or `decrypt`.
    pub direction: String,
    /// Payload octets of a packet.
    pub packet: usize,
    /// Packets of a batch.
    pub batch: usize,
    /// Payload megabytes per second.
    pub mbps: f64,
    /// TSC cycles per payload octet; none if the CPU has no TSC.
    pub cycles_per_byte: Option<f64>,
}

/// Measures, and prints each result as soon as it is known.
///
/// # Errors
/// Standard output fails.
pub fn run(args: &BenchCipher) -> anyhow::Result<()> {
    let kernels = Lanes::new().report();
    if !args.json {
        println!(
            "{:8} {:10} {:>5} {:>13} {:>14} {:>17}",
            "cipher", "kernel", "lanes", "constant time", "chosen from", "MB/s at start"
        );
        for report in &kernels {
            let from = report.encrypts_from.map_or("-".into(), |n| format!("{n} packets"));
            let [encrypt, decrypt] = report.rate;
            let time = if report.constant_time { "yes" } else { "no" };
            println!(
                "{:8} {:10} {:>5} {time:>13} {from:>14} {encrypt:>8.0} {decrypt:>8.0}",
                report.cipher, report.kernel, report.lanes
            );
        }
        println!(
            "\n{:8} {:10} {:8} {:>6} {:>5} {:>8} {:>12}",
            "cipher", "kernel", "", "packet", "batch", "MB/s", "cycles/byte"
        );
    }
    for cipher in ["blowfish", "idea"] {
        let names = kernels.iter().filter(|report| report.cipher == cipher).map(|report| report.kernel);
        for kernel in names.chain(["auto", MANY_KEYS]) {
            if args.cipher.as_deref().is_none_or(|only| only == cipher)
                && args.kernel.as_deref().is_none_or(|only| only == kernel)
            {
                measure(args, cipher, kernel)?;
            }
        }
    }
    Ok(())
}

fn measure(args: &BenchCipher, cipher: &str, kernel: &str) -> anyhow::Result<()> {
    let forced = (!["auto", MANY_KEYS].contains(&kernel)).then_some(kernel);
    let (algorithm, mut lanes) = match cipher {
        "blowfish" => (Algorithm::Blowfish, Lanes::with(forced, None)),
        _ => (Algorithm::Idea, Lanes::with(None, forced)),
    };
    let keys = if kernel == MANY_KEYS { args.batch.iter().copied().max().unwrap_or(1) } else { args.keys };
    let keys: Vec<Key> = (0..keys.max(1))
        .map(|i| {
            let mut octets = *b"sixteen octets..";
            octets[..8].copy_from_slice(&i.to_le_bytes());
            Key::new(algorithm, &octets)
        })
        .collect();
    for &packet in &args.packet {
        for &batch in &args.batch {
            let mut frames = Frames::new(packet, batch);
            for direction in ["encrypt", "decrypt"] {
                let measured = best(args.millis, || match direction {
                    "encrypt" => frames.seal(&mut lanes, &keys),
                    _ => frames.open(&mut lanes, &keys),
                });
                Row::new([cipher, kernel, direction], packet, batch, measured).print(args.json)?;
            }
        }
    }
    Ok(())
}

impl Row {
    /// Makes a figure from the result of [`best`] for a batch; `names` are cipher, kernel and direction.
    pub fn new(names: [&str; 3], packet: usize, batch: usize, (seconds, cycles): (f64, Option<f64>)) -> Self {
        let octets = (packet * batch) as f64;
        let [cipher, kernel, direction] = names.map(String::from);
        let cycles_per_byte = cycles.map(|cycles| cycles / octets);
        Self { cipher, kernel, direction, packet, batch, mbps: octets / seconds / 1e6, cycles_per_byte }
    }

    /// Prints the row as JSON or as a line of the table.
    ///
    /// # Errors
    /// None is known, but the serialization can return one.
    pub fn print(&self, json: bool) -> anyhow::Result<()> {
        if json {
            println!("{}", serde_json::to_string(self)?);
            return Ok(());
        }
        let Self { cipher, kernel, direction, packet, batch, mbps, cycles_per_byte } = self;
        let cycles = cycles_per_byte.map_or("-".into(), |cycles| format!("{cycles:.2}"));
        println!("{cipher:8} {kernel:10} {direction} {packet:>6} {batch:>5} {mbps:>8.0} {cycles:>12}");
        Ok(())
    }
}

/// Seconds and TSC cycles of one run: the best of five parts, because disturbances only add time.
pub fn best(millis: u64, mut run: impl FnMut()) -> (f64, Option<f64>) {
    run();
    let mut best = (f64::INFINITY, None);
    for _ in 0..5 {
        let (start, cycles, mut runs) = (Instant::now(), crate::cipher::cycles(), 0);
        while start.elapsed() < Duration::from_millis(millis) / 5 {
            run();
            runs += 1;
        }
        let seconds = start.elapsed().as_secs_f64() / f64::from(runs);
        if seconds < best.0 {
            let cycles = crate::cipher::cycles().zip(cycles);
            best = (seconds, cycles.map(|(end, start)| (end - start) as f64 / f64::from(runs)));
        }
    }
    best
}

/// A batch of packets in frames of a UMEM.
struct Frames {
    memory: Vec<u8>,
    packet: usize,
}

impl Frames {
    fn new(packet: usize, batch: usize) -> Self {
        let memory = (0..batch * STRIDE).map(|i| (i * 31) as u8).collect();
        Self { memory, packet }
    }

    /// Padding, P, CRC and CBC: the work between a segment and its datagram. All but CBC run on the previous run's
    /// output, which costs the same.
    fn seal(&mut self, lanes: &mut Lanes, keys: &[Key]) {
        let packet = self.packet;
        self.batch(
            keys,
            |frame| {
                packet::frame(frame, packet, packet::Type::Data, *b"\x80 an IV.", [7; 7]);
            },
            |jobs| lanes.encrypt(jobs),
        );
    }

    /// CBC and the checks. After the first run the output is noise; the CRC is computed anyway.
    fn open(&mut self, lanes: &mut Lanes, keys: &[Key]) {
        self.batch(
            keys,
            |_| {},
            |jobs| {
                lanes.decrypt(jobs);
                for job in jobs {
                    let _ = std::hint::black_box(packet::unframe(job.data));
                }
            },
        );
    }

    /// Gives each packet the next of the keys, in turn.
    fn batch(&mut self, keys: &[Key], mut before: impl FnMut(&mut [u8]), mut work: impl FnMut(&mut [Job<'_>])) {
        let sealed = packet::sealed_len(self.packet);
        for memory in self.memory.chunks_mut(STRIDE * 128) {
            let mut jobs = arrayvec::ArrayVec::<Job<'_>, 128>::new();
            for (frame, key) in memory.chunks_exact_mut(STRIDE).zip(keys.iter().cycle()) {
                let frame = &mut frame[HEADROOM..HEADROOM + sealed];
                before(frame);
                if let Some((iv, data)) = frame.split_first_chunk_mut() {
                    jobs.push(Job { key, iv: *iv, data });
                }
            }
            work(&mut jobs);
        }
    }
}
