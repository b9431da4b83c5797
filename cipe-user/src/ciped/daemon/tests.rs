//! The daemon with an engine that the test simulates, over a real control socket.

mod sealed;

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;
use crate::ciped::memory::MemoryFile;
use crate::ciped::options::{self, Draft, Program, Sources};
use crate::control::launch::Launch;
use crate::control::protocol::{Attach, Descriptor, Event, KeyOctets, MessageOctets, Request, VERSION, Wanted};
use crate::control::run_dir::RunDir;
use crate::control::server::{Connection, Server};
use crate::wire::message::{DynamicKey, Message};

/// A directory for sockets and scripts, and an engine that listens in it.
struct Stage {
    directory: TempDir,
    server: Option<Server>,
}

/// A running daemon.
struct Player {
    commands: mpsc::Sender<OperatorCommand>,
    up: oneshot::Receiver<()>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Player {
    async fn ended(self) -> anyhow::Result<()> {
        self.task.await.unwrap()
    }
}

impl Stage {
    fn new() -> Self {
        let directory = scripts::tests::directory();
        let mut stage = Self { directory, server: None };
        stage.start_engine();
        stage
    }

    fn run_dir(&self) -> RunDir {
        RunDir::new(self.directory.path(), 1)
    }

    fn start_engine(&mut self) {
        self.server = Some(Server::bind(self.run_dir()).unwrap());
    }

    async fn accept(&self) -> Connection {
        self.server.as_ref().unwrap().accept().await.unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path
    }

    fn daemon(&self, number: u8, extra: &str) -> Player {
        self.daemon_of(number, extra, Vec::new())
    }

    /// Starts a daemon that reads `files` at a reload.
    fn daemon_of(&self, number: u8, extra: &str, files: Vec<PathBuf>) -> Player {
        self.daemon_with(number, &options_text(number, extra), files)
    }

    /// The same with the whole text of its options.
    fn daemon_with(&self, number: u8, text: &str, files: Vec<PathBuf>) -> Player {
        let sources = Sources {
            program: Program::Cb,
            guard: None,
            system: "/nonexistent/cipe/options".into(),
            files,
            arguments: Vec::new(),
        };
        let mut draft = Draft::new(Program::Cb);
        let mut problems = Vec::new();
        options::read_text(text.as_bytes(), Path::new("/x"), &mut draft, &mut problems);
        let (options, problems) = options::settle(&draft, problems);
        let options = options.unwrap_or_else(|| panic!("{problems:?}"));
        let engine = Launch {
            program: "/nonexistent/cipe".into(),
            name: "cipe".into(),
            arguments: Vec::new(),
            deadline: Duration::from_secs(60),
        };
        let memory = MemoryFile::new(&self.directory.path().join("state"), OsStr::new(&format!("{number}.json")));
        let setup = Setup { sources, draft, options, run_dir: self.run_dir(), memory, engine };
        let (commands, receiver) = mpsc::channel(4);
        let (up_sender, up) = oneshot::channel();
        let task = tokio::spawn(run(setup, receiver, || {
            let _ = up_sender.send(());
        }));
        Player { commands, up, task }
    }

    /// Accepts a daemon and attaches its tunnel.
    async fn attach(&self, device: &str) -> (Connection, Attach) {
        self.attach_with(device, (false, None)).await
    }

    /// The same by an engine that goes on with the ledger that it gets, or has one of its own.
    async fn attach_with(
        &self,
        device: &str,
        (keeps_ledger, ledger): (bool, Option<Descriptor>),
    ) -> (Connection, Attach) {
        let mut connection = self.accept().await;
        let Some(Request::Attach(request)) = connection.receive().await.unwrap() else { panic!("no attach") };
        let me = "192.0.2.1:40000".parse().unwrap();
        let (device, notes) = (device.to_owned(), vec!["played".to_owned()]);
        let attached = Event::Attached { device, me, notes, resumed: false, beats: false, keeps_ledger, ledger };
        connection.send(&attached).unwrap();
        (connection, *request)
    }
}

fn options_text(number: u8, extra: &str) -> String {
    format!(
        "ipaddr 10.9.0.{number}\nptpaddr 10.9.0.99\npeer 192.0.2.99:6789\nkey 000102030405060708090a0b0c0d0e0f\n\
         ipup /nonexistent/ip-up\nipdown /nonexistent/ip-down\n{extra}\n"
    )
}

/// Type octet of a control message in a request.
fn message_type(request: &Request) -> Option<u8> {
    let Request::SendControl { payload, .. } = request else { return None };
    payload.first().copied()
}

/// Makes the daemon learn that its peer runs this program: only such a peer gets a CT_KILL.
fn introduce(connection: &Connection) {
    let mut message = [0; 60];
    message[..10].copy_from_slice(b"\x70CIPEkeep\0");
    let from = "192.0.2.99:6789".parse().unwrap();
    connection
        .send(&Event::Control { payload: message.as_slice().into(), from, under_static: false, sealed: false })
        .unwrap();
}

async fn next(connection: &mut Connection) -> Request {
    connection.receive().await.unwrap().unwrap()
}

#[test]
fn the_daemon_has_nothing_from_which_earlier_private_keys_follow() {
    assert_eq!(size_of::<Random>(), 0, "a generator with a state of its own can be run backwards");
    let mut random = random().unwrap();
    let (one, other): ([u8; 32], [u8; 32]) = (random.random(), random.random());
    assert_ne!(one, other);
}

#[tokio::test(flavor = "current_thread")]
async fn the_engine_is_told_what_the_options_say() {
    let stage = Stage::new();
    let player = stage.daemon(1, "device cipcb5\nmtu 1400\ncttl 64\ntokey 60\ncarrier udp\nmssclamp no\nstaticdata no");
    let (_connection, attach) = stage.attach("cipcb5").await;
    assert_eq!((attach.version, attach.device.as_deref(), attach.prefix.as_str()), (VERSION, Some("cipcb5"), "cipcb"));
    assert_eq!((attach.mtu, attach.cttl, attach.send_seconds, attach.retry_seconds), (1400, 64, 60, 10));
    assert!(!attach.mss_clamp && !attach.static_data && attach.key.is_some());
    player.commands.send(OperatorCommand::Stop).await.unwrap();
    player.ended().await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn an_engine_that_has_missed_a_request_is_told_everything_again() {
    let stage = Stage::new();
    let player = stage.daemon(1, "");
    let (connection, _) = stage.attach("cipcb0").await;
    let ping = Message::Ping(b"").build(1_000_000, &mut StdRng::seed_from_u64(1));
    let from = "192.0.2.99:6789".parse().unwrap();
    let event = Event::Control { payload: ping.as_slice().into(), from, under_static: true, sealed: false };
    // It reads none of the answers.
    let asks = async {
        loop {
            let _ = connection.send(&event);
            tokio::task::yield_now().await;
        }
    };
    let again = tokio::select! {
        () = asks => unreachable!("it does not end"),
        (again, _) = stage.attach("cipcb0") => again,
    };
    drop(again);
    player.commands.send(OperatorCommand::Stop).await.unwrap();
    player.ended().await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_tunnel_is_paced_until_its_peer_is_known_and_one_without_keys_is_not() {
    let stage = Stage::new();
    for (number, extra, paced) in [(1, "", true), (2, "nokey", false)] {
        let mut text = options_text(number, extra);
        if !paced {
            text = text.lines().filter(|line| !line.starts_with("key ")).map(|line| format!("{line}\n")).collect();
        }
        let player = stage.daemon_with(number, &text, Vec::new());
        let (_connection, attach) = stage.attach("cipcb5").await;
        assert_eq!(attach.paced, paced, "{text}");
        player.commands.send(OperatorCommand::Stop).await.unwrap();
        player.ended().await.unwrap();
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_daemon_refuses_the_keys_that_the_one_before_it_has_taken() {
    let stage = Stage::new();
    let key = DynamicKey([7; 16]);
    let mut message = Message::indication(&key).build(1_000_000, &mut StdRng::seed_from_u64(1)).to_vec();
    let from = "192.0.2.99:6789".parse().unwrap();
    for (is_taken, unix) in [(true, 1_000_000_u32), (false, 1_000_001)] {
        for at in [48, 56] {
            message[at..at + 4].copy_from_slice(&unix.to_be_bytes());
        }
        let player = stage.daemon(1, "");
        let (mut connection, _) = stage.attach("cipcb0").await;
        connection
            .send(&Event::Control { payload: message.as_slice().into(), from, under_static: true, sealed: false })
            .unwrap();
        // Its answer comes after all that the key brings about.
        let ping = Message::Ping(b"").build(unix, &mut StdRng::seed_from_u64(2));
        connection
            .send(&Event::Control { payload: ping.as_slice().into(), from, under_static: true, sealed: false })
            .unwrap();
        let mut taken = false;
        while let Some(request) = connection.receive().await.unwrap() {
            taken |= matches!(request, Request::SetReceiveKey { .. });
            if message_type(&request) == Some(0x73) {
                player.commands.send(OperatorCommand::Stop).await.unwrap();
            }
            if request == Request::OwnStatus {
                connection.send(&Event::StatusEnd).unwrap();
            }
        }
        player.ended().await.unwrap();
        assert_eq!(taken, is_taken, "{unix}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn two_daemons_agree_on_keys_for_both_directions() {
    let stage = Stage::new();
    let players = [stage.daemon(1, ""), stage.daemon(2, "")];
    let mut ends = [stage.attach("cipcb0").await.0, stage.attach("cipcb1").await.0];
    let mut send: [Option<KeyOctets>; 2] = [None, None];
    let mut receive: [Option<KeyOctets>; 2] = [None, None];
    for end in &ends {
        end.send(&Event::KeyWanted { reason: Wanted::NoSendKey }).unwrap();
    }
    while send.iter().chain(&receive).any(Option::is_none) {
        let [first, second] = &mut ends;
        let (from, request) = tokio::select! {
            request = next(first) => (0, request),
            request = next(second) => (1, request),
        };
        match request {
            Request::SetSendKey { key } => send[from] = Some(key),
            Request::SetReceiveKey { key, .. } => receive[from] = Some(key),
            Request::SendControl { payload, .. } => {
                let from_address = "192.0.2.9:6789".parse().unwrap();
                let event = Event::Control { payload, from: from_address, under_static: true, sealed: false };
                ends[1 - from].send(&event).unwrap();
            }
            _ => {}
        }
    }
    assert!(send[0] == receive[1] && send[1] == receive[0] && send[0] != send[1]);
    drop(ends);
    for player in players {
        player.commands.send(OperatorCommand::Stop).await.unwrap();
        player.ended().await.unwrap();
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_stop_says_good_bye_runs_ip_down_and_closes() {
    let stage = Stage::new();
    let out = stage.path("out");
    let script = stage.script("ip-down", &format!("#!/bin/sh\necho \"$1 $2 $CIPE_PEER $6\" >{}\n", out.display()));
    let player = stage.daemon(1, &format!("ipdown {}\narg a b", script.display()));
    let (mut connection, _) = stage.attach("cipcb0").await;
    let peer = "198.51.100.7:1234".parse().unwrap();
    connection.send(&Event::NewPeer { peer }).unwrap();
    introduce(&connection);
    assert!(matches!(next(&mut connection).await, Request::SetSendLimits { .. }));
    // The daemon handles this event after the previous one.
    let ping = MessageOctets::from(&[0x72; 60][..]);
    connection.send(&Event::Control { payload: ping, from: peer, under_static: false, sealed: false }).unwrap();
    assert_eq!(message_type(&next(&mut connection).await), Some(0x73));
    player.commands.send(OperatorCommand::Stop).await.unwrap();
    assert_eq!(message_type(&next(&mut connection).await), Some(0x74));
    assert_eq!(next(&mut connection).await, Request::OwnStatus);
    connection.send(&Event::StatusEnd).unwrap();
    assert_eq!(next(&mut connection).await, Request::Detach);
    assert!(connection.receive().await.unwrap().is_none());
    player.ended().await.unwrap();
    assert_eq!(std::fs::read_to_string(out).unwrap(), "cipcb0 192.0.2.1:40000 198.51.100.7:1234 a b\n");
}

#[tokio::test(flavor = "current_thread")]
async fn ip_up_runs_before_the_tunnel_is_called_up_and_beside_the_key_exchange() {
    let stage = Stage::new();
    let (fifo, out) = (stage.path("fifo"), stage.path("out"));
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    // Waits until the test writes, like a script that pings the peer and has to wait for keys.
    let text = format!("#!/bin/sh\nread word <{}\necho \"$# $3 $word\" >{}\n", fifo.display(), out.display());
    let script = stage.script("ip-up", &text);
    let mut player = stage.daemon(1, &format!("ipup {}", script.display()));
    let (mut connection, _) = stage.attach("cipcb0").await;
    connection.send(&Event::KeyWanted { reason: Wanted::NoSendKey }).unwrap();
    while message_type(&next(&mut connection).await) != Some(2) {}
    assert!(player.up.try_recv().is_err(), "up before ip-up has ended");
    tokio::task::spawn_blocking(move || std::fs::write(fifo, "go\n").unwrap()).await.unwrap();
    (&mut player.up).await.unwrap();
    assert_eq!(std::fs::read_to_string(out).unwrap(), format!("6 {} go\n", process::id()));
    player.commands.send(OperatorCommand::Stop).await.unwrap();
    player.ended().await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_dead_engine_is_met_again_with_the_same_interface_port_and_peer() {
    let mut stage = Stage::new();
    let player = stage.daemon(1, "");
    let (mut connection, first) = stage.attach("cipcb3").await;
    assert_eq!((first.device, first.me.port()), (None, 0));
    let peer = "198.51.100.7:1234".parse().unwrap();
    connection.send(&Event::NewPeer { peer }).unwrap();
    let ping = MessageOctets::from(&[0x72; 60][..]);
    connection.send(&Event::Control { payload: ping, from: peer, under_static: false, sealed: false }).unwrap();
    next(&mut connection).await;
    drop(connection);
    stage.server = None;
    stage.start_engine();
    let (mut connection, second) = stage.attach("cipcb3").await;
    assert_eq!(second.device.as_deref(), Some("cipcb3"));
    assert_eq!((second.me.port(), second.peer), (40000, peer));
    connection.send(&Event::KeyWanted { reason: Wanted::NoSendKey }).unwrap();
    assert!(message_type(&next(&mut connection).await).is_some());
    player.commands.send(OperatorCommand::Stop).await.unwrap();
    player.ended().await.unwrap();
}

/// Engines that write no ledger come and go, as after a downgrade and an upgrade: what was written before them is out of date.
#[tokio::test(flavor = "current_thread")]
async fn a_ledger_that_an_engine_did_not_go_on_with_is_forgotten() {
    let mut stage = Stage::new();
    let player = stage.daemon(1, "");
    let memory = || Descriptor(Arc::new(std::fs::File::open("/dev/null").unwrap().into()));
    let engines = [(false, Some(memory())), (true, None), (false, None), (false, Some(memory())), (true, None)];
    let expected = [false, true, true, false, true];
    for (engine, has_ledger) in engines.into_iter().zip(expected) {
        let (connection, request) = stage.attach_with("cipcb0", engine).await;
        assert_eq!(request.ledger.is_some(), has_ledger);
        drop(connection);
        stage.server = None;
        stage.start_engine();
    }
    player.commands.send(OperatorCommand::Stop).await.unwrap();
    player.ended().await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_daemon_without_an_engine_can_be_stopped() {
    let mut stage = Stage::new();
    let player = stage.daemon(1, "");
    let (connection, _) = stage.attach("cipcb0").await;
    stage.server = None;
    drop(connection);
    player.commands.send(OperatorCommand::Stop).await.unwrap();
    player.ended().await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn an_interface_taken_down_ends_the_daemon_without_error() {
    let stage = Stage::new();
    let player = stage.daemon(1, "");
    let (mut connection, _) = stage.attach("cipcb0").await;
    introduce(&connection);
    assert!(matches!(next(&mut connection).await, Request::SetSendLimits { .. }));
    connection.send(&Event::DeviceDown).unwrap();
    let Request::SendControl { payload, .. } = next(&mut connection).await else { panic!("no message") };
    let farewell = payload;
    assert!(farewell.starts_with(b"\x74the interface was taken down\0"));
    player.ended().await.unwrap();
}

/// An original would exit for good.
#[tokio::test(flavor = "current_thread")]
async fn a_peer_that_is_not_known_to_be_ours_gets_no_ct_kill() {
    let stage = Stage::new();
    let player = stage.daemon(1, "");
    let (mut connection, _) = stage.attach("cipcb0").await;
    connection.send(&Event::KeyWanted { reason: Wanted::NoSendKey }).unwrap();
    while message_type(&next(&mut connection).await) != Some(0x70) {}
    player.commands.send(OperatorCommand::Stop).await.unwrap();
    assert_eq!(next(&mut connection).await, Request::OwnStatus);
    connection.send(&Event::StatusEnd).unwrap();
    assert_eq!(next(&mut connection).await, Request::Detach);
    assert!(connection.receive().await.unwrap().is_none());
    player.ended().await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn too_many_network_errors_end_the_daemon_of_a_peer_that_does_not_answer() {
    let stage = Stage::new();
    let player = stage.daemon(1, "maxerr 2");
    let (connection, _) = stage.attach("cipcb0").await;
    for _ in 0..3 {
        connection
            .send(&Event::NetworkError { message: "192.0.2.99: port unreachable".to_owned(), heard: false })
            .unwrap();
    }
    let error = player.ended().await.unwrap_err().to_string();
    assert!(error.contains("cipcb0: no answer from the peer; 3 network errors") && error.contains("maxerr"), "{error}");
}

#[tokio::test(flavor = "current_thread")]
async fn the_engine_s_refusal_is_the_daemon_s_error() {
    let stage = Stage::new();
    let player = stage.daemon(1, "");
    let mut connection = stage.accept().await;
    assert!(matches!(next(&mut connection).await, Request::Attach(_)));
    let message = "UDP port 6789 is taken; 192.0.2.1; choose another with `me`".to_owned();
    connection.send(&Event::Failed { message: message.clone() }).unwrap();
    assert_eq!(player.ended().await.unwrap_err().to_string(), message);
}

#[tokio::test(flavor = "current_thread")]
async fn options_that_cannot_be_read_again_change_nothing() {
    let stage = Stage::new();
    let player = stage.daemon(1, "");
    let (mut connection, _) = stage.attach("cipcb0").await;
    // The sources of the daemon under test have no options at all, so a reload finds errors.
    player.commands.send(OperatorCommand::Reload).await.unwrap();
    let peer = "192.0.2.99:6789".parse().unwrap();
    let ping = MessageOctets::from(&[0x72; 60][..]);
    connection.send(&Event::Control { payload: ping, from: peer, under_static: false, sealed: false }).unwrap();
    assert_eq!(message_type(&next(&mut connection).await), Some(0x73));
    player.commands.send(OperatorCommand::Stop).await.unwrap();
    player.ended().await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_stop_during_ip_up_ends_it_before_ip_down_begins() {
    let stage = Stage::new();
    let (fifo, pid, out) = (stage.path("fifo"), stage.path("pid"), stage.path("out"));
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let text = format!("#!/bin/sh\necho $$ >{}\necho up >{}\nexec sleep 600\n", pid.display(), fifo.display());
    let ip_up = stage.script("ip-up", &text);
    let text = format!(
        "#!/bin/sh\nkill -0 $(cat {}) && echo beside >{out} || echo after >{out}\n",
        pid.display(),
        out = out.display()
    );
    let ip_down = stage.script("ip-down", &text);
    let player = stage.daemon(1, &format!("ipup {}\nipdown {}", ip_up.display(), ip_down.display()));
    let (connection, _) = stage.attach("cipcb0").await;
    tokio::task::spawn_blocking(move || std::fs::read(fifo).unwrap()).await.unwrap();
    player.commands.send(OperatorCommand::Stop).await.unwrap();
    player.ended().await.unwrap();
    drop(connection);
    assert_eq!(std::fs::read_to_string(out).unwrap(), "after\n");
}

#[tokio::test(flavor = "current_thread")]
async fn ip_down_gets_each_option_with_the_values_that_a_reload_has_set() {
    let stage = Stage::new();
    let out = stage.path("out");
    let text = format!("#!/bin/sh\necho \"$arg $ping $tokey $device $me [$key]\" >{}\n", out.display());
    let script = stage.script("ip-down", &text);
    let file = stage.path("options");
    let write = |text: &str| {
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
    };
    let extra = |arg: &str| format!("tokey 60\narg {arg}\nping 5\nipdown {}\n", script.display());
    write(&options_text(1, &extra("one")));
    let player = stage.daemon_of(1, &extra("one"), vec![file.clone()]);
    let (mut connection, _) = stage.attach("cipcb0").await;
    let peer = "192.0.2.99:6789".parse().unwrap();
    for arg in ["two", "three"] {
        write(&options_text(1, &extra(arg)));
        player.commands.send(OperatorCommand::Reload).await.unwrap();
        // The daemon handles this event after the reload.
        let ping = MessageOctets::from(&[0x72; 60][..]);
        connection.send(&Event::Control { payload: ping, from: peer, under_static: false, sealed: false }).unwrap();
        assert_eq!(message_type(&next(&mut connection).await), Some(0x73));
    }
    player.commands.send(OperatorCommand::Stop).await.unwrap();
    while next(&mut connection).await != Request::OwnStatus {}
    connection.send(&Event::StatusEnd).unwrap();
    player.ended().await.unwrap();
    assert_eq!(std::fs::read_to_string(out).unwrap(), "three 5 60 cipcb0 192.0.2.1:40000 []\n");
}

/// The requests up to the end of a connection; the engine answers the one for statistics.
async fn last_requests(connection: &mut Connection) -> Vec<Request> {
    let mut all = Vec::new();
    while let Some(request) = connection.receive().await.unwrap() {
        if request == Request::OwnStatus {
            connection.send(&Event::StatusEnd).unwrap();
        }
        all.push(request);
    }
    all
}

#[tokio::test(flavor = "current_thread")]
async fn only_an_end_that_was_asked_for_takes_the_tunnel_along() {
    let stage = Stage::new();
    for (guard, event, detaches) in [
        ("yes", None, true),
        ("always", None, true),
        ("yes", Some(Event::Stop), true),
        ("yes", Some(Event::DeviceDown), false),
        ("always", Some(Event::DeviceDown), false),
    ] {
        let player = stage.daemon(1, &format!("guard {guard}"));
        let (mut connection, attach) = stage.attach("cipcb0").await;
        assert!(attach.stays);
        match &event {
            Some(event) => connection.send(event).unwrap(),
            None => player.commands.send(OperatorCommand::Stop).await.unwrap(),
        }
        let requests = last_requests(&mut connection).await;
        player.ended().await.unwrap();
        assert_eq!(requests.last() == Some(&Request::Detach), detaches, "{guard}, {event:?}: {requests:?}");
        assert!(detaches || !requests.contains(&Request::Detach), "{guard}, {event:?}");
    }
    let player = stage.daemon(1, "guard no");
    let (connection, attach) = stage.attach("cipcb0").await;
    assert!(!attach.stays);
    drop(connection);
    player.commands.send(OperatorCommand::Stop).await.unwrap();
    player.ended().await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_tunnel_whose_hub_has_gone_starts_over_under_the_same_name() {
    let stage = Stage::new();
    let player = stage.daemon(1, "");
    let (mut connection, first) = stage.attach("cipcb7").await;
    assert_eq!((first.device, first.name.as_str()), (None, ""));
    connection.send(&Event::DeviceLost).unwrap();
    assert!(last_requests(&mut connection).await.contains(&Request::Detach), "nothing of it is left to keep");
    // The engine may not have seen yet that the hub has gone.
    let mut refused = stage.accept().await;
    assert!(matches!(next(&mut refused).await, Request::Attach(_)));
    refused.send(&Event::Failed { message: "cipehub0: no such device".to_owned() }).unwrap();
    let (connection, again) = stage.attach("cipcb7").await;
    assert_eq!(again.device.as_deref(), Some("cipcb7"));
    drop(connection);
    player.commands.send(OperatorCommand::Stop).await.unwrap();
    player.ended().await.unwrap();
}
