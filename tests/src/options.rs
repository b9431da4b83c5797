//! Option files as an operator writes them: `name value` lines.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::topology::Side;

/// The static key of tests. Not a secret.
pub const KEY: &str = "000102030405060708090a0b0c0d0e0f";
/// UDP port of both gateways.
pub const PORT: u16 = 6789;

/// The options of one daemon, in order.
#[derive(Clone, Debug, Default)]
pub struct Options {
    lines: Vec<(String, Option<String>)>,
    environment: Vec<(String, String)>,
}

impl Options {
    /// No options at all.
    pub fn new() -> Self {
        Self::default()
    }

    /// The options of a gateway of the topology, in the foreground: addresses, peer, [`KEY`], a fixed outer TTL, and protocol 3, which
    /// two ends of ours would leave.
    pub fn of(side: Side) -> Self {
        Self::new()
            .set("ipaddr", side.tunnel())
            .set("ptpaddr", side.other().tunnel())
            .set("me", format!("{}:{PORT}", side.carrier()))
            .set("peer", format!("{}:{PORT}", side.other().carrier()))
            .set("key", KEY)
            .set("sealed", "no")
            .set("cttl", 64)
            .flag("debug")
    }

    /// Sets an option, in the place of an earlier one of that name.
    pub fn set(self, name: &str, value: impl fmt::Display) -> Self {
        self.put(name, Some(value.to_string()))
    }

    /// Sets a boolean option.
    pub fn flag(self, name: &str) -> Self {
        self.put(name, None)
    }

    /// Sealed packets only.
    pub fn sealed(self) -> Self {
        self.set("sealed", "require")
    }

    /// Sealed packets only, with new keys under traffic after so many milliseconds instead of two minutes.
    pub fn sealed_anew(self, milliseconds: &str) -> Self {
        self.sealed().with_environment("CIPE_SEALED_RENEW_MS", milliseconds)
    }

    /// Gives the daemon an environment variable.
    pub fn with_environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The environment variables.
    pub fn environment(&self) -> &[(String, String)] {
        &self.environment
    }

    /// The value of an option, if it is set.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.lines.iter().find(|(present, _)| present == name)?.1.as_deref()
    }

    /// Removes an option.
    pub fn without(mut self, name: &str) -> Self {
        self.lines.retain(|(present, _)| present != name);
        self
    }

    /// Whether a tunnel with these options becomes sealed if its peer's may: `sealed` is not `no`.
    pub fn may_be_sealed(&self) -> bool {
        self.value("sealed") != Some("no")
    }

    fn put(mut self, name: &str, value: Option<String>) -> Self {
        match self.lines.iter_mut().find(|(present, _)| present == name) {
            Some(line) => line.1 = value,
            None => self.lines.push((name.to_owned(), value)),
        }
        self
    }

    /// Writes the file `options` into a new directory that only root can enter, and returns its path.
    ///
    /// # Errors
    /// A directory that is there already.
    pub fn write(&self, directory: &Path) -> Result<PathBuf> {
        fs::DirBuilder::new().mode(0o700).create(directory).with_context(|| format!("{}", directory.display()))?;
        let path = directory.join("options");
        self.write_file(&path)?;
        Ok(path)
    }

    /// Writes the option file, in the place of an earlier one.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write_file(&self, path: &Path) -> Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        Ok(write!(file, "{self}")?)
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.lines {
            match value {
                Some(value) => writeln!(f, "{name} {value}")?,
                None => writeln!(f, "{name}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_value_takes_the_place_of_an_earlier_one() {
        let options = Options::new().set("mtu", 1442).flag("debug").set("mtu", 1400).set("key", KEY).without("key");
        assert_eq!((options.value("mtu"), options.value("key")), (Some("1400"), None));
        assert_eq!(options.to_string(), "mtu 1400\ndebug\n");
    }
}
