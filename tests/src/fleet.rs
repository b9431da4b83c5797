//! An engine, and a substitute for the daemons of many tunnels: one control connection for each tunnel.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::net::Ipv4Addr;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};

use crate::status::Status;
use crate::topology::{Side, Topology};
use crate::{SOON, gateway, process};

/// MTU of the tunnels: a UDP payload of 1400 octets is not fragmented.
const MTU: usize = 1428;
/// Carrier port of the first tunnel; the others follow.
const FIRST_PORT: u16 = 20_000;
/// Descriptors that engine and bench need in addition to those of the tunnels.
const OTHER_DESCRIPTORS: u64 = 100;
/// Largest message of the control protocol.
const MAX_MESSAGE_OCTETS: usize = 16 * 1024;

/// Descriptors of an engine for each tunnel: a connection, a UDP socket and a journal. This process needs fewer.
pub const DESCRIPTORS: u64 = 3;

/// The number of tunnels that the limit of open files allows. Raises the limit as far as it may.
pub fn most_tunnels() -> usize {
    let limit = getrlimit(Resource::Nofile);
    // The call fails only if the limit is reached already.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(files.saturating_sub(OTHER_DESCRIPTORS) / DESCRIPTORS).unwrap_or(usize::MAX)
}

/// The address of an end inside a tunnel.
pub fn inner(side: Side, number: usize) -> Ipv4Addr {
    let net = match side {
        Side::A => 0x0A40_0000,
        Side::B => 0x0A80_0000,
    };
    Ipv4Addr::from_bits(net + number as u32)
}

/// A generation of dynamic keys: A's send key is B's receive key, and the other way round.
#[derive(Clone, Copy)]
pub struct Keys(u8);

impl Keys {
    /// The first generation.
    pub fn first() -> Self {
        Self(1)
    }

    /// The second generation.
    pub fn next() -> Self {
        Self(2)
    }

    fn of(self, sender: Side, number: usize) -> String {
        let mut key = [0x5A; 16];
        key[0] = self.0;
        key[1] = sender.letter() as u8;
        key[2..10].copy_from_slice(&(number as u64).to_be_bytes());
        hex::encode(key)
    }
}

/// The cipher of the tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cipher {
    /// Blowfish; devices are `cipcbN`.
    Blowfish,
    /// IDEA; devices are `cipciN`.
    Idea,
    /// No cipher; devices are `cipcbN`.
    Nokey,
}

/// One end: an engine, and the connections that keep its tunnels alive.
pub struct Fleet {
    side: Side,
    cipher: Cipher,
    /// Values of the options `carrier` and `xdp-mode`.
    modes: (String, String),
    engine: Child,
    socket: PathBuf,
    log: PathBuf,
    connections: BTreeMap<usize, (OwnedFd, String)>,
}

impl Fleet {
    /// Starts an engine at the gateway of a side, and waits until it listens.
    ///
    /// # Errors
    /// The engine does not start; the error has its log.
    pub fn start(net: &Topology, side: Side, cipher: Cipher) -> Result<Self> {
        let base = net.directory().join(format!("fleet{}", side.letter()));
        let log = net.directory().join(format!("fleet{}.log", side.letter()));
        let output = File::options().create(true).append(true).open(&log)?;
        let namespace = net.gw(side);
        let mut command = namespace.command(gateway::binary()?);
        command
            .args(["engine", "--stay"])
            .env("CIPE_CONFINEMENT", "end")
            // No daemon is there to start another engine.
            .env("CIPE_STANDBY", "no")
            .env("CIPE_RUN_DIR", &base)
            .stdin(Stdio::null());
        // The engine notifies us as it notifies systemd.
        let told = net.directory().join(format!("fleet{}.up", side.letter()));
        let _ = std::fs::remove_file(&told);
        let up = UnixDatagram::bind(&told)?;
        command.env("NOTIFY_SOCKET", &told);
        let engine = command.stdout(output.try_clone()?).stderr(output).spawn()?;
        let inode = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(namespace.path())?);
        let socket = base.join(format!("net-{inode}/control"));
        let modes = ("auto".to_owned(), "auto".to_owned());
        let end = Self { side, cipher, modes, engine, socket, log, connections: BTreeMap::new() };
        let said = process::wait_for_either(&up, end.engine(), SOON)?;
        ensure!(said, "the engine does not listen\n{}", end.log());
        Ok(end)
    }

    /// Sets the modes of tunnels made from now on: values of the options `carrier` and `xdp-mode`.
    pub fn set_modes(&mut self, carrier: &str, xdp_mode: &str) {
        self.modes = (carrier.to_owned(), xdp_mode.to_owned());
    }

    /// The side of its gateway.
    pub fn side(&self) -> Side {
        self.side
    }

    /// Its engine.
    pub fn engine(&self) -> u32 {
        self.engine.id()
    }

    /// The log of the engine.
    pub fn log(&self) -> String {
        let mut text = String::new();
        // If the log cannot be read, only a message is incomplete.
        let _ = File::open(&self.log).and_then(|mut file| file.read_to_string(&mut text));
        text
    }

    /// Packets by verdict, over all tunnels, as the engine counts them.
    ///
    /// # Errors
    /// The engine has ended.
    pub fn verdicts(&self) -> Result<BTreeMap<String, u64>> {
        let mut sums = BTreeMap::new();
        for status in self.statuses()? {
            for (verdict, count) in status.verdicts {
                *sums.entry(verdict).or_default() += count;
            }
        }
        Ok(sums)
    }

    /// Whether the kernel has a feature, as [`Status::has_feature`]; with at least one tunnel.
    ///
    /// # Errors
    /// The engine has ended, or has no tunnel.
    pub fn has_feature(&self, name: &str) -> Result<bool> {
        Ok(self.statuses()?.first().context("there is a tunnel")?.has_feature(name))
    }

    fn statuses(&self) -> Result<Vec<Status>> {
        let connection = self.connect()?;
        send(&connection, &json!({"request": "status"}))?;
        let mut all = Vec::new();
        loop {
            let event = receive(&connection, &["status", "status-end"])?;
            if event["event"] == "status-end" {
                return Ok(all);
            }
            all.extend(Status::parse(&event.to_string())?);
        }
    }

    fn connect(&self) -> Result<OwnedFd> {
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(&self.socket)?)?;
        Ok(socket)
    }

    /// Makes some tunnels, one after the other.
    ///
    /// # Errors
    /// The engine refuses the request.
    pub fn attach(&mut self, tunnels: Range<usize>) -> Result<()> {
        tunnels.into_iter().try_for_each(|number| self.attach_as(number, None))
    }

    /// Makes a tunnel with a device of this name, or takes over the device of a dead engine.
    ///
    /// # Errors
    /// The engine refuses the request.
    pub fn attach_as(&mut self, number: usize, device: Option<&str>) -> Result<()> {
        let attempt = self.begin(number, device)?;
        self.finish(attempt)
    }

    /// Asks for a tunnel, and does not wait for the answer.
    ///
    /// # Errors
    /// The engine has ended.
    pub fn begin(&self, number: usize, device: Option<&str>) -> Result<Attempt> {
        let connection = self.connect()?;
        send(&connection, &self.request(number, device))?;
        Ok(Attempt { number, connection })
    }

    /// Waits for the answer.
    ///
    /// # Errors
    /// The engine refuses the tunnel.
    pub fn finish(&mut self, Attempt { number, connection }: Attempt) -> Result<()> {
        let answer = receive(&connection, &["attached", "failed"])?;
        let Some(device) = answer["device"].as_str() else { bail!("tunnel {number}: {answer}\n{}", self.log()) };
        self.connections.insert(number, (connection, device.to_owned()));
        Ok(())
    }

    /// Ends some tunnels at once, as daemons that end do.
    pub fn detach(&mut self, tunnels: Range<usize>) {
        self.connections.retain(|number, _| !tunnels.contains(number));
    }

    /// The device of a tunnel.
    ///
    /// # Errors
    /// There is no such tunnel.
    pub fn device(&self, number: usize) -> Result<&str> {
        Ok(&self.connections.get(&number).context("there is no such tunnel")?.1)
    }

    /// Waits for an event of a tunnel.
    ///
    /// # Errors
    /// There is no such tunnel, or the engine has ended.
    pub fn wait_for(&self, number: usize, event: &str) -> Result<Value> {
        receive(&self.connections.get(&number).context("there is no such tunnel")?.0, &[event])
    }

    /// Gives every tunnel its dynamic keys.
    ///
    /// # Errors
    /// The engine has ended.
    pub fn set_keys(&self, keys: Keys) -> Result<()> {
        for (&number, (connection, _)) in &self.connections {
            let receive = keys.of(self.side.other(), number);
            send(connection, &json!({"request": "set-receive-key", "key": receive, "keep_ms": 1000}))?;
            send(connection, &json!({"request": "set-send-key", "key": keys.of(self.side, number)}))?;
        }
        // The engine answers this after all earlier requests.
        let (_, (last, _)) = self.connections.last_key_value().context("there is a tunnel")?;
        let nonsense = json!({
            "request": "send-control", "payload": "no hexadecimal", "under": "live", "announces": false,
        });
        send(last, &nonsense)?;
        receive(last, &["failed"])?;
        Ok(())
    }

    /// The request that makes a tunnel (`cipe_user::control::protocol::Attach`).
    fn request(&self, number: usize, device: Option<&str>) -> Value {
        let (side, (carrier, xdp_mode)) = (self.side, &self.modes);
        let port = FIRST_PORT as usize + number;
        let (cipher, prefix) = match self.cipher {
            Cipher::Idea => ("idea", "cipci"),
            Cipher::Blowfish | Cipher::Nokey => ("blowfish", "cipcb"),
        };
        let key = (self.cipher != Cipher::Nokey).then(|| hex::encode([0xA5; 16]));
        json!({
            "request": "attach",
            "version": 6,
            "device": device,
            "prefix": prefix,
            "protocol": 3,
            "cipher": cipher,
            "key": key,
            "ipaddr": inner(side, number),
            "ptpaddr": inner(side.other(), number),
            "mtu": MTU,
            "interface": {"configure": true, "metric": 0, "prefix": null, "broadcast": null, "mac": null},
            "socks": null,
            "me": format!("{}:{port}", side.carrier()),
            "me_may_come": false,
            "peer": format!("{}:{port}", side.other().carrier()),
            "pin_peer": true,
            "cttl": 64,
            "checksum": false,
            "ignore_df": false,
            "force_mtu": false,
            "mss_clamp": true,
            "busy_poll_us": 0,
            "static_data": true,
            "dynip": false,
            "mark": 0,
            "paced": false,
            "carrier": carrier,
            "xdp_mode": xdp_mode,
            "send_packets": 1_u64 << 40,
            "send_octets": 1_u64 << 50,
            "receive_packets": 0,
            "send_seconds": 1_000_000,
            "retry_seconds": 1_000_000,
        })
    }
}

/// A tunnel that was asked for.
pub struct Attempt {
    number: usize,
    connection: OwnedFd,
}

impl Attempt {
    /// Returns whether the engine has sent it an answer.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn is_answered(&self) -> Result<bool> {
        match rustix::net::recv(&self.connection, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok(_) => Ok(true),
            Err(rustix::io::Errno::AGAIN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // Kill the engine, so that its devices are removed with the namespace at once, and not one by one.
        if let Err(error) = self.engine.kill() {
            eprintln!("engine: {error}");
        }
        // The exit status does not matter.
        let _ = self.engine.wait();
    }
}

fn send(connection: &OwnedFd, request: &Value) -> Result<()> {
    rustix::net::send(connection, request.to_string().as_bytes(), SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The next event of these kinds; skips others, such as requests for keys.
fn receive(connection: &OwnedFd, kinds: &[&str]) -> Result<Value> {
    let mut buffer = [0; MAX_MESSAGE_OCTETS];
    loop {
        let (length, _) = rustix::net::recv(connection, &mut buffer, RecvFlags::empty())?;
        ensure!(length > 0, "the engine has closed a connection");
        let event: Value = serde_json::from_slice(&buffer[..length])?;
        if kinds.iter().any(|kind| event["event"] == *kind) {
            return Ok(event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_all_tunnels_have_addresses_of_their_own() {
        assert_eq!(inner(Side::A, 0), Ipv4Addr::new(10, 64, 0, 0));
        assert_eq!(inner(Side::B, 10_000), Ipv4Addr::new(10, 128, 39, 16));
    }

    #[test]
    fn both_ends_agree_on_keys() {
        assert_eq!(Keys::first().of(Side::A, 7), Keys::first().of(Side::A, 7));
        assert_ne!(Keys::first().of(Side::A, 7), Keys::first().of(Side::B, 7));
        assert_ne!(Keys::first().of(Side::A, 7), Keys::next().of(Side::A, 7));
        assert_ne!(Keys::first().of(Side::A, 7), Keys::first().of(Side::A, 8));
    }
}
