//! Options of the daemons (protocol section 5): their sources, meanings and problems.
//!
//! [`load`] reads `CIPE_GUARD` of the environment, `/etc/cipe/options`, the `-o` files and the command line, in this order; a later value wins.
//! [`settle()`] turns them into [`Options`]: it resolves names and checks the rules between options. Neither fails: for
//! any file, the result is values and a list of all problems.

mod endpoint;
mod file;
mod key;
mod nearest;
mod permission;
mod problem;
mod resolve;
mod secret;
mod settle;
mod table;
mod value;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

pub use endpoint::EndpointName;
pub use permission::check_script;
pub use problem::{Mistake, Origin, Problem, Severity};
pub use resolve::endpoint as address_of;
pub use secret::masked;
pub use settle::{Endpoint, Options, settle};
pub use table::{Draft, SPECS, Setting, Spec};
pub use value::{CipherName, GuardPolicy, IdeaWords, SealedPolicy};

use crate::control::protocol::{Cipher, Protocol};

/// Read first, if it exists.
pub const SYSTEM_FILE: &str = "/etc/cipe/options";

/// Sets the default of `guard`: units of the service manager, which restart daemons, have another one.
pub const GUARD_VARIABLE: &str = "CIPE_GUARD";

/// The name under which the daemon was started: sets the protocol, the default cipher, the interface prefix and the
/// name in messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `ciped-cb`: Blowfish, `cipcbN`.
    Cb,
    /// `ciped-ci`: IDEA, `cipciN`.
    Ci,
    /// `ciped-db`: Blowfish, Ethernet frames, `cipdbN`.
    Db,
    /// `ciped-di`: IDEA, Ethernet frames, `cipdiN`.
    Di,
}

impl Program {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Cb, Self::Ci, Self::Db, Self::Di];

    /// Reads the last component of `argv[0]`; `None` if it is no daemon's name.
    pub fn from_name(name: &[u8]) -> Option<Self> {
        let name = Path::new(std::ffi::OsStr::from_bytes(name)).file_name()?.as_bytes();
        if name == b"ciped" {
            // The name from the time of a single cipher, in start scripts.
            return Some(Self::Cb);
        }
        Self::ALL.into_iter().find(|program| program.name().as_bytes() == name)
    }

    /// Name in messages and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cb => "ciped-cb",
            Self::Ci => "ciped-ci",
            Self::Db => "ciped-db",
            Self::Di => "ciped-di",
        }
    }

    /// Cipher if no option sets it.
    pub const fn cipher(self) -> CipherName {
        match self {
            Self::Cb | Self::Db => CipherName::Blowfish,
            Self::Ci | Self::Di => CipherName::Idea,
        }
    }

    /// The kind of packets that its tunnels carry.
    pub const fn protocol(self) -> Protocol {
        match self {
            Self::Cb | Self::Ci => Protocol::Ip,
            Self::Db | Self::Di => Protocol::Ethernet,
        }
    }
}

/// Interface prefix of a protocol and cipher; the first free number is appended.
pub const fn prefix(protocol: Protocol, cipher: Cipher) -> &'static str {
    match (protocol, cipher) {
        (Protocol::Ip, Cipher::Blowfish) => "cipcb",
        (Protocol::Ip, Cipher::Idea | Cipher::IdeaLittle) => "cipci",
        (Protocol::Ethernet, Cipher::Blowfish) => "cipdb",
        (Protocol::Ethernet, Cipher::Idea | Cipher::IdeaLittle) => "cipdi",
    }
}

/// The sources of options.
#[derive(Clone, Debug)]
pub struct Sources {
    /// Name under which the daemon was started.
    pub program: Program,
    /// The value of [`GUARD_VARIABLE`], if it is set.
    pub guard: Option<OsString>,
    /// System-wide file; may be missing.
    pub system: PathBuf,
    /// `-o` files, in order; must exist.
    pub files: Vec<PathBuf>,
    /// `name=value` or `name` (booleans) of the command line.
    pub arguments: Vec<OsString>,
}

impl Sources {
    /// The usual sources.
    pub fn new(program: Program, files: Vec<PathBuf>, arguments: Vec<OsString>) -> Self {
        let guard = std::env::var_os(GUARD_VARIABLE).filter(|guard| !guard.is_empty());
        Self { program, guard, system: PathBuf::from(SYSTEM_FILE), files, arguments }
    }
}

/// Reads every source; the draft has the valid values, the problems name the rest.
pub fn load(sources: &Sources) -> (Draft, Vec<Problem>) {
    let mut draft = Draft::new(sources.program);
    let mut problems = Vec::new();
    if let Some(guard) = &sources.guard {
        assign(&mut draft, &mut problems, b"guard", guard.as_bytes(), &Origin::Environment(GUARD_VARIABLE));
    }
    // `cipe check` on the system-wide file must not read it twice.
    if !sources.files.contains(&sources.system) && sources.system.exists() {
        read(&sources.system, &mut draft, &mut problems);
    }
    for path in &sources.files {
        read(path, &mut draft, &mut problems);
    }
    for argument in &sources.arguments {
        let (name, value) = file::split_argument(argument.as_bytes());
        assign(&mut draft, &mut problems, name, value, &Origin::CommandLine);
    }
    (draft, problems)
}

fn read(path: &Path, draft: &mut Draft, problems: &mut Vec<Problem>) {
    match permission::read_guarded(path) {
        Ok(text) => read_text(&text, path, draft, problems),
        Err(mistake) => problems.push(Problem::unusable_file(mistake, path.to_owned())),
    }
}

/// Applies the text of one option file, already read from `path`.
pub fn read_text(text: &[u8], path: &Path, draft: &mut Draft, problems: &mut Vec<Problem>) {
    for line in file::lines(text) {
        let origin = Origin::File { path: path.to_owned(), line: line.number };
        assign(draft, problems, line.name, line.value, &origin);
    }
}

fn assign(draft: &mut Draft, problems: &mut Vec<Problem>, name: &[u8], value: &[u8], origin: &Origin) {
    if name == b"key" && *origin == Origin::CommandLine {
        let mistake = Mistake::new(
            "option `key`: refused on a command line, where every user can read it",
            "put it into an option file of mode 0600",
        );
        problems.push(Problem::error(mistake, origin.clone()));
        return;
    }
    let outcome = match std::str::from_utf8(name) {
        Ok(text) => draft.assign(text, value, origin).unwrap_or_else(|| Err(unknown(text, origin))),
        Err(_) => Err(unknown(&String::from_utf8_lossy(name), origin)),
    };
    if let Err(mistake) = outcome {
        problems.push(Problem::error(mistake, origin.clone()));
    }
}

fn unknown(name: &str, origin: &Origin) -> Mistake {
    let shown = secret::shown_name(name);
    let what = format!("unknown option {shown}");
    let in_file = matches!(origin, Origin::File { .. });
    if in_file && name.starts_with('#') {
        return Mistake::new(what, "start a comment in the first column");
    }
    if shown == secret::HIDDEN {
        return Mistake::new(what, "if it is the key, write `key` and a blank before it");
    }
    let first = name.split_once('=').map_or(name, |(first, _)| first);
    if in_file && first != name && SPECS.iter().any(|spec| spec.name == first) {
        return Mistake::new(what, format!("in a file write a blank between name and value: `{first} VALUE`"));
    }
    Mistake::new(what, format!("the nearest known option is `{}`", nearest::nearest(first)))
}

#[cfg(test)]
mod tests;
