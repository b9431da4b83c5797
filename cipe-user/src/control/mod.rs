//! The messages between daemon and engine over the control socket, which replaces the old ioctls; and how the first
//! daemon starts the engine.
//!
//! Knows nothing of packets and of the use of keys. May import `cipher` for names; imported by `engine`, `ciped` and
//! `cli`.

pub mod channel;
pub mod client;
pub mod launch;
pub mod lock;
pub mod protocol;
pub mod run_dir;
mod secret;
pub mod server;
pub mod small_file;
pub mod watch;
