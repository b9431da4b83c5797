//! The path through a SOCKS5 server: its UDP ASSOCIATE, kept as long as the tunnel.
//!
//! The daemon holds the TCP connection to the server, since names and passwords belong to the daemon; it sends the
//! relay's address to the engine ([`crate::control::protocol::Request::SetRelay`]). The relay ends with the connection
//! (RFC 1928, section 6): this counts as a network error, and the daemon requests another relay, with growing pauses.

mod handshake;

use std::net::SocketAddr;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt::Mark};
use rustix::net::sockopt;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;

use super::options::{self, EndpointName};
use crate::kernel::zone;

pub use handshake::{Credentials, SocksError, request_relay};

/// How long the server may take to give a relay.
const RELAY_DEADLINE: Duration = Duration::from_secs(10);
/// The first pause before another relay is requested; it doubles each time.
const MIN_BACK_OFF: Duration = Duration::from_millis(500);
/// The longest such pause.
const MAX_BACK_OFF: Duration = Duration::from_secs(30);

/// A change of the relay.
#[derive(Debug)]
pub enum News {
    /// The server relays datagrams at this address from now on.
    Relay(SocketAddr),
    /// There is no relay any more, or not yet.
    Lost(SocksError),
}

/// A relay that is requested again whenever it is lost. Dropping it closes the connection.
#[derive(Debug)]
pub struct Relay {
    news: mpsc::Receiver<News>,
    task: tokio::task::JoinHandle<()>,
}

impl Relay {
    /// Requests a relay from `server`, on connections with this mark (SO_MARK); 0: none.
    pub fn follow(server: EndpointName, credentials: Option<Credentials>, mark: u32) -> Self {
        let (tell, news) = mpsc::channel(1);
        Self { news, task: tokio::spawn(follow(server, credentials, mark, tell)) }
    }

    /// Waits for a change. Cancel safe.
    pub async fn news(&mut self) -> News {
        match self.news.recv().await {
            Some(news) => news,
            // The task never ends by itself.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn follow(server: EndpointName, credentials: Option<Credentials>, mark: u32, tell: mpsc::Sender<News>) {
    let mut back_off = MIN_BACK_OFF;
    loop {
        let lost = match associate(&server, credentials.as_ref(), mark).await {
            Ok((connection, relay)) => {
                back_off = MIN_BACK_OFF;
                if tell.send(News::Relay(relay)).await.is_err() {
                    return;
                }
                SocksError::new(&server, end_of(connection).await)
            }
            Err(error) => error,
        };
        if tell.send(News::Lost(lost)).await.is_err() {
            return;
        }
        tokio::time::sleep(back_off).await;
        back_off = (back_off * 2).min(MAX_BACK_OFF);
    }
}

/// Connects and requests a relay. The name is looked up each time: the server may have a new address.
async fn associate(
    server: &EndpointName,
    credentials: Option<&Credentials>,
    mark: u32,
) -> Result<(TcpStream, SocketAddr), SocksError> {
    let attempt = async {
        let name = server.clone();
        let address = tokio::task::spawn_blocking(move || options::address_of(&name, None)).await;
        let address = address.map_err(|error| error.to_string())?.map_err(|mistake| mistake.what)?;
        let mut connection = connect(address, mark).await.map_err(|error| error.to_string())?;
        keep_alive(&connection).map_err(|error| error.to_string())?;
        let relay = request_relay(&mut connection, credentials).await?;
        // A server that does not know its own address gives none.
        let ip = if relay.ip().is_unspecified() { address.ip() } else { relay.ip() };
        Ok((connection, zone::socket_address(ip, relay.port(), zone::of(address).unwrap_or_default())))
    };
    let outcome = tokio::time::timeout(RELAY_DEADLINE, attempt).await;
    let late = || Err(format!("no relay after {} s", RELAY_DEADLINE.as_secs()));
    outcome.unwrap_or_else(|_late| late()).map_err(|what| SocksError::new(server, what))
}

async fn connect(address: SocketAddr, mark: u32) -> std::io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if mark != 0 {
        setsockopt(&socket, Mark, &mark)?;
    }
    socket.connect(address).await
}

/// A server that has disappeared must be noticed, although nothing is ever sent on the connection.
fn keep_alive(connection: &TcpStream) -> std::io::Result<()> {
    let (idle, interval) = (Duration::from_secs(20), Duration::from_secs(5));
    sockopt::set_socket_keepalive(connection, true)?;
    sockopt::set_tcp_keepidle(connection, idle)?;
    sockopt::set_tcp_keepintvl(connection, interval)?;
    sockopt::set_tcp_keepcnt(connection, 4)?;
    Ok(())
}

/// Waits for the end of the connection and returns its cause.
async fn end_of(mut connection: TcpStream) -> String {
    let mut word = [0; 64];
    loop {
        match connection.read(&mut word).await {
            Ok(0) => return "it has closed the connection".to_owned(),
            // A server sends nothing more; ignore it if it does.
            Ok(_) => {}
            Err(error) => return error.to_string(),
        }
    }
}

#[cfg(test)]
mod tests;
