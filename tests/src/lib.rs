//! Network namespaces, traffic, and a second implementation of the wire, for scenarios, `xtask run` and benches.

pub mod peer;
