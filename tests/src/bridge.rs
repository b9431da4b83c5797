//! Two LANs that are one Ethernet: each gateway has a bridge with its LAN's cable, the Ethernet tunnel, and a port for the
//! test, which sends and receives whole frames there, tags included.

use std::io;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tun_rs::{DeviceBuilder, Layer, SyncDevice};

use crate::namespace::Namespace;
use crate::process::patient;
use crate::topology::{Side, Topology};

/// The bridge in each gateway.
pub const BRIDGE: &str = "br0";

/// Address of a LAN's host in the network that both LANs form.
pub fn host(side: Side) -> Ipv4Addr {
    Ipv4Addr::new(10, 220, 0, if side == Side::A { 1 } else { 2 })
}

/// Adds the cables of both LANs to bridges, and gives the hosts addresses of one network. Does not add the tunnel.
///
/// # Errors
/// `ip` fails.
pub fn join_lans(net: &Topology) -> Result<()> {
    for side in [Side::A, Side::B] {
        let (gateway, lan) = (net.gw(side), net.lan(side));
        gateway.ip(&["addr", "flush", "dev", "lan0"])?;
        // Forward frames at once: there is no loop to detect.
        gateway.ip(&["link", "add", BRIDGE, "type", "bridge", "stp_state", "0", "forward_delay", "0"])?;
        gateway.sysctl(&format!("net.ipv6.conf.{BRIDGE}.disable_ipv6"), "1")?;
        gateway.ip(&["link", "set", BRIDGE, "up"])?;
        join(gateway, "lan0")?;
        lan.ip(&["addr", "flush", "dev", "eth0"])?;
        lan.ip(&["addr", "add", &format!("{}/24", host(side)), "dev", "eth0"])?;
    }
    Ok(())
}

/// Adds a device to the bridge of a gateway.
///
/// # Errors
/// `ip` fails.
pub fn join(gateway: &Namespace, device: &str) -> Result<()> {
    gateway.ip(&["link", "set", device, "master", BRIDGE])?;
    gateway.ip(&["link", "set", device, "up"])?;
    Ok(())
}

/// A port of a bridge that the test holds: a TAP device.
pub struct Port {
    device: SyncDevice,
}

impl Port {
    /// Makes a device of this name and adds it to the bridge.
    ///
    /// # Errors
    /// /dev/net/tun is missing, or `ip` fails.
    pub fn new(gateway: &Namespace, name: &str) -> Result<Self> {
        let port = Self { device: tap(gateway, name)? };
        join(gateway, name)?;
        Ok(port)
    }

    /// Sends a frame into the bridge.
    ///
    /// # Errors
    /// The kernel reports an error.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.device.send(frame).map(drop)
    }

    /// Waits for a frame that `wanted` accepts, and discards others; `None` if none came `within` that time.
    ///
    /// # Errors
    /// The kernel reports an error.
    pub fn wait_for(&self, within: Duration, wanted: impl Fn(&[u8]) -> bool) -> Result<Option<Vec<u8>>> {
        let deadline = Instant::now() + patient(within);
        let mut buffer = vec![0; 65_536];
        loop {
            match self.device.recv(&mut buffer) {
                Ok(length) if wanted(&buffer[..length]) => return Ok(Some(buffer[..length].to_vec())),
                Ok(_) => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return Ok(None) };
            let left = Timespec::try_from(left)?;
            match poll(&mut [PollFd::new(&self.device, PollFlags::IN)], Some(&left)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A TAP device, non-blocking.
///
/// # Errors
/// /dev/net/tun is missing.
pub fn tap(namespace: &Namespace, name: &str) -> Result<SyncDevice> {
    // Without IPv6 the device sends nothing by itself.
    namespace.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
    let device = namespace
        .run(|| DeviceBuilder::new().name(name).layer(Layer::L2).build_sync())
        .context("TAP device (is /dev/net/tun there?)")?;
    rustix::io::ioctl_fionbio(&device, true)?;
    Ok(device)
}

/// Hardware addresses that the bridge of a gateway has learned at a port.
///
/// # Errors
/// `bridge` (iproute2) fails.
pub fn learned_at(gateway: &Namespace, port: &str) -> Result<Vec<String>> {
    let output = gateway.command("bridge").args(["fdb", "show", "brport", port]).output()?;
    anyhow::ensure!(output.status.success(), "bridge fdb: {}", String::from_utf8_lossy(&output.stderr).trim());
    let text = String::from_utf8_lossy(&output.stdout);
    let learned = text.lines().filter(|line| !line.contains("permanent"));
    Ok(learned.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect())
}

/// Index of a port of the bridge.
///
/// # Errors
/// There is no such device, or it is not in the bridge.
pub fn index_in_bridge(gateway: &Namespace, device: &str) -> Result<u64> {
    let links: serde_json::Value = serde_json::from_str(&gateway.ip(&["-j", "link", "show", "dev", device])?)?;
    anyhow::ensure!(links[0]["master"] == BRIDGE, "{device} is not in {BRIDGE}: {links}");
    links[0]["ifindex"].as_u64().context("a device has an index")
}
