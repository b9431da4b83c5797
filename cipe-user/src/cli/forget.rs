//! `cipe forget`: a peer's clock went back.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};

use crate::ciped::memory::{self, MemoryFile};
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

Examples:
  cipe forget /etc/cipe/gateway-b
  cipe forget cipcb0";

/// Removes what is known of the peers of some tunnels.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let directory = run_dir::state_directory();
    for tunnel in &args.tunnels {
        let file = find(&directory, tunnel)?;
        if !file.forget()? {
            bail!("{}: nothing is remembered of this tunnel's peer", tunnel.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The file of a tunnel.
fn find(directory: &Path, tunnel: &Path) -> anyhow::Result<MemoryFile> {
    let of_option_file = MemoryFile::new(directory, &memory::file_name(Some(tunnel), ""));
    if of_option_file.exists() {
        return Ok(of_option_file);
    }
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries.collect::<Result<Vec<_>, _>>().with_context(|| directory.display().to_string())?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| directory.display().to_string()),
    };
    let mut known = Vec::new();
    for entry in entries {
        let file = MemoryFile::new(directory, &entry.file_name());
        // A damaged file has no device; its option file still names it.
        let Ok(Some(memory)) = file.read() else { continue };
        if Path::new(&memory.device) == tunnel {
            return Ok(file);
        }
        known.push(memory.device);
    }
    known.sort();
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    bail!(
        "{}: no such tunnel; {}; give an option file or one of these interfaces: {known}",
        tunnel.display(),
        directory.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ciped::exchange::TakenKeys;
    use crate::ciped::memory::Memory;

    #[test]
    fn a_tunnel_is_found_by_its_option_file_and_its_device() {
        let base = tempfile::tempdir().unwrap();
        let write = |option_file: &str, device: &str| {
            let file = MemoryFile::new(base.path(), &memory::file_name(Some(Path::new(option_file)), ""));
            file.write(&Memory::new(device, None, &TakenKeys::new([0; 16]))).unwrap();
            file
        };
        let (a, b) = (write("/etc/cipe/a", "cipcb0"), write("/etc/cipe/b", "cipcb1"));
        assert_eq!(find(base.path(), Path::new("/etc/cipe/a")).unwrap(), a);
        assert_eq!(find(base.path(), Path::new("cipcb1")).unwrap(), b);
        let error = find(base.path(), Path::new("cipcb2")).unwrap_err().to_string();
        assert!(error.contains("cipcb2: no such tunnel") && error.contains("cipcb0, cipcb1"), "{error}");
        let error = find(&base.path().join("none"), Path::new("x")).unwrap_err().to_string();
        assert!(error.contains("none"), "{error}");
    }
}
