//! The eBPF programs and their maps: the only module that uses aya.
//!
//! [`Programs`] owns everything that it loaded: dropping it removes programs, maps and links.

mod attach;
mod error;
mod ethernet;
mod hook;
mod lan;
mod link;
mod live;
mod logs;
mod refusal;
#[cfg(test)]
mod tests;
mod verifier;

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd},
    path::PathBuf,
};

use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues, XskMap},
    programs::{SchedClassifier, Xdp},
};
use cipe_common::{
    Verdict,
    maps::{
        CARRIER_QUEUES, CarrierAddress, DEPARTURES_PER_WORKER, Drops, MAX_CARRIERS, MAX_CHUNKS, MAX_HUBS, MAX_TUNNELS,
        PRIVATE_QUEUES, PrivateAddress, SLOTS, Tunnel, drops_entries, drops_index, names,
    },
};
use rustix::process::{Resource, Rlimit, setrlimit};

use super::keys::KeyWriter;
use super::shields::ShieldWriter;
use super::zone;
pub use attach::{AttachedMode, Ends, PairLinks, XdpMode};
pub use error::Error;
pub use hook::{has_tcx, remove_leftovers};
pub use live::LiveFrames;

/// The committed object, built from `cipe-ebpf` by `cargo xtask build-ebpf`.
const OBJECT: &[u8] = aya::include_bytes_aligned!("../../../../cipe-ebpf/prebuilt/cipe.bpf.o");

/// The programs of the object that are loaded at once. [`names::LAN_XDP`] is loaded for the first card that needs it: the kernel
/// takes longer to verify it than all others, and no tunnel should wait for that.
const PROGRAMS: [&str; 6] = [
    names::CARRIER_XDP,
    names::PRIVATE_XDP,
    names::ETHERNET_XDP,
    names::PRIVATE_TC,
    names::ETHERNET_TC,
    names::SHIELD_TC,
];

/// Environment variable that names an object to load instead of the committed one (`cargo xtask build-ebpf --check`).
pub const OBJECT_VARIABLE: &str = "CIPE_BPF_OBJECT";

/// [`Tunnel`] in a type of ours, for which aya's trait can be implemented.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct TunnelValue(Tunnel);

/// [`PrivateAddress`] in a type of ours, for which aya's trait can be implemented.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct PrivateKey(PrivateAddress);

/// [`CarrierAddress`] in a type of ours, for which aya's trait can be implemented.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct AddressKey(CarrierAddress);

// SAFETY: five u32 and octets, no padding, every bit pattern valid.
unsafe impl Pod for TunnelValue {}
// SAFETY: octet arrays only.
unsafe impl Pod for PrivateKey {}
// SAFETY: octet arrays only.
unsafe impl Pod for AddressKey {}

/// The sizes of the maps, and other options of loading.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Tunnels, 1 to [`MAX_TUNNELS`]; their numbers are below this.
    pub max_tunnels: u32,
    /// Carrier devices, 1 to [`MAX_CARRIERS`].
    pub max_carriers: u32,
    /// Workers that share the flows of a hub; 1 or more.
    pub workers: u32,
    /// Chunks of memory for live frames, 1 to [`MAX_CHUNKS`].
    pub chunks: u32,
    /// Octets of the largest frame that carrier sockets receive; larger frames go to the kernel.
    pub largest_frame: u32,
    /// Whether the programs log at debug level (rare events only); else they are silent.
    pub debug: bool,
    /// An object file instead of the built-in one.
    pub object: Option<PathBuf>,
}

impl Default for LoadOptions {
    /// The largest maps, and the object of [`OBJECT_VARIABLE`], if it is set.
    fn default() -> Self {
        Self {
            max_tunnels: MAX_TUNNELS,
            max_carriers: MAX_CARRIERS,
            workers: 1,
            chunks: 1,
            largest_frame: u32::MAX,
            debug: false,
            object: std::env::var_os(OBJECT_VARIABLE).map(PathBuf::from),
        }
    }
}

impl LoadOptions {
    fn tunnels(&self) -> u32 {
        self.max_tunnels.clamp(1, MAX_TUNNELS)
    }
}

/// The loaded programs, their maps and their attachments. Owned by the engine's control thread.
pub struct Programs {
    ebpf: Ebpf,
    links: attach::Links,
    tunnels: Array<MapData, TunnelValue>,
    private_addresses: HashMap<MapData, PrivateKey, u32>,
    private_sockets: XskMap<MapData>,
    ethernet: ethernet::Devices,
    carrier_addresses: HashMap<MapData, AddressKey, u32>,
    local_addresses: HashMap<MapData, [u8; 16], u32>,
    /// The addresses in that map.
    known_addresses: HashSet<IpAddr>,
    carrier_devices: HashMap<MapData, u32, u32>,
    carrier_sockets: XskMap<MapData>,
    verdicts: PerCpuArray<MapData, Drops>,
    lans: lan::LanMaps,
    live: live::LiveMaps,
    keys: Option<KeyWriter>,
    shields: Option<ShieldWriter>,
    /// Its descriptor is in the code of a program that is not loaded yet.
    _key_map: MapData,
}

impl Programs {
    /// Loads the programs and makes their maps. Nothing is attached yet.
    ///
    /// # Errors
    /// [`Error::Privilege`] without the capabilities; otherwise the error of the kernel or the verifier.
    pub fn load(options: &LoadOptions) -> Result<Self, Error> {
        // Maps with a value for each CPU need it; the library's own error says only that something is missing.
        aya::util::nr_cpus().map_err(|(path, cause)| Error::Cpus { path, cause })?;
        let mut ebpf = read(options)?;
        let tunnels = options.tunnels();
        for name in PROGRAMS {
            load(&mut ebpf, name)?;
        }
        let Some(Map::Array(key_map)) = ebpf.take_map(names::KEYS) else {
            return Err(Error::Object { name: names::KEYS });
        };
        let keys = KeyWriter::map(key_map.fd().as_fd(), (tunnels * SLOTS) as usize)
            .map_err(|cause| Error::Map { map: names::KEYS, cause: cause.into() })?;
        let shields = match ebpf.take_map(names::SHIELDS) {
            Some(Map::Array(map)) => ShieldWriter::map(map.fd().as_fd())
                .map_err(|cause| Error::Map { map: names::SHIELDS, cause: cause.into() })?,
            _ => return Err(Error::Object { name: names::SHIELDS }),
        };
        Ok(Self {
            links: attach::Links::default(),
            tunnels: map(&mut ebpf, names::TUNNELS)?,
            private_addresses: map(&mut ebpf, names::PRIVATE_ADDRESSES)?,
            private_sockets: map(&mut ebpf, names::PRIVATE_SOCKETS)?,
            ethernet: map(&mut ebpf, names::ETHERNET_DEVICES)?,
            carrier_addresses: map(&mut ebpf, names::CARRIER_ADDRESSES)?,
            local_addresses: map(&mut ebpf, names::LOCAL_ADDRESSES)?,
            known_addresses: HashSet::new(),
            carrier_devices: map(&mut ebpf, names::CARRIER_DEVICES)?,
            carrier_sockets: map(&mut ebpf, names::CARRIER_SOCKETS)?,
            verdicts: map(&mut ebpf, names::VERDICTS)?,
            lans: lan::LanMaps::take(&mut ebpf)?,
            live: live::LiveMaps::take(&mut ebpf, options.workers)?,
            keys: Some(keys),
            shields: Some(shields),
            _key_map: key_map,
            ebpf,
        })
    }

    /// Loads the program for LAN cards, if it is not loaded yet.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_lan(&mut self) -> Result<(), Error> {
        match xdp(&mut self.ebpf, names::LAN_XDP)?.fd() {
            Ok(_) => Ok(()),
            Err(_) => load(&mut self.ebpf, names::LAN_XDP),
        }
    }

    /// Returns the only writer of the key slots; its [`KeyWriter::reader`]s are for the workers. `None` on the second
    /// call.
    pub fn take_keys(&mut self) -> Option<KeyWriter> {
        self.keys.take()
    }

    /// Returns the only writer of the shields. `None` on the second call.
    pub fn take_shields(&mut self) -> Option<ShieldWriter> {
        self.shields.take()
    }

    /// Sets the programs' data of a tunnel. Without [`Tunnel::ALIVE`] its private traffic is dropped.
    ///
    /// # Errors
    /// [`Error::Map`] if the number is not below [`LoadOptions::max_tunnels`].
    pub fn set_tunnel(&mut self, number: u32, tunnel: Tunnel) -> Result<(), Error> {
        self.tunnels.set(number, TunnelValue(tunnel), 0).map_err(in_map(names::TUNNELS))
    }

    /// Declares a tunnel dead: everything routed into its device is dropped and counted from now on.
    ///
    /// # Errors
    /// As [`Self::set_tunnel`].
    pub fn clear_tunnel(&mut self, number: u32) -> Result<(), Error> {
        self.set_tunnel(number, Tunnel::default())
    }

    /// Registers the tunnel whose device has this MAC address.
    ///
    /// # Errors
    /// [`Error::Map`] if the table is full.
    pub fn set_private_address(&mut self, mac: [u8; 6], tunnel: u32) -> Result<(), Error> {
        let key = PrivateKey(PrivateAddress::new(mac));
        self.private_addresses.insert(key, tunnel, 0).map_err(in_map(names::PRIVATE_ADDRESSES))
    }

    /// Removes a device's address; no error if it was not there.
    ///
    /// # Errors
    /// [`Error::Map`] with the kernel's answer.
    pub fn remove_private_address(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        let key = PrivateKey(PrivateAddress::new(mac));
        forgotten(self.private_addresses.remove(&key)).map_err(in_map(names::PRIVATE_ADDRESSES))
    }

    /// Sets the base of a carrier device in the map of sockets: queue `q` has index `base + q`. Bases are multiples of
    /// [`CARRIER_QUEUES`].
    ///
    /// # Errors
    /// [`Error::Map`] if the table is full.
    pub fn set_carrier_device(&mut self, ifindex: u32, base: u32) -> Result<(), Error> {
        self.carrier_devices.insert(ifindex, base, 0).map_err(in_map(names::CARRIER_DEVICES))
    }

    /// Removes a carrier device: the kernel gets its datagrams. No error if it was not there.
    ///
    /// # Errors
    /// [`Error::Map`] with the kernel's answer.
    pub fn remove_carrier_device(&mut self, ifindex: u32) -> Result<(), Error> {
        forgotten(self.carrier_devices.remove(&ifindex)).map_err(in_map(names::CARRIER_DEVICES))
    }

    /// Puts an AF_XDP socket at a carrier device's base plus queue. The map does not keep the socket open: a closed
    /// socket is removed automatically.
    ///
    /// # Errors
    /// [`Error::Map`] if the index is out of range or the descriptor is no AF_XDP socket.
    pub fn set_carrier_socket(&mut self, index: u32, socket: impl AsFd) -> Result<(), Error> {
        self.carrier_sockets.set(index, socket.as_fd().as_raw_fd(), 0).map_err(in_map(names::CARRIER_SOCKETS))
    }

    /// Puts an AF_XDP socket at [`cipe_common::maps::private_socket_index`].
    ///
    /// # Errors
    /// As [`Self::set_carrier_socket`].
    pub fn set_private_socket(&mut self, index: u32, socket: impl AsFd) -> Result<(), Error> {
        self.private_sockets.set(index, socket.as_fd().as_raw_fd(), 0).map_err(in_map(names::PRIVATE_SOCKETS))
    }

    /// Directs datagrams to a local address (an unspecified one: any address of that port) to a tunnel.
    ///
    /// # Errors
    /// [`Error::Map`] if the table is full.
    pub fn add_carrier_address(&mut self, local: SocketAddr, tunnel: u32) -> Result<(), Error> {
        self.carrier_addresses.insert(address_key(local), tunnel, 0).map_err(in_map(names::CARRIER_ADDRESSES))
    }

    /// Removes such an entry; no error if it was not there.
    ///
    /// # Errors
    /// [`Error::Map`] with the kernel's answer.
    pub fn remove_carrier_address(&mut self, local: SocketAddr) -> Result<(), Error> {
        forgotten(self.carrier_addresses.remove(&address_key(local))).map_err(in_map(names::CARRIER_ADDRESSES))
    }

    /// Tells the carrier program the addresses of this host: a datagram to one of them may be for a tunnel that listens
    /// on its port at any address.
    ///
    /// # Errors
    /// [`Error::Map`] if there are more than [`cipe_common::maps::MAX_LOCAL_ADDRESSES`]; datagrams to the others use
    /// the UDP socket.
    pub fn set_local_addresses(&mut self, addresses: &HashSet<IpAddr>) -> Result<(), Error> {
        let gone: Vec<IpAddr> = self.known_addresses.difference(addresses).copied().collect();
        for address in gone {
            forgotten(self.local_addresses.remove(&octets_of(address))).map_err(in_map(names::LOCAL_ADDRESSES))?;
            self.known_addresses.remove(&address);
        }
        for address in addresses {
            if !self.known_addresses.contains(address) {
                let set = self.local_addresses.insert(octets_of(*address), 0, 0);
                set.map_err(in_map(names::LOCAL_ADDRESSES))?;
                self.known_addresses.insert(*address);
            }
        }
        Ok(())
    }

    /// The drops that the programs counted for a tunnel ([`cipe_common::maps::NO_TUNNEL`]: for none), by discriminant
    /// of [`Verdict`]. The engine's own counts must be added.
    ///
    /// # Errors
    /// [`Error::Map`] if the number is not below [`LoadOptions::max_tunnels`].
    pub fn verdicts(&self, tunnel: u32) -> Result<[u64; Verdict::COUNT], Error> {
        let per_cpu = self.verdicts.get(&drops_index(tunnel), 0).map_err(in_map(names::VERDICTS))?;
        let mut counts = [0; Verdict::COUNT];
        for (index, verdict) in Verdict::KERNEL.iter().enumerate() {
            counts[*verdict as usize] = per_cpu.iter().map(|drops| drops[index]).sum();
        }
        Ok(counts)
    }

    /// Sets a tunnel's counts to zero, before its number is used again.
    ///
    /// # Errors
    /// As [`Self::verdicts`].
    pub fn reset_verdicts(&mut self, tunnel: u32) -> Result<(), Error> {
        let cpus =
            aya::util::nr_cpus().map_err(|(_, cause)| Error::Map { map: names::VERDICTS, cause: cause.into() })?;
        let zero = PerCpuValues::try_from(vec![Drops::default(); cpus])
            .map_err(|cause| Error::Map { map: names::VERDICTS, cause: cause.into() })?;
        self.verdicts.set(drops_index(tunnel), zero, 0).map_err(in_map(names::VERDICTS))
    }
}

/// The key of a local carrier address.
fn address_key(local: SocketAddr) -> AddressKey {
    AddressKey(carrier_address(local))
}

/// A carrier address in the form of the programs.
pub fn carrier_address(address: SocketAddr) -> CarrierAddress {
    let ip = address.ip();
    let octets = if ip.is_unspecified() { [0; 16] } else { octets_of(ip) };
    let zone = zone::of(address).unwrap_or_default();
    CarrierAddress { address: octets, port: address.port().to_be_bytes(), reserved: [0; 2], zone }
}

/// An address in the form of the programs.
fn octets_of(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

fn map<T: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, Error> {
    ebpf.take_map(name).ok_or(Error::Object { name })?.try_into().map_err(in_map(name))
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Xdp, Error> {
    ebpf.program_mut(name).and_then(|program| program.try_into().ok()).ok_or(Error::Object { name })
}

fn classifier<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, Error> {
    ebpf.program_mut(name).and_then(|program| program.try_into().ok()).ok_or(Error::Object { name })
}

/// Reads the object and makes its maps, but loads none of its programs.
fn read(options: &LoadOptions) -> Result<Ebpf, Error> {
    raise_memlock();
    let tunnels = options.tunnels();
    let carriers = options.max_carriers.clamp(1, MAX_CARRIERS);
    let level = if options.debug { aya_log::Level::Debug } else { aya_log::Level::Info } as u8;
    let mut loader = EbpfLoader::new();
    loader
        .map_max_entries(names::TUNNELS, tunnels)
        .map_max_entries(names::BUDGETS, tunnels)
        .map_max_entries(names::PRIVATE_ADDRESSES, tunnels)
        .map_max_entries(names::PRIVATE_SOCKETS, MAX_HUBS * PRIVATE_QUEUES)
        .map_max_entries(names::CARRIER_ADDRESSES, 2 * tunnels)
        .map_max_entries(names::KEYS, tunnels * SLOTS)
        .map_max_entries(names::VERDICTS, drops_entries(tunnels))
        .map_max_entries(names::CHUNKS, options.chunks.clamp(1, MAX_CHUNKS))
        .map_max_entries(names::RUNS, options.workers)
        .map_max_entries(names::DEPARTURES, options.workers * DEPARTURES_PER_WORKER)
        .map_max_entries(names::CARRIER_DEVICES, carriers)
        .map_max_entries(names::CARRIER_SOCKETS, carriers * CARRIER_QUEUES)
        .override_global(names::WORKERS, &options.workers, true)
        .override_global(names::LARGEST_FRAME, &options.largest_frame, true)
        .override_global(aya_log::LEVEL, &level, false);
    match &options.object {
        None => loader.load(OBJECT),
        Some(path) => loader.load_file(path),
    }
    .map_err(|error| Error::object(&error))
}

fn load(ebpf: &mut Ebpf, name: &'static str) -> Result<(), Error> {
    let loaded = match name {
        names::PRIVATE_TC | names::ETHERNET_TC | names::SHIELD_TC => classifier(ebpf, name)?.load(),
        _ => xdp(ebpf, name)?.load(),
    };
    loaded.map_err(|error| Error::program(name, &error))
}

fn in_map(map: &'static str) -> impl FnOnce(MapError) -> Error {
    move |cause| Error::Map { map, cause: cause.into() }
}

/// Removing a missing entry is no error.
fn forgotten(removed: Result<(), MapError>) -> Result<(), MapError> {
    match removed {
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(MapError::KeyNotFound) => Ok(()),
        other => other,
    }
}

/// Kernels before 5.11 count maps against this limit; a refusal (no CAP_SYS_RESOURCE) does not matter on later ones.
fn raise_memlock() {
    if let Err(error) = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None }) {
        tracing::debug!("RLIMIT_MEMLOCK stays as it is: {error}");
    }
}
