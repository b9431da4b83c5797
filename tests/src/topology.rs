//! Two LANs, two gateways and the carrier between them.
//!
//! ```text
//!   lanA              gwA                                 gwB              lanB
//!   eth0 ------- lan0     wire0 ======= carrier ======= wire0     lan0 ------- eth0
//!   10.210.1.2   10.210.1.1 10.200.0.1             10.200.0.2 10.210.2.1   10.210.2.2
//! ```
//!
//! A direct carrier is one veth pair. Packets that AF_XDP transmits pass no packet socket on the sender, and XDP redirects
//! packets before any packet socket on the receiver, so nothing can be captured there. The tapped carrier therefore leads
//! through one more namespace, a router that answers ARP for the other side; there, [`Capture`] sees every carrier frame.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};

use crate::capture::Capture;
use crate::gateway;
use crate::namespace::{Namespace, ip};
use crate::net::Frame;
use crate::offload::Offload;
use crate::process;

/// One of the two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// lanA and gwA.
    A,
    /// lanB and gwB.
    B,
}

impl Side {
    /// The letter.
    pub fn letter(self) -> char {
        match self {
            Self::A => 'A',
            Self::B => 'B',
        }
    }

    /// The opposite side.
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::A => 1,
            Self::B => 2,
        }
    }

    /// Address of the host in the LAN.
    pub fn host(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 210, self.number(), 2)
    }

    /// Address of the gateway in the LAN.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 210, self.number(), 1)
    }

    /// The LAN, as a prefix.
    pub fn lan(self) -> String {
        format!("10.210.{}.0/24", self.number())
    }

    /// Address of the gateway on the carrier.
    pub fn carrier(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 200, 0, self.number())
    }

    /// Address of the gateway on the tunnel.
    pub fn tunnel(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 201, 0, self.number())
    }
}

/// The link between the gateways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// One veth pair.
    Direct,
    /// One veth pair with this number of queues at either end.
    Queues(u32),
    /// Through a namespace where every frame can be captured.
    Tapped,
}

/// The network. Only one at a time in a process: two would disturb each other.
pub struct Topology {
    lan_a: Namespace,
    lan_b: Namespace,
    gw_a: Namespace,
    gw_b: Namespace,
    tap: Option<Namespace>,
    directory: RunDirectory,
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

impl Topology {
    /// Makes the network, with routes inside each LAN but none between them: the tunnel connects them.
    ///
    /// # Errors
    /// `ip` fails, or the kernel reports an error.
    pub fn new(carrier: Carrier, offload: Offload) -> Result<Self> {
        Self::with_lan_queues(1, carrier, offload)
    }

    /// The same with this number of queues at either end of the LANs' cables.
    ///
    /// # Errors
    /// As [`Topology::new`].
    pub fn with_lan_queues(queues: u32, carrier: Carrier, offload: Offload) -> Result<Self> {
        // A test that failed poisons the lock, but its network has been removed.
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let topology = Self {
            lan_a: Namespace::new("lanA")?,
            lan_b: Namespace::new("lanB")?,
            gw_a: Namespace::new("gwA")?,
            gw_b: Namespace::new("gwB")?,
            tap: match carrier {
                Carrier::Direct | Carrier::Queues(_) => None,
                Carrier::Tapped => Some(Namespace::new("tap")?),
            },
            directory: RunDirectory::new()?,
            _alone: alone,
        };
        for gateway in [&topology.gw_a, &topology.gw_b] {
            for setting in ["conf.all.rp_filter", "conf.default.rp_filter"] {
                gateway.sysctl(&format!("net.ipv4.{setting}"), "0")?;
            }
            gateway.sysctl("net.ipv4.ip_forward", "1")?;
            gateway.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        }
        for side in [Side::A, Side::B] {
            topology.join_lan(side, queues)?;
        }
        match &topology.tap {
            None => {
                let of_carrier = if let Carrier::Queues(queues) = carrier { queues } else { 1 };
                cable_of(of_carrier, (&topology.gw_a, "wire0"), (&topology.gw_b, "wire0"))?;
            }
            Some(tap) => topology.join_tap(tap)?,
        }
        for side in [Side::A, Side::B] {
            configure(topology.gw(side), "wire0", side.carrier())?;
        }
        for (namespace, device) in topology.devices() {
            offload.apply(namespace, device)?;
        }
        Ok(topology)
    }

    fn join_lan(&self, side: Side, queues: u32) -> Result<()> {
        let (lan, gw) = (self.lan(side), self.gw(side));
        cable_of(queues, (gw, "lan0"), (lan, "eth0"))?;
        configure(gw, "lan0", side.gateway())?;
        configure(lan, "eth0", side.host())?;
        lan.ip(&["route", "add", "default", "via", &side.gateway().to_string()])?;
        Ok(())
    }

    fn join_tap(&self, tap: &Namespace) -> Result<()> {
        tap.sysctl("net.ipv4.ip_forward", "1")?;
        tap.sysctl("net.ipv4.conf.all.rp_filter", "0")?;
        tap.sysctl("net.ipv4.conf.default.rp_filter", "0")?;
        tap.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        for side in [Side::A, Side::B] {
            let port = format!("port{}", side.letter());
            cable((self.gw(side), "wire0"), (tap, &port))?;
            tap.sysctl(&format!("net.ipv4.conf.{port}.proxy_arp"), "1")?;
            tap.sysctl(&format!("net.ipv4.neigh.{port}.proxy_delay"), "0")?;
            tap.ip(&["link", "set", &port, "up"])?;
            // A source address for ARP requests, outside every prefix in use.
            tap.ip(&["addr", "add", &format!("192.0.2.{}/32", side.number()), "dev", &port])?;
            tap.ip(&["route", "add", &side.carrier().to_string(), "dev", &port])?;
        }
        Ok(())
    }

    fn devices(&self) -> Vec<(&Namespace, &str)> {
        let mut devices = vec![
            (&self.lan_a, "eth0"),
            (&self.gw_a, "lan0"),
            (&self.gw_a, "wire0"),
            (&self.gw_b, "wire0"),
            (&self.gw_b, "lan0"),
            (&self.lan_b, "eth0"),
        ];
        if let Some(tap) = &self.tap {
            devices.extend([(tap, "portA"), (tap, "portB")]);
        }
        devices
    }

    /// The namespace of a LAN's host.
    pub fn lan(&self, side: Side) -> &Namespace {
        match side {
            Side::A => &self.lan_a,
            Side::B => &self.lan_b,
        }
    }

    /// The namespace of a gateway.
    pub fn gw(&self, side: Side) -> &Namespace {
        match side {
            Side::A => &self.gw_a,
            Side::B => &self.gw_b,
        }
    }

    /// The namespace between the gateways of a tapped carrier.
    pub fn tap(&self) -> Option<&Namespace> {
        self.tap.as_ref()
    }

    /// A directory of root's own under /run, for option files and control sockets; removed with the network.
    pub fn directory(&self) -> &Path {
        &self.directory.path
    }

    /// Joins the LANs by plain routes over the carrier, without any tunnel, to compare with.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn route_plainly(&self) -> Result<()> {
        for side in [Side::A, Side::B] {
            let (lan, via) = (side.other().lan(), side.other().carrier().to_string());
            self.gw(side).ip(&["route", "replace", &lan, "via", &via])?;
            if let Some(tap) = &self.tap {
                let (lan, via) = (side.lan(), side.carrier().to_string());
                tap.ip(&["route", "replace", &lan, "via", &via, "dev", &format!("port{}", side.letter()), "onlink"])?;
            }
        }
        Ok(())
    }

    /// Captures frames of the gateways on a tapped carrier, each once, up to `limit` frames.
    ///
    /// # Errors
    /// The carrier is direct, or a packet socket cannot be opened.
    pub fn capture_carrier(&self, limit: usize) -> Result<Capture> {
        let tap = self.tap.as_ref().context("only a tapped carrier can be captured")?;
        let senders = [self.gw_a.mac("wire0")?, self.gw_b.mac("wire0")?];
        Capture::start(tap, limit, move |frame| {
            Frame::parse(frame).is_some_and(|frame| senders.contains(&frame.source))
        })
    }
}

/// Joins two namespaces by a veth pair, both ends down.
fn cable(one: (&Namespace, &str), other: (&Namespace, &str)) -> Result<()> {
    cable_of(1, one, other)
}

fn cable_of(queues: u32, one: (&Namespace, &str), other: (&Namespace, &str)) -> Result<()> {
    let (one_name, other_name, queues) = (one.0.name(), other.0.name(), queues.to_string());
    let queues = ["numtxqueues", &queues, "numrxqueues", &queues];
    let one = ["link", "add", one.1, "netns", one_name];
    let other = ["type", "veth", "peer", "name", other.1, "netns", other_name];
    ip(&[&one[..], &queues, &other, &queues].concat())?;
    Ok(())
}

fn configure(namespace: &Namespace, device: &str, address: Ipv4Addr) -> Result<()> {
    // Without IPv6 nothing sends packets by itself, so captures have only the packets of a test.
    namespace.sysctl(&format!("net.ipv6.conf.{device}.disable_ipv6"), "1")?;
    namespace.ip(&["addr", "add", &format!("{address}/24"), "dev", device])?;
    namespace.ip(&["link", "set", device, "up"])?;
    Ok(())
}

/// `/run/cipe-tests-PID-NUMBER` with the binary under its names in `bin/`.
struct RunDirectory {
    path: PathBuf,
}

impl RunDirectory {
    fn new() -> Result<Self> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(RUN).join(format!("{RUN_PREFIX}{}-{number}", std::process::id()));
        fs::DirBuilder::new().mode(0o755).create(&path).with_context(|| format!("{}", path.display()))?;
        let directory = Self { path };
        let bin = directory.path.join("bin");
        fs::create_dir(&bin)?;
        for name in ["cipe", "ciped-cb", "ciped-ci", "ciped-db", "ciped-di"] {
            symlink(gateway::binary()?, bin.join(name))?;
        }
        Ok(directory)
    }
}

/// The parent of run directories: not /tmp, since nobody else may write to the directories above an option file.
const RUN: &str = "/run";

const RUN_PREFIX: &str = "cipe-tests-";

/// Removes all run directories of the processes that `owner` names.
pub(crate) fn remove_run_directories(owner: impl Fn(u32) -> bool) {
    for entry in fs::read_dir(RUN).into_iter().flatten().flatten() {
        if process::owner_by_name(&entry.file_name().to_string_lossy(), RUN_PREFIX).is_some_and(&owner)
            && let Err(error) = fs::remove_dir_all(entry.path())
        {
            eprintln!("{}: {error}", entry.path().display());
        }
    }
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("{}: {error}", self.path.display());
        }
    }
}
