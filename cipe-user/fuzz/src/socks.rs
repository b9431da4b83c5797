//! A SOCKS5 server that answers anything: the request for a relay ends in an address or in an error, and no error shows the
//! password.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use cipe_user::ciped::socks::{Credentials, request_relay};

const PASSWORD: &str = "an-unlikely-password";

/// Runs one input: the first octet says whether there is a password, the rest is what the server sends before it closes.
pub fn run(input: &[u8]) {
    let Some((first, answers)) = input.split_first() else { return };
    let credentials = Credentials::new(b"user".to_vec(), PASSWORD.as_bytes().to_vec());
    let credentials = credentials.filter(|_| first % 2 == 1);
    let mut server = tokio::io::join(answers, tokio::io::sink());
    let request = pin!(request_relay(&mut server, credentials.as_ref()));
    // Neither end ever waits.
    match request.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Ok(relay)) => assert_ne!(relay.port(), 0),
        Poll::Ready(Err(error)) => assert!(!error.contains(PASSWORD) && !error.is_empty()),
        Poll::Pending => panic!("it waits for a server that has closed the connection"),
    }
}
