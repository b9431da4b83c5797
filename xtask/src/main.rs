//! Builds, runs, tests and measures the project: `cargo xtask help`.

fn main() {}
