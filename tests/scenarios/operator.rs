//! The operator's tools besides the daemon: `cipe top`, `cipe doctor`, systemd, manual pages and completions.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use cipe_common::verdict::Verdict;
use cipe_tests::fleet::{Cipher, Fleet};
use cipe_tests::gateway::{self, Daemon, Gateway, Pair};
use cipe_tests::namespace::Namespace;
use cipe_tests::offload::Offload;
use cipe_tests::options::{Options, PORT};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, process};

/// Prints text if the output is no terminal, and runs on a terminal until `q` is typed.
#[test]
fn top_shows_what_a_tunnel_does() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    let once = pair.a.cipe(&["top", "--batch", "--count", "1", "--interval", "0.1"]).output()?;
    let text = String::from_utf8(once.stdout)?;
    let words: Vec<&str> = text.lines().nth(1).context("a tunnel is a line")?.split_whitespace().collect();
    let peer = format!("{}:{PORT}", Side::B.carrier());
    assert_eq!((words[0], words[1]), ("cipcb0", peer.as_str()), "{text}");
    assert!(once.status.success() && words[3..6].iter().all(|word| *word != "-"), "both keys have an age: {text}");

    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--command", &pair.a.cipe_text("top"), "/dev/null"]);
    let mut script = script.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
    let mut terminal = script.stdout.take().context("a pipe")?;
    let (deadline, mut seen) = (Instant::now() + process::patient(SOON), Vec::new());
    let mut is_told = false;
    while process::wait_readable(&terminal, deadline)? {
        let mut octets = [0; 4096];
        match terminal.read(&mut octets)? {
            0 => break,
            length => seen.extend(&octets[..length]),
        }
        if !is_told && String::from_utf8_lossy(&seen).contains("cipcb0") {
            script.stdin.as_mut().context("a pipe")?.write_all(b"q")?;
            is_told = true;
        }
    }
    let seen = String::from_utf8_lossy(&seen);
    assert!(is_told && script.wait()?.success(), "{seen:?}");
    assert!(seen.trim_end().ends_with("\u{1b}[?1049l"), "the terminal is as it was: {seen:?}");
    Ok(())
}

/// As a systemd service of `Type=notify` the daemon stays in the foreground and notifies when the tunnel is up.
#[test]
fn in_the_foreground_it_tells_systemd_that_it_is_up() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let notified = net.directory().join("notified");
    let systemd = UnixDatagram::bind(&notified)?;
    systemd.set_read_timeout(Some(process::patient(SOON)))?;
    let notified = notified.to_str().context("ASCII")?;
    let (gateway, routes) = ((net.gw(Side::A), "A"), [Side::B.lan()]);
    let environment = [("NOTIFY_SOCKET", notified)];
    let options = Options::of(Side::A);
    let mut daemon = Gateway::start_with(&net, gateway, &routes, Daemon::Idea, &options, &environment)?;
    let mut message = [0; 64];
    let length = systemd.recv(&mut message).context("nothing was said")?;
    assert_eq!(String::from_utf8_lossy(&message[..length]).trim_end(), "READY=1");
    daemon.wait_up()?;
    assert_eq!(daemon.status()?.device, "cipci0", "once ip-up has ended");
    Ok(())
}

/// The log of an engine, the status of its tunnels, and `cipe doctor` in a network namespace where nothing is up.
#[test]
fn what_a_kernel_lacks_is_said_alike() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let mut gateway = Gateway::start(&net, Side::A, Daemon::Idea, &Options::of(Side::A))?;
    gateway.wait_up()?;
    let lacks = gateway.status()?.lacks;
    let said = |text: &str, before: &str| -> Vec<String> {
        text.lines().filter_map(|line| Some(line.split_once(before)?.1.to_owned())).collect()
    };
    let engine = Fleet::start(&net, Side::B, Cipher::Idea)?;
    assert_eq!(said(&engine.log(), "this kernel lacks "), lacks);
    let silent = Namespace::new("silent")?;
    silent.ip(&["link", "set", "lo", "down"])?;
    let doctor = silent.command(gateway::binary()?).arg("doctor").output()?;
    let doctor = String::from_utf8_lossy(&doctor.stdout);
    assert_eq!(said(&doctor, "the kernel lacks "), lacks, "{doctor}");
    assert!(doctor.contains("the kernel takes the eBPF programs"), "{doctor}");
    Ok(())
}

/// A page for each command, readable by man(1); and scripts that the shell accepts.
#[test]
fn manual_pages_and_completions_are_what_their_readers_expect() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cipe = || -> Result<Command> { Ok(Command::new(gateway::binary()?)) };
    assert!(cipe()?.arg("manuals").arg(folder.path()).status()?.success());
    let mut names: Vec<String> = fs::read_dir(folder.path())?
        .map(|page| Ok(page?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    for name in ["cipe.8", "cipe-check.8", "cipe-top.8", "ciped-cb.8", "ciped-ci.8", "ciped-db.8", "ciped-di.8"] {
        assert!(names.iter().any(|found| found == name), "{name}: {names:?}");
    }
    for (program, choice) in [("cipe", &[][..]), ("ciped-cb", &["--program", "ciped-cb"])] {
        let script = cipe()?.arg("completions").args(choice).arg("bash").output()?.stdout;
        let path = folder.path().join("script");
        fs::write(&path, script)?;
        // The script registers with bash a function for the program's name.
        let ask = format!("source {} && complete -p {program}", path.display());
        let told = Command::new("bash").args(["--norc", "-c", &ask]).output()?;
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        assert!(told.contains("-F _cipe") && told.trim_end().ends_with(program), "{told}");
    }
    Ok(())
}

/// The table of verdicts in the manual of the daemons has each one that `cipe show` may print.
#[test]
fn the_manual_explains_each_verdict() {
    let manual = include_str!("../../docs/ciped.md");
    let table = manual.split("\n## ").find(|section| section.starts_with("Verdicts\n")).expect("a section on verdicts");
    let first_columns = table.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    let explained: Vec<&str> = first_columns.flat_map(|names| names.split(", ")).collect();
    for verdict in Verdict::ALL {
        assert!(explained.contains(&verdict.name()), "{}: {explained:?}", verdict.name());
    }
}
