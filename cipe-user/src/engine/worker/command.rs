//! The commands of the control thread to its workers.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::control::protocol::MessageOctets;
use crate::engine::carrier::outer::Hop;
use crate::engine::carrier::{Traffic, UdpCarrier};
use crate::engine::datapath::ControlMessage;
use crate::engine::lan::LanTable;
use crate::engine::tunnel::mtu::TunnelMtu;
use crate::engine::tunnel::{Egress, Tunnel};
use crate::kernel::bpf::{Ends, LiveFrames};
use crate::xsk::{Injector, Socket};

/// A sender that a worker drops when it has carried out a command.
pub(crate) type Done = tokio::sync::mpsc::Sender<()>;

/// A command of the control thread to a worker.
pub(crate) enum Command {
    /// Adds a carrier device, in this slot. The sender is dropped when the device can receive frames; they are queued
    /// until [`Command::BeginCarrier`].
    AddCarrier(usize, Box<NewCarrier>, Done),
    /// Delivers the queued frames of the carrier device in this slot: all earlier datagrams of the UDP sockets have
    /// been read.
    BeginCarrier(usize),
    /// Removes the carrier device in this slot. The sender is dropped when all its frames are read and its sockets are
    /// closed.
    RemoveCarrier(usize, Done),
    /// Reads all datagrams from the UDP sockets. The sender is dropped when the sockets are empty.
    EmptySockets(Done),
    /// Stops or resumes reading the UDP sockets. The sender is dropped when this is done.
    HoldSockets(bool, Done),
    /// Adds a hub, or the pair of an Ethernet tunnel: its slot, the sockets of its hidden end, the injector of
    /// superframes, and which of the two it is.
    AddHub(usize, Vec<Socket>, Injector, Ends),
    /// Removes the hub in this slot. The sender is dropped when its sockets are closed.
    RemoveHub(usize, Done),
    /// Adds a LAN card: its slot, its sockets, its injector, and whether to inject superframes. The sender is dropped
    /// when the card can receive frames.
    AddLan(usize, Vec<Socket>, Injector, bool, Done),
    /// Removes the LAN card in this slot.
    RemoveLan(usize),
    /// Sets the table of packets that leave directly by LAN cards.
    SetExits(Arc<LanTable>),
    /// Adds a tunnel: with its UDP socket, and its own carrier addresses. The sender is dropped when it can receive
    /// frames.
    AddTunnel(Box<Tunnel>, UdpCarrier, Vec<SocketAddr>, Done),
    /// Removes a tunnel. The sender is dropped when its socket is closed.
    RemoveTunnel(u16, Done),
    /// Drops all packets of a tunnel from now on: it has no daemon.
    Orphan(u16),
    /// Sets the link-layer addresses of a tunnel's device.
    SetPrivateHop(u16, Hop),
    /// Sets the MTU of a tunnel's device, in octets, and the resulting MTU of the tunnel.
    SetDeviceMtu(u16, usize, TunnelMtu),
    /// Sets the egress to a tunnel's peer, and the tunnel's MTU. It is ignored if the tunnel has another peer by then.
    SetEgress(u16, IpAddr, Egress, TunnelMtu),
    /// Sets the address of a tunnel's peer.
    SetPeer(u16, SocketAddr),
    /// Sets the ifindex of the device of a tunnel's link-local addresses.
    SetZone(u16, u32),
    /// Sets the address where a SOCKS5 server relays a tunnel's datagrams; `None`: it relays none.
    SetRelay(u16, Option<SocketAddr>),
    /// Sets the limits of packets and payload octets under one send key of a tunnel, whether it is paced, and whether its data may
    /// go under the static key.
    SetSendLimits { number: u16, packets: u64, octets: u64, paced: bool, static_data: bool },
    /// Sets the maximum time of busy-polling.
    BusyPoll(Duration),
    /// Counts the packets that the kernel dropped because rings were full. The sender is dropped when that is done.
    CountLosses(Done),
    /// Seals and sends a message.
    SendControl(u16, ControlMessage),
    /// Sends a datagram in clear to this address, by the tunnel's UDP socket.
    SendClear(u16, SocketAddr, Vec<u8>),
    /// Sends a handshake message to this address, or to the peer.
    SendHandshake(u16, MessageOctets, Option<SocketAddr>),
    /// Seals and sends a packet that confirms a session.
    SendConfirmation(u16),
    /// A tunnel's keys for sealed packets, or the use of other packets, have changed: frames may wait for that, and keys that are not
    /// in use any more are wiped when no worker has a view of them.
    SealedChanged(u16),
    /// A tunnel has a new send key: frames may wait for it.
    SendKeySet,
    /// The tunnel has no dynamic send key any more; the next packet requests one.
    SendKeyDropped(u16),
    /// Ends the worker.
    Stop,
}

/// A carrier device, with the sockets of one worker.
pub(crate) struct NewCarrier {
    /// Index of the device.
    pub ifindex: u32,
    /// Sockets of the receive queues that this worker serves.
    pub sockets: Vec<Socket>,
    /// The counter of the device's datagrams.
    pub traffic: Arc<Traffic>,
    /// For sending live frames on the device.
    pub live: Option<LiveFrames>,
}
