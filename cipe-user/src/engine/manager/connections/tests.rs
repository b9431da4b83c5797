use tokio::sync::mpsc;

use super::{ConnectionEvent, Daemons, MAX_QUEUED_EVENTS, converse, report};
use crate::control::protocol::{Cipher, Event, Protocol, Request, Status};
use crate::control::run_dir::RunDir;
use crate::control::server::Server;

#[tokio::test(flavor = "current_thread")]
async fn a_status_of_any_number_of_tunnels_arrives_whole() {
    const TUNNELS: usize = 5 * MAX_QUEUED_EVENTS;
    let directory = tempfile::tempdir().unwrap();
    let run_dir = RunDir::new(directory.path(), 1);
    let server = Server::bind(run_dir.clone()).unwrap();
    let mut client = crate::control::client::Client::connect(&run_dir).unwrap();
    let connection = server.accept().await.unwrap();
    let (sender, events) = mpsc::channel(MAX_QUEUED_EVENTS);
    let (to_manager, _said) = mpsc::channel(1);
    tokio::spawn(converse(1, connection, events, Default::default(), to_manager));
    let status = |number| Status {
        name: String::new(),
        orphaned_seconds: None,
        device: format!("cipcb{number}"),
        protocol: Protocol::Ip,
        cipher: Cipher::Blowfish,
        me: "192.0.2.1:6789".parse().unwrap(),
        peer: None,
        keys: vec!["static".to_owned()],
        key_seconds: Default::default(),
        sealed: None,
        verdicts: std::collections::BTreeMap::from([("sent".to_owned(), 1)]),
        octets: (1, 2),
        doors: vec!["x".repeat(200)],
        lacks: Vec::new(),
        workers: Vec::new(),
    };
    let all = (0..TUNNELS).map(status).collect();
    tokio::spawn(report(sender, all));
    // A slow reader: everything that can wait somewhere does.
    for _ in 0..10_000 {
        tokio::task::yield_now().await;
    }
    for number in 0..TUNNELS {
        let Some(Event::Status(got)) = client.receive().await.unwrap() else { panic!("no status {number}") };
        assert_eq!(got.device, format!("cipcb{number}"));
    }
    assert!(matches!(client.receive().await.unwrap(), Some(Event::StatusEnd)));
}

/// A daemon whose interface has gone says farewell to the peer and goes, whatever the engine has to tell it meanwhile.
#[tokio::test(flavor = "current_thread")]
async fn what_a_daemon_said_before_it_went_is_heard() {
    let directory = tempfile::tempdir().unwrap();
    let run_dir = RunDir::new(directory.path(), 1);
    let server = Server::bind(run_dir.clone()).unwrap();
    // Which of the two is looked at first is left to chance.
    let told = [Event::DeviceDown, Event::StatusEnd];
    for event in told.iter().cycle().take(100) {
        let client = crate::control::client::Client::connect(&run_dir).unwrap();
        let connection = server.accept().await.unwrap();
        let (sender, events) = mpsc::channel(MAX_QUEUED_EVENTS);
        let (to_manager, mut said) = mpsc::channel(4);
        for _ in 0..2 {
            sender.send(event.clone()).await.unwrap();
        }
        let farewell = Request::SendControl { payload: [0x71][..].into(), under: Default::default(), announces: false };
        client.send(&farewell).unwrap();
        drop(client);
        tokio::spawn(converse(1, connection, events, Default::default(), to_manager));
        assert!(matches!(said.recv().await, Some(ConnectionEvent::Request(1, Request::SendControl { .. }))));
        assert!(matches!(said.recv().await, Some(ConnectionEvent::Closed(1))));
    }
}

/// A daemon that does not read would wait for ever for what it was told once.
#[tokio::test(flavor = "current_thread")]
async fn a_connection_that_loses_what_does_not_come_again_is_closed() {
    let directory = tempfile::tempdir().unwrap();
    let run_dir = RunDir::new(directory.path(), 1);
    let server = Server::bind(run_dir.clone()).unwrap();
    let _client = crate::control::client::Client::connect(&run_dir).unwrap();
    let (to_manager, mut said) = mpsc::channel(4);
    let mut daemons = Daemons::new(to_manager);
    daemons.add(server.accept().await.unwrap());
    daemons.assign(1, 7);
    // Its task has no turn meanwhile.
    (0..=MAX_QUEUED_EVENTS).for_each(|_| daemons.news(7, "what comes again".to_owned()));
    daemons.tell(7, Event::DeviceDown);
    assert!(matches!(said.recv().await, Some(ConnectionEvent::Closed(1))));
    assert_eq!(daemons.remove(1), Some((7, false)));
}

/// The manager may have the attaches of thousands of tunnels before it.
#[tokio::test(flavor = "current_thread")]
async fn a_beat_is_answered_while_a_request_waits_for_the_manager() {
    let directory = tempfile::tempdir().unwrap();
    let run_dir = RunDir::new(directory.path(), 1);
    let server = Server::bind(run_dir.clone()).unwrap();
    let mut client = crate::control::client::Client::connect(&run_dir).unwrap();
    let connection = server.accept().await.unwrap();
    let (_sender, events) = mpsc::channel(MAX_QUEUED_EVENTS);
    let (to_manager, mut said) = mpsc::channel(1);
    to_manager.send(ConnectionEvent::Closed(0)).await.unwrap();
    tokio::spawn(converse(1, connection, events, Default::default(), to_manager));
    for request in [Request::Status, Request::DropSendKey, Request::Beat] {
        client.send(&request).unwrap();
    }
    assert!(matches!(client.receive().await.unwrap(), Some(Event::Beat)));
    drop(client);
    assert!(matches!(said.recv().await, Some(ConnectionEvent::Closed(0))));
    assert!(matches!(said.recv().await, Some(ConnectionEvent::Request(1, Request::Status))));
    assert!(matches!(said.recv().await, Some(ConnectionEvent::Request(1, Request::DropSendKey))));
    assert!(matches!(said.recv().await, Some(ConnectionEvent::Closed(1))));
}
