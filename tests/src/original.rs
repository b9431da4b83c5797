//! Ours as gateway A, the second implementation as gateway B with a TUN device: for the hosts of both LANs gateway B is an
//! original.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tun_rs::{DeviceBuilder, SyncDevice};

use crate::gateway::{Daemon, Gateway};
use crate::offload::Offload;
use crate::options::{KEY, Options, PORT};
use crate::peer::{Cipher, Config, Event, Peer};
use crate::ping::{self, Plan};
use crate::process::patient;
use crate::topology::{Carrier, Side, Topology};
use crate::{SOON, relayed};

/// The original's device.
const DEVICE: &str = "orig0";
/// The device MTU of the protocol (section 2).
const MTU: u16 = 1442;

/// Both ends and the network between them.
pub struct Original {
    /// Gateway A.
    pub ours: Gateway,
    /// Gateway B.
    pub theirs: Peer,
    /// Events of gateway B.
    pub events: Receiver<Event>,
    /// The network.
    pub net: Topology,
    daemon: Daemon,
    options: Options,
    config: Config,
    device: SyncDevice,
}

impl Original {
    /// Starts both; `change` sets the options of ours, `configure` the behaviour of the original.
    ///
    /// # Errors
    /// The network or the device cannot be made, or the gateway does not start.
    pub fn start(
        daemon: Daemon,
        change: impl FnOnce(Options) -> Options,
        configure: impl FnOnce(&mut Config),
    ) -> Result<Self> {
        // Tapped, so that a test can put a relay or a second path there.
        let net = Topology::new(Carrier::Tapped, Offload::On)?;
        for side in [Side::A, Side::B] {
            net.gw(side).ip(&["route", "add", &relayed::port_of(side).ip().to_string(), "dev", "wire0"])?;
        }
        let device = tun_device(&net, Side::B)?;
        let mut key = [0; 16];
        hex::decode_to_slice(KEY, &mut key)?;
        let cipher = match daemon {
            Daemon::Blowfish | Daemon::EthernetBlowfish => Cipher::Blowfish,
            Daemon::Idea | Daemon::EthernetIdea => Cipher::Idea,
        };
        let mut config = Config { echo: false, ..Config::original(cipher, key) };
        config.peer = Some(relayed::carrier_of(Side::A));
        configure(&mut config);
        let options = change(Options::of(Side::A));
        let (theirs, events) = launch(&net, Side::B, &device, &config, relayed::carrier_of(Side::B))?;
        let mut ours = Gateway::start(&net, Side::A, daemon, &options)?;
        ours.wait_up()?;
        Ok(Self { ours, theirs, events, net, daemon, options, config, device })
    }

    /// Stops the original and starts it again at an address of gateway B.
    ///
    /// # Errors
    /// The port is in use, or the original had ended with an error.
    pub fn restart_theirs(&mut self, at: SocketAddr) -> Result<()> {
        // The port must be free before it is bound again.
        let placeholder = UdpSocket::bind("127.0.0.1:0")?;
        let (none, _) = Peer::start(placeholder, self.config.clone())?;
        std::mem::replace(&mut self.theirs, none).stop()?;
        (self.theirs, self.events) = launch(&self.net, Side::B, &self.device, &self.config, at)?;
        Ok(())
    }

    /// Moves the original to another address of gateway B.
    ///
    /// # Errors
    /// The port is in use.
    pub fn move_theirs(&self, to: SocketAddr) -> Result<()> {
        Ok(self.theirs.move_to(self.net.gw(Side::B).run(|| UdpSocket::bind(to))?)?)
    }

    /// Stops ours and starts it again with the previous options after `change`.
    ///
    /// # Errors
    /// The gateway does not start or stop; the error has its log.
    pub fn restart_ours(&mut self, change: impl FnOnce(Options) -> Options) -> Result<()> {
        let options = change(self.options.clone());
        process_end(&mut self.ours)?;
        let mut ours = Gateway::start(&self.net, Side::A, self.daemon, &options)?;
        ours.wait_up()?;
        self.ours = ours;
        Ok(())
    }

    /// Pings from LAN to LAN, in both directions, until an answer has come to each side.
    ///
    /// # Errors
    /// Counters and logs, if that takes longer than [`SOON`].
    pub fn wait_for_pings(&self) -> Result<()> {
        let deadline = Instant::now() + patient(SOON);
        let plan = Plan { timeout: Duration::from_millis(500), ..Plan::count(1) };
        loop {
            let mut answered = 0;
            for side in [Side::A, Side::B] {
                answered += ping::run(self.net.lan(side), side.other().host(), &plan)?.received();
            }
            if answered == 2 {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!(
                    "no answer\nours: {:?}\n{}\ntheirs: {:?}",
                    self.ours.status()?,
                    self.ours.log().text(),
                    self.theirs.counters()
                );
            }
        }
    }
}

/// An original's device, which leads to the other side's tunnel address and LAN.
fn tun_device(net: &Topology, side: Side) -> Result<SyncDevice> {
    let (gateway, other) = (net.gw(side), side.other());
    let device = gateway
        .run(|| DeviceBuilder::new().name(DEVICE).mtu(MTU).build_sync())
        .context("TUN device (is /dev/net/tun there?)")?;
    gateway.ip(&["link", "set", DEVICE, "up"])?;
    let (own, peer) = (side.tunnel().to_string(), other.tunnel().to_string());
    gateway.ip(&["addr", "add", &own, "peer", &peer, "dev", DEVICE])?;
    gateway.ip(&["route", "add", &other.lan(), "dev", DEVICE])?;
    Ok(device)
}

/// Two originals, for comparison.
pub struct Originals {
    /// The network.
    pub net: Topology,
    /// Gateways A and B.
    pub ends: [Peer; 2],
    _devices: [SyncDevice; 2],
}

impl Originals {
    /// Starts both with the usual behaviour after `configure`.
    ///
    /// # Errors
    /// The network or a device cannot be made.
    pub fn start(cipher: Cipher, configure: impl Fn(&mut Config)) -> Result<Self> {
        let net = Topology::new(Carrier::Tapped, Offload::On)?;
        let mut key = [0; 16];
        hex::decode_to_slice(KEY, &mut key)?;
        let start = |side: Side| {
            let device = tun_device(&net, side)?;
            let mut config = Config { echo: false, ..Config::original(cipher, key) };
            config.peer = Some(SocketAddr::from((side.other().carrier(), PORT)));
            configure(&mut config);
            let (peer, _) = launch(&net, side, &device, &config, SocketAddr::from((side.carrier(), PORT)))?;
            anyhow::Ok((peer, device))
        };
        let ((a, of_a), (b, of_b)) = (start(Side::A)?, start(Side::B)?);
        Ok(Self { net, ends: [a, b], _devices: [of_a, of_b] })
    }
}

fn launch(
    net: &Topology,
    side: Side,
    device: &SyncDevice,
    config: &Config,
    at: SocketAddr,
) -> Result<(Peer, Receiver<Event>)> {
    let socket = net.gw(side).run(|| UdpSocket::bind(at)).with_context(|| at.to_string())?;
    let device = device.as_fd().try_clone_to_owned()?;
    Ok(Peer::start_with_device(socket, config.clone(), device)?)
}

/// Ends a gateway and waits for its end; the value stays in place.
fn process_end(gateway: &mut Gateway) -> Result<()> {
    crate::process::signal(gateway.pid(), rustix::process::Signal::TERM)?;
    crate::process::wait_gone(gateway.pid(), SOON)
}

/// Another address of gateway B on the carrier.
///
/// # Errors
/// `ip` fails.
pub fn another_address(net: &Topology, side: Side) -> Result<SocketAddr> {
    let mut octets = side.carrier().octets();
    octets[3] += 10;
    let address = std::net::Ipv4Addr::from(octets);
    net.gw(side).ip(&["addr", "add", &format!("{address}/24"), "dev", "wire0"])?;
    let tap = net.tap().context("a tapped carrier has a tap")?;
    tap.ip(&["route", "add", &address.to_string(), "dev", &format!("port{}", side.letter())])?;
    Ok(SocketAddr::from((address, PORT + 1)))
}
