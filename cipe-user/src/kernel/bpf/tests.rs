//! The programs under BPF_PROG_TEST_RUN.
use super::*;

#[test]
fn loads() {
    let programs = Programs::load(&LoadOptions { max_tunnels: 4, ..Default::default() }).unwrap();
    drop(programs);
    let programs = Programs::load(&LoadOptions::default()).unwrap_or_else(|e| panic!("{e}"));
    drop(programs);
}
