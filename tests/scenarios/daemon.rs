//! The daemon as a program: its log, its end, changes of options while it runs, and the configuration of its interface.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::namespace::Namespace;
use cipe_tests::offload::Offload;
use cipe_tests::options::{Options, PORT};
use cipe_tests::ping::{self, Plan};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, process};
use rustix::process::Signal;
use serde_json::Value;

/// A syslog socket, and the shell commands that make it the /dev/log of one mount namespace: /dev is another file system there,
/// into which the devices that programs need are bind-mounted.
struct Syslog {
    socket: UnixDatagram,
    lines: Vec<String>,
    path: PathBuf,
}

impl Syslog {
    fn new(folder: &Path) -> Result<Self> {
        let path = folder.join("log");
        let socket = UnixDatagram::bind(&path)?;
        Ok(Self { socket, lines: Vec::new(), path })
    }

    /// A command in that mount namespace.
    fn command(&self, namespace: &Namespace, folder: &Path, program: &Path, arguments: &[&str]) -> Command {
        let script = format!(
            "set -e; mount --make-rprivate /; mkdir -p {old}; mount --rbind /dev {old}; mount -t tmpfs none /dev\n\
             for node in null zero random urandom; do : >/dev/$node; mount --bind {old}/$node /dev/$node; done\n\
             : >/dev/log; mount --bind {log} /dev/log; exec \"$0\" \"$@\"",
            old = folder.join("dev").display(),
            log = self.path.display(),
        );
        let mut command = namespace.command("unshare");
        command.args(["--mount", "sh", "-c", &script]).arg(program).args(arguments);
        command.stdin(Stdio::null());
        command
    }

    /// Whether a message with this text has arrived.
    fn has(&mut self, what: &str) -> Result<bool> {
        self.socket.set_nonblocking(true)?;
        let mut message = [0; 2048];
        while let Ok(length) = self.socket.recv(&mut message) {
            self.lines.push(String::from_utf8_lossy(&message[..length]).into_owned());
        }
        self.socket.set_nonblocking(false)?;
        Ok(self.lines.iter().any(|line| line.contains(what)))
    }

    /// Waits for a message with this text; returns it whole.
    fn wait_for(&mut self, what: &str) -> Result<String> {
        let deadline = Instant::now() + process::patient(SOON);
        loop {
            if let Some(line) = self.lines.iter().find(|line| line.contains(what)) {
                return Ok(line.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("no {what:?} in the system log:\n{}", self.lines.join("\n"));
            }
            self.socket.set_read_timeout(Some(left))?;
            let mut message = [0; 2048];
            if let Ok(length) = self.socket.recv(&mut message) {
                self.lines.push(String::from_utf8_lossy(&message[..length]).into_owned());
            }
        }
    }
}

/// Without `debug` the program returns once the tunnel is up, and everything else is in the system log.
#[test]
fn in_the_background_the_classic_lines_go_to_the_system_log() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let (gateway, folder) = (net.gw(Side::A), net.directory());
    let mut log = Syslog::new(folder)?;
    let options = Options::of(Side::A)
        .without("debug")
        .flag("dynip")
        .set("peer", "0.0.0.0:0")
        .set("tokxc", 1)
        .set("ipup", "/nonexistent/ip-up");
    let path = options.write(&folder.join("A"))?;
    // The name of the first versions, which had one cipher.
    let program = folder.join("bin/ciped");
    std::os::unix::fs::symlink("cipe", &program)?;
    let mut command = log.command(gateway, folder, &program, &["-o", path.to_str().context("ASCII")?]);
    let started = command.env("CIPE_RUN_DIR", folder.join("runA")).output()?;
    assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
    let said = String::from_utf8_lossy(&started.stderr);
    assert_eq!(said, "", "nothing is wrong");

    let first = log.wait_for("CIPE daemon vers ")?;
    let tag = first.split_once("CIPE daemon").map(|(tag, _)| tag.to_owned()).unwrap_or_default();
    let pid: u32 =
        tag.strip_prefix("<30>ciped-cb[").and_then(|rest| rest.strip_suffix("]: ")).context(first.clone())?.parse()?;
    assert!(process::arguments(pid).iter().any(|argument| argument == path.to_str().unwrap_or_default()));
    // The process name that `pgrep -x ciped-cb` and `killall ciped-cb` match; only the daemon has it.
    let name_of = |pid: u32| fs::read_to_string(format!("/proc/{pid}/comm")).map(|name| name.trim_end().to_owned());
    assert_eq!(name_of(pid)?, "ciped-cb");
    let others = gateway.processes()?.into_iter().filter(|other| *other != pid);
    let others: Vec<String> = others.map(name_of).collect::<std::io::Result<_>>()?;
    assert_eq!(others, ["cipe-engine"]);
    log.wait_for(&format!("{tag}cipcb0: up, 10.201.0.1 on "))?;

    gateway.ip(&["route", "add", &Side::B.lan(), "dev", "cipcb0"])?;
    let mut other = Gateway::start(&net, Side::B, Daemon::Blowfish, &Options::of(Side::B).set("tokxc", 1))?;
    other.wait_up()?;
    let (deadline, one) =
        (Instant::now() + process::patient(SOON), Plan { timeout: Duration::from_millis(500), ..Plan::count(1) });
    while ping::run(net.lan(Side::B), Side::A.host(), &one)?.received() == 0 && Instant::now() < deadline {}
    log.wait_for(&format!("{tag}cipcb0: new peer {}:{PORT}", Side::B.carrier()))?;
    log.wait_for(&format!("{tag}cipcb0: new send key"))?;

    // Too short, and no multiple of 8.
    let wire = net.gw(Side::B).run(|| std::net::UdpSocket::bind("10.200.0.2:0"))?;
    wire.send_to(b"bogus", (Side::A.carrier(), PORT))?;
    log.wait_for("cipcb0: got bogus length")?;

    gateway.ip(&["addr", "del", "10.200.0.1/24", "dev", "wire0"])?;
    gateway.ip(&["addr", "add", "10.200.0.21/24", "dev", "wire0"])?;
    log.wait_for(&format!("{tag}cipcb0: changing my address: 10.200.0.21:{PORT}"))?;

    let peer = Side::B.carrier().to_string();
    gateway.ip(&["route", "add", &peer, "dev", "cipcb0"])?;
    // It is logged when a datagram has looped.
    let deadline = Instant::now() + process::patient(SOON);
    while !log.has("cipcb0: looped route")? && Instant::now() < deadline {
        let one = Plan { timeout: Duration::from_millis(50), ..Plan::count(1) };
        ping::run(net.lan(Side::A), Side::B.host(), &one)?;
    }
    let looped = log.wait_for("cipcb0: looped route")?;
    assert!(looped.starts_with("<28>ciped-cb["), "{looped}");
    gateway.ip(&["route", "del", &peer, "dev", "cipcb0"])?;
    gateway.ip(&["link", "set", "wire0", "mtu", "115"])?;
    log.wait_for("cipcb0: MTU too small")?;
    gateway.ip(&["link", "set", "wire0", "mtu", "1500"])?;

    process::signal(pid, Signal::TERM)?;
    log.wait_for(&format!("{tag}cipcb0: statistics: "))?;
    log.wait_for(&format!("{tag}cipcb0: down"))?;
    process::wait_gone(pid, SOON)?;
    for pid in gateway.processes()? {
        process::wait_gone(pid, SOON)?;
    }
    assert_eq!(gateway.devices()?, ["lo", "lan0", "wire0"]);
    Ok(())
}

#[test]
fn a_hang_up_takes_up_what_it_can_and_says_what_it_cannot() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    let path = pair.a.directory().join("options");
    let before = fs::read_to_string(&path)?;
    let hang_up = |text: &str| -> Result<()> {
        fs::write(&path, text)?;
        process::signal(pair.a.pid(), Signal::HUP)
    };
    hang_up(&format!("{before}maxerr 3\nmtu 1300\narg more\n"))?;
    let line = pair.a.wait_for_line("of the options", |line| line.contains("options read again"))?;
    assert!(line.text.ends_with("applied: maxerr, arg; needs a restart: mtu"), "{}", line.text);
    // Compared with the options in effect by now.
    hang_up(&format!("{before}maxerr 3\nmtu 1300\narg other\n"))?;
    pair.a.wait_for_line("of the second time", |line| line.ends_with("applied: arg; needs a restart: mtu"))?;
    hang_up(&format!("{before}maxerror 3\n"))?;
    pair.a.wait_for_line("of the mistake", |line| {
        line.contains("unknown option `maxerror`")
            && line.contains(&format!("{}:", path.display()))
            && line.contains("`maxerr`")
    })?;
    pair.a.wait_for_line("of the rest", |line| line.contains("keeps its former options"))?;
    assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &Plan::count(5))?.received(), 5);
    Ok(())
}

#[test]
fn it_ends_well_when_asked_and_badly_when_the_network_is_gone() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    // The interface is set down, or deleted.
    for verb in [&["link", "set", "cipcb0", "down"][..], &["link", "del", "cipcb0"]] {
        let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options)?;
        pair.wait_for_keys(&net)?;
        net.gw(Side::A).ip(verb)?;
        process::wait_gone(pair.a.pid(), SOON)?;
        assert!(pair.a.stop()?.success(), "{verb:?}");
        pair.b.wait_for_line("of the good-bye", |line| line.contains("the peer goes away (CT_KILL): the interface"))?;
    }
    // Nothing listens at the peer's port: its host answers with an ICMP error.
    let options = Options::of(Side::A).set("maxerr", 2).set("ping", 1);
    let mut alone = Gateway::start(&net, Side::A, Daemon::Blowfish, &options)?;
    alone.wait_up()?;
    alone.wait_for_line("of the end", |line| {
        line.contains("no answer from the peer; ") && line.contains("raise maxerr")
    })?;
    process::wait_gone(alone.pid(), SOON)?;
    assert_eq!(alone.stop()?.code(), Some(1));
    // The peer's host is silent, too.
    net.gw(Side::B).ip(&["link", "set", "wire0", "down"])?;
    let options = Options::of(Side::A).set("maxerr", 0).set("ping", 1).set("toping", 1);
    let mut alone = Gateway::start(&net, Side::A, Daemon::Idea, &options)?;
    alone.wait_up()?;
    alone.wait_for_line("of the end", |line| {
        line.contains("1 network errors") || line.contains("no answer to a ping")
    })?;
    process::wait_gone(alone.pid(), SOON)?;
    assert_eq!(alone.stop()?.code(), Some(1));
    Ok(())
}

/// Nobody can decrypt packets that the other end sends under its old key.
fn not_one_packet_is_lost_after_a_restart(change: fn(Options) -> Options) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let mut pair = Pair::start(&net, Daemon::Blowfish, |_, options| change(options))?;
    for from in [Side::A, Side::B, Side::A] {
        pair.wait_for_keys(&net)?;
        let Pair { a, b } = pair;
        assert!(a.stop()?.success());
        b.wait_for_status("no send key", |status| !status.has_key("send") && !status.is_sealed())?;
        let mut a = Gateway::start(&net, Side::A, Daemon::Blowfish, &change(Options::of(Side::A)))?;
        a.wait_up()?;
        let report = ping::run(net.lan(from), from.other().host(), &Plan::count(1))?;
        assert_eq!(report.received(), 1, "from {from:?}: {:?}\n{}", a.status()?, b.log().text());
        pair = Pair { a, b };
    }
    Ok(())
}

#[test]
fn not_one_packet_is_lost_after_a_peer_was_restarted() -> Result<()> {
    not_one_packet_is_lost_after_a_restart(|options| options)
}

#[test]
fn not_one_sealed_packet_is_lost_after_a_peer_was_restarted() -> Result<()> {
    not_one_packet_is_lost_after_a_restart(Options::sealed)
}

#[test]
fn nokey_carries_bare_packets_and_says_so_wherever_it_can() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.without("key").flag("nokey"))?;
    let capture = net.capture_carrier(1000)?;
    let report = ping::run(net.lan(Side::A), Side::B.host(), &Plan::sizes(vec![28, 29, 84, 1442]))?;
    assert_eq!((report.received(), report.damaged), (4, 0));
    capture.wait_for(SOON, cipe_tests::net::in_clear).context("bare packets can be read")?;
    for gateway in [&pair.a, &pair.b] {
        gateway.wait_for_line("at the start", |line| line.starts_with("NO ENCRYPTION: `nokey`"))?;
        gateway.wait_for_line("of the tunnel", |line| line.starts_with("cipcb0: NO ENCRYPTION"))?;
        let shown = gateway.cipe(&["show"]).output()?;
        assert!(String::from_utf8_lossy(&shown.stdout).contains("none: NO ENCRYPTION"));
    }
    Ok(())
}

fn json(namespace: &Namespace, arguments: &[&str]) -> Result<Value> {
    Ok(serde_json::from_str(&namespace.ip(&[&["-j"], arguments].concat())?)?)
}

#[test]
fn the_interface_is_what_its_options_say() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let gateway = net.gw(Side::A);
    let options = Options::of(Side::A)
        .set("mtu", 1400)
        .set("metric", 42)
        .set("mask", "255.255.255.0")
        .set("bcast", "10.201.0.255")
        .set("hwaddr", "02:C1:BE:00:00:07");
    let pair =
        Pair::start(&net, Daemon::Blowfish, |side, usual| if side == Side::A { options.clone() } else { usual })?;
    pair.wait_for_keys(&net)?;
    let device = &json(gateway, &["addr", "show", "dev", "cipcb0"])?[0];
    assert_eq!((&device["mtu"], &device["address"]), (&Value::from(1400), &Value::from("02:c1:be:00:00:07")));
    let address = &device["addr_info"][0];
    assert_eq!(address["local"], "10.201.0.1");
    assert_eq!((&address["address"], &address["prefixlen"]), (&Value::from("10.201.0.2"), &Value::from(24)));
    assert_eq!((&address["broadcast"], &address["metric"]), (&Value::from("10.201.0.255"), &Value::from(42)));
    let routes = json(gateway, &["route", "show", "dev", "cipcb0", "proto", "kernel"])?;
    assert_eq!(
        (&routes[0]["dst"], &routes[0]["metric"]),
        (&Value::from("10.201.0.0/24"), &Value::from(42)),
        "{routes}"
    );
    drop(pair);

    // As the classic device is by default, and as ip-up configures it.
    for (options, addresses) in [(Options::of(Side::A), 1), (Options::of(Side::A).flag("ifconfig"), 0)] {
        let mut alone = Gateway::start_in(&net, (gateway, "A"), &[], Daemon::Idea, &options)?;
        alone.wait_up()?;
        let device = &json(gateway, &["addr", "show", "dev", "cipci0"])?[0];
        let found = device["addr_info"].as_array().map_or(0, Vec::len);
        assert_eq!(found, addresses, "{device}");
        if addresses > 0 {
            assert_eq!(device["addr_info"][0]["prefixlen"], 32);
            assert!(device["addr_info"][0]["broadcast"].is_null());
        }
    }
    Ok(())
}

/// The sample scripts, as an operator would copy them: "pid device" while the tunnel is up.
#[test]
fn the_sample_scripts_keep_a_pid_file() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let (gateway, folder) = (net.gw(Side::A), net.directory());
    let samples =
        [("ip-up", include_str!("../../dist/scripts/ip-up")), ("ip-down", include_str!("../../dist/scripts/ip-down"))];
    for (script, text) in samples {
        fs::write(folder.join(script), text)?;
        fs::set_permissions(folder.join(script), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    }
    let arg = format!("cipe-test-{}", std::process::id());
    let options = Options::of(Side::A)
        .without("debug")
        .set("ipup", folder.join("ip-up").display())
        .set("ipdown", folder.join("ip-down").display())
        .set("arg", &arg);
    let path = options.write(&folder.join("A"))?;
    let mut command = gateway.command(folder.join("bin").join(Daemon::Blowfish.program()));
    command.arg("-o").arg(&path).env("CIPE_RUN_DIR", folder.join("runA")).stdin(Stdio::null());
    let started = command.output()?;
    assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
    let file = PathBuf::from(format!("/var/run/cipe/{arg}.pid"));
    let text = fs::read_to_string(&file)?;
    let (pid, device) = text.trim_end().split_once(' ').context("two words")?;
    assert_eq!(device, "cipcb0");
    let pid = pid.parse()?;
    assert!(gateway.processes()?.contains(&pid));
    process::signal(pid, Signal::TERM)?;
    for pid in gateway.processes()? {
        process::wait_gone(pid, SOON)?;
    }
    assert!(!file.exists());
    Ok(())
}
