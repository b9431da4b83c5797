//! Builds, runs, tests and measures the project: `cargo xtask help`.

mod bench;
mod bench_cipher;
mod bench_datapath;
mod build_ebpf;
mod dependencies;
mod fuzz;
mod guest;
mod package;
mod run;
mod scenarios;
mod soak;
mod svg;
mod test;
mod tools;

use std::process::ExitCode;

use clap::Parser;

/// Builds, runs, tests and measures the project.
#[derive(Parser)]
#[command(name = "cargo xtask")]
enum Command {
    /// Make two LANs and two gateways in network namespaces, and show the tunnel at work
    Run(run::Args),
    /// Run every check: format, eBPF build, lints, dependencies, unit tests, scenarios, other kernels, documentation
    Test(test::Args),
    /// Build the eBPF object (cipe-ebpf/prebuilt) from its sources
    BuildEbpf(build_ebpf::Args),
    Dependencies(dependencies::Args),
    Scenarios(scenarios::Args),
    /// Let everything happen to a tunnel at random, and check that nothing leaves in clear and everything is counted
    Soak(soak::Args),
    /// Run the fuzz targets, each for a while
    Fuzz(fuzz::Args),
    /// Measure tunnels side by side: ours, other ones, the plain wire
    Bench(Box<bench::Args>),
    /// Draw the CPU time of a tunnel under load by function, as a flame graph
    Profile(bench::profile::Args),
    /// Run a command on another kernel, in qemu
    Guest(guest::command::Args),
    #[command(hide = true)]
    GuestInside(guest::inside::Args),
    /// Put the files for a gateway into one folder
    Package(package::Args),
}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Run(args) => run::run(&args),
        Command::Test(args) => test::run(&args),
        Command::BuildEbpf(args) => build_ebpf::run(&args),
        Command::Dependencies(args) => dependencies::run(&args),
        Command::Scenarios(args) => scenarios::run(&args),
        Command::Soak(args) => soak::run(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Profile(args) => bench::profile::run(&args),
        Command::Guest(args) => guest::command::run(&args),
        Command::GuestInside(args) => guest::inside::run(&args),
        Command::Package(args) => package::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
