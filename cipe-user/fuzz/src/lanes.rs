//! The cipher scheduler: in any batch, with every kernel, each job ends as if it were alone, and decrypts to its
//! plaintext.

use std::sync::{LazyLock, Mutex};

use arbitrary::Arbitrary;
use cipe_user::cipher::{Algorithm, Job, Key, Lanes};

use crate::read;

#[derive(Arbitrary, Debug)]
struct Batch {
    /// Each entry makes [`KEYS_PER_ENTRY`] keys, because some kernels treat few keys and many keys differently.
    keys: [(u8, [u8; 16]); 4],
    jobs: Vec<Spec>,
}

#[derive(Arbitrary, Debug)]
struct Spec {
    key: u8,
    iv: [u8; 8],
    offset: u8,
    len: u16,
    /// Number of further jobs like this one: wide kernels need large groups of one key.
    again: u8,
}

/// Number of keys made from one entry; they differ in one octet.
const KEYS_PER_ENTRY: usize = 6;

/// One engine per kernel. The scalar ones are first: their batches of one job give the expected results.
static ENGINES: LazyLock<Mutex<Vec<Lanes>>> = LazyLock::new(|| {
    let mut engines = vec![Lanes::with(Some("scalar"), Some("scalar")), Lanes::with(None, None)];
    for report in Lanes::with(None, None).report() {
        engines.push(match report.cipher {
            "blowfish" => Lanes::with(Some(report.kernel), None),
            _ => Lanes::with(None, Some(report.kernel)),
        });
    }
    Mutex::new(engines)
});

/// Runs one input.
pub fn run(input: &[u8]) {
    let Some(batch) = read::<Batch>(input) else { return };
    let like = batch.keys.iter().flat_map(|key| [key; KEYS_PER_ENTRY]).enumerate();
    let keys: Vec<Key> = like
        .map(|(i, (algorithm, octets))| {
            let algorithms = [Algorithm::Blowfish, Algorithm::Idea, Algorithm::IdeaLittle];
            let mut octets = *octets;
            octets[0] ^= (i % KEYS_PER_ENTRY) as u8;
            Key::new(algorithms[usize::from(*algorithm) % 3], &octets)
        })
        .collect();
    let specs: Vec<&Spec> =
        batch.jobs.iter().flat_map(|spec| vec![spec; 1 + usize::from(spec.again % 70)]).take(300).collect();
    let memory = |spec: &&Spec| -> Vec<u8> {
        let len = usize::from(spec.offset % 64) + usize::from(spec.len % 600);
        (0..len).map(|i| (i * 7) as u8 ^ spec.iv[i % 8]).collect()
    };
    let plain: Vec<Vec<u8>> = specs.iter().map(memory).collect();
    let mut engines = ENGINES.lock().expect("no engine panics");
    let mut alone = plain.clone();
    for job in jobs(&keys, &specs, &mut alone) {
        engines[0].encrypt(&mut [job]);
    }
    for lanes in engines.iter_mut() {
        let mut data = plain.clone();
        lanes.encrypt(&mut jobs(&keys, &specs, &mut data));
        assert!(data == alone, "a batch encrypts as its jobs alone");
        lanes.decrypt(&mut jobs(&keys, &specs, &mut data));
        assert!(data == plain, "a batch decrypts to what it was");
    }
}

fn jobs<'a>(keys: &'a [Key], specs: &[&Spec], data: &'a mut [Vec<u8>]) -> Vec<Job<'a>> {
    let job = |(spec, data): (&&Spec, &'a mut Vec<u8>)| Job {
        key: &keys[usize::from(spec.key) % keys.len()],
        iv: spec.iv,
        data: &mut data[usize::from(spec.offset % 64)..],
    };
    specs.iter().zip(data).map(job).collect()
}
