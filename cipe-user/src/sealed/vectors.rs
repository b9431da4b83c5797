//! The vectors of the second implementation, tests/vectors/sealed-*.json.

use std::convert::Infallible;
use std::time::Duration;

use rand::{TryCryptoRng, TryRng};
use serde::Deserialize;

use super::cipher::{KEY, Key, Suite};
use super::gate::use_cookie;
use super::handshake::{Action, DirectionKey, Handshake, Input, Kept, Now, Profile, Source, Wanted};
use super::message::{COOKIE, Carries, FIRST, Retry};
use super::packet::{self, Content, Epoch, HEADROOM, Header, OVERHEAD};
use super::secrets::Secrets;

#[derive(Deserialize)]
struct File<T> {
    cases: Vec<T>,
}

#[derive(Clone, Copy, Deserialize, PartialEq)]
enum SuiteName {
    #[serde(rename = "aes-256-gcm")]
    Aes256Gcm,
    #[serde(rename = "chacha20-poly1305")]
    ChaCha20Poly1305,
}

impl SuiteName {
    fn suite(self) -> Suite {
        match self {
            Self::Aes256Gcm => Suite::Aes256Gcm,
            Self::ChaCha20Poly1305 => Suite::ChaCha20Poly1305,
        }
    }
}

#[derive(Deserialize)]
struct PacketCase {
    suite: SuiteName,
    #[serde(with = "hex::serde")]
    key: [u8; KEY],
    epoch: u8,
    counter: u64,
    r#type: u8,
    #[serde(with = "hex::serde")]
    payload: Vec<u8>,
    #[serde(with = "hex::serde")]
    datagram: Vec<u8>,
}

#[derive(Deserialize)]
struct EndCase {
    #[serde(with = "hex::serde")]
    id: [u8; 8],
    fast_aes: bool,
    epoch: u8,
    #[serde(with = "hex::serde")]
    ephemeral: [u8; KEY],
}

#[derive(Deserialize)]
struct RetryCase {
    #[serde(with = "hex::serde")]
    iv: [u8; 12],
    newest: u64,
    #[serde(with = "hex::serde")]
    cookie: [u8; COOKIE],
    #[serde(with = "hex::serde")]
    datagram: Vec<u8>,
}

#[derive(Deserialize)]
struct HandshakeCase {
    #[serde(with = "hex::serde")]
    static_key: [u8; 16],
    carries: u8,
    stamp: u64,
    initiator: EndCase,
    responder: EndCase,
    #[serde(with = "hex::serde")]
    psk: [u8; KEY],
    #[serde(with = "hex::serde")]
    first: Vec<u8>,
    #[serde(with = "hex::serde")]
    answer: Vec<u8>,
    suite: SuiteName,
    #[serde(with = "hex::serde")]
    key_of_initiator: [u8; KEY],
    #[serde(with = "hex::serde")]
    key_of_responder: [u8; KEY],
    retry: RetryCase,
    #[serde(with = "hex::serde")]
    first_with_cookie: Vec<u8>,
}

/// Gives these octets first, and zeros then.
struct Given(std::vec::IntoIter<u8>);

impl Given {
    fn octets(octets: &[u8]) -> Self {
        Self(Vec::from(octets).into_iter())
    }
}

impl TryRng for Given {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(0)
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(0)
    }

    fn try_fill_bytes(&mut self, octets: &mut [u8]) -> Result<(), Infallible> {
        octets.fill_with(|| self.0.next().unwrap_or_default());
        Ok(())
    }
}

impl TryCryptoRng for Given {}

#[test]
fn packets_are_those_of_the_second_implementation() {
    let file: File<PacketCase> =
        serde_json::from_str(include_str!("../../../tests/vectors/sealed-packets.json")).unwrap();
    assert_eq!(file.cases.len(), 60);
    for case in file.cases {
        let key = Key::new(case.suite.suite(), &case.key);
        let (epoch, content) =
            (Epoch::new(case.epoch).unwrap(), [Content::Data, Content::Control][usize::from(case.r#type)]);
        let n = case.payload.len();
        let mut buffer = vec![0; n + OVERHEAD];
        buffer[HEADROOM..HEADROOM + n].copy_from_slice(&case.payload);
        packet::seal(&key, epoch, case.counter, content, &mut buffer, n);
        assert_eq!(hex::encode(&buffer), hex::encode(&case.datagram));
        let Ok(Header::Packet(read, low)) = packet::parse(&buffer) else { panic!("not a packet") };
        assert_eq!((read, low.complete(case.counter.saturating_sub(1 << 28))), (epoch, case.counter));
        let (read, place) = packet::open(&key, case.counter, &mut buffer).unwrap();
        assert_eq!((read, &buffer[place]), (Ok(content), &case.payload[..]));
    }
}

fn end(case: &HandshakeCase, end: &EndCase) -> Handshake<Given> {
    let carries = if case.carries == 3 { Carries::Ip } else { Carries::Ethernet };
    let kept = Kept { id: u64::from_be_bytes(end.id), newest: 0, was_sealed: false };
    let profile = Profile { fast_aes: end.fast_aes, carries };
    Handshake::new(Secrets::new(&case.static_key), profile, kept, Given::octets(&end.ephemeral))
}

fn check(key: &DirectionKey, epoch: u8, case: &HandshakeCase, octets: &[u8; KEY]) {
    assert_eq!((key.epoch.number(), key.suite, &*key.octets), (epoch, case.suite.suite(), octets));
}

#[test]
fn handshakes_are_those_of_the_second_implementation() {
    let file: File<HandshakeCase> =
        serde_json::from_str(include_str!("../../../tests/vectors/sealed-handshakes.json")).unwrap();
    assert_eq!(file.cases.len(), 4);
    for case in &file.cases {
        let now = Now { at: Duration::ZERO, unix_nanos: case.stamp };
        let secrets = Secrets::new(&case.static_key);
        assert_eq!(*secrets.psk, case.psk);
        let (mut initiator, mut responder) = (end(case, &case.initiator), end(case, &case.responder));
        let [Action::Transmit(first, _)] = &initiator.handle(Input::Wanted(Wanted::Send), now)[..] else { panic!() };
        assert_eq!(hex::encode(first), hex::encode(&case.first));
        let answered = responder.handle(Input::Datagram(first, Source::Peer), now);
        let [Action::Keep(kept), Action::Receive(receive), Action::Transmit(answer, _)] = &answered[..] else {
            panic!()
        };
        assert_eq!((kept.newest, hex::encode(answer)), (case.stamp, hex::encode(&case.answer)));
        check(receive, case.responder.epoch, case, &case.key_of_initiator);
        let done = initiator.handle(Input::Datagram(answer, Source::Peer), now);
        let [Action::Receive(receive), Action::Send(send, _), Action::Confirm] = &done[..] else { panic!() };
        check(receive, case.initiator.epoch, case, &case.key_of_responder);
        check(send, case.responder.epoch, case, &case.key_of_initiator);

        let mut first: [u8; FIRST] = first[..].try_into().unwrap();
        let retry = Retry { newest: case.retry.newest, cookie: case.retry.cookie };
        let built = retry.build(&secrets, &first, &mut Given::octets(&case.retry.iv));
        assert_eq!(hex::encode(built), hex::encode(&case.retry.datagram));
        use_cookie(&mut first, &case.retry.cookie);
        assert_eq!(hex::encode(first), hex::encode(&case.first_with_cookie));
    }
}
