//! The scheduler: assigns the jobs of a batch to lanes, and refills lanes whose job has ended.

use super::block_copy::BlockCopier;
use super::kernel_choice::{KernelChoice, KernelReport};
use super::stage::{Lane, Piece, Rows, STEPS, WIDTH};
use super::{BLOCK, Job, KEY, Key, Schedule, blowfish, idea};
use arrayvec::ArrayVec;
use std::ptr;

/// Runs batches of jobs through the fastest kernels of this CPU. Each worker has its own; it is not shared.
pub struct Lanes {
    blowfish: KernelChoice<blowfish::Schedule>,
    idea: KernelChoice<idea::Schedule>,
    stage: Box<Stage>,
}

/// The blocks that a kernel processes, aligned so that no vector crosses a cache line.
#[repr(C, align(64))]
struct Stage {
    rows: Rows,
    chain: [u64; WIDTH],
    cipher: [u64; MAX_DECRYPT_BLOCKS],
    plain: [u64; MAX_DECRYPT_BLOCKS],
    copier: BlockCopier,
}

/// Maximum blocks that are decrypted in one call.
const MAX_DECRYPT_BLOCKS: usize = 512;

/// Maximum jobs that are scheduled together. A worker's batch is not larger; a longer one is split.
const MAX_BATCH_JOBS: usize = 128;

/// A set of jobs of a batch.
type Set = u128;

impl Lanes {
    /// Chooses kernels for this CPU by its features and by measurement, in about a millisecond.
    ///
    /// `CIPE_BLOWFISH` and `CIPE_IDEA` in the environment force a kernel by name if the CPU has it.
    #[expect(clippy::new_without_default, reason = "measures the CPU; not a default value")]
    pub fn new() -> Self {
        let named = |variable| std::env::var(variable).ok();
        Self::with(named("CIPE_BLOWFISH").as_deref(), named("CIPE_IDEA").as_deref())
    }

    /// As [`Self::new`], with kernels forced by these names, not by the environment.
    pub fn with(blowfish: Option<&str>, idea: Option<&str>) -> Self {
        Self {
            blowfish: KernelChoice::new(blowfish::kernels(), blowfish, &blowfish::Schedule::new(&[0; KEY])),
            idea: KernelChoice::new(idea::kernels(), idea, &idea::Schedule::new(&[0; KEY], u16::from_be_bytes)),
            stage: Box::new(Stage {
                rows: [[0; WIDTH]; STEPS],
                chain: [0; WIDTH],
                cipher: [0; MAX_DECRYPT_BLOCKS],
                plain: [0; MAX_DECRYPT_BLOCKS],
                copier: BlockCopier::detect(),
            }),
        }
    }

    /// CBC-encrypts every job in place. Does not allocate; jobs are independent of each other and of their order.
    pub fn encrypt(&mut self, jobs: &mut [Job<'_>]) {
        let Self { blowfish, idea, stage } = self;
        for jobs in jobs.chunks_mut(MAX_BATCH_JOBS) {
            encrypt_batch(blowfish, Key::blowfish, stage, jobs);
            encrypt_batch(idea, Key::idea, stage, jobs);
        }
        idea.wipe();
    }

    /// CBC-decrypts every job in place. Does not allocate; jobs are independent of each other and of their order.
    pub fn decrypt(&mut self, jobs: &mut [Job<'_>]) {
        let Self { blowfish, idea, stage } = self;
        for jobs in jobs.chunks_mut(MAX_BATCH_JOBS) {
            decrypt_batch(blowfish, Key::blowfish, stage, jobs);
            decrypt_batch(idea, Key::idea, stage, jobs);
        }
        idea.wipe();
    }
}

impl Lanes {
    /// Returns the kernels of this CPU and their speed at the start.
    pub fn report(&self) -> Vec<KernelReport> {
        self.blowfish.report("blowfish").chain(self.idea.report("idea")).collect()
    }
}

impl Key {
    fn blowfish(&self) -> Option<&blowfish::Schedule> {
        match &self.schedule {
            Schedule::Blowfish(schedule) => Some(schedule),
            Schedule::Idea(_) => None,
        }
    }

    fn idea(&self) -> Option<&idea::Schedule> {
        match &self.schedule {
            Schedule::Idea(schedule) => Some(schedule),
            Schedule::Blowfish(_) => None,
        }
    }
}

/// Groups the jobs of one cipher into sets with one key each. `of` returns the key's schedule if it is of that cipher.
fn by_key<S>(of: fn(&Key) -> Option<&S>, jobs: &[Job<'_>]) -> ArrayVec<Set, MAX_BATCH_JOBS> {
    let mut sets = ArrayVec::<Set, MAX_BATCH_JOBS>::new();
    // A hash table from addresses of keys to set numbers plus one; 0 is empty.
    let mut table = [0u8; 2 * MAX_BATCH_JOBS];
    for (i, job) in jobs.iter().enumerate() {
        if of(job.key).is_none() || job.data.len() < BLOCK {
            continue;
        }
        let mut slot = ptr::from_ref(job.key).addr() / size_of::<Key>() % table.len();
        loop {
            match table[slot] {
                0 => {
                    sets.push(1 << i);
                    table[slot] = sets.len() as u8;
                    break;
                }
                number => {
                    let set = &mut sets[usize::from(number) - 1];
                    if ptr::eq(jobs[set.trailing_zeros() as usize].key, job.key) {
                        *set |= 1 << i;
                        break;
                    }
                }
            }
            slot = (slot + 1) % table.len();
        }
    }
    sets
}

fn members(mut set: Set) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let first = set.trailing_zeros() as usize;
        set &= set.wrapping_sub(1);
        (first < MAX_BATCH_JOBS).then_some(first)
    })
}

fn encrypt_batch<S>(
    kernels: &mut KernelChoice<S>,
    of: fn(&Key) -> Option<&S>,
    stage: &mut Stage,
    jobs: &mut [Job<'_>],
) {
    let sets = by_key(of, jobs);
    // Jobs of different keys that are processed together. Jobs of one key are side by side, because lanes with the same
    // tables share the cache.
    let mut together = ArrayVec::<usize, MAX_BATCH_JOBS>::new();
    for same in &sets {
        if sets.len() == 1 || kernels.wants_one_key(same.count_ones() as usize) {
            encrypt_set(kernels, of, stage, jobs, members(*same), true);
        } else {
            together.extend(members(*same));
        }
    }
    encrypt_set(kernels, of, stage, jobs, together.into_iter(), false);
}

/// Encrypts the jobs `waiting`, which all have the same key if `uniform`.
fn encrypt_set<S>(
    kernels: &mut KernelChoice<S>,
    of: fn(&Key) -> Option<&S>,
    stage: &mut Stage,
    jobs: &mut [Job<'_>],
    waiting: impl Iterator<Item = usize>,
    uniform: bool,
) {
    let mut waiting = waiting.peekable();
    let Some(first) = waiting.peek() else { return };
    let Some(any) = of(jobs[*first].key) else { return };
    let mut keys = [any; WIDTH];
    let mut lanes = [Lane::default(); WIDTH];
    let mut busy = 0;
    loop {
        while busy < WIDTH
            && let Some(job) = waiting.next()
        {
            let Job { key, iv, data } = &jobs[job];
            keys[busy] = of(key).unwrap_or(any);
            stage.chain[busy] = key.algorithm.block(*iv);
            lanes[busy] = Lane { job, done: 0, left: data.len() / BLOCK };
            busy += 1;
        }
        if busy == 0 {
            return;
        }
        let kernel = kernels.encrypt(busy, uniform);
        if busy == 1 {
            let Lane { job, done, .. } = lanes[0];
            let Job { key, data, .. } = &mut jobs[job];
            if kernel.encrypt_alone(keys[0], key.algorithm, stage.chain[0], data[done..].as_chunks_mut().0) {
                return;
            }
        }
        let running = if busy > kernel.lanes() { kernel.steady_lanes() } else { busy };
        let steps = lanes[..running].iter().fold(STEPS, |steps, lane| steps.min(lane.left));
        stage.copier.fill(jobs, &lanes[..running], &mut stage.rows[..steps]);
        kernel.encrypt(&keys[..running], &mut stage.chain, &mut stage.rows, steps);
        stage.copier.drain(jobs, &lanes[..running], &stage.rows[..steps]);
        for lane in &mut lanes[..running] {
            lane.done += steps * BLOCK;
            lane.left -= steps;
        }
        // From last to first: the lane that replaces a finished lane has already been checked.
        for column in (0..running).rev() {
            if lanes[column].left == 0 {
                busy -= 1;
                lanes[column] = lanes[busy];
                stage.chain[column] = stage.chain[busy];
                keys[column] = keys[busy];
            }
        }
    }
}

fn decrypt_batch<S>(
    kernels: &mut KernelChoice<S>,
    of: fn(&Key) -> Option<&S>,
    stage: &mut Stage,
    jobs: &mut [Job<'_>],
) {
    for same in by_key(of, jobs) {
        if let Some(key) = of(jobs[same.trailing_zeros() as usize].key) {
            decrypt_set(kernels, key, stage, jobs, same);
        }
    }
}

/// Decrypts the blocks of all jobs of `set` end to end, as many as fit the stage at a time, so a short message shares
/// its vectors with the next one.
fn decrypt_set<S>(kernels: &mut KernelChoice<S>, key: &S, stage: &mut Stage, jobs: &mut [Job<'_>], set: Set) {
    let mut waiting = members(set);
    let mut pieces = [Piece::default(); MAX_BATCH_JOBS];
    let mut rest: Option<Piece> = None;
    loop {
        let (mut count, mut filled) = (0, 0);
        while filled < stage.cipher.len() && count < MAX_BATCH_JOBS {
            let Some(mut piece) = rest.take().or_else(|| waiting.next().map(|job| Piece::whole(job, &jobs[job])))
            else {
                break;
            };
            let left = piece.blocks;
            piece.blocks = left.min(stage.cipher.len() - filled);
            let cipher = &mut stage.cipher[filled..][..piece.blocks];
            stage.copier.load_piece(&jobs[piece.job], &piece, cipher);
            if left > piece.blocks {
                let start = piece.start + piece.blocks * BLOCK;
                rest = Some(Piece { start, blocks: left - piece.blocks, chain: cipher[piece.blocks - 1], ..piece });
            }
            filled += piece.blocks;
            pieces[count] = piece;
            count += 1;
        }
        if count == 0 {
            return;
        }
        stage.plain[..filled].copy_from_slice(&stage.cipher[..filled]);
        kernels.decrypt(filled).decrypt(key, &mut stage.plain[..filled]);
        let (mut cipher, mut plain) = (&stage.cipher[..filled], &stage.plain[..filled]);
        for piece in &pieces[..count] {
            let (before, blocks);
            (before, cipher) = cipher.split_at(piece.blocks);
            (blocks, plain) = plain.split_at(piece.blocks);
            stage.copier.store_piece(&mut jobs[piece.job], piece, blocks, before);
        }
    }
}

impl Piece {
    fn whole(index: usize, job: &Job<'_>) -> Self {
        Self { job: index, start: 0, blocks: job.data.len() / BLOCK, chain: job.key.algorithm.block(job.iv) }
    }
}
