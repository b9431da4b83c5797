//! Sealed packets: what the daemon keeps on disk, and what it hands to an engine.

use super::*;
use crate::ciped::sealing::{Effect, Sealing};
use crate::control::protocol::{SealedEvent, SealedRequest, SealedWanted, Unsealed};

const FROM: &str = "192.0.2.99:6789";

/// The peer of the daemon under test.
fn peer() -> Sealing<Random> {
    let (mut draft, mut problems) = (Draft::new(Program::Cb), Vec::new());
    options::read_text(options_text(1, "sealed require").as_bytes(), Path::new("/x"), &mut draft, &mut problems);
    let options = options::settle(&draft, problems).0.unwrap();
    let rngs = (random().unwrap(), random().unwrap());
    Sealing::new(&options, None, None, rngs, Clock::new().now()).unwrap()
}

fn transmitted(effects: Vec<Effect>) -> MessageOctets {
    let datagram = effects.into_iter().find_map(|effect| match effect {
        Effect::Request(SealedRequest::Transmit { datagram, .. }) => Some(datagram),
        _ => None,
    });
    datagram.unwrap()
}

async fn next_sealed(connection: &mut Connection) -> SealedRequest {
    loop {
        if let Request::Sealed(request) = next(connection).await {
            return request;
        }
    }
}

fn send(connection: &Connection, event: SealedEvent) {
    connection.send(&Event::Sealed(event)).unwrap();
}

async fn stop(player: Player, mut connection: Connection) {
    player.commands.send(OperatorCommand::Stop).await.unwrap();
    last_requests(&mut connection).await;
    player.ended().await.unwrap();
}

/// The peer begins a handshake, and confirms it. The file is there before the answer is sent.
async fn handshake(stage: &Stage, connection: &mut Connection) {
    let (mut peer, clock) = (peer(), Clock::new());
    let datagram = transmitted(peer.unanswered(clock.now()));
    send(connection, SealedEvent::Handshake { datagram, from: FROM.parse().unwrap(), from_peer: true });
    let mut receives = None;
    let answer = loop {
        match next_sealed(connection).await {
            SealedRequest::Receive(key) => receives = Some(key),
            // Its clock is not after that of the daemon.
            SealedRequest::Transmit { datagram, to } => {
                assert_eq!(to, Some(FROM.parse().unwrap()));
                break datagram;
            }
            _ => {}
        }
    };
    let kept = stage.memory().unwrap().sealed.unwrap();
    assert!(kept.newest > 0 && !kept.was_sealed);
    assert_eq!(next_sealed(connection).await, SealedRequest::Judged { refused: None });
    let event = SealedEvent::Handshake { datagram: answer, from: FROM.parse().unwrap(), from_peer: true };
    assert!(
        peer.event(&event, clock.now())
            .iter()
            .any(|effect| matches!(effect, Effect::Request(SealedRequest::Send { .. })))
    );
    send(connection, SealedEvent::Opened { serial: receives.unwrap().serial });
    while !matches!(next_sealed(connection).await, SealedRequest::Send { .. }) {}
    while next_sealed(connection).await != SealedRequest::Confirm {}
    // The next event is handled after the file was written.
    send(connection, SealedEvent::Probed { serial: 1 });
    assert_eq!(next_sealed(connection).await, SealedRequest::Confirm);
    assert_eq!(stage.memory().unwrap().sealed.unwrap(), crate::sealed::handshake::Kept { was_sealed: true, ..kept });
}

impl Stage {
    fn memory(&self) -> Option<crate::ciped::memory::Memory> {
        self.memory_file().read().unwrap()
    }

    fn memory_file(&self) -> MemoryFile {
        MemoryFile::new(&self.directory.path().join("state"), OsStr::new("1.json"))
    }
}

#[tokio::test(flavor = "current_thread")]
async fn the_engine_is_told_what_sealed_says() {
    let stage = Stage::new();
    let none = Unsealed { sends: false, accepts: false };
    let both = Unsealed { sends: true, accepts: true };
    for (extra, expected, is_paced) in
        [("", Some(both), true), ("sealed require", Some(none), false), ("sealed no", None, true)]
    {
        let player = stage.daemon(1, extra);
        let (connection, attach) = stage.attach("cipcb0").await;
        assert_eq!(attach.sealed.as_ref().map(|sealed| sealed.unsealed), expected, "{extra}");
        assert!(attach.sealed.is_none_or(|sealed| sealed.resume.is_none()));
        assert_eq!(attach.paced, is_paced, "{extra}");
        stop(player, connection).await;
    }
}

#[tokio::test(flavor = "current_thread")]
async fn keys_are_for_the_next_engine_and_what_is_known_for_the_next_daemon() {
    let mut stage = Stage::new();
    let player = stage.daemon(1, "");
    let (mut connection, _) = stage.attach("cipcb0").await;
    handshake(&stage, &mut connection).await;
    drop(connection);
    stage.server = None;
    stage.start_engine();
    let (mut connection, attach) = stage.attach("cipcb0").await;
    let sealed = attach.sealed.unwrap();
    assert!(!sealed.unsealed.sends);
    let keys = sealed.resume.unwrap();
    let (send_key, renew_ms) = keys.send.unwrap();
    assert_eq!((send_key.serial, keys.receive.len()), (1, 1));
    assert!((100_000..=135_000).contains(&renew_ms), "{renew_ms}");
    // This engine cannot go on under them.
    send(&connection, SealedEvent::KeysLost);
    let lost = [next_sealed(&mut connection).await, next_sealed(&mut connection).await];
    assert_eq!(lost, [SealedRequest::Forget { serial: 1 }, SealedRequest::StopSending]);
    stop(player, connection).await;
    let player = stage.daemon(1, "");
    let (connection, attach) = stage.attach("cipcb0").await;
    let sealed = attach.sealed.unwrap();
    assert_eq!((sealed.unsealed.sends, sealed.unsealed.accepts, sealed.resume), (false, false, None));
    stop(player, connection).await;
    // What is known outlives a time without sealed packets.
    let kept = stage.memory().unwrap().sealed;
    let player = stage.daemon(1, "sealed no");
    let (connection, _) = stage.attach("cipcb0").await;
    introduce(&connection);
    stop(player, connection).await;
    let memory = stage.memory().unwrap();
    assert_eq!((memory.sealed, memory.is_ours), (kept, true));
}

/// It may have said that the peer was sealed.
#[tokio::test(flavor = "current_thread")]
async fn a_damaged_file_is_of_a_peer_that_was_sealed_until_it_is_forgotten() {
    let stage = Stage::new();
    let file = stage.memory_file();
    std::fs::create_dir(file.path().parent().unwrap()).unwrap();
    std::fs::write(file.path(), "").unwrap();
    let player = stage.daemon(1, "");
    let (mut connection, attach) = stage.attach("cipcb0").await;
    assert_eq!(attach.sealed.unwrap().unsealed, Unsealed { sends: false, accepts: false });
    assert!(file.forget().unwrap());
    send(&connection, SealedEvent::Wanted { reason: SealedWanted::Send });
    while next_sealed(&mut connection).await != SealedRequest::Unsealed(Unsealed { sends: true, accepts: true }) {}
    stop(player, connection).await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_removed_file_makes_a_running_daemon_forget_its_peer() {
    let stage = Stage::new();
    let player = stage.daemon(1, "");
    let (mut connection, _) = stage.attach("cipcb0").await;
    handshake(&stage, &mut connection).await;
    stop(player, connection).await;
    let player = stage.daemon(1, "");
    let (mut connection, _) = stage.attach("cipcb0").await;
    assert!(stage.memory_file().forget().unwrap());
    send(&connection, SealedEvent::Wanted { reason: SealedWanted::Send });
    while next_sealed(&mut connection).await != SealedRequest::Unsealed(Unsealed { sends: true, accepts: true }) {}
    stop(player, connection).await;
    assert!(stage.memory().is_none_or(|memory| memory.sealed.is_none()));
}
