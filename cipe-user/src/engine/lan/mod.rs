//! The short cut of gateways: which opened packets go straight out of a LAN card, and how a router changes them.
//!
//! What the kernel would do to a plain packet is done here; any other is left to it. Its counterpart for the other direction
//! is the program of LAN cards, which judges by the same table. Knows no sockets: the worker sends, the manager makes tables.

mod exits;
mod hop;
mod table;

pub use exits::Exits;
pub use hop::{count_hop, plain};
pub use table::{Exit, LanPort, LanTable, ShortCutTarget};
