//! Keys and values of the eBPF maps, by map name. Multi-octet wire fields are kept as octets in network order.

/// Names of the maps and programs in the eBPF object.
pub mod names {
    /// Global of the private TC program: how many workers to spread flows over (u32).
    pub const WORKERS: &str = "WORKERS";
    /// Global of the carrier program: octets of the largest frame that its sockets take (u32).
    pub const LARGEST_FRAME: &str = "LARGEST_FRAME";
    /// `ARRAY` of [`super::Tunnel`], by tunnel number.
    pub const TUNNELS: &str = "TUNNELS";
    /// `HASH` from [`super::PrivateAddress`], a tunnel device's MAC address, to its tunnel number (u32).
    pub const PRIVATE_ADDRESSES: &str = "PRIVATE_ADDRESSES";
    /// `XSKMAP` by [`super::private_socket_index`].
    pub const PRIVATE_SOCKETS: &str = "PRIVATE_SOCKETS";
    /// `HASH` from the ifindex (u32) of either end of an Ethernet tunnel's pair to [`super::EthernetDevice`].
    pub const ETHERNET_DEVICES: &str = "ETHERNET_DEVICES";
    /// `HASH` from [`super::CarrierAddress`] to a tunnel number (u32).
    pub const CARRIER_ADDRESSES: &str = "CARRIER_ADDRESSES";
    /// `HASH` from each address of this host, as 16 octets (see [`super::CarrierAddress`]), to zero (u32). A tunnel that listens on
    /// any address takes only datagrams to one of these addresses. Other datagrams to its port are in transit.
    pub const LOCAL_ADDRESSES: &str = "LOCAL_ADDRESSES";
    /// `HASH` from a carrier device's ifindex (u32) to the index of its queue 0 in `CARRIER_SOCKETS` (u32).
    pub const CARRIER_DEVICES: &str = "CARRIER_DEVICES";
    /// `XSKMAP` by the device's base index plus the receive queue.
    pub const CARRIER_SOCKETS: &str = "CARRIER_SOCKETS";
    /// `ARRAY` of [`super::KeySlot`], `BPF_F_MMAPABLE`, by [`super::key_index`].
    pub const KEYS: &str = "KEYS";
    /// `ARRAY` of [`crate::shield::Shield`], `BPF_F_MMAPABLE`, by [`super::Tunnel::shield`] less one.
    pub const SHIELDS: &str = "SHIELDS";
    /// `PERCPU_ARRAY` of [`super::Drops`] by [`super::drops_index`].
    pub const VERDICTS: &str = "VERDICTS";
    /// `ARRAY` of [`super::Budgets`] by tunnel number.
    pub const BUDGETS: &str = "BUDGETS";
    /// `HASH` from a LAN card's ifindex (u32) to [`super::Lan`].
    pub const LAN_DEVICES: &str = "LAN_DEVICES";
    /// `XSKMAP` by [`super::Lan::sockets`] plus the receive queue.
    pub const LAN_SOCKETS: &str = "LAN_SOCKETS";
    /// `LPM_TRIE` from IPv4 prefixes, as octets, to [`super::LanRoute`].
    pub const LAN_ROUTES4: &str = "LAN_ROUTES4";
    /// The same for IPv6.
    pub const LAN_ROUTES6: &str = "LAN_ROUTES6";
    /// `ARRAY` of [`super::CHUNK`] octets, `BPF_F_MMAPABLE`, by chunk number: the memory of all frames.
    pub const CHUNKS: &str = "CHUNKS";
    /// `ARRAY` of [`super::Run`], `BPF_F_MMAPABLE`, by worker.
    pub const RUNS: &str = "RUNS";
    /// `ARRAY` of [`super::Departure`], `BPF_F_MMAPABLE`, [`super::DEPARTURES_PER_WORKER`] for each worker.
    pub const DEPARTURES: &str = "DEPARTURES";
    /// XDP (frags) program of carrier devices. It receives and transmits.
    pub const CARRIER_XDP: &str = "carrier_xdp";
    /// TC ingress program of the carrier devices of shielded tunnels that use UDP sockets.
    pub const SHIELD_TC: &str = "shield_tc";
    /// TC egress program of the hubs' visible ends.
    pub const PRIVATE_TC: &str = "private_tc";
    /// XDP (frags) program of the hubs' hidden ends.
    pub const PRIVATE_XDP: &str = "private_xdp";
    /// Egress program of Ethernet tunnels' devices.
    pub const ETHERNET_TC: &str = "ethernet_tc";
    /// XDP (frags) program of the hidden ends of Ethernet tunnels' devices.
    pub const ETHERNET_XDP: &str = "ethernet_xdp";
    /// XDP (frags) program of LAN cards with a short cut.
    pub const LAN_XDP: &str = "lan_xdp";
}

/// Octets of a chunk in `CHUNKS`. A chunk is one frame of the UMEM.
pub const CHUNK: usize = 2048;
/// Chunks that one engine can have; user space resizes the map before loading.
pub const MAX_CHUNKS: u32 = 1 << 19;
/// The most frames that a worker can send in one run of the program.
pub const DEPARTURES_PER_WORKER: u32 = 512;
/// Tunnels that one engine can hold; user space may resize the maps to fewer before loading.
pub const MAX_TUNNELS: u32 = 16_384;
/// The most addresses of this host that `LOCAL_ADDRESSES` holds. Datagrams to any further address go to the UDP socket.
pub const MAX_LOCAL_ADDRESSES: u32 = 16_384;
/// Row of `VERDICTS` for drops whose tunnel is unknown.
pub const NO_TUNNEL: u32 = u32::MAX;
/// The most veth pairs of one engine: one for each hub, and one for each Ethernet tunnel.
pub const MAX_HUBS: u32 = 64;
/// The most receive queues of a hub's hidden end that can have a socket: one for each worker, and one more.
pub const PRIVATE_QUEUES: u32 = 16;
/// The most carrier devices of one engine.
pub const MAX_CARRIERS: u32 = 64;
/// The most receive queues of a carrier device that can have a socket.
pub const CARRIER_QUEUES: u32 = 64;
/// The most LAN cards of one engine that have a short cut.
pub const MAX_LANS: u32 = 16;
/// The most receive queues of a LAN card that can have a socket.
pub const LAN_QUEUES: u32 = 64;
/// The most prefixes of one IP version that the short cut can hold.
pub const MAX_LAN_ROUTES: u32 = 65_536;

/// Value of `TUNNELS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tunnel {
    /// Bits of [`Tunnel::ALIVE`], [`Tunnel::NOKEY`], [`Tunnel::PINNED`], [`Tunnel::SEALED`] and [`Tunnel::SEALED_ONLY`].
    pub flags: u32,
    /// Largest TCP MSS to let through, in octets, for IPv4; IPv6 is 20 less. 0: do not clamp.
    pub mss: u32,
    /// The hub of its device, below [`MAX_HUBS`].
    pub hub: u32,
    /// Largest IP packet that the short cut takes for this tunnel, in octets.
    pub mtu: u32,
    /// MAC address of its device. If its last two octets are the tunnel's number, big-endian, the programs need no look-up in
    /// `PRIVATE_ADDRESSES`.
    pub device: PrivateAddress,
    /// The address that its datagrams are sent to: the peer, or a relay. All zero if it is not known. A datagram to this address
    /// may not enter the tunnel, since that would be a loop.
    pub target: CarrierAddress,
    /// Index of its keys in `SHIELDS` plus one; 0: it is not shielded.
    pub shield: u32,
}

impl Tunnel {
    /// The engine takes traffic for this tunnel.
    pub const ALIVE: u32 = 1;
    /// Payloads are sent without encryption (`nokey`), so there is no length rule and no key flag.
    pub const NOKEY: u32 = 2;
    /// Only `target` may send datagrams to this tunnel (`pinpeer`).
    pub const PINNED: u32 = 4;
    /// Sealed datagrams, which begin with [`Tunnel::SEALED_PREFIX`], go to the engine.
    pub const SEALED: u32 = 8;
    /// No other datagrams do, but for one now and then ([`Budgets::KEYLESS_INTERVAL`]). Only together with [`Tunnel::SEALED`].
    pub const SEALED_ONLY: u32 = 16;

    /// The first octets of a sealed datagram.
    pub const SEALED_PREFIX: [u8; 4] = [0x80, 0, 0, 0];
    /// Octets of the shortest sealed datagram.
    pub const LEAST_SEALED: usize = 25;
}

/// Key of `PRIVATE_ADDRESSES`: the source address of a tunnel device's frames.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrivateAddress {
    /// MAC address.
    pub mac: [u8; 6],
    /// Zero.
    pub reserved: [u8; 2],
}

impl PrivateAddress {
    /// The key for a MAC address.
    #[inline(always)]
    pub const fn new(mac: [u8; 6]) -> Self {
        Self { mac, reserved: [0; 2] }
    }
}

/// Value of `ETHERNET_DEVICES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EthernetDevice {
    /// Number of its tunnel.
    pub tunnel: u32,
    /// The slot of its pair, below [`MAX_HUBS`].
    pub hub: u32,
}

/// Key of `CARRIER_ADDRESSES`: a local carrier address and port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CarrierAddress {
    /// IPv6, or IPv4 as `::ffff:a.b.c.d`; all zero matches any local address.
    pub address: [u8; 16],
    /// UDP port, big-endian.
    pub port: [u8; 2],
    /// Zero.
    pub reserved: [u8; 2],
    /// Ifindex of the device that a link-local address belongs to; 0 for any other address.
    pub zone: u32,
}

impl CarrierAddress {
    /// Returns whether an IPv6 address is link-local (fe80::/10), so that it is valid on one device only.
    #[inline(always)]
    pub const fn is_link_local(address: &[u8; 16]) -> bool {
        address[0] == 0xFE && address[1] & 0xC0 == 0x80
    }
}

/// Value of `BUDGETS`: what the programs let pass of datagrams that anybody can send in any number. Times are in nanoseconds of
/// `CLOCK_MONOTONIC`. Only the programs write it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budgets {
    /// When a datagram that no key of ours opens passed last; 0: never.
    pub keyless: u64,
    /// When the budget for messages in clear is full again.
    pub clear: u64,
}

impl Budgets {
    /// Minimum time between two datagrams that no key of ours opens, in nanoseconds.
    pub const KEYLESS_INTERVAL: u64 = 100_000_000;
    /// Messages in clear that may pass at once.
    pub const CLEAR_BURST: u64 = 16;
    /// The time after which one more may pass, in nanoseconds.
    pub const CLEAR_INTERVAL: u64 = 100_000_000;
}

/// Value of `LAN_DEVICES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lan {
    /// The time of the last packet that looked like a superframe or had an unfinished checksum, in nanoseconds of
    /// `CLOCK_MONOTONIC`; 0: never. The program writes it.
    pub unfinished: u64,
    /// Index of the card's queue 0 in `LAN_SOCKETS`.
    pub sockets: u32,
    /// Bits of [`Lan::GENERIC`].
    pub flags: u32,
    /// The card's MAC address. The program passes frames to any other address.
    pub mac: [u8; 6],
    /// Zero.
    pub reserved: [u8; 2],
}

impl Lan {
    /// XDP runs in the stack, so that the program may see superframes and unfinished checksums.
    pub const GENERIC: u32 = 1;
}

/// Value of `LAN_ROUTES4` and `LAN_ROUTES6`: the kernel's route for a prefix, reduced to what the short cut needs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LanRoute {
    /// If `tunnel` is a tunnel: ifindex of the LAN card that may send to it. If not: ifindex of the route's egress LAN card.
    /// 0: the route leads elsewhere, and the kernel forwards the packet.
    pub lan: u32,
    /// Number of the tunnel that the route leads to, or [`NO_TUNNEL`].
    pub tunnel: u32,
}

/// Value of `RUNS`: the state of a run in which the program sends a worker's frames. All fields are words of 64 bits, so that both
/// sides can share them as atomics.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// Index of the worker's next departure. The program counts it up.
    pub next: u64,
    /// Ifindex of the device to send on.
    pub device: u64,
    /// Frames that were redirected to the device. The program counts them.
    pub sent: u64,
    /// Zero. Fills a cache line, so that two workers never share one.
    pub reserved: [u64; 5],
}

/// Value of `DEPARTURES`: the place of a frame to send. Bits 0 to 31 are the chunk's number, bits 32 to 47 the frame's offset in
/// it, bits 48 to 63 the frame's length; both in octets.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Departure(pub u64);

impl Departure {
    /// Offsets are below this. It is a power of two, so that a mask can be the bound that the verifier sees.
    pub const OFFSET_LIMIT: usize = 256;
    /// The shortest frame, in octets: an Ethernet header.
    pub const MIN_LENGTH: usize = 14;
    /// The longest frame, in octets. It fits into a chunk at any offset.
    pub const MAX_LENGTH: usize = CHUNK - Self::OFFSET_LIMIT;

    /// Returns the departure of `length` octets at `offset` in chunk `chunk`; `None` if the offset or the length is out of bounds.
    pub fn new(chunk: u32, offset: usize, length: usize) -> Option<Self> {
        let fits = offset < Self::OFFSET_LIMIT && (Self::MIN_LENGTH..=Self::MAX_LENGTH).contains(&length);
        fits.then_some(Self(u64::from(chunk) | (offset as u64) << 32 | (length as u64) << 48))
    }

    /// Returns the number of the chunk.
    #[inline(always)]
    pub const fn chunk(self) -> u32 {
        self.0 as u32
    }

    /// Returns the frame's offset in the chunk, in octets.
    #[inline(always)]
    pub const fn offset(self) -> usize {
        (self.0 >> 32) as usize & (Self::OFFSET_LIMIT - 1)
    }

    /// Returns the length of the frame, in octets.
    #[inline(always)]
    pub const fn length(self) -> usize {
        (self.0 >> 48) as usize
    }
}

/// The four key slots of a tunnel in `KEYS`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// The pre-shared key.
    Static = 0,
    /// The dynamic key that we encrypt with.
    Send = 1,
    /// The dynamic key that the peer encrypts with.
    Receive = 2,
    /// The peer's dynamic key before the current one, for packets still in flight.
    Previous = 3,
}

/// Key slots of one tunnel.
pub const SLOTS: u32 = 4;

/// Value of `KEYS`. Only the engine's control thread writes it; XDP and the workers read it.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct KeySlot {
    /// Sequence lock and generation: odd during a write, a new even number after each change, 0 before the first one.
    pub generation: u64,
    /// 1 if the slot holds a live key.
    pub live: u32,
    /// Zero.
    pub reserved: u32,
    /// Key octets 0..15.
    pub key: [u8; 16],
}

/// Returns the index of a tunnel's slot in `KEYS`.
#[inline(always)]
pub const fn key_index(tunnel: u32, slot: Slot) -> u32 {
    tunnel * SLOTS + slot as u32
}

/// Returns the index of a hub's receive queue in `PRIVATE_SOCKETS`.
#[inline(always)]
pub const fn private_socket_index(hub: u32, queue: u32) -> u32 {
    hub * PRIVATE_QUEUES + queue
}

/// Drops of a tunnel that the programs counted on one CPU, by [`crate::Verdict::kernel_index`]. All counters of a tunnel are in
/// one element, because the kernel needs about a microsecond to allocate each element of a per-CPU map.
pub type Drops = [u64; KERNEL_VERDICTS];

/// Counters in [`Drops`]. It is a power of two, so that programs can bound an index by a mask.
pub const KERNEL_VERDICTS: usize = 16;

/// Returns the number of entries of `VERDICTS` for `tunnels` tunnels and [`NO_TUNNEL`].
#[inline(always)]
pub const fn drops_entries(tunnels: u32) -> u32 {
    tunnels + 1
}

/// Returns the index of a tunnel's [`Drops`] in `VERDICTS`. The index for [`NO_TUNNEL`] is 0.
#[inline(always)]
pub const fn drops_index(tunnel: u32) -> u32 {
    tunnel.wrapping_add(1)
}

const _: () = assert!(size_of::<KeySlot>() == 32 && size_of::<CarrierAddress>() == 24 && size_of::<Tunnel>() == 52);
const _: () = assert!(size_of::<Run>() == 64 && CHUNK.is_power_of_two() && Departure::OFFSET_LIMIT.is_power_of_two());
const _: () = assert!(size_of::<Lan>() == 24 && size_of::<LanRoute>() == 8 && size_of::<Budgets>() == 16);
const _: () = assert!(KERNEL_VERDICTS.is_power_of_two() && crate::Verdict::KERNEL.len() <= KERNEL_VERDICTS);
const _: () = assert!(size_of::<PrivateAddress>() == 8 && size_of::<EthernetDevice>() == 8 && MAX_HUBS <= 256);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_departure_reads_back_and_stays_in_its_chunk() {
        let last = Departure::OFFSET_LIMIT - 1;
        for (chunk, offset, length) in [(0, 0, 14), (u32::MAX, last, Departure::MAX_LENGTH), (7, 214, 1500)] {
            let departure = Departure::new(chunk, offset, length).unwrap();
            assert_eq!((departure.chunk(), departure.offset(), departure.length()), (chunk, offset, length));
            assert!(offset + length <= CHUNK);
        }
    }

    #[test]
    fn a_frame_beyond_its_chunk_has_no_departure() {
        for (offset, length) in [(Departure::OFFSET_LIMIT, 100), (0, Departure::MAX_LENGTH + 1), (0, 13)] {
            assert_eq!(Departure::new(0, offset, length), None);
        }
    }
}
