//! What a process could lose: the rights that engine and daemon keep, and the keys that their memory holds.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use cipe_tests::gateway::{Daemon, Pair, binary};
use cipe_tests::offload::Offload;
use cipe_tests::ping::{self, Plan};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, process};
use rustix::process::Signal;

/// CAP_NET_BIND_SERVICE, CAP_NET_ADMIN, CAP_NET_RAW, CAP_IPC_LOCK, CAP_PERFMON, CAP_BPF (capability.h).
const ENGINE_CAPABILITIES: u64 = 1 << 10 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 38 | 1 << 39;
/// Unlike any other sequence of octets in a process.
const KEY: &str = "a1b2c3d4e5f60718293a4b5c6d7e8f90";
/// Octets of the key map: four slots of 32 octets for each of 16,384 tunnels.
const KEY_MAP: u64 = 16_384 * 4 * 32;

/// A field of /proc/PID/status.
fn status(pid: u32, field: &str) -> Result<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("{field} of {pid}"))?.trim().to_owned())
}

/// Readable areas of a process's memory: first and last address, and what is mapped.
fn areas(pid: u32) -> Result<Vec<(u64, u64, String)>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let area = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (from, to) = words.next()?.split_once('-')?;
        let is_readable = words.next()?.starts_with('r');
        let name = words.nth(3).unwrap_or("anonymous").to_owned();
        let address = |text| u64::from_str_radix(text, 16).ok();
        // The kernel's own pages cannot be read.
        (is_readable && !name.starts_with("[v")).then_some((address(from)?, address(to)?, name))
    };
    Ok(text.lines().filter_map(area).collect())
}

/// The live keys in the engine's map.
fn keys_in_map(engine: u32) -> Result<Vec<[u8; 16]>> {
    let memory = File::open(format!("/proc/{engine}/mem"))?;
    let areas = areas(engine)?;
    let map = areas.iter().find(|(from, to, name)| to - from == KEY_MAP && name.contains("bpf-map"));
    let mut slots = vec![0; 4 * 32];
    memory.read_exact_at(&mut slots, map.context("the key map")?.0)?;
    Ok(slots.chunks(32).filter(|slot| slot[8] == 1).map(|slot| slot[16..].try_into().unwrap_or_default()).collect())
}

/// Where one of the keys stands in a process's memory, as octets or in hexadecimal.
fn places(pid: u32, keys: &[[u8; 16]]) -> Result<Vec<String>> {
    let hexadecimal = keys.iter().flat_map(|key| [hex::encode(key), hex::encode_upper(key)]);
    let needles: Vec<Vec<u8>> =
        keys.iter().map(|key| key.to_vec()).chain(hexadecimal.map(String::into_bytes)).collect();
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let mut found = Vec::new();
    for (from, to, name) in areas(pid)? {
        let mut octets = vec![0; (to - from) as usize];
        // An area may go meanwhile, or be one of a device.
        if memory.read_exact_at(&mut octets, from).is_err() {
            continue;
        }
        for needle in &needles {
            let windows = octets.windows(needle.len()).enumerate();
            let hits = windows.filter(|(_, window)| window[0] == needle[0] && window == needle);
            found.extend(hits.map(|(at, _)| format!("{at:#x} in {name} at {from:x} to {to:x}")));
        }
    }
    Ok(found)
}

/// Waits until none of the keys stands in the memory of a process any more.
fn wait_until_wiped(pid: u32, keys: &[[u8; 16]], net: &Topology) -> Result<()> {
    let deadline = Instant::now() + process::patient(SOON);
    loop {
        let places = places(pid, keys)?;
        if places.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("keys are left in process {pid}: {places:?}");
        }
        // Traffic under newer keys, if there is a tunnel yet.
        ping::run(net.lan(Side::A), Side::B.host(), &Plan::count(1))?;
    }
}

#[test]
fn an_engine_keeps_the_rights_that_it_uses_and_no_others() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    let engine = pair.a.engine_pid().context("an engine")?;
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        let kept = u64::from_str_radix(&status(engine, set)?, 16)?;
        assert_eq!(kept, ENGINE_CAPABILITIES, "{set} {kept:#x}");
    }
    for (field, value) in
        [("CapInh", "0000000000000000"), ("CapAmb", "0000000000000000"), ("NoNewPrivs", "1"), ("Seccomp", "2")]
    {
        assert_eq!(status(engine, field)?, value, "{field}");
    }
    for pid in [engine, pair.a.pid()] {
        assert_ne!(status(pid, "VmLck")?, "0 kB", "locked memory of {pid}");
    }
    let warned = pair.a.log().lines().into_iter().find(|line| line.text.contains("keeps rights"));
    assert!(warned.is_none_or(|line| line.text.contains("Landlock enabled")), "{}", pair.a.log().text());
    pair.stop()?;
    Ok(())
}

#[test]
fn no_key_outlives_its_use_in_memory() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let engine = Engine::start(&net)?;
    let pair =
        Pair::start(&net, Daemon::Blowfish, |_, options| options.set("key", KEY).set("tokey", 1).set("tokxc", 1))?;
    pair.wait_for_keys(&net)?;
    let fixed: [u8; 16] = hex::decode(KEY)?.try_into().ok().context("16 octets")?;
    let first: Vec<_> = keys_in_map(engine.pid())?.into_iter().filter(|key| *key != fixed).collect();
    assert!(first.len() >= 2 && !places(engine.pid(), &first)?.is_empty(), "the search finds keys that are there");
    for pid in [engine.pid(), pair.a.pid()] {
        wait_until_wiped(pid, &first, &net)?;
    }
    let mut last = keys_in_map(engine.pid())?;
    assert!(last.contains(&fixed) && last.len() >= 3, "{last:?}");
    last.extend(keys_in_map(engine.pid())?);
    pair.stop()?;
    last.extend(keys_in_map(engine.pid())?);
    wait_until_wiped(engine.pid(), &last, &net)?;
    assert_eq!(keys_in_map(engine.pid())?, [[0; 16]; 0], "the map is empty");
    Ok(())
}

/// Gateway A's engine, which stays when its tunnel has gone.
struct Engine(Child);

impl Engine {
    fn start(net: &Topology) -> Result<Self> {
        let mut command = net.gw(Side::A).command(binary()?);
        command
            .args(["engine", "--stay"])
            .env("CIPE_RUN_DIR", net.directory().join("runA"))
            .env("CIPE_CONFINEMENT", "end");
        // It notifies this test as it notifies systemd.
        let told = net.directory().join("engine.up");
        let up = UnixDatagram::bind(&told)?;
        command.env("NOTIFY_SOCKET", &told).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let engine = Self(command.spawn()?);
        ensure!(process::wait_for_either(&up, engine.pid(), SOON)?, "the engine does not come up");
        Ok(engine)
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = process::signal(self.0.id(), Signal::TERM);
        let _ = self.0.wait();
    }
}
