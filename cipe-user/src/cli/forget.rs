//! `cipe forget`: a peer's clock went back, or a peer that was sealed is an original now.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};

use crate::ciped::memory::{self, Memory, MemoryFile};
use crate::control::run_dir;

/// Names of tunnels.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Option file or interface of the tunnel
    #[arg(required = true, value_name = "FILE|DEVICE")]
    tunnels: Vec<PathBuf>,
}

const EXAMPLES: &str =
    "A daemon drops key exchange messages that are older than others of the same peer: somebody may have recorded
them. If the peer's clock was ahead and was set back, its log says so until this command was given.

A tunnel that was sealed never goes back to protocol 3 by itself. If the peer is an original now, this command allows that once: make
sure first that it is, since whoever drops packets on the path can make it look so.

Examples:
  cipe forget /etc/cipe/gateway-b
  cipe forget cipcb0";

/// Removes what is known of the peers of some tunnels.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let directory = run_dir::state_directory();
    let namespace = run_dir::namespace().context("own network namespace not found; is /proc mounted?")?;
    for tunnel in &args.tunnels {
        let mut forgot = false;
        for file in find(&directory, tunnel, namespace)? {
            forgot |= file.forget()?;
        }
        if !forgot {
            bail!("{}: nothing is remembered of this tunnel's peer", tunnel.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The files of a tunnel. Tunnels of several network namespaces may have this name: those that ran last in this one are meant, or, if
/// there is none, all of them.
fn find(directory: &Path, tunnel: &Path, namespace: u64) -> anyhow::Result<Vec<MemoryFile>> {
    let option_file = tunnel.file_name().map(|name| name.to_string_lossy().into_owned());
    let of_option_file = MemoryFile::namesakes(directory, &memory::file_name(Some(tunnel), ""));
    // A damaged file has no option file and no device; its name still is the option file's.
    let of_option_file = of_option_file.filter(MemoryFile::exists).map(|file| (file.read().ok().flatten(), file));
    let is_meant = |memory: &Option<Memory>| {
        let other = memory.as_ref().and_then(|memory| memory.tunnel.as_ref());
        other.is_none_or(|other| Some(&other.name) == option_file.as_ref())
    };
    let mut found: Vec<(Option<Memory>, MemoryFile)> = of_option_file.filter(|(memory, _)| is_meant(memory)).collect();
    let mut known = Vec::new();
    if found.is_empty() {
        for file in all(directory)? {
            let Ok(Some(memory)) = file.read() else { continue };
            known.push(memory.device.clone());
            if Path::new(&memory.device) == tunnel {
                found.push((Some(memory), file));
            }
        }
    }
    if found.is_empty() {
        known.sort();
        known.dedup();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        bail!(
            "{}: no such tunnel; {}; give an option file or one of these interfaces: {known}",
            tunnel.display(),
            directory.display()
        )
    }
    let is_here = |memory: &Option<Memory>| memory.as_ref().is_some_and(|memory| memory.namespace == Some(namespace));
    if found.iter().any(|(memory, _)| is_here(memory)) {
        found.retain(|(memory, _)| is_here(memory));
    }
    Ok(found.into_iter().map(|(_, file)| file).collect())
}

/// The files of all tunnels.
fn all(directory: &Path) -> anyhow::Result<Vec<MemoryFile>> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries.collect::<Result<Vec<_>, _>>().with_context(|| directory.display().to_string())?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| directory.display().to_string()),
    };
    Ok(entries.iter().map(|entry| MemoryFile::new(directory, &entry.file_name())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ciped::exchange::TakenKeys;
    use crate::ciped::identity::Identity;
    use crate::control::small_file::Flush;

    /// Inode of a network namespace.
    const HERE: u64 = 7;

    fn write(file: &MemoryFile, device: &str, option_file: &str, namespace: u64) {
        let [ipaddr, ptpaddr] = [[10, 0, 0, 1], [10, 0, 0, 2]].map(std::net::IpAddr::from);
        let tunnel = Identity { name: option_file.to_owned(), prefix: "cipcb".to_owned(), ipaddr, ptpaddr };
        let mut memory = Memory::new(device, None, &TakenKeys::new([0; 16]));
        (memory.tunnel, memory.namespace) = (Some(tunnel), Some(namespace));
        file.write(&memory, Flush::Yes).unwrap();
    }

    fn found(base: &Path, tunnel: &str) -> Vec<String> {
        let files = find(base, Path::new(tunnel), HERE).unwrap();
        files.iter().map(|file| file.path().file_name().unwrap().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_tunnel_is_found_by_its_option_file_and_its_device() {
        let base = tempfile::tempdir().unwrap();
        for (name, device) in [("a", "cipcb0"), ("b", "cipcb1")] {
            let path = format!("/etc/cipe/{name}");
            let file = MemoryFile::new(base.path(), &memory::file_name(Some(Path::new(&path)), ""));
            write(&file, device, name, HERE);
        }
        assert_eq!(found(base.path(), "/etc/cipe/a"), ["etc-cipe-a.json"]);
        assert_eq!(found(base.path(), "cipcb1"), ["etc-cipe-b.json"]);
        let error = find(base.path(), Path::new("cipcb2"), HERE).unwrap_err().to_string();
        assert!(error.contains("cipcb2: no such tunnel") && error.contains("cipcb0, cipcb1"), "{error}");
        let error = find(&base.path().join("none"), Path::new("x"), HERE).unwrap_err().to_string();
        assert!(error.contains("none"), "{error}");
    }

    #[test]
    fn of_tunnels_with_one_name_that_of_this_network_namespace_is_meant() {
        let base = tempfile::tempdir().unwrap();
        let mut files = MemoryFile::namesakes(base.path(), &memory::file_name(Some(Path::new("/etc/cipe/a")), ""));
        write(&files.next().unwrap(), "cipcb0", "a", HERE + 1);
        write(&files.next().unwrap(), "cipcb0", "a", HERE);
        // The second file of /etc/cipe/a may have the name of the first one of /etc/cipe/a.3.
        write(&files.next().unwrap(), "cipcb1", "a.3", HERE);
        for tunnel in ["/etc/cipe/a", "cipcb0"] {
            assert_eq!(found(base.path(), tunnel), ["etc-cipe-a.2.json"]);
        }
        assert_eq!(found(base.path(), "/etc/cipe/a.3"), ["etc-cipe-a.3.json"]);
        let elsewhere = find(base.path(), Path::new("/etc/cipe/a"), HERE + 5).unwrap();
        assert_eq!(elsewhere.len(), 2);
    }
}
