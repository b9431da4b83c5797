//! What the control thread and its workers tell each other.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::engine::carrier::outer::Hop;
use crate::engine::carrier::{Traffic, UdpCarrier};
use crate::engine::datapath::ControlMessage;
use crate::engine::lan::LanTable;
use crate::engine::tunnel::mtu::TunnelMtu;
use crate::engine::tunnel::{Egress, Tunnel};
use crate::kernel::bpf::{Ends, LiveFrames};
use crate::xsk::{Injector, Socket};

/// Kept by a worker until it has carried out a command.
pub(crate) type Done = tokio::sync::mpsc::Sender<()>;

/// What the control thread tells a worker.
pub(crate) enum Command {
    /// A carrier device was opened, in this slot; the sender is dropped when frames can come. They wait until
    /// [`Command::BeginCarrier`].
    AddCarrier(usize, Box<NewCarrier>, Done),
    /// Nothing is on its way to the UDP sockets any more that came before the frames of the carrier device in this slot.
    BeginCarrier(usize),
    /// The carrier device in this slot is no longer used; the sender is dropped when all that has come is read, and its
    /// sockets are closed.
    RemoveCarrier(usize, Done),
    /// Read the UDP sockets until nothing is in them; the sender is dropped when that is done.
    EmptySockets(Done),
    /// Let what comes to the UDP sockets wait there, or no longer; the sender is dropped when it is so.
    HoldSockets(bool, Done),
    /// A hub, or an Ethernet tunnel's own pair, was opened: its slot, its hidden end's sockets, the way back in for superframes,
    /// and which of both it is.
    AddHub(usize, Vec<Socket>, Injector, Ends),
    /// The hub in this slot goes; the sender is dropped when its sockets are closed.
    RemoveHub(usize, Done),
    /// A LAN card was opened: its slot, its sockets, another way out, and whether that should take superframes; the sender is
    /// dropped when frames can come.
    AddLan(usize, Vec<Socket>, Injector, bool, Done),
    /// The LAN card in this slot is no longer used.
    RemoveLan(usize),
    /// What goes straight out of LAN cards.
    SetExits(Arc<LanTable>),
    /// A tunnel was made: its UDP socket, and the carrier addresses that are its own; the sender is dropped when frames can
    /// come.
    AddTunnel(Box<Tunnel>, UdpCarrier, Vec<SocketAddr>, Done),
    /// A tunnel goes; the sender is dropped when its socket is closed.
    RemoveTunnel(u16, Done),
    /// A tunnel's device has another address.
    SetPrivateHop(u16, Hop),
    /// A tunnel's device has another MTU, in octets, and so the tunnel takes up to another size.
    SetDeviceMtu(u16, usize, TunnelMtu),
    /// The egress to a tunnel's peer and the tunnel's MTU changed; to be ignored if the tunnel has another peer by now.
    SetEgress(u16, IpAddr, Egress, TunnelMtu),
    /// A tunnel's peer is at this address from now on.
    SetPeer(u16, SocketAddr),
    /// A tunnel's link-local addresses are at the device of this ifindex from now on.
    SetZone(u16, u32),
    /// Where a SOCKS5 server relays a tunnel's datagrams, if it does.
    SetRelay(u16, Option<SocketAddr>),
    /// Packets and payload octets under one send key before a new one is wanted.
    SetSendLimits(u16, u64, u64, bool),
    /// Stay awake for this long at most when there is nothing to do.
    BusyPoll(Duration),
    /// Count what the kernel dropped at the rings; the sender is dropped when that is done.
    CountLosses(Done),
    /// A message to seal and send.
    SendControl(u16, ControlMessage),
    /// A datagram in clear for this address, by the tunnel's UDP socket.
    SendClear(u16, SocketAddr, Vec<u8>),
    /// A tunnel has no dynamic send key any more: the next packet asks for one.
    SendKeyDropped(u16),
    /// The end.
    Stop,
}

/// A carrier device, as one worker gets it.
pub(crate) struct NewCarrier {
    /// The device.
    pub ifindex: u32,
    /// Sockets of its receive queues.
    pub sockets: Vec<Socket>,
    /// Where to count what goes through them.
    pub traffic: Arc<Traffic>,
    /// How to send live frames there.
    pub live: Option<LiveFrames>,
}
