//! A daemon in a namespace, started from a real option file, with its status and log.

mod binary;
mod pair;

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::process::Signal;

use crate::SOON;
use crate::log::{Line, Log};
use crate::namespace::Namespace;
use crate::options::Options;
use crate::process::{self, BpfObjects};
use crate::status::Status;
use crate::topology::{Side, Topology};

pub use binary::{binary, use_binary};
pub use pair::Pair;

/// A daemon, by the name of its program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Daemon {
    /// `ciped-cb`: Blowfish, device `cipcb0`.
    Blowfish,
    /// `ciped-ci`: IDEA, device `cipci0`.
    Idea,
    /// `ciped-db`: Blowfish, Ethernet frames, device `cipdb0`.
    EthernetBlowfish,
    /// `ciped-di`: IDEA, Ethernet frames, device `cipdi0`.
    EthernetIdea,
}

impl Daemon {
    /// Program name.
    pub fn program(self) -> &'static str {
        match self {
            Self::Blowfish => "ciped-cb",
            Self::Idea => "ciped-ci",
            Self::EthernetBlowfish => "ciped-db",
            Self::EthernetIdea => "ciped-di",
        }
    }

    /// The first device it makes.
    pub fn device(self) -> &'static str {
        match self {
            Self::Blowfish => "cipcb0",
            Self::Idea => "cipci0",
            Self::EthernetBlowfish => "cipdb0",
            Self::EthernetIdea => "cipdi0",
        }
    }
}

/// A running daemon, with the engine that it has started. Dropping it stops it.
pub struct Gateway {
    child: Child,
    daemon: Daemon,
    device: Option<String>,
    options: Options,
    option_file: PathBuf,
    directory: PathBuf,
    run_directory: PathBuf,
    bin: PathBuf,
    namespace: PathBuf,
    namespace_name: String,
    up: fs::File,
    log: Log,
    /// When it was started.
    pub started: Instant,
    /// The command line.
    pub command: String,
}

/// Sets the directories of a program, and ends an engine that does what it should not.
fn set_environment(command: &mut Command, run_directory: &Path) {
    command.env("CIPE_RUN_DIR", run_directory).env("CIPE_CONFINEMENT", "end");
    // Beside it, since what is in the run directory has to be gone at the end.
    command.env("CIPE_STATE_DIR", run_directory.with_extension("state"));
}

/// What starts a daemon; its log is a pipe.
fn command_of(
    namespace: &Namespace,
    program: &Path,
    (options, file): (&Options, &Path),
    run_directory: &Path,
) -> Command {
    let mut command = namespace.command(program);
    command.arg("-o").arg(file);
    set_environment(&mut command, run_directory);
    command.envs(options.environment().iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

impl Gateway {
    /// Writes the option file, with an `ip-up` that routes the other side's LAN into the tunnel, and starts the daemon.
    ///
    /// # Errors
    /// Files that cannot be written or a program that cannot be started. [`Gateway::wait_up`] reports a daemon that gives up.
    pub fn start(net: &Topology, side: Side, daemon: Daemon, options: &Options) -> Result<Self> {
        let (name, routes) = (format!("{}", side.letter()), [side.other().lan()]);
        Self::start_in(net, (net.gw(side), &name), &routes, daemon, options)
    }

    /// The same in any namespace, under any name; `ip-up` leads `routes` into the tunnel. Daemons of one name share an
    /// engine.
    ///
    /// # Errors
    /// As [`Gateway::start`].
    pub fn start_in(
        net: &Topology,
        (namespace, who): (&Namespace, &str),
        routes: &[String],
        daemon: Daemon,
        options: &Options,
    ) -> Result<Self> {
        Self::start_with(net, (namespace, who), routes, daemon, options, &[])
    }

    /// The same with additional environment variables.
    ///
    /// # Errors
    /// As [`Gateway::start`].
    pub fn start_with(
        net: &Topology,
        (namespace, who): (&Namespace, &str),
        routes: &[String],
        daemon: Daemon,
        options: &Options,
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("gw{who}-{number}");
        let directory = net.directory().join(&name);
        let fifo = directory.join("up");
        let script = directory.join("ip-up");
        let options = options.clone().set("ipup", script.display());
        let path = options.write(&directory)?;
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        // Open for writing too, so that there is no end of file when one writer closes it.
        let up =
            fs::File::from(rustix::fs::open(&fifo, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o700).open(&script)?;
        // Arguments of ip-up: device, own carrier address, pid, ipaddr, ptpaddr, arg.
        writeln!(file, "#!/bin/sh\nPATH=/usr/sbin:/usr/bin:/sbin:/bin")?;
        for route in routes {
            writeln!(file, "ip route replace {route} dev \"$1\"")?;
        }
        writeln!(file, "echo \"$1\" >{}", fifo.display())?;
        drop(file);

        // There is one engine for each namespace: the run directory belongs to the namespace, not to the daemon.
        let run_directory = net.directory().join(format!("run{who}"));
        let bin = net.directory().join("bin");
        let mut command = command_of(namespace, &bin.join(daemon.program()), (&options, &path), &run_directory);
        command.envs(environment.iter().copied());
        let text = format!(
            "CIPE_RUN_DIR={} ip netns exec {} {} -o {}",
            run_directory.display(),
            namespace.name(),
            bin.join(daemon.program()).display(),
            path.display()
        );
        let started = Instant::now();
        let mut child = command.spawn().with_context(|| text.clone())?;
        let stderr = child.stderr.take().context("stderr is a pipe")?;
        Ok(Self {
            child,
            daemon,
            device: None,
            options,
            option_file: path,
            directory,
            run_directory,
            bin,
            namespace: namespace.path(),
            namespace_name: namespace.name().to_owned(),
            up,
            log: Log::follow(stderr),
            started,
            command: text,
        })
    }

    /// Waits until `ip-up` has run, and returns the tunnel's device.
    ///
    /// # Errors
    /// The daemon's log, if it ends before or takes longer than [`SOON`].
    pub fn wait_up(&mut self) -> Result<String> {
        if process::wait_for_either(&self.up, self.child.id(), SOON)? {
            let mut text = [0; 64];
            let length = (&self.up).read(&mut text)?;
            let device = String::from_utf8_lossy(&text[..length]).trim().to_owned();
            self.device = Some(device.clone());
            return Ok(device);
        }
        let Some(status) = self.child.try_wait()? else {
            bail!("{}: ip-up has not run after {SOON:?}; its log:\n{}", self.command, self.log.text());
        };
        self.log.wait_for_end(Duration::from_secs(1));
        bail!("{}: ended with {status}; its log:\n{}", self.command, self.log.text());
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How the daemon has ended, if it has.
    ///
    /// # Errors
    /// wait(2) fails.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// The engine's process, if there is one.
    pub fn engine_pid(&self) -> Option<u32> {
        let inside = process::in_namespace(&self.namespace).ok()?;
        // Not one that stands by, which has the same arguments when it has become the engine.
        inside.into_iter().find(|&pid| process::name(pid).as_deref() == Some("cipe-engine"))
    }

    /// BPF objects that the engine and the daemon hold open.
    pub fn bpf_objects(&self) -> BpfObjects {
        let mut all = BpfObjects::default();
        for pid in [Some(self.pid()), self.engine_pid()].into_iter().flatten() {
            let objects = BpfObjects::of(pid).unwrap_or_default();
            all.programs.extend(objects.programs);
            all.maps.extend(objects.maps);
            all.links.extend(objects.links);
        }
        all
    }

    /// The log of daemon and engine.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Waits for a line of the log.
    ///
    /// # Errors
    /// The whole log, if none came within [`SOON`].
    pub fn wait_for_line(&self, what: &str, wanted: impl Fn(&str) -> bool) -> Result<Line> {
        self.log
            .wait_for_line(0, SOON, wanted)
            .with_context(|| format!("no line {what} in the log:\n{}", self.log.text()))
    }

    /// Waits until the log has exactly `count` lines that `wanted` accepts. One process delivers a packet and another one logs
    /// its effect, so a line may come after the packet's answer.
    ///
    /// # Errors
    /// The whole log, if there are fewer after [`SOON`], or more.
    pub fn wait_for_lines(&self, count: usize, what: &str, wanted: impl Fn(&str) -> bool) -> Result<()> {
        let found = self.log.wait_for_lines(count, SOON, wanted);
        if found != count {
            bail!("{found} lines {what} instead of {count} in the log:\n{}", self.log.text());
        }
        Ok(())
    }

    /// A `cipe` command line for this gateway's engine, such as `cipe show --json`.
    pub fn cipe(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace_name]).arg(self.bin.join("cipe")).args(arguments);
        set_environment(&mut command, &self.run_directory);
        command.stdin(Stdio::null());
        command
    }

    /// The same as text, for people.
    pub fn cipe_text(&self, arguments: &str) -> String {
        let (run, namespace, bin) = (self.run_directory.display(), &self.namespace_name, self.bin.display());
        format!("CIPE_RUN_DIR={run} ip netns exec {namespace} {bin}/cipe {arguments}")
    }

    /// Status of this tunnel.
    ///
    /// # Errors
    /// `cipe show --json` fails, or does not list the tunnel.
    pub fn status(&self) -> Result<Status> {
        let mut output = self.cipe(&["show", "--json"]).output()?;
        // `cipe show` waits for some seconds, which is too short where everything takes ten times as long.
        let slow = |output: &Output| String::from_utf8_lossy(&output.stderr).contains("does not answer");
        for _ in 1..process::slowness() {
            if output.status.success() || !slow(&output) {
                break;
            }
            output = self.cipe(&["show", "--json"]).output()?;
        }
        if !output.status.success() {
            bail!("cipe show --json: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        let device = self.device.as_deref().unwrap_or(self.daemon.device());
        let text = String::from_utf8_lossy(&output.stdout);
        let tunnels = Status::parse(&text)?;
        let found = tunnels.into_iter().find(|status| status.device == device);
        found.with_context(|| format!("cipe show --json does not know {device}: {text}\n{}", self.log.text()))
    }

    /// Send keys that the daemon has started to use, as far as its log shows: it logs the 1st, 2nd, 4th, 8th and so on.
    pub fn send_keys(&self) -> usize {
        let lines = self.log().lines();
        let told = lines.iter().filter(|line| line.text.contains("new send key"));
        let total = |line: &str| line.strip_suffix(" so far")?.rsplit(' ').next()?.parse().ok();
        told.enumerate().map(|(place, line)| total(&line.text).unwrap_or(place + 1)).max().unwrap_or(0)
    }

    /// Waits for a status. A counter may increase only after the answer to its packet has arrived: another process gets the
    /// packet first.
    ///
    /// # Errors
    /// The last status and the log, if none that `wanted` accepts came within [`SOON`].
    pub fn wait_for_status(&self, what: &str, wanted: impl Fn(&Status) -> bool) -> Result<Status> {
        let deadline = Instant::now() + process::patient(SOON);
        loop {
            let status = self.status()?;
            if wanted(&status) {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("not seen: {what}\n{status:?}\n{}", self.log.text());
            }
        }
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// A daemon that does not end within [`SOON`]; it is killed then.
    pub fn stop(mut self) -> Result<ExitStatus> {
        self.end(Signal::TERM)
    }

    /// Stops the daemon as [`Gateway::stop`] does, and starts it in `namespace` with the same option file.
    ///
    /// # Errors
    /// Those of [`Gateway::stop`], [`Gateway::start`] and [`Gateway::wait_up`].
    pub fn restart(&mut self, namespace: &Namespace) -> Result<()> {
        self.restart_after(Signal::TERM, namespace)
    }

    /// Writes the option file anew, for the next start.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn reconfigure(&mut self, change: impl FnOnce(Options) -> Options) -> Result<()> {
        self.options = change(self.options.clone());
        self.options.write_file(&self.option_file)
    }

    /// Ends the daemon by a signal, unless it has ended, and starts it again as [`Gateway::restart`] does.
    ///
    /// # Errors
    /// As [`Gateway::restart`].
    pub fn restart_after(&mut self, how: Signal, namespace: &Namespace) -> Result<()> {
        self.end(how)?;
        // A tunnel that started over, as after the deletion of its hub, has run `ip-up` more than once.
        let mut earlier = [0; 4096];
        while matches!((&self.up).read(&mut earlier), Ok(1..)) {}
        let program = self.bin.join(self.daemon.program());
        let mut child =
            command_of(namespace, &program, (&self.options, &self.option_file), &self.run_directory).spawn()?;
        self.log = Log::follow(child.stderr.take().context("stderr is a pipe")?);
        (self.child, self.started) = (child, Instant::now());
        self.wait_up().map(drop)
    }

    /// Sends SIGKILL and waits for the end; the engine is left alone.
    ///
    /// # Errors
    /// wait(2) fails.
    pub fn kill(mut self) -> Result<ExitStatus> {
        self.end(Signal::KILL)
    }

    fn end(&mut self, how: Signal) -> Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        process::signal(self.child.id(), how)?;
        let ended = process::wait_gone(self.child.id(), SOON);
        if ended.is_err() {
            self.child.kill()?;
        }
        let status = self.child.wait()?;
        ended.with_context(|| format!("{how:?}; its log:\n{}", self.log.text()))?;
        Ok(status)
    }

    /// Its options.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The directory of option file and scripts.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The directory of the engine's socket.
    pub fn run_directory(&self) -> &Path {
        &self.run_directory
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of {}\n{}---", self.command, self.log.text());
        }
        if let Err(error) = self.end(Signal::TERM) {
            eprintln!("{error:#}");
        }
    }
}
