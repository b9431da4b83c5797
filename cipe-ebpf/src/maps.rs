//! The maps, sized for the largest engine; the loader shrinks them. `cipe_common::maps` defines their layouts and names.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    macros::map,
    maps::{Array, HashMap, LpmTrie, PerCpuArray, XskMap},
};
use cipe_common::maps::{
    Budgets, CARRIER_QUEUES, CHUNK, CarrierAddress, DEPARTURES_PER_WORKER, Departure, Drops, EthernetDevice, KeySlot,
    LAN_QUEUES, Lan, LanRoute, MAX_CARRIERS, MAX_CHUNKS, MAX_HUBS, MAX_LAN_ROUTES, MAX_LANS, MAX_LOCAL_ADDRESSES,
    MAX_TUNNELS, PRIVATE_QUEUES, PrivateAddress, Run, SLOTS, Tunnel, drops_entries,
};
use cipe_common::shield::{MAX_SHIELDS, Shield};

#[map]
pub static TUNNELS: Array<Tunnel> = Array::with_max_entries(MAX_TUNNELS, 0);

#[map]
pub static PRIVATE_ADDRESSES: HashMap<PrivateAddress, u32> = HashMap::with_max_entries(MAX_TUNNELS, 0);

#[map]
pub static ETHERNET_DEVICES: HashMap<u32, EthernetDevice> = HashMap::with_max_entries(2 * MAX_HUBS, 0);

#[map]
pub static PRIVATE_SOCKETS: XskMap = XskMap::with_max_entries(MAX_HUBS * PRIVATE_QUEUES, 0);

#[map]
pub static CARRIER_ADDRESSES: HashMap<CarrierAddress, u32> = HashMap::with_max_entries(2 * MAX_TUNNELS, 0);

#[map]
pub static LOCAL_ADDRESSES: HashMap<[u8; 16], u32> = HashMap::with_max_entries(MAX_LOCAL_ADDRESSES, BPF_F_NO_PREALLOC);

#[map]
pub static CARRIER_DEVICES: HashMap<u32, u32> = HashMap::with_max_entries(MAX_CARRIERS, 0);

#[map]
pub static CARRIER_SOCKETS: XskMap = XskMap::with_max_entries(MAX_CARRIERS * CARRIER_QUEUES, 0);

#[map]
pub static KEYS: Array<KeySlot> = Array::with_max_entries(MAX_TUNNELS * SLOTS, BPF_F_MMAPABLE);

#[map]
pub static SHIELDS: Array<Shield> = Array::with_max_entries(MAX_SHIELDS, BPF_F_MMAPABLE);

#[map]
pub static VERDICTS: PerCpuArray<Drops> = PerCpuArray::with_max_entries(drops_entries(MAX_TUNNELS), 0);

#[map]
pub static BUDGETS: Array<Budgets> = Array::with_max_entries(MAX_TUNNELS, 0);

#[map]
pub static LAN_DEVICES: HashMap<u32, Lan> = HashMap::with_max_entries(MAX_LANS, 0);

#[map]
pub static LAN_SOCKETS: XskMap = XskMap::with_max_entries(MAX_LANS * LAN_QUEUES, 0);

#[map]
pub static LAN_ROUTES4: LpmTrie<[u8; 4], LanRoute> = LpmTrie::with_max_entries(MAX_LAN_ROUTES, 0);

#[map]
pub static LAN_ROUTES6: LpmTrie<[u8; 16], LanRoute> = LpmTrie::with_max_entries(MAX_LAN_ROUTES, 0);

#[map]
pub static CHUNKS: Array<[u8; CHUNK]> = Array::with_max_entries(MAX_CHUNKS, BPF_F_MMAPABLE);

#[map]
pub static RUNS: Array<Run> = Array::with_max_entries(PRIVATE_QUEUES, BPF_F_MMAPABLE);

#[map]
pub static DEPARTURES: Array<Departure> =
    Array::with_max_entries(PRIVATE_QUEUES * DEPARTURES_PER_WORKER, BPF_F_MMAPABLE);
