//! Cargo, the workspace's folders, and tools that the checks need.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};

/// The packages with unit tests, and the one with scenarios, as arguments of cargo.
pub(crate) const UNIT_TESTS: &[&str] = &["--workspace", "--exclude", "cipe-tests"];
/// See [`UNIT_TESTS`].
pub(crate) const SCENARIOS: &[&str] = &["--package", "cipe-tests"];

/// The workspace's root folder: the one of the cargo command that runs this program, else the one that contains the program,
/// else the current one. The program may have been compiled elsewhere, since people copy checkouts with their build.
pub(crate) fn workspace() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
        let here = std::env::current_dir().unwrap_or_default();
        let starts = [manifest, std::env::current_exe().ok(), Some(here.clone())];
        let root = starts.iter().flatten().find_map(|start| root_above(start));
        // If none is found, cargo reports what is missing here.
        root.unwrap_or(here)
    })
}

/// The innermost folder at or above `start` that contains this program's sources.
fn root_above(start: &Path) -> Option<PathBuf> {
    start.ancestors().find(|folder| folder.join("xtask/Cargo.toml").is_file()).map(Path::to_owned)
}

/// Cargo's target folder.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), |dir| workspace().join(dir))
}

/// A cargo command in the workspace's root folder.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(workspace()).stdin(Stdio::null());
    command
}

/// Runs a command to its end.
///
/// # Errors
/// The command fails; the error has the command line.
pub(crate) fn check(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| text(command))?;
    if !status.success() {
        bail!("{}: {status}", text(command));
    }
    Ok(())
}

/// A command line for people.
pub(crate) fn text(command: &Command) -> String {
    let name = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
    command.get_args().fold(name, |line, argument| line + " " + &argument.to_string_lossy())
}

/// A program that the checks run, from the registry of packages, in a fixed version: a newer one may find more faults, and is a
/// commit of its own.
pub(crate) struct Tool {
    package: &'static str,
    version: &'static str,
    /// Further options of `cargo install`.
    options: &'static [&'static str],
}

/// Finds dependencies that are not used.
pub(crate) const MACHETE: Tool = Tool { package: "cargo-machete", version: "0.9.2", options: &[] };
/// Checks licences and sources of dependencies.
pub(crate) const DENY: Tool = Tool { package: "cargo-deny", version: "0.20.2", options: &[] };
/// Runs several tests at the same time, each in a process of its own, and prints the time of each.
pub(crate) const NEXTEST: Tool =
    Tool { package: "cargo-nextest", version: "0.9.151", options: &["--no-default-features"] };

impl Tool {
    /// Its program, which is installed under the target folder unless this version is there.
    ///
    /// # Errors
    /// cargo fails.
    pub(crate) fn get(&self) -> Result<PathBuf> {
        let root = target().join("tools");
        let program = root.join("bin").join(self.package);
        if self.is_installed(&program) {
            return Ok(program);
        }
        println!("installing {} {}", self.package, self.version);
        // Without optimisation: the tools run for seconds, but their build takes minutes.
        let mut install = cargo(&["install", "--locked", "--quiet", "--debug", "--version", self.version, "--root"]);
        // A separate target folder: these files would only fill a build folder that the environment names.
        install.arg(&root).args(self.options).arg(self.package).env_remove("CARGO_TARGET_DIR");
        check(&mut install)?;
        Ok(program)
    }

    fn is_installed(&self, program: &Path) -> bool {
        let output = Command::new(program).arg("--version").output();
        output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(self.version))
    }
}

/// Builds the `cipe` binary and returns its path.
///
/// # Errors
/// cargo fails.
pub(crate) fn build_cipe(release: bool) -> Result<PathBuf> {
    let mut build = cargo(&["build", "--locked", "--package", "cipe-user", "--bin", "cipe"]);
    if release {
        build.arg("--release");
    }
    check(&mut build)?;
    Ok(target().join(if release { "release" } else { "debug" }).join("cipe"))
}

/// Makes sure that network namespaces can be made: this needs root, and `ip`, which it installs on Debian if it is missing.
///
/// # Errors
/// They cannot be made; the error says what to do.
pub(crate) fn need_namespaces() -> Result<()> {
    if !cipe_tests::is_root() {
        bail!(
            "network namespaces need root; run it again as root, such as: sudo -E env PATH=\"$PATH\" cargo xtask ..."
        );
    }
    if has("ip") {
        return Ok(());
    }
    println!("`ip` is missing: installing Debian's iproute2");
    apt_install(&["iproute2"])
}

/// Installs Debian packages; none is no work.
///
/// # Errors
/// apt-get fails or is missing.
pub(crate) fn apt_install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    if !has("apt-get") {
        bail!("this is not Debian: install {} by the system's package manager", packages.join(", "));
    }
    println!("Installing {} ...", packages.join(", "));
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
        check(&mut command)
    };
    apt(&["update", "-qq"])?;
    apt(&[&["install", "-qq", "-y", "--no-install-recommends"], packages].concat())
}

static ENDING: AtomicBool = AtomicBool::new(false);

/// Whether a signal has arrived: later failures come from the removal of the networks, and nothing new may be made.
pub(crate) fn ending() -> bool {
    ENDING.load(Ordering::Relaxed)
}

/// Makes Ctrl-C and SIGTERM end the process at once, without dropping guards: it first removes everything that the bed has
/// made, and calls `more`.
///
/// # Errors
/// The signal handlers cannot be set.
pub(crate) fn clean_up_on_signals(more: fn()) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let (mut interrupt, mut terminate) = {
        let _entered = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        ENDING.store(true, Ordering::Relaxed);
        cipe_tests::remove_everything();
        more();
        std::process::exit(130);
    });
    Ok(())
}

/// Makes Ctrl-C end only the child processes, not this one, so that a child has time to clean up.
///
/// # Errors
/// The signal handler cannot be set.
pub(crate) fn outlive_interrupts() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let _entered = runtime.enter();
    // The handler stays when the stream is dropped.
    drop(tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?);
    Ok(())
}

/// Whether a program is in PATH or in root's folders.
pub(crate) fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .any(|folder| folder.join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_of_a_checkout_is_worked_on_where_it_stands() {
        let copy = tempfile::tempdir().expect("a folder");
        let sources = copy.path().join("xtask");
        let built = copy.path().join("target/debug");
        std::fs::create_dir_all(&sources).and_then(|()| std::fs::create_dir_all(&built)).expect("folders");
        std::fs::write(sources.join("Cargo.toml"), "").expect("a file");
        assert_eq!(root_above(&built.join("xtask")).as_deref(), Some(copy.path()));
        assert_eq!(root_above(&sources).as_deref(), Some(copy.path()));
        assert_eq!(root_above(Path::new("/proc")), None);
        assert!(workspace().join("xtask/src/tools.rs").is_file(), "{}", workspace().display());
    }
}
