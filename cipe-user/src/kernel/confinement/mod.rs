//! Gives up what a process does not use, so that whoever takes it over gets as little as possible: capabilities, system calls,
//! files, and a memory that others can read.

mod files;
mod system_calls;

use std::path::Path;

use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set};
use rustix::thread::{remove_capability_from_bounding_set, set_capabilities};

/// Value of this variable: see [`Strictness`].
pub const VARIABLE: &str = "CIPE_CONFINEMENT";

/// The capabilities that an engine uses: devices and routes, AF_XDP and raw sockets, eBPF; and those that it uses if it has them:
/// memory of AF_XDP sockets that does not count against a limit, and carrier ports below 1024.
const ENGINE: CapabilitySet = CapabilitySet::NET_ADMIN
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::BPF)
    .union(CapabilitySet::PERFMON)
    .union(CapabilitySet::IPC_LOCK)
    .union(CapabilitySet::NET_BIND_SERVICE);

/// What happens to an engine that does what it should not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strictness {
    /// The kernel refuses.
    #[default]
    Refuse,
    /// The kernel ends the process if a system call is refused; for tests.
    End,
    /// It keeps the rights that it was started with.
    Off,
}

impl Strictness {
    /// Reads the value of [`VARIABLE`]: `refuse`, `end` or `off`; empty: `refuse`.
    ///
    /// # Errors
    /// Any other text.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "" | "refuse" => Ok(Self::Refuse),
            "end" => Ok(Self::End),
            "off" => Ok(Self::Off),
            other => Err(format!("{VARIABLE}: `{other}` is none of refuse, end and off")),
        }
    }
}

/// Why a process keeps a right. It goes on with it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A capability could not be given up.
    #[error("capabilities: {0}")]
    Capabilities(std::io::Error),
    /// The kernel has no Landlock, or it is not enabled.
    #[error("this kernel does not have Landlock enabled (`lsm=` on its command line)")]
    NoLandlock,
    /// Landlock refused the rules.
    #[error("Landlock: {0}")]
    Files(#[from] landlock::RulesetError),
    /// The filter of system calls was refused.
    #[error("seccomp: {0}")]
    SystemCalls(#[from] seccompiler::Error),
}

/// Confines the calling thread, and threads that it starts later, to the rights of an engine. It may write files in `run_dir` and
/// `state_dir` only, and switches of the network. Call it before any other thread starts.
///
/// Returns what could not be given up.
pub fn confine_engine(run_dir: &Path, state_dir: &Path, strictness: Strictness) -> Vec<Error> {
    if strictness == Strictness::Off {
        return Vec::new();
    }
    // In this order: a refused system call must not hinder the others.
    let steps = [
        drop_capabilities(ENGINE).map_err(Error::Capabilities),
        files::limit_writing(run_dir, state_dir),
        system_calls::filter(strictness == Strictness::End).map_err(Error::SystemCalls),
    ];
    steps.into_iter().filter_map(Result::err).collect()
}

/// Gives up all capabilities but these, for good.
fn drop_capabilities(keep: CapabilitySet) -> std::io::Result<()> {
    let permitted = capabilities(None)?.permitted;
    let kept = kept(keep, permitted);
    clear_ambient_capability_set()?;
    for capability in CapabilitySet::all().difference(kept).iter() {
        // Without CAP_SETPCAP the bounding set stays. It matters to executed programs only, and there are none.
        let _ = remove_capability_from_bounding_set(capability);
    }
    Ok(set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )?)
}

/// The capabilities to keep of those that are permitted. CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON where they are missing.
fn kept(keep: CapabilitySet, permitted: CapabilitySet) -> CapabilitySet {
    let programs = CapabilitySet::BPF | CapabilitySet::PERFMON;
    if permitted.contains(programs) { keep & permitted } else { (keep | CapabilitySet::SYS_ADMIN) & permitted }
}

/// Keeps keys in the memory of this process from core dumps, from other users, and from being swapped out. Warns of what cannot be
/// had.
pub fn protect_memory() {
    if let Err(error) = hide_memory() {
        tracing::warn!("keys may get into core dumps of this process: {error}");
    }
    if let Err(error) = lock_memory() {
        tracing::warn!(
            "keys in the memory of this process may be swapped out: {error}; grant CAP_IPC_LOCK, or encrypt the swap space"
        );
    }
}

/// Keeps the memory of this process, which holds keys, from core dumps and from debuggers of anybody without CAP_SYS_PTRACE.
fn hide_memory() -> std::io::Result<()> {
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Keeps the memory of this process, also that which it uses later, from being swapped out. Without CAP_IPC_LOCK nothing is locked: a
/// lock within a limit would make later allocations fail.
fn lock_memory() -> std::io::Result<()> {
    if !capabilities(None)?.effective.contains(CapabilitySet::IPC_LOCK) {
        return Err(std::io::Error::other("no CAP_IPC_LOCK"));
    }
    Ok(mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_words_are_a_strictness() {
        assert_eq!(Strictness::parse(""), Ok(Strictness::Refuse));
        assert_eq!(Strictness::parse("end"), Ok(Strictness::End));
        assert_eq!(Strictness::parse("off"), Ok(Strictness::Off));
        assert!(Strictness::parse("no").unwrap_err().contains("`no`"));
    }

    #[test]
    fn the_administrator_s_capability_is_kept_only_in_place_of_others() {
        let all = CapabilitySet::all();
        assert_eq!(kept(ENGINE, all), ENGINE);
        assert_eq!(kept(ENGINE, CapabilitySet::NET_RAW | CapabilitySet::CHOWN), CapabilitySet::NET_RAW);
        let old = all.difference(CapabilitySet::BPF);
        assert!(
            kept(ENGINE, old).contains(CapabilitySet::SYS_ADMIN) && !kept(ENGINE, old).contains(CapabilitySet::CHOWN)
        );
    }

    /// In a thread of its own, since there is no way back.
    #[test]
    fn a_confined_thread_writes_executes_and_traces_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("base/run");
        let state_dir = dir.path().join("state");
        std::fs::create_dir_all(&run_dir).unwrap();
        std::fs::create_dir_all(&state_dir).unwrap();
        let outside = dir.path().join("outside");
        let confined = std::thread::spawn(move || {
            let failed = confine_engine(&run_dir, &state_dir, Strictness::Refuse);
            let lacks_landlock = failed.iter().any(|error| matches!(error, Error::NoLandlock));
            assert!(failed.iter().all(|error| matches!(error, Error::NoLandlock)), "{failed:?}");
            std::fs::write(run_dir.join("inside"), "").unwrap();
            std::fs::write(state_dir.join("inside"), "").unwrap();
            std::fs::rename(state_dir.join("inside"), state_dir.join("old")).unwrap();
            std::fs::remove_dir_all(&run_dir).unwrap();
            std::fs::read_to_string("/proc/self/stat").unwrap();
            assert!(lacks_landlock || std::fs::write(&outside, "").is_err());
            let ended = std::process::Command::new("/bin/true").status();
            assert!(ended.is_err(), "{ended:?}");
            // SAFETY: asks to be traced; the kernel refuses.
            assert_eq!(unsafe { libc::ptrace(libc::PTRACE_TRACEME) }, -1);
            // SAFETY: takes numbers only.
            assert_eq!(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) }, -1);
            let (own, parent) = (std::process::id() as i32, std::os::unix::process::parent_id() as i32);
            // SAFETY: a descriptor that is none: without the filter, each call would fail in another way.
            let set_owner = unsafe { [libc::fcntl(-1, libc::F_SETOWN, own), libc::fcntl(-1, 15, &own)] };
            assert_eq!((set_owner, std::io::Error::last_os_error().raw_os_error()), ([-1; 2], Some(libc::ENOSYS)));
            // SAFETY: as before.
            let set_owner = unsafe { [libc::ioctl(-1, 0x8901, &own), libc::ioctl(-1, 0x8902, &own)] };
            assert_eq!((set_owner, std::io::Error::last_os_error().raw_os_error()), ([-1; 2], Some(libc::ENOSYS)));
            let cpus = rustix::thread::sched_getaffinity(None).unwrap();
            rustix::thread::sched_setaffinity(None, &cpus).unwrap();
            let of_another = rustix::thread::sched_setaffinity(rustix::thread::Pid::from_raw(parent), &cpus);
            assert_eq!(of_another, Err(rustix::io::Errno::NOSYS));
            let left = capabilities(None).unwrap();
            assert!(ENGINE.contains(left.permitted) && left.inheritable.is_empty(), "{left:?}");
            // What threads and allocations need.
            std::thread::spawn(|| vec![1_u8; 1 << 20].len()).join().unwrap()
        });
        assert_eq!(confined.join().unwrap(), 1 << 20);
    }
}
