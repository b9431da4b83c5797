//! The command line for people: `cipe` and its commands, and the daemons `ciped-cb`, `ciped-ci`, `ciped-db` and
//! `ciped-di`.
//!
//! May import everything; imported by `main` only. Every error is one line on stderr, `program: what; where; how to
//! fix`, and exit code 1.

pub mod bench_cipher;
mod check;
mod ciped;
pub mod decode;
mod doctor;
mod down;
mod engine;
mod forget;
mod genkey;
mod logging;
mod manuals;
mod process;
mod show;
mod status;
mod top;
mod unguard;
mod vectors;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::ciped::options::{self, Program};

/// CIPE for today's Linux: encrypted IP or Ethernet in UDP, protocols 3 and 4.
#[derive(Debug, Parser)]
#[command(name = "cipe", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  cipe genkey                               make a static key for both ends
  cipe doctor                               what this machine offers, and what it lacks
  cipe check /etc/cipe/gateway-b            what an option file means, and what is wrong with it
  ciped-cb -o /etc/cipe/gateway-b           bring a tunnel up (Blowfish; ciped-ci for IDEA)
  ciped-db -o /etc/cipe/site-b              the same for Ethernet frames (ciped-di for IDEA)
  ciped-cb -o /etc/cipe/gateway-b debug     the same in the foreground
  cipe show                                 tunnels, peers, keys, rates, counters
  cipe show cipcb0 --json                   for scripts
  cipe top                                  the same, live
  cipe down gateway-b                       end a tunnel, or remove one that its daemon has left behind
  cipe unguard gateway-b                    let packets for a tunnel that has ended take other routes";

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the tunnels of this network namespace.
    Show(show::Args),
    /// Watch the tunnels of this network namespace: packets, bits and drops per second.
    Top(top::Args),
    /// Explain option files and report their problems, without starting anything.
    Check(check::Args),
    /// End a tunnel, as SIGTERM to its daemon does, or remove one whose daemon has gone.
    Down(down::Args),
    /// Remove the guard routes of a tunnel that has ended.
    Unguard(unguard::Args),
    /// Check this machine for what would stop or slow down tunnels.
    Doctor(doctor::Args),
    /// Accept a peer whose clock went back.
    Forget(forget::Args),
    /// Print a new random static key.
    Genkey,
    /// Decrypt a captured carrier packet and show its contents.
    Decode(decode::Args),
    /// Seal and open the packets of a vector file, and compare.
    Vectors(vectors::Args),
    /// Run the daemon of one tunnel under one of its names.
    Ciped(ciped::NamedArgs),
    /// Measure the cipher kernels of this CPU.
    BenchCipher(bench_cipher::BenchCipher),
    /// Print a shell's completion script.
    Completions(manuals::CompletionArgs),
    /// Write the manual pages of all commands into a folder.
    Manuals(manuals::Args),
    /// Run the engine in the foreground; usually the first daemon starts it.
    Engine(engine::Args),
}

/// Runs the command in the arguments; `arguments[0]` is the program's name.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let name = arguments.first().map(OsString::as_os_str).unwrap_or_default();
    match Program::from_name(name.as_bytes()) {
        Some(program) => match parse::<ciped::Args>(program.name(), &arguments) {
            Ok(args) => finish(program.name(), ciped::run(program, args)),
            Err(code) => code,
        },
        None => match parse::<Cli>("cipe", &arguments) {
            Ok(cli) => run(cli.command),
            Err(code) => code,
        },
    }
}

fn run(command: Command) -> ExitCode {
    match command {
        Command::Show(args) => finish("cipe", show::run(args)),
        Command::Top(args) => finish("cipe", top::run(args)),
        Command::Check(args) => finish("cipe", check::run(args)),
        Command::Down(args) => finish("cipe", down::run(args)),
        Command::Unguard(args) => finish("cipe", unguard::run(args)),
        Command::Doctor(args) => finish("cipe", doctor::run(args)),
        Command::Forget(args) => finish("cipe", forget::run(args)),
        Command::Genkey => finish("cipe", genkey::run()),
        Command::Decode(args) => finish("cipe", decode::run(args)),
        Command::Vectors(args) => finish("cipe", vectors::run(args)),
        Command::Ciped(named) => finish(named.program.name(), ciped::run(named.program, named.args)),
        Command::BenchCipher(args) => finish("cipe", bench_cipher::run(&args).map(|()| ExitCode::SUCCESS)),
        Command::Completions(args) => finish("cipe", manuals::complete(&args)),
        Command::Manuals(args) => finish("cipe", manuals::run(&args)),
        Command::Engine(args) => finish("cipe", engine::run(args)),
    }
}

fn finish(program: &str, outcome: anyhow::Result<ExitCode>) -> ExitCode {
    outcome.unwrap_or_else(|error| {
        eprintln!("{program}: {error:#}");
        ExitCode::FAILURE
    })
}

/// As clap's own parser, but with errors on one line and exit code 1.
fn parse<T: CommandFactory + FromArgMatches>(program: &'static str, arguments: &[OsString]) -> Result<T, ExitCode> {
    let command = T::command().name(program).bin_name(program);
    let parsed = command.try_get_matches_from(arguments).and_then(|matches| T::from_arg_matches(&matches));
    parsed.map_err(|error| {
        let asked_for = matches!(
            error.kind(),
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
        );
        if asked_for {
            // If stdout is closed, nobody reads the text.
            let _ = error.print();
            return if error.exit_code() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
        let text = error.render().to_string();
        let what: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
        let what = what.join(" ");
        // A key on the command line must not be shown either.
        let what = options::masked(what.trim_start_matches("error: "));
        eprintln!("{program}: {what}; command line; see {program} --help");
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_lines_are_consistent() {
        Cli::command().debug_assert();
        ciped::Args::command().debug_assert();
    }

    #[test]
    fn the_old_command_line_of_the_daemon_is_understood() {
        let arguments =
            ["ciped-cb", "-o", "/etc/cipe/b", "peer=192.0.2.2:6789", "maxerr=-1", "debug"].map(OsString::from);
        let args = parse::<ciped::Args>("ciped-cb", &arguments).unwrap();
        assert_eq!(args.files, [std::path::PathBuf::from("/etc/cipe/b")]);
        assert_eq!(args.settings, ["peer=192.0.2.2:6789", "maxerr=-1", "debug"].map(OsString::from));
    }

    #[test]
    fn wrong_arguments_are_an_error_and_help_is_none() {
        assert!(parse::<ciped::Args>("ciped-cb", &["ciped-cb".into(), "--bogus".into()]).is_err());
        assert!(parse::<Cli>("cipe", &["cipe".into(), "bogus".into()]).is_err());
    }
}
