//! The stamp of Ethernet tunnels: one more VLAN tag in front of the frame, which the engine takes off again.

use aya_ebpf::{
    helpers::generated::{bpf_skb_vlan_pop, bpf_skb_vlan_push},
    programs::TcContext,
};
use cipe_common::{EthernetStamp, stamp::STAMP_TPID};

use crate::{
    contents::{Contents, contents, is_tcp, is_unfinished},
    frame::{
        BEHIND_ONE, BEHIND_TWO, ETHERNET, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Front, Vlan, behind_tags, is_tag,
    },
};

/// `gso_size` of SCTP, which the kernel cuts.
const GSO_BY_FRAGS: u16 = 0xFFFF;

/// There is no header, or the kernel had no memory.
pub struct Failed;

impl From<i64> for Failed {
    fn from(_: i64) -> Self {
        Self
    }
}

/// A VLAN tag, in the order of the wire.
#[derive(Clone, Copy)]
struct Tag {
    tpid: [u8; 2],
    tci: [u8; 2],
}

/// Says in a tag what the engine must know of a frame, if there is anything, or if the frame's own first tag looks like one.
#[inline(always)]
pub fn stamp(ctx: &TcContext, gso_size: u16) -> Result<(), Failed> {
    let beside = beside(ctx);
    let first = match beside {
        Some(tag) => tag.tpid,
        None => Front::of_tc(ctx).at::<Ethernet>(0).ok_or(Failed)?.ethertype,
    };
    match of_frame(ctx, beside, gso_size)? {
        EthernetStamp::Plain if first != STAMP_TPID => Ok(()),
        stamp => push(ctx, Tag { tpid: STAMP_TPID, tci: stamp.to_tci().to_be_bytes() }),
    }
}

/// What the engine must know of a frame.
#[inline(always)]
fn of_frame(ctx: &TcContext, beside: Option<Tag>, gso_size: u16) -> Result<EthernetStamp, Failed> {
    let superframe = match gso_size {
        0 | GSO_BY_FRAGS => EthernetStamp::Plain,
        _ => EthernetStamp::Superframe(gso_size),
    };
    let front = Front::of_tc(ctx);
    let (tags, ethertype) = behind_tags(front).ok_or(Failed)?;
    // The engine looks behind two.
    let is_known = tags < 2 || beside.is_none();
    if is_known && matches!(ethertype, ETHERTYPE_IPV4 | ETHERTYPE_IPV6) {
        let is_tcp = match tags {
            0 => is_tcp::<ETHERNET>(front, ethertype),
            1 => is_tcp::<BEHIND_ONE>(front, ethertype),
            _ => is_tcp::<BEHIND_TWO>(front, ethertype),
        };
        if is_tcp {
            return Ok(superframe);
        }
        if let Some(contents) = contents_behind(ctx, beside, tags, ethertype)? {
            return Ok(match contents {
                Contents::Plain => superframe,
                Contents::Encapsulated => EthernetStamp::Encapsulated,
                // SCTP, or UDP that is to be cut into fragments.
                Contents::Other => EthernetStamp::Plain,
            });
        }
    }
    // MPLS, many tags and the like.
    if superframe == EthernetStamp::Plain && is_unfinished(ctx)? {
        return Ok(EthernetStamp::Hidden);
    }
    Ok(superframe)
}

/// What the packet is to the kernel, which answers where no tag is left in the frame: behind one of two that is taken off for the
/// time, the other comes to stand beside it. `None` where the kernel takes the frame for another.
#[inline(always)]
fn contents_behind(
    ctx: &TcContext,
    beside: Option<Tag>,
    tags: usize,
    ethertype: [u8; 2],
) -> Result<Option<Contents>, Failed> {
    // SAFETY: the context is the one the kernel called us with. The field holds the ethertype in network order in its low half.
    let protocol = unsafe { (*ctx.skb.skb).protocol as u16 }.to_ne_bytes();
    if tags == 0 {
        return Ok((protocol == ethertype).then(|| contents(ctx)));
    }
    if !is_tag(protocol) {
        return Ok(None);
    }
    let first = match beside {
        Some(tag) => tag,
        None => {
            let front = Front::of_tc(ctx);
            let tpid = front.at::<Ethernet>(0).ok_or(Failed)?.ethertype;
            Tag { tpid, tci: front.at::<Vlan>(ETHERNET).ok_or(Failed)?.tci }
        }
    };
    // SAFETY: the context is the one the kernel called us with; no reference into the packet is kept.
    if unsafe { bpf_skb_vlan_pop(ctx.skb.skb) } < 0 {
        return Err(Failed);
    }
    let contents = contents(ctx);
    push(ctx, first)?;
    Ok(Some(contents))
}

/// The tag that the kernel keeps beside a frame.
#[inline(always)]
fn beside(ctx: &TcContext) -> Option<Tag> {
    // SAFETY: the context is the one the kernel called us with; the verifier checks each field access.
    let (is_there, tpid, tci) = unsafe {
        let skb = ctx.skb.skb;
        ((*skb).vlan_present, (*skb).vlan_proto, (*skb).vlan_tci)
    };
    // The TPID is in network order, the TCI in that of the host.
    (is_there != 0).then(|| Tag { tpid: (tpid as u16).to_ne_bytes(), tci: (tci as u16).to_be_bytes() })
}

/// Puts a tag beside the frame; one that is there already goes into it.
#[inline(always)]
fn push(ctx: &TcContext, tag: Tag) -> Result<(), Failed> {
    let (tpid, tci) = (u16::from_ne_bytes(tag.tpid), u16::from_be_bytes(tag.tci));
    // SAFETY: the context is the one the kernel called us with; no reference into the packet is kept.
    if unsafe { bpf_skb_vlan_push(ctx.skb.skb, tpid, tci) } < 0 { Err(Failed) } else { Ok(()) }
}
