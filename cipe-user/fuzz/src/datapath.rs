//! Two datapaths: whatever comes, each frame of memory is back afterwards, each datagram is under one verdict, and each private
//! frame under one for each of its packets at least.

/// Runs one input.
pub fn run(input: &[u8]) {
    cipe_user::engine::pair::run(input);
}
