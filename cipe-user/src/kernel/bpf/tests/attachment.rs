//! Attachment to real devices: a veth pair with a macvlan on it, in a network namespace of the test's thread, which
//! ends with the thread.

use std::{
    io::Read as _,
    net::{Ipv4Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use cipe_common::{Stamp, maps::private_socket_index};
use futures_util::TryStreamExt as _;
use netlink_packet_route::link::{LinkAttribute, MacVlanMode};
use rtnetlink::{Handle, LinkMacVlan, LinkUnspec, LinkVeth};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use socket2::{Domain, Protocol, Socket, Type};

use super::super::hook::Place;
use super::{
    frames::{ETHERNET, IPV4, TCP, pseudo_sum, udp},
    *,
};

/// Address of the macvlan, and the network behind it.
const NEAR: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 1);
const PREFIX: u8 = 24;
const FAR: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 2);

/// Longer than any step here: an event that has not come by then never comes.
const EVENT_DEADLINE: Duration = Duration::from_secs(10);

/// Both ends' ifindex.
pub(super) struct Veth {
    pub(super) visible: u32,
    pub(super) hidden: u32,
}

/// Chunks of memory that frames can be sent from.
pub(super) const CHUNKS: u32 = 256;

/// Slot of the pair as a hub.
const HUB: u8 = 3;
/// MAC address of the macvlan.
const SOURCE: [u8; 6] = [0x1E, 0, 0, 0, 0, 1];

/// Runs `test` on a thread in a new network namespace, with a veth pair `v0`, `v1` and a macvlan on `v0`, all up.
pub(super) fn in_namespace(test: impl FnOnce(&mut Programs, Veth) + Send) {
    thread::scope(|scope| {
        let run = scope.spawn(|| {
            // Loaded first: this shows whether the test has the permission.
            let Some(mut programs) = programs_with(LoadOptions { chunks: CHUNKS, ..LoadOptions::default() }) else {
                return;
            };
            // SAFETY: a network namespace is no resource that other threads' safety rests on; only this thread changes.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let veth = runtime.block_on(make_veth());
            test(&mut programs, veth);
        });
        if let Err(panic) = run.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// The hidden end has one receive queue more than the engine uses on any device.
async fn make_veth() -> Veth {
    let (connection, netlink, _) = rtnetlink::new_connection().unwrap();
    tokio::spawn(connection);
    let queues = LinkAttribute::NumRxQueues(CARRIER_QUEUES + 1);
    let pair = LinkVeth::new("v1", "v0").append_extra_attribute(queues).build();
    netlink.link().add(pair).execute().await.unwrap();
    let veth = Veth { visible: index(&netlink, "v0").await, hidden: index(&netlink, "v1").await };
    let macvlan = LinkMacVlan::new("m0", veth.visible, MacVlanMode::Private).address(SOURCE.to_vec()).build();
    netlink.link().add(macvlan).execute().await.unwrap();
    let macvlan = index(&netlink, "m0").await;
    netlink.address().add(macvlan, NEAR.into(), PREFIX).execute().await.unwrap();
    for end in [veth.visible, veth.hidden, macvlan] {
        let change = LinkUnspec::new_with_index(end).up().arp(false).build();
        netlink.link().set(change).execute().await.unwrap();
    }
    veth
}

async fn index(netlink: &Handle, name: &str) -> u32 {
    let mut links = netlink.link().get().match_name(name.to_owned()).execute();
    links.try_next().await.unwrap().unwrap().header.index
}

#[test]
fn a_veth_runs_native_xdp_unless_generic_is_asked_for() {
    in_namespace(|programs, veth| {
        assert_eq!(programs.attach_carrier(veth.visible, XdpMode::Auto).unwrap(), AttachedMode::Native);
        programs.detach_carrier(veth.visible);
        let generic = programs.attach_carrier(veth.visible, XdpMode::Generic).unwrap();
        assert_eq!(generic, AttachedMode::Generic { refused: None });
        let busy = programs.attach_carrier(veth.visible, XdpMode::Native).unwrap_err().to_string();
        let id = xdp(&mut programs.ebpf, names::CARRIER_XDP).unwrap().info().unwrap().id();
        assert_eq!(
            busy,
            format!("v0: another XDP program is attached (id {id}); detach it with `ip link set v0 xdp off`")
        );
        programs.detach_carrier(veth.visible);
        assert_eq!(programs.attach_carrier(veth.visible, XdpMode::Native).unwrap(), AttachedMode::Native);
    });
}

#[test]
fn loopback_falls_back_to_generic_with_the_reason() {
    in_namespace(|programs, _| {
        let mode = programs.attach_carrier(DEVICE, XdpMode::Auto).unwrap();
        assert_eq!(mode.to_string(), "generic (native refused: the driver has no native XDP)");
        programs.detach_carrier(DEVICE);
        let error = programs.attach_carrier(DEVICE, XdpMode::Native).unwrap_err().to_string();
        assert_eq!(error, "lo: native XDP refused (the driver has no native XDP); use generic XDP (xdp-mode=generic)");
    });
}

#[test]
fn what_this_host_sends_into_a_tunnel_is_clamped_stamped_and_fails_closed() {
    in_namespace(|programs, veth| {
        programs.set_private_address(SOURCE, TUNNEL).unwrap();
        programs
            .set_tunnel(TUNNEL, Tunnel { flags: Tunnel::ALIVE, mss: 1_000, hub: HUB.into(), ..Tunnel::default() })
            .unwrap();
        programs.attach_private(Ends::Hub, veth.visible, veth.hidden, XdpMode::Auto).unwrap();
        let tap = tap();
        let _half_open = syn();
        let frame = stamped(&tap);
        assert_eq!(frame[ETHERNET + IPV4 + TCP..][..4], [2, 4, 3, 0xE8], "MSS 1000");
        // The device must complete it: so far it is the sum of the pseudo-header, not changed by the clamp.
        let sum = u16::from_be_bytes(frame[ETHERNET + IPV4 + 16..][..2].try_into().unwrap());
        assert_eq!(sum, pseudo_sum(&frame[ETHERNET..], IPV4));
        // No socket is there: nothing passes the hidden end, where the frame arrives after an unknown time.
        let start = Instant::now();
        while programs.counted(TUNNEL, Verdict::NoEngine) == 0 && start.elapsed() < EVENT_DEADLINE {
            thread::yield_now();
        }
        assert_ne!(programs.counted(TUNNEL, Verdict::NoEngine), 0);
        let before = programs.counted(TUNNEL, Verdict::TunnelDead);
        programs.clear_tunnel(TUNNEL).unwrap();
        let _half_open = syn();
        assert!(programs.counted(TUNNEL, Verdict::TunnelDead) > before);
    });
}

#[test]
fn a_program_that_somebody_detaches_is_missed_beside_a_foreign_one_and_with_an_engine_s_rights() {
    if !has_tcx() {
        return;
    }
    in_namespace(|programs, veth| {
        let mut others = programs_with(LoadOptions::default()).unwrap();
        let attach = |of: &mut Programs| {
            let program = classifier(&mut of.ebpf, names::PRIVATE_TC).unwrap();
            (Some(program.info().unwrap().id()), hook::attach(program, ("v0", veth.visible)).unwrap())
        };
        let (own, link) = attach(programs);
        let (foreign, _foreign_link) = attach(&mut others);
        // Only this thread's, which ends.
        let rights = CapabilitySet::NET_ADMIN | CapabilitySet::BPF | CapabilitySet::PERFMON;
        let sets = CapabilitySets { effective: rights, permitted: rights, inheritable: CapabilitySet::empty() };
        set_capabilities(None, sets).unwrap();
        let are_there = || [own, foreign].map(|id| hook::is_attached(veth.visible, Place::Egress, id));
        assert_eq!(are_there(), [true, true]);
        assert!(!hook::is_attached(veth.visible, Place::Ingress, own));
        drop(link);
        assert_eq!(are_there(), [false, true]);
    });
}

/// As if the first engine had been killed: its links live on in descriptors.
#[test]
fn the_programs_of_another_engine_take_the_place_of_the_first_ones() {
    in_namespace(|first, veth| {
        let mut second = programs().unwrap();
        first.attach_private(Ends::Hub, veth.visible, veth.hidden, XdpMode::Generic).unwrap();
        let links = first.pair_links(veth.visible).unwrap();
        if links.tc.is_none() {
            return eprintln!("skipped: no tcx");
        }
        second.take_over_private(Ends::Hub, (veth.visible, veth.hidden), XdpMode::Generic, links).unwrap();
        second.set_private_address(SOURCE, TUNNEL).unwrap();
        let dead = |programs: &Programs| {
            let before = programs.counted(TUNNEL, Verdict::TunnelDead);
            let _half_open = syn();
            programs.counted(TUNNEL, Verdict::TunnelDead) > before
        };
        assert!(dead(&second));
        // Whoever drops a link detaches it, even if others hold it.
        first.detach_private(veth.visible);
        assert!(!dead(&second));
        // Links that are detached are made anew.
        let detached = second.pair_links(veth.visible).unwrap();
        second.detach_private(veth.visible);
        second.take_over_private(Ends::Hub, (veth.visible, veth.hidden), XdpMode::Generic, detached).unwrap();
        assert!(dead(&second));
    });
}

/// Kernels before 6.6 have this instead of a tcx link.
#[test]
fn a_filter_stamps_as_a_link_does_and_is_found_when_its_engine_was_killed() {
    in_namespace(|programs, veth| {
        programs.set_private_address(SOURCE, TUNNEL).unwrap();
        programs.set_tunnel(TUNNEL, Tunnel { flags: Tunnel::ALIVE, hub: HUB.into(), ..Tunnel::default() }).unwrap();
        let look = tap();
        let mut attach = || {
            let program = classifier(&mut programs.ebpf, names::PRIVATE_TC).unwrap();
            hook::attach_filter(program, "v0").unwrap()
        };
        let link = attach();
        let half_open = syn();
        stamped(&look);
        drop((link, half_open));
        // As if the engine were killed: nothing detaches.
        std::mem::forget(attach());
        let half_open = syn();
        stamped(&look);
        drop(half_open);
        remove_leftovers(veth.visible);
        remove_leftovers(veth.visible);
        // A new tap, which has not seen the former frames.
        let look = tap();
        let _half_open = syn();
        let (_, on_hub) = (next_tcp(&look), next_tcp(&look));
        assert_eq!(on_hub[..6], SOURCE, "nobody stamps");
    });
}

#[test]
fn a_receive_queue_beyond_the_table_is_not_another_hubs() {
    in_namespace(|programs, veth| {
        programs.attach_private(Ends::Hub, veth.visible, veth.hidden, XdpMode::Native).unwrap();
        let last = xdp_socket();
        programs.set_private_socket(private_socket_index(HUB.into(), PRIVATE_QUEUES - 1), &last).unwrap();
        let next = xdp_socket();
        programs.set_private_socket(private_socket_index(u32::from(HUB) + 1, 0), &next).unwrap();
        let mut frame = udp("192.0.2.7:53".parse().unwrap(), b"question");
        frame[..6].copy_from_slice(&Stamp { hub: HUB, tunnel: TUNNEL as u16, ..Stamp::default() }.to_mac());
        let mut run = |queue| programs.run_xdp_from(names::PRIVATE_XDP, &frame, veth.hidden, queue);
        assert_eq!(run(PRIVATE_QUEUES - 1), XDP_REDIRECT);
        assert_eq!(run(PRIVATE_QUEUES), XDP_DROP);
        assert_eq!(programs.counted(TUNNEL, Verdict::NoEngine), 1);
    });
}

/// The next frame that leaves the hub, which has the tunnel's stamp. The tap also sees the frame leave the device,
/// before the hub.
fn stamped(tap: &Socket) -> Vec<u8> {
    let frame = std::iter::repeat_with(|| next_tcp(tap)).find(|frame| frame[..6] != SOURCE).unwrap();
    let stamp = Stamp { hub: HUB, tunnel: TUNNEL as u16, ..Stamp::default() };
    assert_eq!(Stamp::from_mac(frame[..6].try_into().unwrap()), Some(stamp));
    frame
}

#[test]
fn a_receive_queue_beyond_the_table_is_not_another_carriers() {
    in_namespace(|programs, veth| {
        let local = "192.0.2.1:4000".parse().unwrap();
        programs.set_tunnel(TUNNEL, Tunnel { flags: Tunnel::ALIVE, ..Tunnel::default() }).unwrap();
        programs.add_carrier_address(local, TUNNEL).unwrap();
        programs.set_carrier_device(veth.hidden, 0).unwrap();
        programs.attach_carrier(veth.hidden, XdpMode::Native).unwrap();
        let (last, next) = (xdp_socket(), xdp_socket());
        programs.set_carrier_socket(CARRIER_QUEUES - 1, &last).unwrap();
        programs.set_carrier_socket(CARRIER_QUEUES, &next).unwrap();
        let frame = udp(local, &[0x7F; 16]);
        let mut run = |queue| programs.run_xdp_from(names::CARRIER_XDP, &frame, veth.hidden, queue);
        assert_eq!(run(CARRIER_QUEUES - 1), XDP_REDIRECT);
        assert_eq!(run(CARRIER_QUEUES), XDP_PASS);
    });
}

/// Makes the kernel send a SYN to [`FAR`]; the connection is never established.
fn syn() -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_nonblocking(true).unwrap();
    let answer = socket.connect(&SocketAddr::from((FAR, 443)).into());
    assert_eq!(answer.unwrap_err().raw_os_error(), Some(libc::EINPROGRESS));
    socket
}

/// Sees every frame of the namespace as it leaves or arrives; a read fails after ten seconds without one.
pub(super) fn tap() -> Socket {
    const ETH_P_ALL: u16 = 3;
    let tap = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(ETH_P_ALL.to_be())))).unwrap();
    tap.set_read_timeout(Some(EVENT_DEADLINE)).unwrap();
    tap
}

/// The next frame with a TCP segment over IPv4.
fn next_tcp(mut tap: &Socket) -> Vec<u8> {
    let mut frame = vec![0; 2048];
    loop {
        let length = tap.read(&mut frame).unwrap();
        if length >= ETHERNET + IPV4 + TCP && frame[12..14] == [0x08, 0x00] && frame[ETHERNET + 9] == 6 {
            frame.truncate(length);
            return frame;
        }
    }
}
