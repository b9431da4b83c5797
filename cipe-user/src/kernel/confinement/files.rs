//! The files that a process may change (Landlock).

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, LandlockStatus, PathBeneath, PathFd, PathFdError, Ruleset, RulesetAttr, RulesetCreatedAttr,
};

use super::Error;

/// Switches of network devices.
const SWITCHES: &str = "/proc/sys/net";
/// Takes the place of the standard descriptors.
const NULL: &str = "/dev/null";

/// Lets the calling thread, and threads that it starts later, change files in `run_dir` and `state_dir` only, remove the former, and set
/// switches of the network. It may read what it could before, and execute nothing.
pub(super) fn limit_writing(run_dir: &Path, state_dir: &Path) -> Result<(), Error> {
    let handled = AccessFs::from_all(ABI::V3);
    let reading = AccessFs::ReadFile | AccessFs::ReadDir;
    let writing = AccessFs::from_write(ABI::V3) | reading;
    // The directory itself is removed at the end, which is a change of its parent.
    let base = run_dir.parent().unwrap_or(run_dir);
    let mut rules = Ruleset::default().handle_access(handled)?.create()?;
    for (path, access) in [
        (Path::new("/"), reading),
        (base, reading | AccessFs::RemoveDir),
        (run_dir, writing),
        (state_dir, writing),
        (Path::new(SWITCHES), reading | AccessFs::WriteFile),
        (Path::new(NULL), AccessFs::WriteFile | AccessFs::ReadFile),
    ] {
        match PathFd::new(path) {
            Ok(parent) => rules = rules.add_rule(PathBeneath::new(parent, access))?,
            // What is not there needs no rule.
            Err(PathFdError::OpenCall { .. }) => {}
            Err(error) => tracing::debug!("{}: {error}", path.display()),
        }
    }
    match rules.restrict_self()?.landlock {
        LandlockStatus::Available { .. } => Ok(()),
        _ => Err(Error::NoLandlock),
    }
}
