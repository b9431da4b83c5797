//! A network namespace that is removed, with the processes in it, when its guard is dropped.

use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socket_with};
use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{SOON, process};

/// A network namespace made by `ip netns add`.
pub struct Namespace {
    name: String,
    handle: File,
}

/// Devices that kernel modules for tunnels make in each namespace (`net.core.fb_tunnels_only_for_init_net`).
const OF_MODULES: [&str; 9] =
    ["tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0"];

impl Namespace {
    /// Makes `cipe-PID-NUMBER-role` with its loopback up.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn new(role: &str) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("cipe-{}-{number}-{role}", std::process::id());
        ip(&["netns", "add", &name])?;
        let handle = match File::open(path_of(&name)) {
            Ok(handle) => handle,
            Err(error) => {
                ip(&["netns", "del", &name])?;
                return Err(error).with_context(|| format!("namespace {name}"));
            }
        };
        let namespace = Self { name, handle };
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Its name, for `ip netns exec NAME`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `/run/netns/NAME`.
    pub fn path(&self) -> PathBuf {
        path_of(&self.name)
    }

    /// Runs `ip -n NAME ...` and returns its output.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn ip(&self, arguments: &[&str]) -> Result<String> {
        let mut all = vec!["-n", self.name.as_str()];
        all.extend_from_slice(arguments);
        ip(&all)
    }

    /// Runs `work` in a thread inside the namespace; sockets opened there stay in it.
    ///
    /// # Panics
    /// If `work` panics, or if the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.enter();
                work()
            });
            match inside.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    fn enter(&self) {
        move_into_link_name_space(self.handle.as_fd(), Some(LinkNameSpaceType::Network))
            .expect("root can enter a namespace that it holds open");
    }

    /// Sets `net.X.Y` of this namespace.
    ///
    /// # Errors
    /// A name that this kernel does not have.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        self.run(|| fs::write(&path, value)).with_context(|| format!("{}: {path}={value}", self.name))
    }

    /// A command that runs inside, as an operator would start it.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Gives programs that [`Namespace::command`] starts from now on a separate file under /etc with this text. Programs that
    /// run already see a later text, too: the file is written in place.
    ///
    /// # Errors
    /// The file cannot be written. /etc must have a file of that name, over which this one is mounted.
    pub fn set_etc(&self, file: &str, text: &str) -> Result<()> {
        let folder = self.etc();
        fs::DirBuilder::new().recursive(true).mode(0o755).create(&folder)?;
        let path = folder.join(file);
        fs::write(&path, text).with_context(|| format!("{}", path.display()))
    }

    /// The directory in which `ip netns exec` looks for them.
    fn etc(&self) -> PathBuf {
        PathBuf::from("/etc/netns").join(&self.name)
    }

    /// Names of the network devices, in the kernel's order, without those that some modules make in each new namespace.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn devices(&self) -> Result<Vec<String>> {
        let links: Vec<serde_json::Value> = serde_json::from_str(&self.ip(&["-j", "link", "show"])?)?;
        let names = links.iter().filter_map(|link| link["ifname"].as_str());
        Ok(names.filter(|name| !OF_MODULES.contains(name)).map(str::to_owned).collect())
    }

    /// Waits until exactly these network devices exist.
    ///
    /// # Errors
    /// The devices differ after [`SOON`]; the error lists them.
    pub fn wait_for_devices(&self, wanted: &[&str]) -> Result<()> {
        let deadline = Instant::now() + process::patient(SOON);
        // Subscribe before the first look, so that no change between two looks is missed.
        let changes = self.device_changes()?;
        loop {
            let devices = self.devices()?;
            if devices == wanted {
                return Ok(());
            }
            ensure!(process::wait_readable(&changes, deadline)?, "{devices:?}, and not {wanted:?}");
            changes.forget();
        }
    }

    /// Subscribes to network devices that are added, changed or removed.
    ///
    /// # Errors
    /// A netlink socket cannot be opened.
    pub fn device_changes(&self) -> Result<DeviceChanges> {
        self.run(|| {
            let (kind, flags) = (SocketType::RAW, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
            // Without a protocol it is NETLINK_ROUTE.
            let socket = socket_with(AddressFamily::NETLINK, kind, flags, None)?;
            rustix::net::bind(&socket, &SocketAddrNetlink::new(0, libc::RTMGRP_LINK as u32))?;
            Ok(DeviceChanges(socket))
        })
    }

    /// Hardware address of a device.
    ///
    /// # Errors
    /// There is no such device.
    pub fn mac(&self, device: &str) -> Result<[u8; 6]> {
        let links: Vec<serde_json::Value> = serde_json::from_str(&self.ip(&["-j", "link", "show", "dev", device])?)?;
        let text = links.first().and_then(|link| link["address"].as_str()).unwrap_or_default().replace(':', "");
        let mut mac = [0; 6];
        hex::decode_to_slice(&text, &mut mac).with_context(|| format!("{}: address of {device}", self.name))?;
        Ok(mac)
    }

    /// Packets and octets that a device has received and sent, from `/proc/net/dev`.
    ///
    /// # Errors
    /// There is no such device.
    pub fn counters(&self, device: &str) -> Result<DeviceCounters> {
        let text = self.run(|| fs::read_to_string("/proc/thread-self/net/dev"))?;
        for line in text.lines() {
            let Some((name, fields)) = line.split_once(':') else { continue };
            if name.trim() != device {
                continue;
            }
            let f: Vec<u64> = fields.split_whitespace().filter_map(|field| field.parse().ok()).collect();
            // Eight receive columns, then eight transmit columns; octets, packets, errors and drops come first in both.
            if let [rx_octets, rx_packets, _, _, _, _, _, _, tx_octets, tx_packets, _, tx_dropped, ..] = f[..] {
                return Ok(DeviceCounters { rx_packets, rx_octets, tx_packets, tx_octets, tx_dropped });
            }
        }
        bail!("{}: no device {device}", self.name)
    }

    /// Processes that live in the namespace.
    ///
    /// # Errors
    /// A /proc that cannot be read.
    pub fn processes(&self) -> Result<Vec<u32>> {
        process::in_namespace(&self.path())
    }
}

/// Counters of a network device.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceCounters {
    /// Packets received.
    pub rx_packets: u64,
    /// Octets received.
    pub rx_octets: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Octets sent.
    pub tx_octets: u64,
    /// Packets that could not be sent; of a veth, also those that its other end did not take.
    pub tx_dropped: u64,
}

impl Drop for Namespace {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

fn path_of(name: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(name)
}

/// A socket that is readable once a network device has changed.
pub struct DeviceChanges(OwnedFd);

impl DeviceChanges {
    /// Reads all pending messages; the socket is readable again at the next change.
    ///
    /// The content of the messages does not matter, nor does a lost message.
    pub fn forget(&self) {
        let mut news = [0; 4096];
        while matches!(recv(&self.0, &mut news, RecvFlags::empty()), Ok(_) | Err(Errno::NOBUFS)) {}
    }
}

impl AsFd for DeviceChanges {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Runs `ip` (iproute2) and returns its output.
///
/// # Errors
/// `ip` fails; the error has the command line and its output.
pub fn ip(arguments: &[&str]) -> Result<String> {
    let output = Command::new("ip").args(arguments).output().context("ip (Debian package iproute2)")?;
    if !output.status.success() {
        bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Removes all namespaces of the processes that `owner` names, with the processes in them.
pub(crate) fn remove_all(owner: impl Fn(u32) -> bool) {
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if process::owner_by_name(&name, "cipe-").is_some_and(&owner) {
            remove(&name);
        }
    }
}

/// Ends the processes in a namespace of our own, all of which we or our processes started, and removes it.
fn remove(name: &str) {
    if let Err(error) = fs::remove_dir_all(PathBuf::from("/etc/netns").join(name))
        && error.kind() != std::io::ErrorKind::NotFound
    {
        eprintln!("/etc/netns/{name}: {error}");
    }
    let left = process::in_namespace(&path_of(name)).unwrap_or_default();
    for &pid in &left {
        let _ = process::signal(pid, Signal::KILL);
    }
    for pid in left {
        if let Err(error) = process::wait_gone(pid, SOON) {
            eprintln!("{name}: {error}");
        }
    }
    if let Err(error) = ip(&["netns", "del", name]) {
        eprintln!("{error:#}");
    }
}
