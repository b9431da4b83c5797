//! Inner packets that are larger than the tunnel takes: how large that is, what their sender is told, and the cutting
//! of those that may be cut before they are sealed (protocol section 4, "Path MTU").
//!
//! Pure functions over slices. Any octets give an answer, none a panic.

mod bucket;
mod fragment;
mod message;
mod mtu;

pub use bucket::Bucket;
pub use fragment::Fragments;
pub use message::Message;
pub use mtu::TunnelMtu;
