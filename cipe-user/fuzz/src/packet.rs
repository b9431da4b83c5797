//! Any payload is opened as it was sealed; any datagram gets a verdict, and `cipe decode` can show it.

use arbitrary::Arbitrary;
use cipe_user::cipher::{Algorithm, Key, Lanes};
use cipe_user::cli::decode::decode;
use cipe_user::inner::ip;
use cipe_user::wire::packet::{self, Ends, IV, KeyKind, Type};

use crate::read;

#[derive(Arbitrary, Debug)]
struct Case {
    key: [u8; 16],
    iv: [u8; 8],
    filler: [u8; 7],
    which: u8,
    control: bool,
    dynamic: bool,
    octets: Vec<u8>,
}

/// Runs one input.
pub fn run(input: &[u8]) {
    let Some(case) = read::<Case>(input) else { return };
    let algorithm = [Algorithm::Blowfish, Algorithm::Idea, Algorithm::IdeaLittle][usize::from(case.which % 3)];
    let key = Key::new(algorithm, &case.key);
    let mut lanes = Lanes::new();
    let kind = if case.control { Type::Control } else { Type::Data };
    let flag = if case.dynamic { KeyKind::Dynamic } else { KeyKind::Static };
    let octets = &case.octets;

    let mut sealed = vec![0; packet::sealed_len(octets.len())];
    sealed[IV..IV + octets.len()].copy_from_slice(octets);
    let len = packet::seal(&mut lanes, &key, &mut sealed, octets.len(), kind, flag.mark(case.iv), case.filler);
    assert_eq!(len, sealed.len());
    assert_eq!(KeyKind::of(sealed[0]), flag);
    let shown = decode(Some(&key), &sealed);
    let _ = (shown.verdict(), shown.to_string());
    if ip::check(octets).is_ok() && !case.control {
        let mut ends = Ends::of(&sealed).expect("a sealed packet has ends");
        lanes.decrypt(&mut ends.jobs(&key));
        assert!(ends.are_possible(true));
    }
    assert_eq!(packet::open(&mut lanes, &key, &mut sealed), Ok((kind, &**octets)));

    let _ = packet::unframe(octets);
    if let Some(mut ends) = Ends::of(octets) {
        lanes.decrypt(&mut ends.jobs(&key));
        let _ = ends.are_possible(case.dynamic);
    }
    let _ = decode(Some(&key), octets).to_string();
    let mut raw = octets.clone();
    if let Ok((_, payload)) = packet::open(&mut lanes, &key, &mut raw) {
        assert!(payload.len() < octets.len());
    }
}
