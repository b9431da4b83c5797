//! Releases of Linux.

use std::fmt;
use std::str::FromStr;

/// A release, without the additions of a distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release {
    major: u32,
    minor: u32,
    patch: u32,
}

impl Release {
    /// A release by its three numbers.
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    /// The release of the running kernel; `None` if it has no number. Debian's 6.1.0 does not have the patch number, so
    /// there it comes from the version text.
    pub fn running() -> Option<Self> {
        let uname = rustix::system::uname();
        let version: Self = uname.release().to_str().ok()?.parse().ok()?;
        let of_debian = uname.version().to_str().ok().and_then(|text| text.split_once("Debian ")?.1.parse().ok());
        Some(
            of_debian
                .filter(|real: &Self| (real.major, real.minor) == (version.major, version.minor))
                .unwrap_or(version),
        )
    }
}

/// The text does not begin with a release.
#[derive(Debug, thiserror::Error)]
#[error("no release of Linux")]
pub struct NoRelease;

impl FromStr for Release {
    type Err = NoRelease;

    /// Reads the numbers at the start: `6.18.15+deb13-amd64`, `7.0-rc1`.
    fn from_str(text: &str) -> Result<Self, NoRelease> {
        let front = text.split(|c: char| !c.is_ascii_digit() && c != '.').next().unwrap_or_default();
        let mut numbers = front.split('.').map(|number| number.parse().ok());
        let (Some(Some(major)), Some(Some(minor))) = (numbers.next(), numbers.next()) else { return Err(NoRelease) };
        Ok(Self { major, minor, patch: numbers.next().flatten().unwrap_or_default() })
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.patch {
            0 => write!(f, "{}.{}", self.major, self.minor),
            patch => write!(f, "{}.{}.{patch}", self.major, self.minor),
        }
    }
}

/// Release of the running kernel, as uname(1) prints it.
pub fn running() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read_up_to_what_a_distribution_adds() {
        for (text, version) in [
            ("6.18.15+deb13-amd64", Release::new(6, 18, 15)),
            ("6.1.0-50-amd64", Release::new(6, 1, 0)),
            ("7.0-rc1", Release::new(7, 0, 0)),
            ("6.12.117", Release::new(6, 12, 117)),
        ] {
            assert_eq!(text.parse::<Release>().unwrap(), version, "{text}");
        }
        for text in ["", "odd", "6", "-6.1"] {
            assert!(text.parse::<Release>().is_err(), "{text}");
        }
        assert!(Release::new(6, 9, 0) < Release::new(6, 12, 0));
    }
}
