//! Rings and queues over plain memory, with the test as the kernel; and sockets on real devices.

mod frames;
mod heap;
pub(crate) mod net;
pub(crate) mod program;
mod queue;
mod ring;
mod sockets;
