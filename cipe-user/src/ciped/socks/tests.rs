use std::net::Ipv4Addr;

use tokio::io::{AsyncWriteExt, DuplexStream, duplex};
use tokio::net::TcpListener;

use super::handshake::request_relay;
use super::*;

/// The octets that the client must send, and the server's answer.
type Turn<'a> = (&'a [u8], &'a [u8]);

/// Acts as a server: reads as many octets as the client must send, then answers.
async fn play(mut server: DuplexStream, turns: &[Turn<'_>]) -> DuplexStream {
    for (said, answer) in turns {
        let mut got = vec![0; said.len()];
        server.read_exact(&mut got).await.unwrap();
        assert_eq!(got, *said);
        server.write_all(answer).await.unwrap();
    }
    server
}

async fn against(turns: &[Turn<'_>], credentials: Option<&Credentials>) -> Result<SocketAddr, String> {
    let (mut client, server) = duplex(1024);
    let (outcome, _server) = tokio::join!(request_relay(&mut client, credentials), play(server, turns));
    outcome
}

fn credentials() -> Credentials {
    Credentials::new(b"user".to_vec(), b"secret".to_vec()).unwrap()
}

const HELLO: &[u8] = &[5, 1, 0];
const HELLO_WITH_PASSWORD: &[u8] = &[5, 2, 0, 2];
const ASSOCIATE: &[u8] = &[5, 3, 0, 1, 0, 0, 0, 0, 0, 0];
const RELAY: &[u8] = &[5, 0, 0, 1, 192, 0, 2, 9, 0x1F, 0x90];

#[tokio::test(flavor = "current_thread")]
async fn a_relay_is_given_with_and_without_password() {
    let relay: SocketAddr = "192.0.2.9:8080".parse().unwrap();
    assert_eq!(against(&[(HELLO, &[5, 0]), (ASSOCIATE, RELAY)], None).await, Ok(relay));
    let log_in: &[u8] = b"\x01\x04user\x06secret";
    let turns = [(HELLO_WITH_PASSWORD, &[5, 2][..]), (log_in, &[1, 0]), (ASSOCIATE, RELAY)];
    assert_eq!(against(&turns, Some(&credentials())).await, Ok(relay));
    // A server that needs no password although one was offered.
    assert_eq!(against(&[(HELLO_WITH_PASSWORD, &[5, 0]), (ASSOCIATE, RELAY)], Some(&credentials())).await, Ok(relay));
    let six = [&[5, 0, 0, 4][..], &[0; 15], &[1, 0, 9]].concat();
    assert_eq!(against(&[(HELLO, &[5, 0]), (ASSOCIATE, &six)], None).await, Ok("[::1]:9".parse().unwrap()));
}

#[tokio::test(flavor = "current_thread")]
async fn what_a_server_refuses_is_said() {
    let cases: [(&[Turn<'_>], Option<&Credentials>, &str); 9] = [
        (&[(HELLO, &[5, 0xFF])], None, "SOCKS5_USER"),
        (&[(HELLO, &[5, 2])], None, "SOCKS5_USER"),
        (&[(HELLO, &[4, 0])], None, "is it a SOCKS5 server"),
        (&[(HELLO, b"HT")], None, "is it a SOCKS5 server"),
        (&[(HELLO_WITH_PASSWORD, &[5, 0xFF])], Some(&credentials()), "neither"),
        (&[(HELLO_WITH_PASSWORD, &[5, 2]), (b"\x01\x04user\x06secret", &[1, 1])], Some(&credentials()), "refuses"),
        (&[(HELLO, &[5, 0]), (ASSOCIATE, &[5, 7, 0, 1, 0, 0, 0, 0, 0, 0])], None, "no UDP ASSOCIATE"),
        (&[(HELLO, &[5, 0]), (ASSOCIATE, &[5, 0, 0, 3, 1, b'a', 0, 9])], None, "by name"),
        (&[(HELLO, &[5, 0]), (ASSOCIATE, &[5, 0, 0, 1, 1, 2, 3, 4, 0, 0])], None, "port 0"),
    ];
    for (turns, credentials, expected) in cases {
        let error = against(turns, credentials).await.unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_server_that_hangs_up_is_no_relay() {
    for octets in 0..RELAY.len() {
        let (mut client, mut server) = duplex(1024);
        let play = async {
            server.write_all(&[&[5, 0], &RELAY[..octets]].concat()).await.unwrap();
            drop(server);
        };
        let (outcome, ()) = tokio::join!(request_relay(&mut client, None), play);
        assert!(outcome.is_err());
    }
}

#[test]
fn user_and_password_have_255_octets_at_most_and_are_not_shown() {
    assert!(Credentials::new(Vec::new(), b"x".to_vec()).is_none());
    assert!(Credentials::new(vec![b'x'; 256], b"x".to_vec()).is_none());
    assert!(Credentials::new(vec![b'x'; 255], vec![b'x'; 255]).is_some());
    assert_eq!(format!("{:?}", credentials()), "Credentials(..)");
}

#[tokio::test(flavor = "current_thread")]
async fn a_relay_that_ends_is_told_and_asked_for_again() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let name = EndpointName { host: "127.0.0.1".to_owned(), port: port.to_string() };
    let mut relay = Relay::follow(name, None, 0);
    for number in [1_u8, 2] {
        let (mut server, _) = listener.accept().await.unwrap();
        let mut hello = [0; 3];
        server.read_exact(&mut hello).await.unwrap();
        server.write_all(&[5, 0]).await.unwrap();
        let mut wish = [0; 10];
        server.read_exact(&mut wish).await.unwrap();
        // Without an address: it means the server's own address.
        server.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, number]).await.unwrap();
        let News::Relay(at) = relay.news().await else { panic!("no relay") };
        assert_eq!(at, SocketAddr::from((Ipv4Addr::LOCALHOST, number.into())));
        drop(server);
        let News::Lost(error) = relay.news().await else { panic!("still there") };
        assert!(error.to_string().contains(&format!("127.0.0.1:{port}: it has closed")), "{error}");
    }
}
