//! The machine that a guest runs in: qemu, by KVM where that works, else by emulation.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock, mpsc};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use cipe_tests::process;
use rustix::process::Signal;

use super::initramfs;
use super::kernel::Kernel;
use super::plan::{MARK, Plan, Record};
use crate::tools;

/// A guest that is silent for this time hangs, since it sends a sign of life every ten seconds. The time is long because
/// emulation on a busy host boots slowly.
const SILENCE_LIMIT: Duration = Duration::from_secs(240);

/// The same if the guest's clock counts instructions: emulation takes a minute for one such second on a busy host.
const SILENCE_LIMIT_ICOUNT: Duration = Duration::from_secs(1200);

/// Lines of the console that are shown if a guest ends early.
const SHOWN_CONSOLE_LINES: usize = 40;

const QEMU: &str = "qemu-system-x86_64";

/// The emulated CPU: all possible features except page tables of five levels, which are not needed here and cost a step in each
/// walk.
const CPU: &str = "max,la57=off";

/// Running machines.
static RUNNING: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// Ends every machine at once, for a signal handler.
pub(super) fn end_all() {
    for pid in RUNNING.lock().unwrap_or_else(std::sync::PoisonError::into_inner).drain(..) {
        drop(process::signal(pid, Signal::KILL));
    }
}

/// Arguments that describe the machine.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Shape {
    /// CPUs of the guest
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Memory of the guest, MiB
    #[arg(long, default_value_t = 4096)]
    memory: u32,
    /// Let the guest's clock count instructions, one a nanosecond, also on a busy host: a second of CPU time is then a thousand
    /// million instructions, and an idle guest's clock skips to the next timer. By emulation, with one CPU
    #[arg(long)]
    instructions: bool,
    /// Further arguments for qemu, such as `--qemu=-device --qemu=e1000e,netdev=n`; once for each
    #[arg(long)]
    qemu: Vec<String>,
}

impl Shape {
    /// Whether its clock counts instructions.
    pub(crate) fn counts_instructions(&self) -> bool {
        self.instructions
    }

    /// The same, with a clock that counts instructions.
    pub(crate) fn counting_instructions(&self) -> Self {
        Self { instructions: true, ..self.clone() }
    }
}

/// Whether guests run by KVM: the host must let us make a virtual CPU, which not every host with /dev/kvm does.
pub(super) fn has_kvm() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let mut command = Command::new(QEMU);
        command.args(["-accel", "kvm", "-cpu", "host", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio"]);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let Ok(mut child) = command.spawn() else { return false };
        // If it has ended already, the write fails, and its exit code is reported.
        drop(child.stdin.take().map(|mut monitor| monitor.write_all(b"quit\n")));
        child.wait().is_ok_and(|status| status.success())
    })
}

/// Text of the console after emulation has run stale code: the kernel puts a breakpoint into code while it changes it, and a
/// virtual CPU hits the breakpoint after the kernel has removed it.
const STALE_CODE: &str = "int3: 0000 ";

/// The end of a guest.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The plan is done.
    Done,
    /// Emulation itself failed, [`STALE_CODE`]: another guest may run the rest.
    StaleCode,
}

/// Boots `kernel`, runs `plan` in it, and calls `listen` with each record and each line of output. Logs stay in `home`.
///
/// # Errors
/// The guest ends before its plan is done, or hangs; the error has the end of its console.
pub(super) fn run(
    kernel: &Kernel,
    plan: &Plan,
    shape: &Shape,
    home: &Path,
    mut listen: impl FnMut(Told<'_>),
) -> Result<End> {
    fs::create_dir_all(home)?;
    let [plan_file, image, console] = ["plan.json", "initramfs", "console.log"].map(|name| home.join(name));
    serde_json::to_writer(File::create(&plan_file)?, plan)?;
    initramfs::write(kernel, &plan_file, &image)?;
    let mut log = File::create(home.join("output.log"))?;
    let machine = Machine::start(kernel, shape, &image, &console)?;
    let mut done = false;
    let silence = if shape.instructions { SILENCE_LIMIT_ICOUNT } else { SILENCE_LIMIT };
    let why = loop {
        let line = match machine.lines.recv_timeout(silence) {
            Ok(line) => line,
            Err(mpsc::RecvTimeoutError::Disconnected) => break "it has ended".to_owned(),
            Err(mpsc::RecvTimeoutError::Timeout) => break format!("it said nothing for {} s", silence.as_secs()),
        };
        match line.strip_prefix(MARK).map(serde_json::from_str) {
            Some(Ok(Record::Done)) => done = true,
            Some(Ok(record)) => listen(Told::Record(record, machine.used())),
            Some(Err(_)) => {}
            None => {
                writeln!(log, "{line}")?;
                listen(Told::Line(&line));
            }
        }
    };
    drop(machine);
    if done {
        return Ok(End::Done);
    }
    let console = fs::read(&console).unwrap_or_default();
    let console = String::from_utf8_lossy(&console);
    if !has_kvm() && console.contains(STALE_CODE) {
        return Ok(End::StaleCode);
    }
    let lines: Vec<&str> = console.lines().collect();
    bail!(
        "the guest did not finish its plan: {why}; the end of its console:\n{}",
        lines[lines.len().saturating_sub(SHOWN_CONSOLE_LINES)..].join("\n")
    )
}

/// Messages of a guest.
pub(super) enum Told<'a> {
    /// A record, and the CPU time that the machine has used on the host so far.
    Record(Record, Duration),
    /// A line that a program has printed.
    Line(&'a str),
}

/// A running qemu; dropping it ends it.
struct Machine {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Machine {
    fn start(kernel: &Kernel, shape: &Shape, image: &Path, console: &Path) -> Result<Self> {
        let mut command = command(kernel, shape, image, console);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(console.with_file_name("qemu.log"))?);
        let mut child = command.spawn().with_context(|| tools::text(&command))?;
        RUNNING.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(child.id());
        let output = child.stdout.take().context("stdout is a pipe")?;
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            let mut output = BufReader::new(output);
            let mut line = Vec::new();
            while output.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                    break;
                }
                line.clear();
            }
        });
        Ok(Self { child, lines })
    }

    fn used(&self) -> Duration {
        let time = process::CpuTime::of(self.child.id()).unwrap_or_default();
        time.user + time.system
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        let pid = self.child.id();
        RUNNING.lock().unwrap_or_else(std::sync::PoisonError::into_inner).retain(|other| *other != pid);
    }
}

fn command(kernel: &Kernel, shape: &Shape, image: &Path, console: &Path) -> Command {
    // The guest ends when this process ends, for whatever reason.
    let mut command = Command::new("setpriv");
    command.args([
        "--pdeathsig",
        "KILL",
        "--",
        QEMU,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    let mut cpus = shape.cpus;
    if shape.instructions {
        cpus = 1;
        // An idle guest waits for nobody: its clock goes on to the next timer.
        command.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-cpu", CPU]);
    } else if has_kvm() {
        command.args(["-accel", "kvm", "-cpu", "host"]);
    } else {
        command.args(["-accel", "tcg,thread=multi", "-cpu", CPU]);
    }
    command.args(["-machine", "q35", "-smp", &cpus.to_string(), "-m", &shape.memory.to_string()]);
    command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(image);
    // Mitigations are for hosts, and each costs time under emulation. A busy host delays ticks, so the kernel's check of its
    // timer could fail.
    command.args(["-append", "console=ttyS0 panic=-1 mitigations=off nokaslr no_timer_check quiet"]);
    let share = format!("local,path=/,mount_tag={},security_model=none,readonly=on,multidevs=remap", initramfs::HOST);
    command.args(["-virtfs", &share, "-serial", &format!("file:{}", console.display()), "-serial", "stdio"]);
    command.args(&shape.qemu);
    command
}

/// The directory of a guest's logs.
pub(super) fn home(name: &str) -> PathBuf {
    tools::target().join("guests").join(name)
}
