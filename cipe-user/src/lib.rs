//! CIPE for today's Linux: an encrypted tunnel that is compatible with the kernel modules and daemons of CIPE 1.5.
//!
//! # The house
//!
//! A room imports only rooms that stand below it.
//!
//! ```text
//!                     cli          what people type: show, top, doctor, check, decode, genkey
//!        ┌─────────────┴─────────────┐
//!      ciped                       engine         one process a tunnel    │  one process for all tunnels
//!      options, key exchange,      manager        control thread: devices, maps, routes, connections
//!      scripts                     worker         a thread for I/O: sockets, epoll, doors
//!        │                         datapath       packets, without a descriptor: check, seal, open, deliver
//!        └────────── control ──────────┘          the protocol between the two
//!      wire   sealed               kernel         layout and messages, by protocol  │  eBPF loader, links, routes, keys in maps
//!      inner   xsk   cipher   repeats             inside IP packets  │  AF_XDP  │  ciphers, many packets wide  │  log lines
//! ```
//!
//! # Words
//!
//! - **carrier**: the network between the gateways, and the card that leads there; **private side**: the tunnel's
//!   device.
//! - **door**: a path for datagrams to and from the carrier: AF_XDP on a card, live frames, or the tunnel's UDP socket.
//! - **hub**: a veth pair of the engine; the devices of tunnels are macvlans on its visible end, the engine uses its
//!   hidden end.
//! - **superframe**: one frame of up to 64 KiB that stands for many segments (TSO, USO, GRO).
//! - **stamp**: the data for the engine that the TC program writes over a frame's destination address: tunnel, segment
//!   size, checksum state.
//! - **lane**: the place of one packet among those that a cipher kernel works on at once.
//! - **live frames**: frames that an XDP program transmits when the engine runs it (BPF_PROG_RUN), without socket
//!   buffers.
//! - **short cut**: the path of packets between a tunnel and a LAN card that bypasses the kernel's forwarding (option
//!   `lan`).
//! - **verdict**: the result for a packet; each packet is counted under one.
//! - **original**: an implementation of 1996 to 2004, or one that behaves like it; **ours**: this program at the other end.

#![cfg_attr(
    not(feature = "harness"),
    allow(unreachable_pub, reason = "the fuzz targets and benchmarks reach some items through the feature `harness`")
)]

pub mod ciped;
pub mod cipher;
pub mod cli;
pub mod control;
pub mod engine;
pub mod inner;
pub mod kernel;
pub mod repeats;
pub mod sealed;
pub mod wire;
pub mod xsk;
