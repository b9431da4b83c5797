//! The owner of a device: written into its alias, so that the next engine can tell a leftover from a device in use.

use std::fmt;

use super::netlink::{Error, Result};

/// First letters of the name of a hub's hidden end before it has an alias.
const UNFINISHED_PREFIX: &str = "cx";

/// A process, identified so that a later one with the same number is not mistaken for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pid: u32,
    /// Clock ticks between boot and the start of the process (proc_pid_stat(5), field 22).
    start: u64,
    /// The target of /proc/self/ns/pid: a process number has no meaning in another pid namespace.
    namespace: String,
}

impl Owner {
    /// Identifies a living process of the own pid namespace.
    ///
    /// # Errors
    /// It has ended, or /proc is not there.
    pub fn of(pid: u32) -> Result<Self> {
        let owner = || Some(Self { pid, start: start_of(pid)?, namespace: own_namespace()? });
        owner().ok_or_else(|| Error::Io {
            what: format!("/proc/{pid}/stat: cannot read"),
            cause: std::io::ErrorKind::NotFound.into(),
        })
    }

    /// Whether the process has certainly ended. A process of another pid namespace is not visible from here: it counts
    /// as alive.
    pub fn is_dead(&self) -> bool {
        own_namespace().is_some_and(|own| own == self.namespace) && start_of(self.pid) != Some(self.start)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The alias of a device of the kind `what`, such as `cipe tunnel`.
    pub fn alias(&self, what: &str) -> String {
        format!("{what}, {self}")
    }

    /// Reads an alias: the kind of the device, and its owner; `None` if it is not ours.
    pub fn from_alias(alias: &str) -> Option<(&str, Self)> {
        let (what, owner) = alias.rsplit_once(", pid ")?;
        let mut words = owner.split(' ');
        let pid = words.next()?.parse().ok()?;
        let start = words.next()?.strip_prefix("start=")?.parse().ok()?;
        let namespace = words.next()?.to_owned();
        (what.starts_with("cipe ") && words.next().is_none()).then_some((what, Self { pid, start, namespace }))
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} start={} {}", self.pid, self.start, self.namespace)
    }
}

/// Name of a hub's hidden end before it has its alias: the kernel accepts an alias for existing devices only. The
/// kernel replaces `%d`.
pub(super) fn unfinished_template() -> String {
    format!("{UNFINISHED_PREFIX}{}.%d", std::process::id())
}

/// Whether this process gave a hidden end this name, and has not finished it.
pub(super) fn unfinished_is_own(name: &str) -> bool {
    name.strip_prefix(unfinished_template().trim_end_matches("%d")).is_some_and(|number| number.parse::<u32>().is_ok())
}

/// Whether a hidden end of this name was never finished because its engine died; `None` for other names.
pub(super) fn unfinished_is_dead(name: &str) -> Option<bool> {
    let (pid, number) = name.strip_prefix(UNFINISHED_PREFIX)?.split_once('.')?;
    let _: u32 = number.parse().ok()?;
    Some(start_of(pid.parse().ok()?).is_none())
}

fn own_namespace() -> Option<String> {
    Some(std::fs::read_link("/proc/self/ns/pid").ok()?.to_str()?.to_owned())
}

/// Start time of a living process; a zombie counts as ended.
fn start_of(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, which may contain any characters, including parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    let start = fields.nth(18)?.parse().ok()?;
    (state != "Z" && state != "X").then_some(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_names_its_owner() {
        let owner = Owner::of(std::process::id()).unwrap();
        assert_eq!(Owner::from_alias(&owner.alias("cipe tunnel")), Some(("cipe tunnel", owner.clone())));
    }

    #[test]
    fn other_aliases_are_not_ours() {
        for alias in [
            "",
            "uplink to Berlin",
            "cipe tunnel",
            "cipe tunnel, pid 1 start=z pid:[1]",
            "our hub, pid 1 start=1 pid:[1]",
        ] {
            assert_eq!(Owner::from_alias(alias), None, "{alias}");
        }
    }

    #[test]
    fn an_unfinished_end_is_dead_when_its_engine_is() {
        assert_eq!(unfinished_is_dead(&unfinished_template().replace("%d", "0")), Some(false));
        assert_eq!(unfinished_is_dead("cx4194305.0"), Some(true));
        assert_eq!(unfinished_is_dead("cx1"), None);
        assert_eq!(unfinished_is_dead("eth0"), None);
        assert!(unfinished_is_own(&unfinished_template().replace("%d", "12")));
        assert!(!unfinished_is_own("cx4194305.0") && !unfinished_is_own(&unfinished_template()));
    }

    #[test]
    fn this_process_is_alive() {
        assert!(!Owner::of(std::process::id()).unwrap().is_dead());
    }

    #[test]
    fn a_later_process_with_the_same_number_is_another() {
        let owner = Owner::of(std::process::id()).unwrap();
        assert!(Owner { start: owner.start - 1, ..owner }.is_dead());
    }

    #[test]
    fn a_process_of_another_pid_namespace_counts_as_alive() {
        let owner = Owner::of(std::process::id()).unwrap();
        assert!(!Owner { pid: u32::MAX, namespace: "pid:[1]".to_owned(), ..owner }.is_dead());
    }
}
