//! Debian packages of suites that the machine itself does not use: the machine's package client finds, fetches and unpacks
//! them, with a separate source list, package lists and cache. Nothing is installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail};

use crate::tools;

/// Suites that have the kernels: Debian 12, Debian 13, the backports of Debian 13, and unstable.
const SUITES: &[&str] = &["bookworm", "trixie", "trixie-backports", "sid"];

/// The package client with a separate configuration.
pub(super) struct Client {
    folder: PathBuf,
}

impl Client {
    /// The client; the first call sets it up and fetches the lists of packages.
    ///
    /// # Errors
    /// The machine is not Debian, or apt-get fails.
    pub(super) fn get() -> Result<&'static Self> {
        static CLIENT: OnceLock<std::result::Result<Client, String>> = OnceLock::new();
        let client = CLIENT.get_or_init(|| Self::new().map_err(|error| format!("{error:#}")));
        client.as_ref().map_err(|error| anyhow!("{error}"))
    }

    fn new() -> Result<Self> {
        let folder = super::folder().join("apt");
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(part))?;
        }
        let archive = archive()?;
        let sources: String = SUITES.iter().map(|suite| format!("deb {archive} {suite} main\n")).collect();
        fs::write(folder.join("sources.list"), sources)?;
        let client = Self { folder };
        println!("Fetching the package lists of {} ...", SUITES.join(", "));
        // A suite that no longer exists is an error; the packages of the others are enough.
        if !client.command("apt-get").args(["update", "-qq"]).status()?.success() {
            println!("some lists could not be fetched");
        }
        Ok(client)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let own = |key: &str, part: &str| format!("{key}={}", self.folder.join(part).display());
        for option in [
            own("Dir::Etc::SourceList", "sources.list"),
            own("Dir::State::Lists", "lists"),
            own("Dir::Cache", "cache"),
            "Dir::Etc::SourceParts=-".to_owned(),
            "Dir::Etc::Preferences=/dev/null".to_owned(),
            "Dir::Etc::PreferencesParts=/dev/null".to_owned(),
            // Descriptions and the like are not needed.
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "APT::Architecture=amd64".to_owned(),
            "APT::Architectures=amd64".to_owned(),
            // The client's own user may not be allowed to read our folder.
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command.stdin(Stdio::null());
        command
    }

    /// Names of all packages that begin with `prefix`.
    ///
    /// # Errors
    /// apt-cache fails.
    pub(super) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let text = output(self.command("apt-cache").args(["pkgnames", prefix]))?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// Names of the packages that `package` needs.
    ///
    /// # Errors
    /// apt-cache fails.
    pub(super) fn needs(&self, package: &str) -> Result<Vec<String>> {
        let text = output(self.command("apt-cache").args(["show", "--no-all-versions", package]))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
        let names = line.split([',', '|']).filter_map(|need| need.split_whitespace().next());
        Ok(names.map(str::to_owned).collect())
    }

    /// Fetches packages and unpacks them into `to`.
    ///
    /// # Errors
    /// apt-get or dpkg fails.
    pub(super) fn unpack(&self, packages: &[&str], to: &Path) -> Result<()> {
        println!("Fetching {} ...", packages.join(", "));
        let archives = self.folder.join("cache/archives");
        tools::check(self.command("apt-get").args(["download", "-qq"]).args(packages).current_dir(&archives))?;
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(&archives)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                tools::check(Command::new("dpkg").arg("-x").arg(&path).arg(to))?;
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }
}

/// The address of the archive of this machine's own packages.
fn archive() -> Result<String> {
    if !tools::has("apt-get") {
        bail!("kernels come from Debian's packages, and this machine has no apt-get");
    }
    let targets = || {
        let mut command = Command::new("apt-get");
        command.args(["indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)", "Created-By: Packages"]);
        output(&mut command)
    };
    let ours = |text: &str| text.lines().find_map(|line| line.strip_prefix("Debian|Debian|").map(str::to_owned));
    if let Some(archive) = ours(&targets()?) {
        return Ok(archive);
    }
    // A source's origin is in its lists, which a new machine has not fetched.
    tools::check(Command::new("apt-get").args(["update", "-qq"]).stdin(Stdio::null()))?;
    ours(&targets()?).context("the package client of this machine has no source of Debian's")
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| tools::text(command))?;
    if !output.status.success() {
        bail!("{}: {}", tools::text(command), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
