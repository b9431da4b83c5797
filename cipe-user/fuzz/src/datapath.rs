//! Two datapaths: whatever comes, each frame of memory is back afterwards and each packet under one verdict.

/// Runs one input.
pub fn run(input: &[u8]) {
    cipe_user::engine::pair::run(input);
}
