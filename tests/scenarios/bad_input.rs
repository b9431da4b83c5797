//! Mistakes of an operator: one clear line each, exit code 1, nothing left behind.

use std::fs;
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use cipe_tests::gateway::{self, Daemon};
use cipe_tests::log::Log;
use cipe_tests::offload::Offload;
use cipe_tests::options::{Options, PORT};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, process};

/// Runs a daemon that should fail, and returns its one line.
fn refusal(mut command: Command) -> Result<String> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let log = Log::follow(child.stderr.take().context("stderr is a pipe")?);
    if let Err(error) = process::wait_gone(child.id(), SOON) {
        child.kill()?;
        child.wait()?;
        return Err(error.context(format!("it went on:\n{}", log.text())));
    }
    let status = child.wait()?;
    if !log.wait_for_end(SOON) {
        bail!("something that it started still holds its standard error:\n{}", log.text());
    }
    // The line of the start is no error.
    let lines: Vec<String> =
        log.lines().into_iter().map(|line| line.text).filter(|line| !line.contains("CIPE daemon vers")).collect();
    match &lines[..] {
        [line] if status.code() == Some(1) => Ok(line.clone()),
        _ => bail!("{status}, and {} lines instead of one:\n{}", lines.len(), lines.join("\n")),
    }
}

/// A gateway for mistakes. It tries a whole table before it fails.
struct Desk {
    net: Topology,
    number: usize,
    complaints: Vec<String>,
}

impl Desk {
    fn new() -> Result<Self> {
        Ok(Self { net: Topology::new(Carrier::Direct, Offload::On)?, number: 0, complaints: Vec::new() })
    }

    fn file(&mut self, options: &Options) -> Result<PathBuf> {
        self.number += 1;
        options.write(&self.net.directory().join(format!("case-{}", self.number)))
    }

    fn daemon(&self, arguments: &[&str]) -> Command {
        let program = self.net.directory().join("bin").join(Daemon::Blowfish.program());
        let mut command = self.net.gw(Side::A).command(program);
        command.args(arguments).env("CIPE_RUN_DIR", self.net.directory().join("runA"));
        command
    }

    /// Checks that the daemon refuses with a line that contains all of `words`, and that it leaves nothing behind.
    fn expect(&mut self, case: &str, command: Command, words: &[&str]) -> Result<()> {
        match refusal(command) {
            Err(error) => self.complaints.push(format!("{case}: {error:#}")),
            Ok(line) => {
                println!("{case}: {line}");
                let missing = words.iter().filter(|word| !line.to_lowercase().contains(&word.to_lowercase()));
                self.complaints.extend(missing.map(|word| format!("{case}: no {word:?} in: {line}")));
            }
        }
        let namespace = self.net.gw(Side::A);
        for pid in namespace.processes()? {
            process::wait_gone(pid, SOON).with_context(|| case.to_owned())?;
        }
        let devices = namespace.devices()?;
        if devices != ["lo", "lan0", "wire0"] {
            self.complaints.push(format!("{case}: devices left: {devices:?}"));
        }
        Ok(())
    }

    fn finish(self) -> Result<()> {
        if !self.complaints.is_empty() {
            bail!("{}", self.complaints.join("\n"));
        }
        Ok(())
    }

    fn expect_file(&mut self, case: &str, options: &Options, words: &[&str]) -> Result<()> {
        let path = self.file(options)?;
        let command = self.daemon(&["-o", text(&path)]);
        self.expect(case, command, words)
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the bed's paths are ASCII")
}

#[test]
fn wrong_options_are_named() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let mut desk = Desk::new()?;
    let good = Options::of(Side::A);
    for (case, options, words) in [
        ("an unknown option", good.clone().set("tokexy", 5), &["tokexy", "options"][..]),
        ("no key", good.clone().without("key"), &["key"]),
        ("a short key", good.clone().set("key", "0123"), &["key", "32"]),
        ("a key of other letters", good.clone().set("key", "zz0102030405060708090a0b0c0d0e0f"), &["key"]),
        ("key and nokey", good.clone().flag("nokey"), &["nokey"]),
        ("no ipaddr", good.clone().without("ipaddr"), &["ipaddr"]),
        ("no peer", good.clone().without("peer"), &["peer"]),
        ("an address that is none", good.clone().set("ipaddr", "10.201.0.1.9"), &["ipaddr"]),
        ("a number that is none", good.clone().set("mtu", "big"), &["mtu", "big"]),
        ("a cipher that is none", good.clone().set("cipher", "rot13"), &["cipher", "rot13"]),
    ] {
        desk.expect_file(case, &options, words)?;
    }
    let path = desk.file(&good.clone().without("key"))?;
    let command = desk.daemon(&["-o", text(&path), "key=000102030405060708090a0b0c0d0e0f"]);
    desk.expect("a key on the command line", command, &["key", "command line"])?;
    let path = desk.file(&good.without("key"))?;
    let written = fs::read_to_string(&path)?;
    fs::write(&path, format!("{written}key=000102030405060708090a0b0c0d0e0f\nnokey\n"))?;
    let line = refusal(desk.daemon(&["-o", text(&path)]))?;
    assert!(line.contains("`key=`") && !line.contains("00010203"), "{line}");
    desk.finish()
}

#[test]
fn files_that_cannot_be_trusted_are_named() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let mut desk = Desk::new()?;
    let missing = desk.net.directory().join("nowhere/options");
    let command = desk.daemon(&["-o", text(&missing)]);
    desk.expect("a file that is not there", command, &[text(&missing)])?;

    let open = desk.file(&Options::of(Side::A))?;
    fs::set_permissions(&open, fs::Permissions::from_mode(0o644))?;
    let command = desk.daemon(&["-o", text(&open)]);
    desk.expect("a file that others can read", command, &[text(&open)])?;

    let parent = desk.file(&Options::of(Side::A))?;
    let directory = parent.parent().context("a file has a directory")?;
    fs::set_permissions(directory, fs::Permissions::from_mode(0o777))?;
    let command = desk.daemon(&["-o", text(&parent)]);
    desk.expect("a file in a directory that others can write", command, &[text(directory)])?;

    for (option, mode) in [("ipup", 0o757), ("ipdown", 0o775)] {
        let script = desk.net.directory().join(format!("writable-{option}"));
        fs::write(&script, "#!/bin/sh\n")?;
        fs::set_permissions(&script, fs::Permissions::from_mode(mode))?;
        let options = Options::of(Side::A).set(option, script.display());
        desk.expect_file("a script that others can write", &options, &[option, text(&script), "chmod go-w"])?;
    }
    desk.finish()
}

#[test]
fn a_carrier_that_cannot_work_is_named() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let mut desk = Desk::new()?;
    let good = Options::of(Side::A);
    let link_local = |me: &str, peer: &str| {
        let of = |host: &str, device: &str| format!("[{host}%{device}]:{PORT}");
        good.clone().set("me", of("fe80::1", me)).set("peer", of("fe80::2", peer))
    };
    for (case, options, words) in [
        ("a carrier without a route", good.clone().set("peer", "198.51.100.1:6789"), &["198.51.100.1", "route"][..]),
        ("an address of nobody", good.clone().set("me", "10.99.99.99:6789"), &["10.99.99.99"]),
        (
            "a link-local address alone",
            good.clone().set("me", "fe80::1"),
            &["`me`: fe80::1", "device", "[fe80::1%eth0]"],
        ),
        ("a zone of nobody", link_local("wire0", "wire9"), &["fe80::2%wire9", "no network device", "wire9"]),
        ("two zones", link_local("wire0", "lan0"), &["`me` is on wire0", "`peer` on lan0", "same device"]),
        (
            "a zone and another device",
            link_local("wire0", "wire0").set("carrier-device", "lan0"),
            &["wire0", "carrier-device"],
        ),
        (
            "a zone for a global address",
            good.clone().set("me", "[fd00::1%wire0]:6789"),
            &["fd00::1%wire0", "link-local"],
        ),
        ("a device name too long", good.clone().set("device", "this-name-is-too-long"), &["this-name-is-too-long"]),
        ("a device that is there already", good.clone().set("device", "wire0"), &["wire0"]),
    ] {
        desk.expect_file(case, &options, words)?;
    }

    let port = format!("{}:{PORT}", Side::A.carrier());
    let holder = desk.net.gw(Side::A).run(|| UdpSocket::bind(&port))?;
    desk.expect_file("a taken port", &good, &[&port])?;
    drop(holder);
    desk.finish()
}

#[test]
fn only_root_may_start_it() -> Result<()> {
    const NOBODY: u32 = 65534;
    if !may_make_namespaces() {
        return Ok(());
    }
    let mut desk = Desk::new()?;
    // A copy that every user can execute, wherever the build directory is.
    let program = desk.net.directory().join("ciped-cb");
    fs::copy(gateway::binary()?, &program)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let mut command = Command::new(&program);
    command.arg("debug").uid(NOBODY).gid(NOBODY).current_dir("/");
    command.env("CIPE_RUN_DIR", desk.net.directory().join("runA"));
    desk.expect("not root", command, &["root"])?;
    desk.finish()
}
