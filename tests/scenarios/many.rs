//! Many tunnels in one engine: no tunnel affects another, and shared objects are removed with the last one.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use cipe_tests::fleet::{Cipher, Fleet, Keys, inner};
use cipe_tests::namespace::Namespace;
use cipe_tests::offload::Offload;
use cipe_tests::process::{StoppedThread, detach_xdp, patient};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces};
use nix::net::if_::if_nametoindex;
use socket2::{Domain, Socket, Type};

/// Devices of a gateway without tunnels.
const NONE: [&str; 3] = ["lo", "lan0", "wire0"];

/// A socket that receives packets of one device only.
fn receiver(namespace: &Namespace, device: &str) -> Result<UdpSocket> {
    let socket = namespace.run(|| Socket::new(Domain::IPV4, Type::DGRAM, None))?;
    socket.bind_device(Some(device.as_bytes()))?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from(([0, 0, 0, 0], 9999)).into())?;
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(patient(SOON)))?;
    Ok(socket)
}

#[test]
fn no_tunnel_gets_a_packet_of_another() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    const TUNNELS: usize = 40;
    const DATAGRAMS: usize = 5;
    for (carrier, cipher, native) in
        [("xdp", Cipher::Blowfish, false), ("udp", Cipher::Idea, false), ("auto", Cipher::Idea, true)]
    {
        let net = Topology::new(Carrier::Direct, Offload::On)?;
        let mut ends = [Fleet::start(&net, Side::A, cipher)?, Fleet::start(&net, Side::B, cipher)?];
        for end in &mut ends {
            end.set_modes(carrier, if native { "native" } else { "auto" });
            end.attach(0..TUNNELS)?;
        }
        // Twice: under the static key, and under each tunnel's own keys.
        for round in 0..2 {
            for (from, to) in [(0, 1), (1, 0)] {
                let sides = [Side::A, Side::B];
                let receivers: Vec<UdpSocket> = (0..TUNNELS)
                    .map(|number| receiver(net.gw(sides[to]), ends[to].device(number)?))
                    .collect::<Result<_>>()?;
                let sender = net.gw(sides[from]).run(|| UdpSocket::bind("0.0.0.0:0"))?;
                for datagram in 0..DATAGRAMS * TUNNELS {
                    let number = datagram % TUNNELS;
                    sender.send_to(&number.to_be_bytes(), (inner(sides[to], number), 9999))?;
                }
                for (number, receiver) in receivers.iter().enumerate() {
                    let mut buffer = [0; 16];
                    for _ in 0..DATAGRAMS {
                        let what = || {
                            format!("{carrier}, round {round}, {:?} to {:?}, tunnel {number}", sides[from], sides[to])
                        };
                        let (length, source) = receiver.recv_from(&mut buffer).with_context(what)?;
                        assert_eq!(
                            (&buffer[..length], source.ip()),
                            (&number.to_be_bytes()[..], inner(sides[from], number).into())
                        );
                    }
                    receiver.set_nonblocking(true)?;
                    let more = receiver.recv_from(&mut buffer).map_err(|error| error.kind());
                    assert_eq!(more, Err(ErrorKind::WouldBlock), "more than was sent");
                }
            }
            for end in &ends {
                end.set_keys(Keys::first())?;
            }
        }
        for end in &ends {
            let verdicts = end.verdicts()?;
            let counted = 2 * (DATAGRAMS * TUNNELS) as u64;
            assert_eq!(
                (verdicts.get("sent"), verdicts.get("delivered")),
                (Some(&counted), Some(&counted)),
                "{verdicts:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn tunnels_come_and_go_and_leave_nothing() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let namespace = net.gw(Side::A);
    let mut fleet = Fleet::start(&net, Side::A, Cipher::Idea)?;
    for round in 0..3 {
        fleet.attach(0..20)?;
        fleet.set_modes("auto", "native");
        fleet.attach(20..30)?;
        fleet.set_modes("auto", "auto");
        let hubs: Vec<String> = namespace.devices()?.into_iter().filter(|name| name.starts_with("cipehub")).collect();
        // Without it, hubs always take single frames by native XDP.
        let pairs = if fleet.has_feature("AF_XDP multi-buffer")? { 2 } else { 1 };
        assert_eq!(hubs.len(), 2 * pairs, "one pair for superframes, one for native XDP: {hubs:?}");
        fleet.detach(0..10);
        fleet.detach(20..30);
        // The other tunnels work while these end.
        fleet.attach(0..10)?;
        fleet.detach(0..20);
        namespace.wait_for_devices(&NONE).with_context(|| format!("round {round}"))?;
        assert_eq!(fleet.verdicts()?.len(), 0);
    }
    Ok(())
}

#[test]
fn an_operator_who_deletes_a_hub_ends_its_tunnels_and_the_next_one_gets_another() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let namespace = net.gw(Side::A);
    let mut fleet = Fleet::start(&net, Side::A, Cipher::Blowfish)?;
    fleet.attach(0..3)?;
    namespace.ip(&["link", "del", "cipehub0"])?;
    for number in 0..3 {
        fleet.wait_for(number, "device-down")?;
    }
    namespace.wait_for_devices(&NONE)?;
    fleet.attach(3..4)?;
    assert!(namespace.devices()?.iter().any(|name| name == fleet.device(3).unwrap_or_default()));
    fleet.detach(0..4);
    namespace.wait_for_devices(&NONE)
}

#[test]
fn an_engine_keeps_the_devices_that_a_dead_one_left_for_daemons_that_live() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let namespace = net.gw(Side::A);
    let mut first = Fleet::start(&net, Side::A, Cipher::Blowfish)?;
    first.attach(0..3)?;
    let left = namespace.devices()?;
    drop(first);
    let mut second = Fleet::start(&net, Side::A, Cipher::Blowfish)?;
    assert_eq!(namespace.devices()?, left, "they belong to us, and we live");
    second.attach_as(0, Some("cipcb0"))?;
    second.attach(3..4)?;
    assert_eq!(second.device(3)?, "cipcb3", "it shares the hub of the others");
    second.detach(0..4);
    let others: Vec<&str> = left.iter().map(String::as_str).filter(|name| *name != "cipcb0").collect();
    namespace.wait_for_devices(&others)?;
    second.attach_as(1, Some("cipcb1"))?;
    second.attach_as(2, Some("cipcb2"))?;
    second.detach(0..4);
    namespace.wait_for_devices(&NONE)
}

/// A worker that does not run answers nothing. Whoever needs it waits; whoever does not is served.
#[test]
fn a_worker_that_hangs_stops_no_command_of_the_other_tunnels() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let mut end = Fleet::start(&net, Side::A, Cipher::Blowfish)?;
    end.attach(0..2)?;

    // One is made meanwhile: the keys of the others are set, and only it waits.
    let mut devices = net.gw(end.side()).devices()?;
    devices.push("cipcb2".to_owned());
    let stopped = StoppedThread::named(end.engine(), "cipe-worker")?;
    let attempt = end.begin(2, None)?;
    net.gw(end.side()).wait_for_devices(&devices.iter().map(String::as_str).collect::<Vec<_>>())?;
    end.set_keys(Keys::first())?;
    ensure!(!attempt.is_answered()?, "a tunnel is there that a worker has not taken");
    drop(stopped);
    end.finish(attempt).context("the worker goes on in time")?;

    // One goes meanwhile: its device is there until the worker has let go of it, and whoever attaches then waits for that.
    let going = end.device(1)?.to_owned();
    let is_there = |end: &Fleet| net.gw(end.side()).run(|| if_nametoindex(going.as_str()).is_ok());
    let stopped = StoppedThread::named(end.engine(), "cipe-worker")?;
    end.detach(1..2);
    let attempt = end.begin(1, Some(&going))?;
    end.set_keys(Keys::next())?;
    ensure!(is_there(&end) && !attempt.is_answered()?, "a device went that a worker has not let go of");
    drop(stopped);
    end.finish(attempt).context("the name and the port are free in time")?;
    ensure!(is_there(&end) && end.device(1)? == going);
    Ok(())
}

/// A card changes between AF_XDP and UDP sockets when all workers have let go of it, and nobody else waits for that.
#[test]
fn a_worker_that_hangs_stops_no_command_while_a_card_changes_its_door() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let mut end = Fleet::start(&net, Side::A, Cipher::Blowfish)?;
    end.set_modes("xdp", "auto");
    end.attach(0..1)?;
    let told = |end: &Fleet| -> Result<String> {
        Ok(end.wait_for(0, "notice")?["message"].as_str().unwrap_or_default().to_owned())
    };
    while !told(&end)?.contains("native XDP") {}
    let carrier = net.gw(end.side()).run(|| if_nametoindex("wire0"))?;
    let stopped = StoppedThread::named(end.engine(), "cipe-worker")?;
    detach_xdp(end.engine(), carrier)?;
    while !told(&end)?.contains("attaching it again") {}
    end.set_keys(Keys::first())?;
    drop(stopped);
    let next = told(&end)?;
    ensure!(next.contains("native XDP"), "the worker goes on in time, and takes the card: {next}");
    Ok(())
}
