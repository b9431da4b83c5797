//! The sources of the committed object.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use sha2::{Digest as _, Sha256};

use super::{OBJECT, SOURCES};

/// Sources of the object, relative to the root; for a folder, every file below it.
const INPUTS: [&str; 5] =
    ["cipe-common/Cargo.toml", "cipe-common/src", "cipe-ebpf/Cargo.lock", "cipe-ebpf/Cargo.toml", "cipe-ebpf/src"];

/// The list of hashes to commit: sources and the object, by path, as `sha256sum -c` reads it.
pub(super) fn listing(root: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    for (path, hash) in hashes(root)? {
        writeln!(text, "{hash}  {path}")?;
    }
    Ok(text)
}

/// Fails if the committed list does not match the files, with the first file that differs.
pub(super) fn check(root: &Path) -> anyhow::Result<()> {
    let committed = fs::read_to_string(root.join(SOURCES)).with_context(|| format!("reading {SOURCES}"))?;
    let committed: BTreeMap<&str, &str> =
        committed.lines().filter_map(|line| line.split_once("  ")).map(|(hash, path)| (path, hash)).collect();
    let current = hashes(root)?;
    let changed = current.iter().find(|(path, hash)| committed.get(path.as_str()) != Some(&hash.as_str()));
    let gone = committed.keys().find(|path| !current.contains_key(**path));
    if let Some(path) = changed.map(|(path, _)| path.as_str()).or(gone.copied()) {
        bail!(
            "{OBJECT} is stale: {path} has changed since; run `cargo xtask build-ebpf` and commit cipe-ebpf/prebuilt"
        );
    }
    Ok(())
}

/// Hash by path from the root.
fn hashes(root: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    let mut files = vec![PathBuf::from(OBJECT)];
    for input in INPUTS {
        collect(root, Path::new(input), &mut files)?;
    }
    files
        .iter()
        .map(|file| {
            let path = file.to_str().with_context(|| format!("{} is not UTF-8", file.display()))?;
            let content = fs::read(root.join(file)).with_context(|| format!("reading {path}"))?;
            Ok((path.to_owned(), hex::encode(Sha256::digest(content))))
        })
        .collect()
}

fn collect(root: &Path, path: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let full = root.join(path);
    if !full.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(&full).with_context(|| format!("reading {}", path.display()))? {
        collect(root, &path.join(entry?.file_name()), files)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_object_is_made_of_the_sources_as_they_are() {
        check(crate::tools::workspace()).unwrap();
    }

    #[test]
    fn a_changed_a_new_and_a_missing_file_make_it_stale() {
        let root = tempfile::tempdir().unwrap();
        for path in ["cipe-common/src", "cipe-ebpf/src", "cipe-ebpf/prebuilt"] {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        let write = |path: &str, text: &str| fs::write(root.path().join(path), text).unwrap();
        for path in
            [OBJECT, "cipe-common/Cargo.toml", "cipe-ebpf/Cargo.toml", "cipe-ebpf/Cargo.lock", "cipe-ebpf/src/a.rs"]
        {
            write(path, path);
        }
        write(SOURCES, &listing(root.path()).unwrap());
        check(root.path()).unwrap();
        let stale = |path: &str| {
            let error = check(root.path()).unwrap_err().to_string();
            assert!(error.contains(path) && error.contains("cargo xtask build-ebpf"), "{error}");
        };
        write("cipe-ebpf/src/a.rs", "changed");
        stale("cipe-ebpf/src/a.rs");
        write("cipe-ebpf/src/a.rs", "cipe-ebpf/src/a.rs");
        write("cipe-common/src/b.rs", "new");
        stale("cipe-common/src/b.rs");
        fs::remove_file(root.path().join("cipe-common/src/b.rs")).unwrap();
        fs::remove_file(root.path().join("cipe-ebpf/src/a.rs")).unwrap();
        stale("cipe-ebpf/src/a.rs");
    }
}
