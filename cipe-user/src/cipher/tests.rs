//! Compares every kernel with the plain ciphers of independent crates.

use super::*;
use ::cipher::{Array, InnerIvInit, KeyInit};
use cbc::cipher::{Block, BlockModeDecrypt, BlockModeEncrypt};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::cell::RefCell;

/// CBC with the crates `blowfish`, `idea` and `cbc`.
fn oracle(algorithm: Algorithm, key: &[u8; KEY], iv: [u8; BLOCK], data: &mut [u8], encrypt: bool) {
    fn run<C>(cipher: C, iv: [u8; BLOCK], data: &mut [u8], encrypt: bool)
    where
        C: ::cipher::BlockCipherEncrypt<BlockSize = ::cipher::consts::U8>
            + ::cipher::BlockCipherDecrypt<BlockSize = ::cipher::consts::U8>,
    {
        let (blocks, _) = Block::<C>::slice_as_chunks_mut(data);
        if encrypt {
            cbc::Encryptor::inner_iv_init(cipher, &Array(iv)).encrypt_blocks(blocks);
        } else {
            cbc::Decryptor::inner_iv_init(cipher, &Array(iv)).decrypt_blocks(blocks);
        }
    }
    let swap = |data: &mut [u8]| data.as_chunks_mut::<2>().0.iter_mut().for_each(|word| word.reverse());
    let whole = data.len() / BLOCK * BLOCK;
    match algorithm {
        Algorithm::Blowfish => run(blowfish_of(key), iv, data, encrypt),
        Algorithm::Idea => run(::idea::Idea::new(&Array(*key)), iv, data, encrypt),
        Algorithm::IdeaLittle => {
            let (mut key, mut iv) = (*key, iv);
            swap(&mut key);
            swap(&mut iv);
            swap(&mut data[..whole]);
            run(::idea::Idea::new(&Array(key)), iv, data, encrypt);
            swap(&mut data[..whole]);
        }
    }
}

fn blowfish_of(key: &[u8; KEY]) -> ::blowfish::BlowfishLE {
    ::blowfish::BlowfishLE::new_from_slice(key).expect("Blowfish takes 16 octets")
}

/// Returns an engine that chooses its kernels, and one for every kernel of this CPU, by name.
fn engines() -> Vec<(String, Lanes)> {
    let choosing = Lanes::with(None, None);
    let forced = |report: KernelReport| {
        let name = format!("{} {}", report.cipher, report.kernel);
        match report.cipher {
            "blowfish" => (name, Lanes::with(Some(report.kernel), None)),
            _ => (name, Lanes::with(None, Some(report.kernel))),
        }
    };
    let mut engines: Vec<_> = choosing.report().into_iter().map(forced).collect();
    engines.push(("chosen".into(), choosing));
    engines
}

fn algorithm() -> impl Strategy<Value = Algorithm> {
    prop_oneof![Just(Algorithm::Blowfish), Just(Algorithm::Idea), Just(Algorithm::IdeaLittle)]
}

/// A job in the tests: its key's index, its IV, its distance from an aligned address, its length.
#[derive(Clone, Debug)]
struct Spec {
    key: usize,
    iv: [u8; BLOCK],
    offset: usize,
    len: usize,
}

/// Keys, messages, and a seed for their contents.
type Batch = (Vec<(Algorithm, [u8; KEY])>, Vec<Spec>, u8);

fn batch() -> impl Strategy<Value = Batch> {
    let key = || (algorithm(), any::<[u8; KEY]>());
    let keys = prop_oneof![prop::collection::vec(key(), 1..6), prop::collection::vec(key(), 20..60)];
    let len = prop_oneof![0usize..80, Just(1456), 0usize..1600];
    // A key index is taken modulo the number of keys; low ones are common, so that large groups of one key occur.
    let spec = (prop_oneof![3 => Just(0usize), 1 => 0usize..6, 2 => 0usize..60], any::<[u8; BLOCK]>(), 0usize..64, len)
        .prop_map(|(key, iv, offset, len)| Spec { key, iv, offset, len });
    let specs = prop_oneof![
        prop::collection::vec(spec.clone(), 0..12),
        prop::collection::vec(spec.clone(), 40..150),
        (40usize..150, spec).prop_map(|(n, spec)| vec![spec; n]),
    ];
    (keys, specs, any::<u8>())
}

#[test]
fn every_kernel_agrees_with_the_plain_ciphers_on_any_batch() {
    let mut runner = TestRunner::new(Config::with_cases(if cfg!(debug_assertions) { 12 } else { 400 }));
    let engines = RefCell::new(engines());
    let outcome = runner.run(&batch(), |(keys, specs, seed)| agrees(&mut engines.borrow_mut(), &keys, &specs, seed));
    outcome.unwrap_or_else(|error| panic!("{error}"));
}

fn jobs<'a>(keys: &'a [Key], specs: &[Spec], data: &'a mut [Vec<u8>]) -> Vec<Job<'a>> {
    let job = |(spec, data): (&Spec, &'a mut Vec<u8>)| Job {
        key: &keys[spec.key % keys.len()],
        iv: spec.iv,
        data: &mut data[spec.offset..],
    };
    specs.iter().zip(data).map(job).collect()
}

fn agrees(
    engines: &mut [(String, Lanes)],
    keys: &[(Algorithm, [u8; KEY])],
    specs: &[Spec],
    seed: u8,
) -> Result<(), TestCaseError> {
    let expanded: Vec<Key> = keys.iter().map(|(algorithm, octets)| Key::new(*algorithm, octets)).collect();
    let octet = |i: usize, j: usize| (j * 167 + i * 13 + j / 251) as u8 ^ seed;
    let memory = |(i, spec): (usize, &Spec)| (0..spec.offset + spec.len).map(|j| octet(i, j)).collect();
    let plain: Vec<Vec<u8>> = specs.iter().enumerate().map(memory).collect();
    let mut want = plain.clone();
    for (spec, data) in specs.iter().zip(&mut want) {
        let (algorithm, octets) = &keys[spec.key % keys.len()];
        oracle(*algorithm, octets, spec.iv, &mut data[spec.offset..], true);
    }
    for (name, lanes) in engines {
        let mut data = plain.clone();
        lanes.encrypt(&mut jobs(&expanded, specs, &mut data));
        prop_assert!(data == want, "encryption by {name}");
        lanes.decrypt(&mut jobs(&expanded, specs, &mut data));
        prop_assert!(data == plain, "decryption by {name}");
    }
    Ok(())
}

/// A batch that is small enough for miri, which checks the memory accesses of the plain kernels and of the scheduler.
#[test]
fn a_batch_of_each_algorithm_with_refilled_lanes_comes_back() {
    let algorithms = [Algorithm::Blowfish, Algorithm::Idea, Algorithm::IdeaLittle];
    let keys: Vec<_> = algorithms.iter().zip([[1; KEY], [2; KEY], [3; KEY]]).map(|(a, k)| (*a, k)).collect();
    let spec = |i: usize| Spec { key: i, iv: [i as u8; BLOCK], offset: i % 5, len: i % 4 * BLOCK + i % 3 };
    let specs: Vec<_> = (0..40).map(spec).collect();
    agrees(&mut engines(), &keys, &specs, 0).expect("the same as the plain ciphers");
}

/// The keys of one part of a batch must not affect the next part.
#[test]
fn batches_of_any_number_of_keys_come_back() {
    let mut engines = engines();
    for count in [2, 7, 9, 15, 17, 23, 40, 64] {
        let keys: Vec<_> = (0..count).map(|i| (Algorithm::Blowfish, [i as u8; KEY])).collect();
        let spec = |i: usize| Spec { key: i * i, iv: [i as u8; BLOCK], offset: 0, len: (3 + i % 2) * BLOCK };
        let specs: Vec<_> = (0..100).map(spec).collect();
        agrees(&mut engines, &keys, &specs, 0).expect("the same as the plain ciphers");
    }
}

#[test]
fn every_kernel_passes_every_vector_of_the_original() {
    let text = include_str!("../../../tests/vectors/cipe-v3.json");
    let vectors: serde_json::Value = serde_json::from_str(text).expect("the vectors are JSON");
    let cases = vectors["cases"].as_array().expect("an array of cases");
    let mut seen = 0;
    let mut engines = engines();
    for case in cases {
        let octets = |name: &str| hex::decode(case[name].as_str().expect("hex digits")).expect("hex digits");
        let algorithm = match case["cipher_variant"].as_str() {
            Some("le32-words") => Algorithm::Blowfish,
            Some("standard-be16") => Algorithm::Idea,
            Some("le16-words") => Algorithm::IdeaLittle,
            _ => continue,
        };
        seen += 1;
        let key = Key::new(algorithm, &octets("key_hex").try_into().expect("16 octets"));
        let wire = octets("wire_hex");
        let (iv, cipher) = wire.split_first_chunk::<BLOCK>().expect("an IV");
        let inner = ["plaintext_hex", "padding_hex", "P_hex", "crc32_hex"].map(octets).concat();
        for (name, lanes) in &mut engines {
            // Alone, and as one of many.
            for copies in [1, 70] {
                let mut data = vec![inner.clone(); copies];
                let mut jobs: Vec<_> = data.iter_mut().map(|data| Job { key: &key, iv: *iv, data }).collect();
                lanes.encrypt(&mut jobs);
                assert!(jobs.iter().all(|job| job.data == cipher), "encryption of {} by {name}", case["name"]);
                lanes.decrypt(&mut jobs);
                assert!(jobs.iter().all(|job| job.data == inner), "decryption of {} by {name}", case["name"]);
            }
        }
    }
    assert_eq!(seen, cases.len(), "a case has an unknown variant");
}
