//! The choice of a kernel for each number of lanes. It is measured at start, in about a millisecond, because neither
//! the CPU's name nor its feature bits show how fast its gathers and shuffles are.

use super::kernel::Kernel;
use super::stage::{Rows, STEPS, WIDTH};
use std::time::{Duration, Instant};

/// Maximum lanes of a kernel that is measured at each number of lanes.
const MAX_NARROW_LANES: usize = 8;

/// Numbers of lanes at which wider kernels are measured: where one more vector of 16, 32 or 64 lanes begins, which
/// costs the same for any number of its lanes; and the maximum.
const MEASURED_LANES: [usize; 7] = [1, 17, 33, 49, 65, 97, WIDTH];

/// Rows of a measurement.
const MEASURED_ROWS: usize = 6;

/// Nanoseconds by which a forced kernel counts as faster than all others.
const FORCED_LEAD_NS: f64 = 1e12;

/// Every kernel that this CPU can run, and the fastest for each number of lanes.
pub(super) struct KernelChoice<S> {
    kernels: Vec<Box<dyn Kernel<S>>>,
    /// Megabytes per second of each kernel: encryption, decryption.
    rates: Vec<[f64; 2]>,
    /// Fastest kernel for `n` lanes of one key, by `n - 1`.
    uniform: [usize; WIDTH],
    /// Fastest kernel for `n` lanes of several keys, by `n - 1`.
    mixed: [usize; WIDTH],
    /// Fastest kernel to decrypt `n` blocks, by `n - 1`; the last entry is for any larger number.
    decrypt: [usize; WIDTH],
}

impl<S> KernelChoice<S> {
    /// Measures the kernels with any key. A kernel `forced` by name, or by the first part of its name, is used wherever
    /// it can be.
    pub(super) fn new(mut kernels: Vec<Box<dyn Kernel<S>>>, forced: Option<&str>, key: &S) -> Self {
        let is_forced = |kernel: &dyn Kernel<S>| {
            forced.is_some_and(|name| kernel.name() == name || kernel.name().split('-').next() == Some(name))
        };
        if let Some(name) = forced
            && !kernels.iter().any(|kernel| is_forced(&**kernel))
        {
            tracing::warn!("this CPU has no cipher kernel named {name}; choosing by measurement");
        }
        let mut choice = Self {
            uniform: [0; WIDTH],
            mixed: [0; WIDTH],
            decrypt: [0; WIDTH],
            rates: Vec::new(),
            kernels: Vec::new(),
        };
        let mut best = [[f64::INFINITY; WIDTH]; 3];
        for (index, kernel) in kernels.iter_mut().enumerate() {
            let lead = if is_forced(&**kernel) { FORCED_LEAD_NS } else { 0.0 };
            let lanes = kernel.lanes();
            let mut total = [0.0; 2];
            let mut rate = [0.0; 2];
            for n in 1..=WIDTH {
                let running = if n > lanes { kernel.steady_lanes() } else { n };
                let blocks = if n > lanes && lanes <= MAX_NARROW_LANES { 2 * running } else { n };
                if if lanes <= MAX_NARROW_LANES { n <= lanes + 1 } else { MEASURED_LANES.contains(&n) } {
                    total = [encrypt_cost(&mut **kernel, key, running), decrypt_cost(&mut **kernel, key, blocks)];
                }
                let [encrypt, decrypt] = [total[0] / running as f64, total[1] / blocks as f64];
                rate = [8e3 / encrypt, 8e3 / decrypt];
                let mut cost = [encrypt, encrypt, decrypt].map(|cost| cost - lead);
                if !kernel.mixes_keys() {
                    cost[1] = f64::INFINITY;
                }
                let picks = [&mut choice.uniform, &mut choice.mixed, &mut choice.decrypt];
                for ((cost, best), pick) in cost.into_iter().zip(&mut best).zip(picks) {
                    if cost < best[n - 1] {
                        best[n - 1] = cost;
                        pick[n - 1] = index;
                    }
                }
            }
            choice.rates.push(rate);
        }
        choice.kernels = kernels;
        choice.wipe();
        choice
    }

    /// Returns the kernel to encrypt `n` lanes, of one key or of several.
    pub(super) fn encrypt(&mut self, n: usize, uniform: bool) -> &mut dyn Kernel<S> {
        let pick = if uniform { &self.uniform } else { &self.mixed };
        &mut *self.kernels[pick[n.clamp(1, WIDTH) - 1]]
    }

    /// Whether `n` lanes of one key are faster alone than among lanes of other keys.
    pub(super) fn wants_one_key(&self, n: usize) -> bool {
        !self.kernels[self.uniform[n.clamp(1, WIDTH) - 1]].mixes_keys()
    }

    /// Returns the kernel to decrypt `n` blocks.
    pub(super) fn decrypt(&mut self, n: usize) -> &mut dyn Kernel<S> {
        &mut *self.kernels[self.decrypt[n.clamp(1, WIDTH) - 1]]
    }

    /// Returns the measurements of each kernel, for `cipe doctor` and tables.
    pub(super) fn report(&self, cipher: &'static str) -> impl Iterator<Item = KernelReport> {
        self.kernels.iter().enumerate().map(move |(index, kernel)| KernelReport {
            cipher,
            kernel: kernel.name(),
            lanes: kernel.lanes(),
            constant_time: kernel.constant_time(),
            rate: self.rates[index],
            encrypts_from: self.uniform.iter().position(|pick| *pick == index).map(|n| n + 1),
            decrypts_from: self.decrypt.iter().position(|pick| *pick == index).map(|n| n + 1),
        })
    }

    /// Erases what every kernel derived from keys.
    pub(super) fn wipe(&mut self) {
        self.kernels.iter_mut().for_each(|kernel| kernel.wipe());
    }
}

/// A kernel, as measured at start.
#[derive(Clone, Debug)]
pub struct KernelReport {
    /// `blowfish` or `idea`.
    pub cipher: &'static str,
    /// The kernel's name, as `CIPE_BLOWFISH` and `CIPE_IDEA` take it.
    pub kernel: &'static str,
    /// Messages that it works on at once.
    pub lanes: usize,
    /// Whether no address and no branch depends on keys or data.
    pub constant_time: bool,
    /// Megabytes per second with all lanes busy: encryption, decryption.
    pub rate: [f64; 2],
    /// Minimum messages of one key for which it is chosen to encrypt; `None` if never.
    pub encrypts_from: Option<usize>,
    /// Minimum blocks for which it is chosen to decrypt; `None` if never.
    pub decrypts_from: Option<usize>,
}

/// Nanoseconds to encrypt a row of `n` lanes.
fn encrypt_cost<S>(kernel: &mut dyn Kernel<S>, key: &S, n: usize) -> f64 {
    let (mut chain, mut rows): (_, Rows) = ([0; WIDTH], [[0; WIDTH]; STEPS]);
    let keys = [key; WIDTH];
    shortest(|| kernel.encrypt(&keys[..n], &mut chain, &mut rows, MEASURED_ROWS)) / MEASURED_ROWS as f64
}

/// Nanoseconds to decrypt `n` blocks.
fn decrypt_cost<S>(kernel: &mut dyn Kernel<S>, key: &S, n: usize) -> f64 {
    let mut blocks = [0; WIDTH];
    shortest(|| kernel.decrypt(key, &mut blocks[..n]))
}

/// Nanoseconds of the fastest of a few runs, because noise only adds time.
fn shortest(mut run: impl FnMut()) -> f64 {
    run();
    let time = |_| {
        let start = Instant::now();
        run();
        start.elapsed()
    };
    (0..3).map(time).min().unwrap_or(Duration::MAX).as_nanos() as f64
}
