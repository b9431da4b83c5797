//! AF_XDP in Rust alone: UMEM, rings and sockets. All unsafe code for AF_XDP is here: mappings in `map.rs`, chunks in
//! `umem.rs`, one socket option in `socket.rs`.
//!
//! One worker owns one [`Umem`], its [`Pool`] of free frames, and a [`Socket`] for each device queue that it serves.
//! All sockets use the same UMEM, so a frame that one device received is changed in place and transmitted on another. A
//! [`Frame`] is the right to use one chunk; it is always in exactly one place: a pool, a packet, or a socket.
//!
//! Does not know packet contents, eBPF or tunnels; imports no other module of this crate. Imported by `engine`.
//!
//! Kernel features, and what happens without them:
//! - UMEM for several devices: 5.10. Older kernels refuse the second socket.
//! - [`MultiBuffer`] (`XDP_USE_SG`): 6.6. Older kernels refuse the bind, and so do many drivers with zero copy;
//!   [`has_multi_buffer`] asks the kernel.
//! - Large transmit batches in copy mode (`XDP_MAX_TX_SKB_BUDGET`): 6.17. Older kernels take 32 packets a system call,
//!   and [`Socket::kick`] repeats it.
//! - Zero copy: needs support of the driver; otherwise [`Mode::Auto`] uses copy mode.
//!
//! The cost of a socket, measured on kernel 6.18 with 16,384 frames: about 1.2 MiB of kernel memory (80 octets a frame
//! of its UMEM), 1 ms to bind, and 14 ms to close, most of it an RCU grace period.

mod bind;
mod config;
mod error;
mod frames;
mod held;
mod injector;
mod map;
mod probe;
mod queue;
mod registration;
mod ring;
mod rings;
mod socket;
mod umem;

pub use config::{Mode, MultiBuffer, SocketConfig};
pub use error::Error;
pub use frames::{Frame, Packet, Pool};
pub use held::Held;
pub use injector::Injector;
pub use probe::{has_multi_buffer, has_udp_superframes};
pub use queue::Anomalies;
pub use socket::{Closed, Kick, Socket, Statistics};
pub use umem::{PACKET_HEADROOM, Umem, UmemConfig};

#[cfg(test)]
pub(crate) mod tests;
