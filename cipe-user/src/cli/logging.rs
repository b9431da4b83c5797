//! The destination of messages: stderr in the foreground, syslog otherwise.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use tracing::{Level, Metadata};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::{DefaultFields, Format, Full};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt};

/// Socket of syslogd or of systemd's journal.
const SYSLOG_SOCKET: &str = "/dev/log";
/// Facility daemon (RFC 3164 section 4.1.1).
const FACILITY: u8 = 3 << 3;
/// Target of messages that are shown on the terminal in another way.
pub(super) const SYSLOG_ONLY: &str = "syslog";

/// The destination of messages.
#[derive(Clone, Copy, Debug)]
pub(super) enum Destination {
    /// To stderr.
    Stderr {
        /// Debug messages too.
        verbose: bool,
    },
    /// To syslog under this name; warnings and errors to stderr too, until it is released.
    Syslog {
        /// The tag.
        name: &'static str,
        /// Report on stderr if there is no syslog. The engine does not: the daemon that starts it has already done so.
        complain: bool,
    },
}

/// Sets the destination, once per process. `RUST_LOG` replaces the filter.
pub(super) fn init(destination: Destination) {
    let verbose = matches!(destination, Destination::Stderr { verbose: true });
    let usual = if verbose { "info,cipe_user=debug" } else { "info" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(usual));
    let registry = tracing_subscriber::registry().with(filter);
    let done = match destination {
        Destination::Stderr { .. } => registry.with(plain().with_writer(io::stderr)).try_init(),
        Destination::Syslog { name, complain } => {
            let to_terminal =
                |metadata: &Metadata<'_>| *metadata.level() <= Level::WARN && metadata.target() != SYSLOG_ONLY;
            let terminal = plain().with_writer(io::stderr).with_filter(filter_fn(to_terminal));
            match Syslog::open(name) {
                Ok(syslog) => registry.with(terminal).with(plain().with_writer(syslog)).try_init(),
                Err(error) => {
                    if complain {
                        eprintln!(
                            "{name}: no system log ({error}); {SYSLOG_SOCKET}; messages after the start are lost; start a syslogd, or use debug"
                        );
                    }
                    registry.with(terminal).try_init()
                }
            }
        }
    };
    if let Err(error) = done {
        eprintln!("the destination of messages is not changed ({error})");
    }
}

/// The text of the message and nothing else.
fn plain<S>() -> fmt::Layer<S, DefaultFields, Format<Full, ()>> {
    fmt::layer().with_target(false).with_level(false).without_time().with_ansi(false)
}

/// Writes each event as one datagram. Without a time: the receiver adds its own, in the right time zone.
struct Syslog {
    socket: UnixDatagram,
    name: &'static str,
}

impl Syslog {
    fn open(name: &'static str) -> io::Result<Self> {
        if !Path::new(SYSLOG_SOCKET).exists() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let socket = UnixDatagram::unbound()?;
        // A syslogd that hangs must not block the tunnel.
        socket.set_nonblocking(true)?;
        Ok(Self { socket, name })
    }
}

impl<'a> MakeWriter<'a> for Syslog {
    type Writer = Message<'a>;

    fn make_writer(&'a self) -> Message<'a> {
        Message { syslog: self, severity: severity(Level::INFO) }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Message<'a> {
        Message { syslog: self, severity: severity(*metadata.level()) }
    }
}

struct Message<'a> {
    syslog: &'a Syslog,
    severity: u8,
}

impl io::Write for Message<'_> {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        // By address each time, so that a restarted syslogd is found. Without a syslogd, the message is lost.
        let _ = self.syslog.socket.send_to(&datagram(self.severity, self.syslog.name, text), SYSLOG_SOCKET);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn datagram(severity: u8, name: &str, text: &[u8]) -> Vec<u8> {
    let mut datagram = format!("<{}>{name}[{}]: ", FACILITY | severity, std::process::id()).into_bytes();
    datagram.extend_from_slice(text.trim_ascii_end());
    datagram
}

const fn severity(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_priority_name_and_pid() {
        let text = datagram(severity(Level::WARN), "ciped-cb", b"cipcb0: new peer 192.0.2.2:6789\n");
        let expected = format!("<28>ciped-cb[{}]: cipcb0: new peer 192.0.2.2:6789", std::process::id());
        assert_eq!(String::from_utf8(text).unwrap(), expected);
    }
}
