//! The messages of SOCKS5 (RFC 1928) that a UDP relay needs, and the password (RFC 1929).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::ciped::options::EndpointName;

const VERSION: u8 = 5;
/// Version of the password's sub-negotiation.
const PASSWORD_VERSION: u8 = 1;
const NO_AUTHENTICATION: u8 = 0;
const PASSWORD: u8 = 2;
const NO_METHOD: u8 = 0xFF;
const UDP_ASSOCIATE: u8 = 3;
const ADDRESS_IPV4: u8 = 1;
const ADDRESS_NAME: u8 = 3;
const ADDRESS_IPV6: u8 = 4;

/// What the server refused, and how to fix it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("SOCKS5 server {server}: {what}")]
pub struct SocksError {
    server: String,
    what: String,
}

impl SocksError {
    pub(super) fn new(server: &EndpointName, what: String) -> Self {
        Self { server: server.to_string(), what }
    }
}

/// User and password; never in Debug output.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Credentials {
    user: Vec<u8>,
    password: Vec<u8>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credentials(..)")
    }
}

impl Credentials {
    /// Makes credentials of 1 to 255 octets each (RFC 1929); `None` for other lengths.
    pub fn new(user: Vec<u8>, password: Vec<u8>) -> Option<Self> {
        let fits = |text: &[u8]| (1..=255).contains(&text.len());
        (fits(&user) && fits(&password)).then_some(Self { user, password })
    }

    /// Reads SOCKS5_USER and SOCKS5_PASSWD (protocol section 4), if both are set.
    ///
    /// # Errors
    /// One is set without the other, or is empty or too long.
    pub fn of_environment() -> Result<Option<Self>, String> {
        use std::os::unix::ffi::OsStringExt;
        let variable = |name| std::env::var_os(name).map(OsStringExt::into_vec);
        let rule = "SOCKS5_USER and SOCKS5_PASSWD: set both, of 1 to 255 octets, or neither";
        match (variable("SOCKS5_USER"), variable("SOCKS5_PASSWD")) {
            (None, None) => Ok(None),
            (Some(user), Some(password)) => Self::new(user, password).map(Some).ok_or_else(|| rule.to_owned()),
            _ => Err(rule.to_owned()),
        }
    }
}

/// Requests a relay on a new connection; returns its address, which may be unspecified.
///
/// # Errors
/// The server's error, without its name.
pub async fn request_relay<S>(server: &mut S, credentials: Option<&Credentials>) -> Result<SocketAddr, String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let io = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => "it has closed the connection in the middle of the greeting".to_owned(),
        _ => error.to_string(),
    };
    let greeting: &[u8] = match credentials {
        Some(_) => &[VERSION, 2, NO_AUTHENTICATION, PASSWORD],
        None => &[VERSION, 1, NO_AUTHENTICATION],
    };
    server.write_all(greeting).await.map_err(io)?;
    let mut chosen = [0; 2];
    server.read_exact(&mut chosen).await.map_err(io)?;
    match (chosen, credentials) {
        ([VERSION, NO_AUTHENTICATION], _) => {}
        ([VERSION, PASSWORD], Some(credentials)) => log_in(server, credentials).await?,
        ([VERSION, NO_METHOD], Some(_)) => return Err("it accepts neither method (password, none)".to_owned()),
        ([VERSION, _], None) => return Err("it wants a password; set SOCKS5_USER and SOCKS5_PASSWD".to_owned()),
        ([VERSION, method], _) => return Err(format!("it chose method {method}, which was not offered")),
        ([other, _], _) => return Err(format!("it answers with version {other}; is it a SOCKS5 server?")),
    }
    // From any address and port of ours: with a NAT in between, the server sees another address than we do.
    server.write_all(&[VERSION, UDP_ASSOCIATE, 0, ADDRESS_IPV4, 0, 0, 0, 0, 0, 0]).await.map_err(io)?;
    let mut reply = [0; 4];
    server.read_exact(&mut reply).await.map_err(io)?;
    let [version, outcome, _, kind] = reply;
    if version != VERSION {
        return Err(format!("it answers with version {version}; is it a SOCKS5 server?"));
    }
    if outcome != 0 {
        return Err(refusal(outcome));
    }
    let ip = match kind {
        ADDRESS_IPV4 => {
            let mut octets = [0; 4];
            server.read_exact(&mut octets).await.map_err(io)?;
            IpAddr::V4(Ipv4Addr::from(octets))
        }
        ADDRESS_IPV6 => {
            let mut octets = [0; 16];
            server.read_exact(&mut octets).await.map_err(io)?;
            IpAddr::V6(Ipv6Addr::from(octets))
        }
        ADDRESS_NAME => return Err("it gives its relay by name, which is not supported".to_owned()),
        kind => return Err(format!("it gives its relay as address type {kind}")),
    };
    let mut port = [0; 2];
    server.read_exact(&mut port).await.map_err(io)?;
    match u16::from_be_bytes(port) {
        0 => Err("it gives port 0 for its relay".to_owned()),
        port => Ok(SocketAddr::new(ip, port)),
    }
}

async fn log_in<S: AsyncRead + AsyncWrite + Unpin>(server: &mut S, credentials: &Credentials) -> Result<(), String> {
    let Credentials { user, password } = credentials;
    let mut words = Zeroizing::new(Vec::with_capacity(3 + user.len() + password.len()));
    words.push(PASSWORD_VERSION);
    for word in [user, password] {
        // At most 255 octets: the constructor checked it.
        words.push(word.len() as u8);
        words.extend(word);
    }
    server.write_all(&words).await.map_err(|error| error.to_string())?;
    let mut answer = [0; 2];
    server.read_exact(&mut answer).await.map_err(|error| error.to_string())?;
    match answer {
        [_, 0] => Ok(()),
        _ => Err("it refuses SOCKS5_USER and SOCKS5_PASSWD".to_owned()),
    }
}

/// RFC 1928, section 6.
fn refusal(outcome: u8) -> String {
    let what = match outcome {
        1 => "general failure",
        2 => "not allowed by its rules",
        3 => "network unreachable",
        4 => "host unreachable",
        5 => "connection refused",
        6 => "TTL expired",
        7 => "it has no UDP ASSOCIATE; use a server that relays UDP",
        8 => "it does not take IPv4 addresses",
        _ => "a reason that RFC 1928 does not define",
    };
    format!("refuses to relay UDP ({outcome}: {what})")
}
