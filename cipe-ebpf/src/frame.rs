//! Packet access. Headers are octet arrays, without alignment or host byte order, and each takes one bounds check.

use core::marker::PhantomData;

use aya_ebpf::programs::{TcContext, XdpContext};
use cipe_common::maps::CarrierAddress;

/// Ethertypes and IP protocols, in network order.
pub const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
pub const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xDD];
pub const ETHERTYPE_VLAN: [u8; 2] = [0x81, 0x00];
pub const ETHERTYPE_QINQ: [u8; 2] = [0x88, 0xA8];
pub const PROTOCOL_ICMP: u8 = 1;
pub const PROTOCOL_TCP: u8 = 6;
pub const PROTOCOL_UDP: u8 = 17;
pub const PROTOCOL_ICMPV6: u8 = 58;
pub const IPV6_FRAGMENT: u8 = 44;

/// Octets of an untagged Ethernet header.
pub const ETHERNET: usize = size_of::<Ethernet>();

#[repr(C)]
pub struct Ethernet {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub ethertype: [u8; 2],
}

#[repr(C)]
pub struct Vlan {
    pub tci: [u8; 2],
    pub ethertype: [u8; 2],
}

#[repr(C)]
pub struct Ipv4 {
    pub version_ihl: u8,
    pub tos: u8,
    pub total_length: [u8; 2],
    pub id: [u8; 2],
    pub fragment: [u8; 2],
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: [u8; 2],
    pub source: [u8; 4],
    pub destination: [u8; 4],
}

impl Ipv4 {
    /// Returns whether this is a fragment, the first one included.
    #[inline(always)]
    pub fn is_fragment(&self) -> bool {
        u16::from_be_bytes(self.fragment) & 0x3FFF != 0
    }
}

impl Ipv4 {
    /// Returns whether the packet is whole or the first fragment, so that the transport header follows.
    #[inline(always)]
    pub fn begins(&self) -> bool {
        u16::from_be_bytes(self.fragment) & 0x1FFF == 0
    }
}

#[repr(C)]
pub struct Ipv6 {
    pub version_class_flow: [u8; 4],
    pub payload_length: [u8; 2],
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: [u8; 16],
    pub destination: [u8; 16],
}

/// The fragment header of IPv6.
#[repr(C)]
pub struct Fragment {
    pub next_header: u8,
    pub reserved: u8,
    pub offset: [u8; 2],
    pub id: [u8; 4],
}

impl Fragment {
    /// Returns whether this is the first fragment.
    #[inline(always)]
    pub fn begins(&self) -> bool {
        u16::from_be_bytes(self.offset) & 0xFFF8 == 0
    }
}

/// A TCP header without its options.
#[repr(C)]
pub struct Tcp {
    pub ports: [u8; 4],
    pub sequence: [u8; 4],
    pub acknowledgement: [u8; 4],
    pub data_offset: u8,
    pub flags: u8,
    pub window: [u8; 2],
    pub checksum: [u8; 2],
    pub urgent: [u8; 2],
}

#[repr(C)]
pub struct Udp {
    pub source: [u8; 2],
    pub destination: [u8; 2],
    pub length: [u8; 2],
    pub checksum: [u8; 2],
}

/// The front of a packet, which a program can read directly. In TC, helpers that change the packet invalidate it; the verifier
/// enforces that.
#[derive(Clone, Copy)]
pub struct Front<'a> {
    data: usize,
    end: usize,
    context: PhantomData<&'a ()>,
}

impl<'a> Front<'a> {
    #[inline(always)]
    pub fn of_xdp(ctx: &'a XdpContext) -> Self {
        Self { data: ctx.data(), end: ctx.data_end(), context: PhantomData }
    }

    #[inline(always)]
    pub fn of_tc(ctx: &'a TcContext) -> Self {
        Self { data: ctx.data(), end: ctx.data_end(), context: PhantomData }
    }

    /// Returns the number of octets in the front.
    #[inline(always)]
    pub fn len(self) -> usize {
        self.end - self.data
    }

    /// Returns the header at a constant offset, or `None` if the front ends before its end. `T` is one of the octet structs of this
    /// module.
    #[inline(always)]
    pub fn at<T>(self, offset: usize) -> Option<&'a T> {
        const { assert!(align_of::<T>() == 1) };
        if self.data + offset + size_of::<T>() > self.end {
            return None;
        }
        // SAFETY: the octets lie between data and data_end, which the kernel guarantees to be readable for the life of
        // the program's context; the type is made of octets, so any address and content is valid.
        Some(unsafe { &*((self.data + offset) as *const T) })
    }

    /// Overwrites the header at a constant offset. Returns `false` if the front ends before its end. The caller keeps no reference
    /// into it.
    #[inline(always)]
    pub fn put<T>(self, offset: usize, value: T) -> bool {
        const { assert!(align_of::<T>() == 1) };
        if self.data + offset + size_of::<T>() > self.end {
            return false;
        }
        // SAFETY: as in `at`; XDP packets are writable between data and data_end, and the verifier refuses the program
        // where one is not.
        unsafe { *((self.data + offset) as *mut T) = value };
        true
    }
}

/// Returns whether an ethertype is that of a VLAN tag.
#[inline(always)]
pub fn is_tag(ethertype: [u8; 2]) -> bool {
    matches!(ethertype, ETHERTYPE_VLAN | ETHERTYPE_QINQ)
}

/// Offsets of the header behind one VLAN tag, and behind two.
pub const BEHIND_ONE: usize = ETHERNET + size_of::<Vlan>();
pub const BEHIND_TWO: usize = BEHIND_ONE + size_of::<Vlan>();

/// Returns the number of VLAN tags in a frame, two at most, and the ethertype behind them; `None` if the front is too short.
#[inline(always)]
pub fn behind_tags(front: Front<'_>) -> Option<(usize, [u8; 2])> {
    let ethernet = front.at::<Ethernet>(0)?;
    if !is_tag(ethernet.ethertype) {
        return Some((0, ethernet.ethertype));
    }
    let tag = front.at::<Vlan>(ETHERNET)?;
    if !is_tag(tag.ethertype) {
        return Some((1, tag.ethertype));
    }
    Some((2, front.at::<Vlan>(BEHIND_ONE)?.ethertype))
}

/// Returns whether `address` is this IPv4 address.
#[inline(always)]
pub fn is_v4(address: &CarrierAddress, [a, b, c, d]: [u8; 4]) -> bool {
    is_v6(address, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, a, b, c, d])
}

/// Returns whether `address` is this IPv6 address.
#[inline(always)]
pub fn is_v6(address: &CarrierAddress, other: [u8; 16]) -> bool {
    let mut difference = 0;
    for (one, other) in address.address.iter().zip(other) {
        difference |= one ^ other;
    }
    difference == 0
}
