//! The toolchains that can build for BPF: a compiler with its library's sources, and a bpf-linker of the same LLVM.
//!
//! - rustup: a nightly with rust-src;
//! - Debian: `rustc-web` with `rust-web-src` (RUSTC_BOOTSTRAP makes it accept `-Zbuild-std`).
//!
//! The linker is looked for where `--install` puts it, under `target/`, then in the PATH. It does not tell which LLVM it
//! was built for; one of another LLVM fails with "unable to parse bitcode".

use std::{
    env,
    ffi::OsString,
    fmt, fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use super::succeed;

/// Pinned: each release moves to a newer LLVM by default.
const LINKER_VERSION: &str = "0.13.0";
/// The oldest LLVM that this linker can be built for; rules out Debian's own older rustc.
const OLDEST_LLVM: u32 = 21;
/// LLVM of Debian's toolchain.
const DEBIAN_LLVM: u32 = 22;
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_PACKAGES: [&str; 4] = ["rustc-web", "rust-web-src", "llvm-22-dev", "libpolly-22-dev"];

/// A complete toolchain.
pub(super) struct Toolchain {
    /// Name for people.
    name: String,
    /// Absolute, so that no rustup proxy chooses another.
    rustc: PathBuf,
    cargo: PathBuf,
    /// bpf-linker.
    pub linker: PathBuf,
    /// Sources of the standard library (`rust-src`).
    pub sources: PathBuf,
}

/// A suitable compiler, with or without a linker.
struct Compiler {
    name: String,
    rustc: PathBuf,
    cargo: PathBuf,
    sources: PathBuf,
    llvm: u32,
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} and {}", self.name, self.linker.display())
    }
}

impl Toolchain {
    /// A cargo command that uses this toolchain, whichever toolchain started this program.
    pub(super) fn cargo(&self) -> Command {
        let mut command = Command::new(&self.cargo);
        command.env("RUSTC", &self.rustc).env("RUSTC_BOOTSTRAP", "1");
        for foreign in
            ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTUP_TOOLCHAIN", "CARGO_BUILD_TARGET"]
        {
            command.env_remove(foreign);
        }
        command
    }
}

/// The first complete toolchain; with `install`, installs the missing parts of Debian's.
pub(super) fn find_or_install(root: &Path, install: bool) -> anyhow::Result<Toolchain> {
    if let Some(found) = find(root) {
        return Ok(found);
    }
    if install {
        install_debian(root)?;
        return find(root).context("the Debian toolchain is installed, but is not complete");
    }
    match compilers().first() {
        None => bail!(
            "no Rust compiler for the BPF target: run `cargo xtask build-ebpf --install` (Debian, as root), or `rustup toolchain \
             install nightly --component rust-src` and then this again"
        ),
        Some(Compiler { name, llvm, .. }) => bail!(
            "{name} has no bpf-linker: run `cargo xtask build-ebpf --install` (Debian), or `cargo install \
             bpf-linker@{LINKER_VERSION} --locked --no-default-features --features llvm-{llvm}`"
        ),
    }
}

fn find(root: &Path) -> Option<Toolchain> {
    compilers().into_iter().find_map(|compiler| {
        let linker = linker(root, compiler.llvm)?;
        let Compiler { name, rustc, cargo, sources, .. } = compiler;
        Some(Toolchain { name, rustc, cargo, linker, sources })
    })
}

/// Compilers with their library's sources, Debian's first, since its versions are tested.
fn compilers() -> Vec<Compiler> {
    let cargo = env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from);
    let debian = compiler("Debian's rustc".to_owned(), PathBuf::from(DEBIAN_RUSTC), cargo);
    let nightlies = output("rustup", &["toolchain", "list"]).unwrap_or_default();
    let nightlies =
        nightlies.lines().filter_map(|line| line.split_whitespace().next()).filter(|name| name.starts_with("nightly"));
    let rustup = nightlies.filter_map(|name| {
        let which =
            |program| output("rustup", &["which", "--toolchain", name, program]).map(|path| PathBuf::from(path.trim()));
        compiler(format!("rustup's {name}"), which("rustc")?, which("cargo")?)
    });
    debian.into_iter().chain(rustup).collect()
}

fn compiler(name: String, rustc: PathBuf, cargo: PathBuf) -> Option<Compiler> {
    let version = output(&rustc, &["-vV"])?;
    let llvm =
        version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?.split('.').next()?.parse::<u32>().ok()?;
    let sysroot = output(&rustc, &["--print", "sysroot"])?;
    let sources = Path::new(sysroot.trim()).join("lib/rustlib/src/rust");
    let usable = llvm >= OLDEST_LLVM && sources.join("library/core/src/lib.rs").is_file();
    usable.then_some(Compiler { name, rustc, cargo, sources, llvm })
}

/// The directory in which `--install` installs the linker for an LLVM.
fn own_linker_root(root: &Path, llvm: u32) -> PathBuf {
    root.join(format!("target/ebpf-tools/bpf-linker-{LINKER_VERSION}-llvm-{llvm}"))
}

fn linker(root: &Path, llvm: u32) -> Option<PathBuf> {
    let own = own_linker_root(root, llvm).join("bin/bpf-linker");
    let path = env::var_os("PATH").unwrap_or_default();
    let in_path = env::split_paths(&path).map(|folder| folder.join("bpf-linker"));
    std::iter::once(own).chain(in_path).find(|file| file.is_file())
}

/// Installs missing Debian packages, and builds the linker.
fn install_debian(root: &Path) -> anyhow::Result<()> {
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{DEBIAN_LLVM}"));
    if !is_installed() {
        let root_user = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
        if !Path::new("/etc/debian_version").exists() || !root_user {
            bail!("`--install` needs root on Debian, to install {}", DEBIAN_PACKAGES.join(", "));
        }
        println!("installing {}", DEBIAN_PACKAGES.join(", "));
        succeed(Command::new("apt-get").arg("update").arg("-q"))?;
        let mut apt = Command::new("apt-get");
        apt.args(["install", "-q", "-y", "--no-install-recommends"]).args(DEBIAN_PACKAGES);
        succeed(apt.env("DEBIAN_FRONTEND", "noninteractive"))?;
    }
    println!("building bpf-linker {LINKER_VERSION} for LLVM {DEBIAN_LLVM} (about a minute)");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    succeed(
        Command::new(cargo)
            .arg("install")
            .arg(format!("bpf-linker@{LINKER_VERSION}"))
            .args(["--locked", "--no-default-features", "--features"])
            .arg(format!("llvm-{DEBIAN_LLVM}"))
            .arg("--root")
            .arg(own_linker_root(root, DEBIAN_LLVM))
            .env("LLVM_PREFIX", &prefix)
            .env("LLVM_SYS_221_PREFIX", &prefix),
    )
}

/// Whether all of Debian's packages are there.
fn is_installed() -> bool {
    DEBIAN_PACKAGES.iter().all(|package| {
        output("dpkg-query", &["-W", "-f", "${db:Status-Abbrev}", package])
            .is_some_and(|status| status.starts_with("ii"))
    })
}

/// The output of a command, if it starts and succeeds.
fn output(program: impl AsRef<std::ffi::OsStr>, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8(output.stdout).ok()).flatten()
}
