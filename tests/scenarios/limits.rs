//! Few rights, little memory, and the file systems of containers: a tunnel works, or an error names what is missing.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cipe_tests::gateway::{Daemon, Gateway};
use cipe_tests::log::Log;
use cipe_tests::offload::Offload;
use cipe_tests::options::Options;
use cipe_tests::ping::{self, Plan};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, process};
use rustix::process::Signal;

/// Lists the capabilities that an engine needs.
const README: &str = include_str!("../../README.md");
/// Limit of locked memory that systemd gives to services.
const MEMLOCK: &str = "--memlock=8388608:8388608";

/// Gateway A's daemon, started by a program that removes rights or limits resources.
struct Confined {
    child: Child,
    log: Log,
}

impl Confined {
    fn start(net: &Topology, path: &Path, words: &[&str]) -> Result<Self> {
        let (first, rest) = words.split_first().context("a program")?;
        let mut command: Command = net.gw(Side::A).command(first);
        command.args(rest);
        Self::spawn(net, path, command)
    }

    /// In a memory cgroup, which the process must enter first, since `ip netns exec` hides its directory.
    fn start_in(net: &Topology, path: &Path, group: &Cgroup) -> Result<Self> {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("echo $$ >{}; exec \"$0\" \"$@\"", group.0.join("cgroup.procs").display())]);
        command.args(["ip", "netns", "exec", net.gw(Side::A).name()]);
        Self::spawn(net, path, command)
    }

    fn spawn(net: &Topology, path: &Path, mut command: Command) -> Result<Self> {
        command.arg(net.directory().join("bin").join(Daemon::Blowfish.program())).arg("-o").arg(path);
        command.env("CIPE_RUN_DIR", net.directory().join("runA")).env("CIPE_CONFINEMENT", "end");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let log = Log::follow(child.stderr.take().context("stderr is a pipe")?);
        Ok(Self { child, log })
    }

    /// Waits until the other gateway answers through the tunnel.
    fn wait_for_tunnel(&self, net: &Topology) -> Result<()> {
        let found = self.log.wait_for_line(0, SOON, |line| line.contains("cipcb0: up, "));
        found.with_context(|| format!("it does not come up:\n{}", self.log.text()))?;
        let (deadline, one) =
            (Instant::now() + process::patient(SOON), Plan { timeout: Duration::from_millis(500), ..Plan::count(1) });
        while ping::run(net.gw(Side::A), Side::B.tunnel(), &one)?.received() == 0 {
            if Instant::now() > deadline {
                bail!("no answer:\n{}", self.log.text());
            }
        }
        Ok(())
    }

    /// Ends the daemon, and waits until the namespace is empty.
    fn stop(mut self, net: &Topology) -> Result<()> {
        process::signal(self.child.id(), Signal::TERM)?;
        process::wait_gone(self.child.id(), SOON)?;
        self.child.wait()?;
        for pid in net.gw(Side::A).processes()? {
            process::wait_gone(pid, SOON)?;
        }
        Ok(())
    }

    /// Waits for its end, and checks that its last line contains `words`.
    fn expect_refusal(mut self, net: &Topology, words: &[&str]) -> Result<()> {
        if process::wait_gone(self.child.id(), SOON).is_err() {
            let text = self.log.text();
            self.stop(net)?;
            bail!("it goes on:\n{text}");
        }
        assert_eq!(self.child.wait()?.code(), Some(1), "{}", self.log.text());
        self.log.wait_for_end(SOON);
        let line = self.log.lines().pop().map(|line| line.text).unwrap_or_default();
        for word in words {
            assert!(line.contains(word), "no {word:?} in: {line}");
        }
        for pid in net.gw(Side::A).processes()? {
            process::wait_gone(pid, SOON)?;
        }
        Ok(())
    }
}

/// The topology with gateway B up, and A's option file.
fn prepared() -> Result<(Topology, Gateway, PathBuf)> {
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let mut other = Gateway::start(&net, Side::B, Daemon::Blowfish, &Options::of(Side::B))?;
    other.wait_up()?;
    let options = Options::of(Side::A).set("ipup", "/nonexistent/ip-up").set("ipdown", "/nonexistent/ip-down");
    let path = options.write(&net.directory().join("A"))?;
    Ok((net, other, path))
}

fn without_all_but(capabilities: &[String]) -> String {
    capabilities.iter().fold("--bounding-set=-all".to_owned(), |set, capability| format!("{set},+{capability}"))
}

/// With the capabilities and the default limit of locked memory of a service.
#[test]
fn the_capabilities_of_the_readme_suffice() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let line = README.lines().find(|line| line.starts_with("- Root: ")).context("the README names capabilities")?;
    let words = line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let capabilities: Vec<String> =
        words.filter_map(|word| word.strip_prefix("CAP_")).map(str::to_ascii_lowercase).collect();
    assert!(capabilities.len() >= 4 && !capabilities.contains(&"sys_admin".to_owned()), "{capabilities:?}");
    let (net, _other, path) = prepared()?;
    let set = without_all_but(&capabilities);
    let confined = Confined::start(&net, &path, &["prlimit", MEMLOCK, "setpriv", &set, "--inh-caps=-all"])?;
    confined.wait_for_tunnel(&net)?;
    if !capabilities.contains(&"ipc_lock".to_owned()) {
        let told = confined.log.wait_for_line(0, SOON, |line| line.contains("locked memory is limited to 8192 KiB"));
        told.with_context(|| confined.log.text())?;
    }
    confined.stop(&net)?;
    // The error names what is missing.
    for (missing, name) in
        [(&["net_admin"][..], "CAP_NET_ADMIN"), (&["bpf", "sys_admin"], "CAP_BPF"), (&["net_raw"], "CAP_NET_RAW")]
    {
        let set = missing.iter().map(|name| format!("-{name}")).collect::<Vec<_>>().join(",");
        let set = format!("--bounding-set={set}");
        Confined::start(&net, &path, &["setpriv", &set, "--inh-caps=-all"])?.expect_refusal(&net, &[name])?;
    }
    Ok(())
}

/// A memory cgroup of this test's own; removed at the end.
struct Cgroup(PathBuf);

impl Cgroup {
    /// `None`: this machine has no memory controller for us.
    fn new(limit: &str) -> Option<Self> {
        let name = format!("cipe-test-{}", std::process::id());
        for (root, file) in [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")] {
            let folder = Path::new(root).join(&name);
            if Path::new(root).join("cgroup.procs").exists() && std::fs::create_dir(&folder).is_ok() {
                let group = Self(folder);
                if std::fs::write(group.0.join(file), limit).is_ok() {
                    return Some(group);
                }
            }
        }
        None
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir(&self.0) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

#[test]
fn a_memory_limit_is_named_as_such() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let Some(group) = Cgroup::new("24M") else {
        eprintln!("skipped: no memory cgroup can be made here");
        return Ok(());
    };
    let (net, _other, path) = prepared()?;
    Confined::start_in(&net, &path, &group)?.expect_refusal(&net, &["memory.max", "MemoryMax="])
}

/// In containers /proc/sys is read-only; the kernel's settings may or may not be right already.
#[test]
fn proc_may_be_read_only_and_an_empty_sys_is_named() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let (net, _other, path) = prepared()?;
    let mounted = |mount: &str| format!("mount --make-rprivate /; {mount}; exec \"$0\" \"$@\"");
    let read_only = mounted("mount -t proc -o ro proc /proc");
    let confined = Confined::start(&net, &path, &["unshare", "--mount", "sh", "-c", &read_only])?;
    confined.wait_for_tunnel(&net)?;
    confined.stop(&net)?;
    let empty = mounted("mount -t tmpfs none /sys");
    let words = ["/sys/devices/system/cpu/possible", "mount sysfs on /sys"];
    Confined::start(&net, &path, &["unshare", "--mount", "sh", "-c", &empty])?.expect_refusal(&net, &words)
}
