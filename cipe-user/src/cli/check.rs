//! `cipe check`.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::ciped::options::{self, Options, Program, SealedPolicy, Severity, Sources};
use crate::control::protocol::Protocol;

/// Arguments of `cipe check`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cipe check /etc/cipe/gateway-b
  cipe check --program ciped-ci /etc/cipe/*")]
pub(super) struct Args {
    /// Option files; each is read like `-o FILE` of a daemon, after /etc/cipe/options.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Name that the daemon would run under: ciped-cb, ciped-ci, ciped-db or ciped-di.
    #[arg(long, value_name = "NAME", default_value = "ciped-cb", value_parser = super::ciped::program)]
    program: Program,
}

/// Prints effective values, their origins and all problems; exits with 1 if a problem is an error.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut good = true;
    for file in args.files {
        let sources = Sources::new(args.program, vec![std::path::absolute(file)?], Vec::new());
        let (text, passed) = report(&sources);
        print!("{text}");
        good &= passed;
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn report(sources: &Sources) -> (String, bool) {
    let (draft, problems) = options::load(sources);
    let (settled, problems) = options::settle(&draft, problems);
    let mut text = String::new();
    let mut line = |args: std::fmt::Arguments<'_>| {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{args}");
    };
    let files: Vec<_> = sources.files.iter().map(|file| file.display().to_string()).collect();
    line(format_args!("{} ({})", files.join(" "), sources.program.name()));
    let effective = draft.effective();
    let width = effective.iter().map(|(_, value, _)| value.chars().count()).max().unwrap_or(0).min(40);
    for (name, value, origin) in effective {
        line(format_args!("  {name:<10}  {value:<width$}  {origin}"));
    }
    if let Some(options) = &settled {
        let what = match options.protocol {
            Protocol::Ip => "IP packets",
            Protocol::Ethernet => "Ethernet frames",
        };
        line(format_args!("  protocol {}: {what}, interface {}N", options.protocol.number(), options.prefix()));
        let shown = |end: &options::Endpoint| match end.address.to_string() {
            address if address == end.text => address,
            address => format!("{address} ({})", options::masked(&end.text)),
        };
        let socks =
            options.socks.as_ref().map_or_else(String::new, |(name, address)| format!(", by {address} ({name})"));
        line(format_args!("  resolved: me {}, peer {}{socks}", shown(&options.me), shown(&options.peer)));
        let who = match options.interface.configure {
            true => "the daemon sets the interface's addresses",
            false => "ip-up sets the interface's addresses, because of `ifconfig`",
        };
        line(format_args!("  {who}"));
        line(format_args!("  {}", sealed(options)));
    }
    for problem in &problems {
        match problem.severity {
            Severity::Error => line(format_args!("error: {problem}")),
            Severity::Warning => line(format_args!("warning: {problem}")),
        }
    }
    line(format_args!("{}", if settled.is_some() { "ok" } else { "not usable" }));
    (text, settled.is_some())
}

/// What `sealed` comes to.
fn sealed(options: &Options) -> &'static str {
    match options.sealed {
        _ if options.key.is_none() => "packets are not sealed, without a key",
        SealedPolicy::Auto => {
            "packets are sealed if the peer is this program and does the same; then, and until `cipe forget`, it must"
        }
        SealedPolicy::Require => "packets are sealed, and all others dropped: the peer must be this program",
        SealedPolicy::No => {
            "packets are not sealed, because of `sealed no`: protocol 3 and what it protects (docs/SECURITY.md)"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_reported_with_everything_else() {
        let sources = Sources {
            program: Program::Ci,
            guard: None,
            system: "/nonexistent/cipe/options".into(),
            files: vec!["/nonexistent/cipe/b".into()],
            arguments: Vec::new(),
        };
        let (text, passed) = report(&sources);
        assert!(!passed);
        for part in
            ["/nonexistent/cipe/b (ciped-ci)", "  mtu ", "called as ciped-ci", "error: option file", "not usable"]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
