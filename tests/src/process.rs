//! Processes: waits with a deadline, processes of a namespace, and CPU time.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::AsFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How many times longer than usual everything may take: `CIPE_TEST_SLOWNESS`, for an emulated machine.
///
/// # Panics
/// The variable is not a number.
pub fn slowness() -> u32 {
    static SLOWNESS: LazyLock<u32> = LazyLock::new(|| {
        let given = std::env::var("CIPE_TEST_SLOWNESS").ok();
        given.map_or(1, |text| text.parse().expect("CIPE_TEST_SLOWNESS is a number, such as 10"))
    });
    *SLOWNESS
}

/// A deadline, multiplied by [`slowness`].
pub fn patient(time: Duration) -> Duration {
    time * slowness()
}

/// Polls one descriptor for input until `deadline`; false if the deadline came first.
///
/// # Errors
/// poll(2) fails, other than by an interruption.
pub fn wait_readable(fd: impl AsFd, deadline: Instant) -> io::Result<bool> {
    poll_until(&mut [PollFd::new(&fd, PollFlags::IN)], deadline)
}

fn poll_until(fds: &mut [PollFd<'_>], deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(fds, Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits for input and returns true; false if `pid` ends first, or after that time.
///
/// # Errors
/// As [`wait_readable`], or there was no such process.
pub fn wait_for_either(fd: impl AsFd, pid: u32, within: Duration) -> Result<bool> {
    let gone = open(pid).with_context(|| format!("process {pid}"))?;
    let deadline = Instant::now() + patient(within);
    let mut fds = [PollFd::new(&fd, PollFlags::IN), PollFd::new(&gone, PollFlags::IN)];
    poll_until(&mut fds, deadline)?;
    Ok(!fds[0].revents().is_empty())
}

/// Waits until `pid` has ended (a zombie has); true at once if there is no such process.
///
/// # Errors
/// The process still runs after `within`.
pub fn wait_gone(pid: u32, within: Duration) -> Result<()> {
    let Some(fd) = open(pid) else { return Ok(()) };
    if wait_readable(&fd, Instant::now() + patient(within))? {
        return Ok(());
    }
    bail!("process {pid} is still there after {within:?}")
}

/// Sends `signal` to `pid`; a process that is gone is no error.
///
/// # Errors
/// pidfd_send_signal(2) fails for another reason.
pub fn signal(pid: u32, signal: Signal) -> Result<()> {
    let Some(fd) = open(pid) else { return Ok(()) };
    match pidfd_send_signal(fd, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("signal to process {pid}")),
    }
}

fn open(pid: u32) -> Option<rustix::fd::OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

/// Whether there is such a process, zombies included.
pub fn exists(pid: u32) -> bool {
    open(pid).is_some()
}

/// The name of a process, as `pgrep -x` matches it.
pub fn name(pid: u32) -> Option<String> {
    Some(fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim_end().to_owned())
}

/// The process that made an object named `PREFIXPID-...`.
pub fn owner_by_name(name: &str, prefix: &str) -> Option<u32> {
    name.strip_prefix(prefix)?.split_once('-')?.0.parse().ok()
}

/// Processes whose network namespace is the one that `path` (such as `/run/netns/NAME`) names, zombies left out.
///
/// # Errors
/// The path cannot be read.
pub fn in_namespace(path: &Path) -> Result<Vec<u32>> {
    use std::os::unix::fs::MetadataExt;
    let wanted = fs::metadata(path).with_context(|| format!("{}", path.display()))?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // A process may end meanwhile; a zombie has no namespaces any more.
        if let Ok(meta) = fs::metadata(entry.path().join("ns/net"))
            && (meta.dev(), meta.ino()) == (wanted.dev(), wanted.ino())
        {
            found.push(pid);
        }
    }
    Ok(found)
}

/// The arguments of a process, empty if it is gone.
pub fn arguments(pid: u32) -> Vec<String> {
    let octets = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    octets.split(|&o| o == 0).filter(|a| !a.is_empty()).map(|a| String::from_utf8_lossy(a).into_owned()).collect()
}

/// CPU time of a process and its threads.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuTime {
    /// In user mode.
    pub user: Duration,
    /// In the kernel on the process's behalf, including softirq work during its system calls.
    pub system: Duration,
}

impl CpuTime {
    /// CPU time of `pid` so far; `None` if it has ended.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may contain spaces: count fields after it. utime and stime are fields 14 and 15.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
        let mut next = || Some(ticks(fields.next()?.parse().ok()?));
        Some(Self { user: next()?, system: next()? })
    }

    /// Time used since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self { user: self.user.saturating_sub(earlier.user), system: self.system.saturating_sub(earlier.system) }
    }
}

fn ticks(count: u64) -> Duration {
    Duration::from_secs_f64(count as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// Identifiers of the BPF programs, maps and links that a process holds open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BpfObjects {
    /// Program identifiers.
    pub programs: Vec<u32>,
    /// Map identifiers.
    pub maps: Vec<u32>,
    /// Link identifiers.
    pub links: Vec<u32>,
}

impl BpfObjects {
    /// Reads `/proc/PID/fdinfo`.
    ///
    /// # Errors
    /// The process has ended.
    pub fn of(pid: u32) -> Result<Self> {
        let mut objects = Self::default();
        for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))?.flatten() {
            let Ok(text) = fs::read_to_string(entry.path()) else { continue };
            let field = |name: &str| {
                text.lines().find_map(|line| line.strip_prefix(name)).and_then(|value| value.trim().parse().ok())
            };
            // A link also has a program's identifier: test for the link first.
            if let Some(id) = field("link_id:") {
                objects.links.push(id);
            } else if let Some(id) = field("map_id:") {
                objects.maps.push(id);
            } else if let Some(id) = field("prog_id:") {
                objects.programs.push(id);
            }
        }
        Ok(objects)
    }
}

/// Detaches the XDP program that a process has attached to a device by a BPF link, as `bpftool link detach` does.
///
/// # Errors
/// There is none, or the kernel reports an error.
pub fn detach_xdp(pid: u32, ifindex: u32) -> Result<()> {
    detach_link(pid, "xdp", ifindex)
}

/// The same for a link of any kind, such as `tcx`.
///
/// # Errors
/// As [`detach_xdp`].
pub fn detach_link(pid: u32, kind: &str, ifindex: u32) -> Result<()> {
    const BPF_LINK_GET_FD_BY_ID: libc::c_long = 30;
    const BPF_LINK_DETACH: libc::c_long = 34;
    let bpf = |command: libc::c_long, value: u32| {
        // The first field of either command's attributes; the others are zero.
        let attributes = [value, 0, 0, 0];
        // SAFETY: the kernel reads the attributes during the call, and nothing else of this process.
        let answer = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const attributes, size_of_val(&attributes)) };
        if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer as i32) }
    };
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))?.flatten() {
        let Ok(text) = fs::read_to_string(entry.path()) else { continue };
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        if field("link_type:") != Some(kind) || field("ifindex:") != Some(&ifindex.to_string()) {
            continue;
        }
        let id = field("link_id:").and_then(|id| id.parse().ok()).context("a link has a number")?;
        let descriptor = bpf(BPF_LINK_GET_FD_BY_ID, id)?;
        // SAFETY: the command has just answered with a new descriptor that nobody else owns.
        let link = unsafe { std::os::fd::OwnedFd::from_raw_fd(descriptor) };
        bpf(BPF_LINK_DETACH, link.as_raw_fd() as u32)?;
        return Ok(());
    }
    bail!("process {pid} has no {kind} link on device {ifindex}")
}

/// A stopped thread of another process, such as one that hangs or gets no CPU. It runs again when this is dropped.
pub struct StoppedThread(libc::pid_t);

impl StoppedThread {
    /// Stops the first thread of a process whose name begins with `name`.
    ///
    /// # Errors
    /// There is no such thread, or the kernel reports an error.
    pub fn named(pid: u32, name: &str) -> Result<Self> {
        for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            if fs::read_to_string(task.path().join("comm"))?.starts_with(name) {
                let number = task.file_name().to_str().and_then(|number| number.parse().ok());
                return Self::of(number.context("a thread has a number")?);
            }
        }
        bail!("process {pid} has no thread {name}")
    }

    fn of(thread: libc::pid_t) -> Result<Self> {
        let failed = || Err(io::Error::last_os_error().into());
        // SAFETY: without options the call takes no pointer.
        if unsafe { libc::ptrace(libc::PTRACE_SEIZE, thread, 0, 0) } < 0 {
            return failed();
        }
        let stopped = Self(thread);
        // SAFETY: as above.
        if unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, thread, 0, 0) } < 0 {
            return failed();
        }
        // SAFETY: the kernel writes no status where there is none to write to.
        if unsafe { libc::waitpid(thread, std::ptr::null_mut(), libc::__WALL) } < 0 {
            return failed();
        }
        Ok(stopped)
    }
}

impl Drop for StoppedThread {
    fn drop(&mut self) {
        // SAFETY: without a signal to deliver the call takes no pointer. It fails only for a thread that has ended.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, 0, 0) };
    }
}
