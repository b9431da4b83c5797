//! The kernel side of the data path: seven programs that classify, stamp and redirect packets. Of a payload they decrypt two blocks
//! at most, to see whether a key can open it.
//!
//! The code reads every header at a constant offset after one bounds check, because that is what the verifier can
//! follow. Each program turns its packet into a `Result<action, Drop>`; drops are counted in one place.

#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod bounds;
mod carrier;
mod contents;
mod ethernet;
mod frame;
mod lan;
mod live;
mod loops;
mod maps;
mod mss;
mod private;
mod shield;
mod tag;
mod verdicts;

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_PIPE, TC_ACT_SHOT, xdp_action},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};

/// XDP on a carrier device: redirects our datagrams to the engine and passes all others unchanged. It also transmits
/// the engine's frames.
#[xdp(frags)]
pub fn carrier_xdp(ctx: XdpContext) -> u32 {
    if let Some(worker) = live::worker_of(&ctx) {
        return live::send(&ctx, worker);
    }
    carrier::classify(&ctx).unwrap_or_else(|drop| drop.count(xdp_action::XDP_DROP))
}

/// TC ingress on a carrier device of a tunnel that uses its UDP socket, while it is shielded: drops datagrams that no key can open.
#[classifier]
pub fn shield_tc(ctx: TcContext) -> i32 {
    match carrier::shield(&ctx) {
        Ok(()) => TC_ACT_PIPE,
        Err(drop) => drop.count(TC_ACT_SHOT),
    }
}

/// TC egress on a hub, below the tunnel devices: stamps frames with data that the hidden end cannot see, and drops
/// frames that may not leave.
#[classifier]
pub fn private_tc(ctx: TcContext) -> i32 {
    match private::stamp(&ctx) {
        Ok(()) => TC_ACT_OK,
        Err(drop) => drop.count(TC_ACT_SHOT),
    }
}

/// XDP on a hub's hidden end: redirects stamped frames to the engine and drops all others.
#[xdp(frags)]
pub fn private_xdp(ctx: XdpContext) -> u32 {
    private::redirect(&ctx).unwrap_or_else(|drop| drop.count(xdp_action::XDP_DROP))
}

/// TC egress of an Ethernet tunnel's device: stamps frames with data that the hidden end cannot see, and drops frames
/// that may not leave.
#[classifier]
pub fn ethernet_tc(ctx: TcContext) -> i32 {
    match ethernet::check(&ctx) {
        Ok(()) => TC_ACT_OK,
        Err(drop) => drop.count(TC_ACT_SHOT),
    }
}

/// XDP on the hidden end of an Ethernet tunnel's device: redirects its frames to the engine, or drops them.
#[xdp(frags)]
pub fn ethernet_xdp(ctx: XdpContext) -> u32 {
    ethernet::redirect(&ctx).unwrap_or_else(|drop| drop.count(xdp_action::XDP_DROP))
}

/// XDP on a LAN card with a short cut: redirects plain packets for its tunnels to the engine and passes all others unchanged.
#[xdp(frags)]
pub fn lan_xdp(ctx: XdpContext) -> u32 {
    lan::shorten(&ctx).unwrap_or_else(|drop| drop.count(xdp_action::XDP_DROP))
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// Licence of the object. It is dual, because the kernel offers the ring buffer and clock helpers only to GPL-compatible programs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
