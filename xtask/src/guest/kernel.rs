//! Kernels: their selection, the directory in which they are unpacked, and their modules.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use super::debian::Client;
use super::folder;
use crate::tools;

/// Folders of modules that guests often load: decompressed on the host, since xz is slow under emulation.
const UNPACKED: &[&str] =
    &["arch", "crypto", "drivers/net", "drivers/virtio", "fs/9p", "fs/netfs", "fs/overlayfs", "lib", "net"];

/// A requested kernel: the latest of a line, such as `6.12`, or the newest of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// The latest of this line.
    Line(u32, u32),
    /// The newest kernel.
    Newest,
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "newest" {
            return Ok(Self::Newest);
        }
        let line = text.split_once('.').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        line.map(|(major, minor)| Self::Line(major, minor))
            .ok_or_else(|| "a line such as 6.12, newest, or all".to_owned())
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(major, minor) => write!(f, "{major}.{minor}"),
            Self::Newest => f.write_str("newest"),
        }
    }
}

/// An unpacked kernel.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    /// Its release, as `uname -r` prints it.
    pub release: String,
    /// The image for qemu.
    pub image: PathBuf,
    /// The folder for `/lib/modules/RELEASE`.
    pub modules: PathBuf,
}

impl Kernel {
    /// Finds a kernel that was unpacked before, or fetches and unpacks it.
    ///
    /// # Errors
    /// There is no such kernel, or the package client fails.
    pub(super) fn get(wanted: Wanted) -> Result<Self> {
        let home = folder().join(wanted.to_string());
        if !home.is_dir() {
            let client = Client::get()?;
            let package = newest(&client.names("linux-image-")?, wanted)
                .with_context(|| format!("Debian's archive has no kernel {wanted}"))?;
            let release = package.trim_start_matches("linux-image-");
            // Since 6.19 the image, the modules and the lists of them (7.3) are separate packages. Some of those names are
            // virtual: another package provides them.
            let needs = client.needs(&package)?;
            let mut packages = Vec::new();
            for part in ["base", "binary", "modules"] {
                let name = format!("linux-{part}-{release}");
                if needs.contains(&name) && client.names(&name)?.contains(&name) {
                    packages.push(name);
                }
            }
            packages.push(package.clone());
            let fresh = folder().join("fresh");
            if fresh.is_dir() {
                fs::remove_dir_all(&fresh)?;
            }
            client.unpack(&packages.iter().map(String::as_str).collect::<Vec<_>>(), &fresh)?;
            prepare(&fresh)?;
            fs::rename(&fresh, &home)?;
        }
        Self::unpacked(&home)
    }

    fn unpacked(home: &Path) -> Result<Self> {
        let modules = modules_folder(home)?;
        let release = modules.file_name().and_then(|name| name.to_str()).context("a release is a name")?.to_owned();
        let places = [home.join("boot").join(format!("vmlinuz-{release}")), modules.join("vmlinuz")];
        let image = places.into_iter().find(|path| path.is_file());
        let image = image.with_context(|| format!("{}: there is no kernel image in it", home.display()))?;
        Ok(Self { release, image, modules })
    }

    /// Files of the modules that `names` need, in the order in which they can be loaded, without built-in ones.
    ///
    /// # Errors
    /// The kernel does not have a module.
    pub(super) fn in_order(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let dependencies = fs::read_to_string(self.modules.join("modules.dep"))?;
        let built_in = fs::read_to_string(self.modules.join("modules.builtin"))?;
        let files = in_order(names, &dependencies, &built_in).with_context(|| self.release.clone())?;
        Ok(files.into_iter().map(|file| self.modules.join(file)).collect())
    }
}

/// The package with the newest matching kernel, of the usual flavour only.
fn newest(packages: &[String], wanted: Wanted) -> Option<String> {
    let parsed = packages.iter().filter_map(|package| {
        let release = package.strip_prefix("linux-image-")?.strip_suffix("-amd64")?;
        // Such as 6.1.0-50 and 6.12.117+deb13; other flavours have a word after it.
        if !release.starts_with(|c: char| c.is_ascii_digit()) || release.contains(['c', 'r']) {
            return None;
        }
        let numbers: Vec<u32> =
            release.split(['.', '-', '+']).filter_map(|part| part.trim_start_matches("deb").parse().ok()).collect();
        let fits = match wanted {
            Wanted::Line(major, minor) => numbers.starts_with(&[major, minor]),
            Wanted::Newest => true,
        };
        (numbers.len() >= 3 && fits).then_some((numbers, package))
    });
    parsed.max().map(|(_, package)| package.clone())
}

fn modules_folder(home: &Path) -> Result<PathBuf> {
    let places = ["usr/lib/modules", "lib/modules"].map(|place| home.join(place));
    let place =
        places.iter().find(|place| place.is_dir()).with_context(|| format!("{}: no modules", home.display()))?;
    let entry = fs::read_dir(place)?.next().with_context(|| format!("{}: it is empty", place.display()))?;
    Ok(entry?.path())
}

/// Decompresses the modules that guests use, and writes their dependencies.
fn prepare(home: &Path) -> Result<()> {
    let modules = modules_folder(home)?;
    let mut packed = Vec::new();
    for part in UNPACKED {
        let part = modules.join("kernel").join(part);
        if part.is_dir() {
            collect_packed(&part, &mut packed)?;
        }
    }
    if !packed.is_empty() {
        tools::check(Command::new("xz").args(["--decompress", "--threads=0"]).args(&packed))?;
    }
    let base = modules.ancestors().nth(3).context("modules stand in lib/modules")?;
    let release = modules.file_name().context("modules stand in a folder of their own")?;
    tools::check(Command::new("depmod").arg("-b").arg(base).arg(release))
}

fn collect_packed(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect_packed(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "xz") {
            found.push(path);
        }
    }
    Ok(())
}

/// See [`Kernel::in_order`]; `modules.dep` lists after each module its dependencies, the first one to load last.
fn in_order(names: &[&str], dependencies: &str, built_in: &str) -> Result<Vec<String>> {
    let name = |file: &str| {
        let file = file.rsplit('/').next().unwrap_or(file);
        file.split('.').next().unwrap_or(file).replace('-', "_")
    };
    let needs: HashMap<String, (&str, Vec<&str>)> = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, needs)| (name(file), (file, needs.split_whitespace().collect())))
        .collect();
    let built_in: HashSet<String> = built_in.lines().map(name).collect();
    let mut order: Vec<String> = Vec::new();
    for wanted in names {
        let Some((file, needs)) = needs.get(*wanted) else {
            if built_in.contains(*wanted) {
                continue;
            }
            bail!("this kernel has no {wanted}");
        };
        for file in needs.iter().rev().chain([file]) {
            if !order.iter().any(|there| there == file) {
                order.push((*file).to_owned());
            }
        }
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_a_line_is_found_among_other_flavours() {
        let packages = [
            "linux-image-6.1.0-9-amd64",
            "linux-image-6.1.0-50-amd64",
            "linux-image-6.1.0-50-cloud-amd64",
            "linux-image-6.12.99+deb13-amd64",
            "linux-image-6.12.117+deb12-amd64",
            "linux-image-6.12.117+deb13-amd64",
            "linux-image-6.12.117+deb13-rt-amd64",
            "linux-image-6.12.118+deb13-amd64-unsigned",
            "linux-image-6.12.118+deb13-amd64-dbg",
            "linux-image-7.2.13+deb14-amd64",
            "linux-image-7.3.4+deb13-amd64",
            "linux-image-7.3.4+deb13-cloud-amd64",
            "linux-image-amd64",
            "linux-image-rt-amd64",
        ]
        .map(str::to_owned);
        for (wanted, package) in [
            ("6.1", Some("linux-image-6.1.0-50-amd64")),
            ("6.12", Some("linux-image-6.12.117+deb13-amd64")),
            ("newest", Some("linux-image-7.3.4+deb13-amd64")),
            ("6.6", None),
        ] {
            let wanted = wanted.parse().expect("a kernel");
            assert_eq!(newest(&packages, wanted).as_deref(), package, "{wanted}");
        }
    }

    #[test]
    fn modules_are_loaded_behind_what_they_need_and_once() {
        let dependencies = "kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko kernel/fs/netfs/netfs.ko.xz\n\
                            kernel/net/9p/9pnet.ko:\n\
                            kernel/net/9p/9pnet_virtio.ko: kernel/net/9p/9pnet.ko\n";
        let built_in = "kernel/drivers/virtio/virtio_pci.ko\n";
        let order = in_order(&["virtio_pci", "9pnet_virtio", "9p"], dependencies, built_in).expect("all are there");
        let expected = [
            "kernel/net/9p/9pnet.ko",
            "kernel/net/9p/9pnet_virtio.ko",
            "kernel/fs/netfs/netfs.ko.xz",
            "kernel/fs/9p/9p.ko",
        ];
        assert_eq!(order, expected);
        assert!(in_order(&["overlay"], dependencies, built_in).is_err());
    }
}
