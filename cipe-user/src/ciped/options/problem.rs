//! The origin of a value, and what is wrong with it.

use std::fmt;
use std::path::PathBuf;

use super::secret::masked;

/// Where the value of an option was set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nowhere: the built-in default.
    Default,
    /// Nowhere, and there is no default.
    Unset,
    /// The name under which the program was started.
    Program(&'static str),
    /// A variable of the environment.
    Environment(&'static str),
    /// A file as a whole.
    Path(PathBuf),
    /// A line of a file; the first is 1.
    File {
        /// Path as given.
        path: PathBuf,
        /// Line number.
        line: usize,
    },
    /// `name=value` on the command line.
    CommandLine,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Unset => f.write_str("no file and no argument sets it"),
            Self::Program(name) => write!(f, "called as {name}"),
            Self::Environment(name) => write!(f, "{name} in the environment"),
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::CommandLine => f.write_str("command line"),
        }
    }
}

/// What is wrong and how to fix it, without the place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// What is wrong.
    pub what: String,
    /// How to fix it.
    pub fix: String,
}

impl Mistake {
    /// Combines the two.
    pub fn new(what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { what: what.into(), fix: fix.into() }
    }

    /// Masks everything that may be a part of a key.
    pub fn without_keys(self) -> Self {
        Self { what: masked(&self.what).into_owned(), ..self }
    }
}

/// How severe a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Prevents the start.
    Error,
    /// Is reported; the daemon starts.
    Warning,
}

/// One problem of the options; displays as `what; where; how to fix`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong and how to fix it.
    pub mistake: Mistake,
    /// Where it is.
    pub origin: Origin,
}

impl Problem {
    /// A problem that prevents the start. Masks everything in its text that may be a part of a key.
    pub fn error(mistake: Mistake, origin: Origin) -> Self {
        Self { severity: Severity::Error, mistake: mistake.without_keys(), origin }
    }

    /// A problem that is only reported. Masks everything in its text that may be a part of a key.
    pub fn warning(mistake: Mistake, origin: Origin) -> Self {
        Self { severity: Severity::Warning, mistake: mistake.without_keys(), origin }
    }

    /// Returns an error about an option file that cannot be used. The text has its path, and none of its contents.
    pub fn unusable_file(mistake: Mistake, path: PathBuf) -> Self {
        Self { severity: Severity::Error, mistake, origin: Origin::Path(path) }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}; {}", self.mistake.what, self.origin, self.mistake.fix)
    }
}
