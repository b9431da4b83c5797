//! Rings and queues over plain memory, where the test acts as the kernel; and sockets on real devices.

mod frames;
mod heap;
pub(crate) mod net;
pub(crate) mod program;
mod queue;
mod ring;
mod sockets;
