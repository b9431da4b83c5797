//! What daemon and engine say to each other over the control socket, the image of the old ioctls, and how the first
//! daemon starts the engine.
//!
//! Knows no packets and no keys' use. May import `cipher` for names; imported by `engine`, `ciped` and `cli`.

pub mod channel;
pub mod client;
pub mod launch;
pub mod lock;
pub mod protocol;
pub mod run_dir;
pub mod server;
