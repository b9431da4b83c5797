//! The daemon: options, key exchange, scripts; one process per tunnel.
//!
//! Knows the engine through `control` only. May import `wire`, `control` and, for zones and guard routes, `kernel`; imported
//! by `cli`.

mod attach;
pub mod daemon;
pub mod exchange;
pub mod guard;
pub mod health;
mod heartbeat;
pub mod identity;
pub mod memory;
pub mod options;
mod peer_name;
pub mod scripts;
pub mod sealing;
pub mod session;
pub mod setup;
pub mod socks;
