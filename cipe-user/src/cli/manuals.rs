//! Manual pages and shell completions, generated from the command lines.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::ciped::options::Program;

/// Arguments of `cipe completions`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cipe completions bash >/usr/share/bash-completion/completions/cipe
  cipe completions --program ciped-cb bash >/usr/share/bash-completion/completions/ciped-cb")]
pub(super) struct CompletionArgs {
    /// Program: ciped-cb, ciped-ci, ciped-db or ciped-di; by default cipe.
    #[arg(long, value_name = "NAME", value_parser = super::ciped::program)]
    program: Option<Program>,
    /// Shell.
    shell: Shell,
}

/// Arguments of `cipe manuals`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cipe manuals /usr/local/share/man/man8 && man cipe-show")]
pub(super) struct Args {
    /// Existing folder for the pages.
    folder: PathBuf,
}

fn command_of(program: Option<Program>) -> (Command, &'static str) {
    match program {
        None => (super::Cli::command(), "cipe"),
        Some(program) => (super::ciped::Args::command().name(program.name()), program.name()),
    }
}

/// Prints a completion script.
pub(super) fn complete(args: &CompletionArgs) -> anyhow::Result<ExitCode> {
    let (mut command, name) = command_of(args.program);
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, name, &mut script);
    std::io::stdout().write_all(&script)?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a page for `cipe`, each of its commands, and each daemon.
pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    for (name, page) in pages()? {
        let path = args.folder.join(format!("{name}.8"));
        fs::write(&path, page).with_context(|| format!("{}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Names and texts, all of section 8: the commands need root, or describe programs that do.
fn pages() -> std::io::Result<Vec<(String, Vec<u8>)>> {
    let mut pages = Vec::new();
    for program in std::iter::once(None).chain(Program::ALL.map(Some)) {
        let (command, name) = command_of(program);
        for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
            let name = format!("{name}-{}", command.get_name());
            pages.push((name.clone(), page(command.clone().name(name))?));
        }
        pages.push((name.to_owned(), page(command)?));
    }
    Ok(pages)
}

fn page(command: Command) -> std::io::Result<Vec<u8>> {
    let command = command.version(env!("CARGO_PKG_VERSION")).disable_help_subcommand(true);
    let mut text = Vec::new();
    Man::new(command).section("8").manual("CIPE").render(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_and_each_daemon_have_a_page_of_their_own() {
        let pages = pages().unwrap();
        let names: Vec<&str> = pages.iter().map(|(name, _)| name.as_str()).collect();
        for name in [
            "cipe",
            "cipe-show",
            "cipe-top",
            "cipe-check",
            "cipe-doctor",
            "ciped-cb",
            "ciped-ci",
            "ciped-db",
            "ciped-di",
        ] {
            assert!(names.contains(&name), "{name}: {names:?}");
        }
        for (name, page) in &pages {
            let page = String::from_utf8(page.clone()).unwrap();
            assert!(page.contains(&format!(".TH {name} 8")), "{name}: {page}");
        }
        let daemon = pages.iter().find(|(name, _)| name == "ciped-cb").map(|(_, page)| page.clone()).unwrap();
        assert!(String::from_utf8(daemon).unwrap().contains("ptpaddr"), "its options are told");
    }

    #[test]
    fn every_shell_gets_a_script() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            for program in [None, Some(Program::Cb)] {
                let (mut command, name) = command_of(program);
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut command, name, &mut script);
                assert!(String::from_utf8(script).unwrap().contains(name), "{shell}");
            }
        }
    }
}
