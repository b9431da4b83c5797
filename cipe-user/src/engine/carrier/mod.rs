//! Doors to the carrier network that are not AF_XDP: the tunnel's own UDP socket.
//!
//! Knows datagrams and sockets; knows no keys and no frames. Imported by the tunnel and its worker.

pub mod losses;
mod sight;
mod udp;

pub use sight::Sight;
pub use udp::{Inbox, UdpCarrier};
