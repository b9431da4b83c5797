//! `cargo xtask build-ebpf`: the eBPF object from `cipe-ebpf`, with one of two toolchains.
//!
//! The object is committed (`cipe-ebpf/prebuilt/cipe.bpf.o`), so that building the project does not need this command;
//! `SOURCES.sha256` beside it, in the format of sha256sum(1), lists its sources.

mod sources;
mod toolchain;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::tools;
use anyhow::{Context as _, bail, ensure};
use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};

use toolchain::Toolchain;

/// Rust's name of the target of the object.
const TARGET: &str = "bpfel-unknown-none";
/// The binary target in `cipe-ebpf/Cargo.toml`.
const BINARY: &str = "cipe-bpf";
/// The committed object, from the root of the repository.
const OBJECT: &str = "cipe-ebpf/prebuilt/cipe.bpf.o";
/// Hashes of its sources.
const SOURCES: &str = "cipe-ebpf/prebuilt/SOURCES.sha256";
/// The object of `--check`.
pub(crate) const FRESH: &str = "target/ebpf/cipe.bpf.o";

/// Arguments of `cargo xtask build-ebpf`.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// Install the Debian toolchain first, if none is found (its packages need root)
    #[arg(long)]
    pub install: bool,
    /// Fail if the committed object is stale; build a fresh one into target/ebpf and leave the committed one alone
    #[arg(long)]
    pub check: bool,
}

/// Builds the object; with `check`, compares instead of writing and prints how to run the tests with the fresh one.
///
/// # Errors
/// The toolchain is missing (with the command to type), the object is stale (with the changed file), or the build fails.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let root = tools::workspace();
    if args.check {
        sources::check(root)?;
    }
    let toolchain = toolchain::find_or_install(root, args.install)?;
    println!("building the eBPF object with {toolchain}");
    let object = build(root, &toolchain)?;
    if args.check {
        let fresh = root.join(FRESH);
        fs::write(&fresh, &object).with_context(|| format!("writing {}", fresh.display()))?;
        let same = fs::read(root.join(OBJECT)).is_ok_and(|committed| committed == object);
        println!(
            "{OBJECT} is up to date; a fresh build is {}",
            if same { "identical" } else { "not octet for octet the same" }
        );
        println!("to test the fresh one: CIPE_BPF_OBJECT={} cargo test", fresh.display());
    } else {
        let path = root.join(OBJECT);
        fs::create_dir_all(path.parent().context("the object's path has no parent")?)?;
        fs::write(&path, &object).with_context(|| format!("writing {OBJECT}"))?;
        fs::write(root.join(SOURCES), sources::listing(root)?).with_context(|| format!("writing {SOURCES}"))?;
        println!("wrote {OBJECT} ({} octets) and {SOURCES}: commit both", object.len());
    }
    Ok(())
}

/// Compiles, links and strips; returns the object.
fn build(root: &Path, toolchain: &Toolchain) -> anyhow::Result<Vec<u8>> {
    let manifest = root.join("cipe-ebpf/Cargo.toml");
    let target_dir = root.join("target/ebpf");
    // First, so that all sources are unpacked in the places that the flags below name.
    succeed(toolchain.cargo().arg("fetch").arg("--locked").arg("--manifest-path").arg(&manifest))?;
    let paths = machine_paths(root, toolchain)?;
    let mut flags = vec![
        "-Cdebuginfo=2".to_owned(),
        format!("-Clinker={}", toolchain.linker.display()),
        "-Clink-arg=--btf".to_owned(),
    ];
    flags.extend(paths.iter().map(|(path, name)| format!("--remap-path-prefix={}={name}", path.display())));
    succeed(
        toolchain
            .cargo()
            .args(["build", "--release", "--locked", "-Zbuild-std=core", "--target", TARGET, "--manifest-path"])
            .arg(&manifest)
            .arg("--target-dir")
            .arg(&target_dir)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")),
    )?;
    let built = target_dir.join(TARGET).join("release").join(BINARY);
    let object = strip(&fs::read(&built).with_context(|| format!("reading {}", built.display()))?)?;
    for (path, _) in &paths {
        let path = path.as_os_str().as_encoded_bytes();
        ensure!(
            !object.windows(path.len()).any(|window| window == path),
            "the object names a path of this machine, {}",
            String::from_utf8_lossy(path)
        );
    }
    Ok(object)
}

/// Paths of this machine that compilers write into objects, and their replacements.
fn machine_paths(root: &Path, toolchain: &Toolchain) -> anyhow::Result<Vec<(PathBuf, &'static str)>> {
    let mut paths = vec![(root.to_owned(), ".")];
    for sources in [toolchain.sources.clone(), toolchain.sources.canonicalize()?] {
        paths.push((sources, "rust"));
    }
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")))
        .context("neither CARGO_HOME nor HOME is set")?;
    let registries = home.join("registry/src");
    for registry in fs::read_dir(&registries).with_context(|| format!("reading {}", registries.display()))? {
        paths.push((registry?.path(), "crates"));
    }
    Ok(paths)
}

/// Removes DWARF, from which the BTF was made: nothing reads it, and it is ten times as large as the programs.
fn strip(object: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut builder = Builder::read64(object).context("the linker's output is no 64-bit ELF file")?;
    for section in &mut builder.sections {
        let name = section.name.as_slice();
        section.delete = name.starts_with(b".debug") || name.starts_with(b".rel.debug");
    }
    // LLVM stores the names of sections in the symbols' string table; the builder requires separate tables.
    let names = builder.sections.add();
    names.name = b".shstrtab"[..].into();
    names.sh_type = SHT_STRTAB;
    names.sh_addralign = 1;
    names.data = SectionData::SectionString;
    builder.delete_orphans();
    let mut stripped = Vec::new();
    builder.write(&mut stripped).context("writing the stripped object")?;
    Ok(stripped)
}

/// Runs a command, which must succeed; its output goes to the user.
fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("starting {program}"))?;
    if !status.success() {
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
        bail!("`{program} {}` failed ({status})", arguments.join(" "));
    }
    Ok(())
}
