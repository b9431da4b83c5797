//! The oldest C library that a program starts with.

use anyhow::{Context, Result};
use object::elf::FileHeader64;
use object::endian::Endianness;
use object::read::elf::FileHeader;

/// The C library of Debian 12, the oldest supported Debian.
pub(super) const OLDEST: Version = Version(2, 36);

/// A version of glibc.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(u32, u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// The newest glibc version of a program's symbols (a 64-bit ELF file); `None`: it uses no glibc symbol.
///
/// # Errors
/// The file has another format.
pub(super) fn least(program: &[u8]) -> Result<Option<Version>> {
    let header = FileHeader64::<Endianness>::parse(program).context("no 64-bit ELF file")?;
    let endian = header.endian()?;
    let sections = header.sections(endian, program)?;
    let Some((libraries, strings)) = sections.gnu_verneed(endian, program)? else { return Ok(None) };
    let strings = sections.strings(endian, program, strings)?;
    let mut least = None;
    for library in libraries {
        let (_, mut versions) = library?;
        while let Some(version) = versions.next()? {
            least = least.max(parse(&String::from_utf8_lossy(version.name(endian, strings)?)));
        }
    }
    Ok(least)
}

/// `GLIBC_2.34`, or `GLIBC_2.2.5`, whose third number newer versions do not have.
fn parse(name: &str) -> Option<Version> {
    let mut numbers = name.strip_prefix("GLIBC_")?.split('.').map(str::parse);
    Some(Version(numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_needs_what_std_is_built_for_and_no_more_than_the_oldest_debian_has() {
        let this = std::fs::read(std::env::current_exe().expect("a program")).expect("it can be read");
        let least = least(&this).expect("an ELF file").expect("std takes symbols from glibc");
        assert!(Version(2, 17) <= least && least <= OLDEST, "{least}");
    }

    #[test]
    fn versions_are_compared_by_number() {
        assert!(parse("GLIBC_2.34") > parse("GLIBC_2.2.5"));
        assert!(parse("GLIBC_2.9") < parse("GLIBC_2.10"));
        assert_eq!(parse("GCC_3.0"), None);
        assert_eq!(parse("GLIBC_PRIVATE"), None);
    }

    #[test]
    fn what_is_no_program_is_refused() {
        assert!(least(b"no ELF file, and longer than the header of one, which has 64 octets....").is_err());
    }
}
