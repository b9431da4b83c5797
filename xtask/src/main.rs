//! Builds, runs, tests and measures the project: `cargo xtask help`.

mod build_ebpf;

use std::process::ExitCode;

use clap::Parser;

/// Builds, runs, tests and measures the project.
#[derive(Parser)]
#[command(name = "cargo xtask")]
enum Command {
    /// Build the eBPF object (cipe-ebpf/prebuilt) from its sources
    BuildEbpf(build_ebpf::Args),
}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::BuildEbpf(args) => build_ebpf::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
