//! The short cut of gateways: which decrypted packets leave directly by a LAN card, and what is changed in them.
//!
//! The short cut treats a plain packet as the kernel would; the kernel forwards all others. For the opposite direction,
//! the program of LAN cards uses the same table. This module knows no sockets: the worker sends, and the manager makes
//! the tables.

mod exits;
mod hop;
mod table;

pub use exits::Exits;
pub use hop::{count_hop, plain};
pub use table::{Exit, LanPort, LanTable, ShortCutTarget};
