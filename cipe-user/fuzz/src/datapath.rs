//! Two datapaths: after any input, all frames of memory are back, each datagram has one verdict, and each private frame
//! has at least one for each of its packets.

/// Runs one input.
pub fn run(input: &[u8]) {
    cipe_user::engine::pair::run(input);
}
