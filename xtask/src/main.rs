//! Builds, runs, tests and measures the project: `cargo xtask help`.

mod build_ebpf;
mod fuzz;
mod package;
mod run;
mod test;
mod tools;

<<<<<<< HEAD
use clap::{Parser, Subcommand};
=======
use std::process::ExitCode;

use clap::Parser;
>>>>>>> ebpf

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, runs, tests and measures the project", disable_version_flag = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes two LANs and two gateways in network namespaces and shows the tunnel at work
    Run(run::Args),
    /// Builds the eBPF object (cipe-ebpf/prebuilt) from its sources
    BuildEbpf(build_ebpf::Args),
    /// Runs every check: format, lints, eBPF build, unit tests, scenarios, documentation
    Test(test::Args),
    /// Runs the fuzz targets, each for a while
    Fuzz(fuzz::Args),
    /// Puts what a gateway needs into one folder
    Package(package::Args),
}

<<<<<<< HEAD
fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Run(args) => run::run(args),
        Command::BuildEbpf(args) => build_ebpf::run(&args),
        Command::Test(args) => test::run(args),
        Command::Fuzz(args) => fuzz::run(args),
        Command::Package(args) => package::run(args),
=======
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
>>>>>>> ebpf
    }
}
