//! Finding and installing the programs of other tunnels.

use std::process::Command;

use anyhow::{Result, bail};

use super::program::{Need, Source, find, root};
use super::tunnel::Tunnel;
use crate::tools;

/// Missing programs of a tunnel.
pub(super) fn missing(tunnel: Tunnel) -> Vec<&'static Need> {
    tunnel.needs().iter().filter(|need| find(need.program).is_none()).collect()
}

/// The version of a tunnel's program; of the kernel for the kernel's tunnels.
pub(super) fn version(tunnel: Tunnel) -> String {
    let first = |text: &str| text.lines().find(|line| line.contains(|c: char| c.is_ascii_digit())).map(short);
    let Some(need) = tunnel.needs().first() else { return String::new() };
    let Some(path) = find(need.program) else { return String::new() };
    let Ok(output) = Command::new(path).args(need.version).output() else { return String::new() };
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    first(&out).or_else(|| first(&err)).unwrap_or_default()
}

/// The first word of a line that looks like a version.
fn short(line: &str) -> String {
    let is_version = |word: &&str| word.trim_start_matches('v').starts_with(|c: char| c.is_ascii_digit());
    line.split_whitespace().find(is_version).unwrap_or(line).trim_start_matches('v').to_owned()
}

/// Installs missing programs of the tunnels: Debian packages by apt-get, crates by `cargo install` under the target folder.
///
/// # Errors
/// apt-get or cargo fails.
pub(super) fn install(tunnels: &[Tunnel]) -> Result<()> {
    let mut packages = Vec::new();
    for need in tunnels.iter().flat_map(|&tunnel| missing(tunnel)) {
        match need.source {
            Source::Debian(package) => packages.push(package),
            Source::Crate(name) => {
                println!("Installing {name} into {} ...", root().display());
                let root = root();
                let mut install = tools::cargo(&["install", "--quiet", "--locked", name, "--root"]);
                tools::check(install.arg(root))?;
            }
        }
    }
    packages.dedup();
    tools::apt_install(&packages)
}

/// Leaves out tunnels whose programs are missing, or that the kernel does not have, and prints them; fails if such a tunnel was
/// asked for by name.
///
/// # Errors
/// A program is missing (with how to get it), or the kernel lacks the tunnel.
pub(super) fn runnable(tunnels: &[Tunnel], by_name: bool) -> Result<Vec<Tunnel>> {
    let mut found = Vec::new();
    for &tunnel in tunnels {
        match missing(tunnel)[..] {
            [] => match tunnel.lacking() {
                None => found.push(tunnel),
                Some(why) if by_name => bail!("{}: {why}", tunnel.name()),
                Some(why) => println!("left out: {} ({why})", tunnel.name()),
            },
            [need, ..] if by_name => bail!("{} needs {}; add --install", tunnel.name(), need.program),
            [need, ..] => {
                println!("left out: {} ({} is not installed; --install gets it)", tunnel.name(), need.program);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_found_in_what_programs_print() {
        assert_eq!(short("OpenVPN 2.6.14 x86_64-pc-linux-gnu [SSL (OpenSSL)]"), "2.6.14");
        assert_eq!(short("wireguard-go v0.0.20220316"), "0.0.20220316");
        assert_eq!(short("fastd v22"), "22");
    }
}
