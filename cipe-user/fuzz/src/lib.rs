//! The fuzz targets. libFuzzer calls these functions by `fuzz_targets/`; `cargo test` replays `corpus/`.

use arbitrary::{Arbitrary, Unstructured};

pub mod carrier;
pub mod coalesce;
pub mod control;
pub mod datapath;
pub mod exchange;
pub mod headers;
pub mod lanes;
pub mod message;
pub mod options;
pub mod packet;
pub mod sealed_handshake;
pub mod sealed_packet;
pub mod segment;
pub mod socks;

/// Runs one input; panics if something is wrong.
pub type Run = fn(&[u8]);

/// Every target by name, which is also the name of its folder of inputs.
pub const TARGETS: [(&str, Run); 14] = [
    ("carrier", carrier::run),
    ("coalesce", coalesce::run),
    ("control", control::run),
    ("datapath", datapath::run),
    ("exchange", exchange::run),
    ("headers", headers::run),
    ("lanes", lanes::run),
    ("message", message::run),
    ("options", options::run),
    ("packet", packet::run),
    ("sealed_handshake", sealed_handshake::run),
    ("sealed_packet", sealed_packet::run),
    ("segment", segment::run),
    ("socks", socks::run),
];

/// Decodes an input; `None` if it is too short.
fn read<'a, T: Arbitrary<'a>>(input: &'a [u8]) -> Option<T> {
    T::arbitrary_take_rest(Unstructured::new(input)).ok()
}
