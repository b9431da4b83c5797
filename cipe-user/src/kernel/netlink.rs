//! A connection to rtnetlink, and the conversion of its refusals to errors that an operator can read.

use std::io;
use std::time::Duration;

use futures_util::StreamExt;
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, NlasIterator};
use rtnetlink::sys::AsyncSocket;
use rustix::io::Errno;

use super::zone::ShownHost;

/// If the kernel does not answer within this time, it never will: the answer was lost or could not be parsed.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
/// `NLMSGERR_ATTR_MSG` of linux/netlink.h: the reason of a refusal in words.
const ERROR_ATTRIBUTE_MESSAGE: u16 = 1;
/// Octets of `struct nlmsghdr`.
const HEADER_OCTETS: usize = 16;

/// An error of the kernel's network configuration. The text includes the cause, so the error has no `source()`:
/// printing a whole chain would print the cause twice.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused a request.
    #[error("{what}: {cause}{}{}", words(.reason), remedy(.cause))]
    Refused {
        /// The request, such as `cipcb0: cannot set the MTU to 20`.
        what: String,
        /// The errno.
        cause: io::Error,
        /// The kernel's message, if it gave one.
        reason: Option<String>,
    },
    /// A file or socket of the network configuration could not be used.
    #[error("{what}: {cause}")]
    Io {
        /// The attempted operation.
        what: String,
        /// Why it failed.
        cause: io::Error,
    },
    /// The kernel's answer lacks an attribute that it always has, or never came.
    #[error("{0}: the kernel gave no usable answer")]
    Answer(String),
    /// The requested name is in use.
    #[error("{0}: a network device of this name exists; choose another or leave the name out for the next free one")]
    NameTaken(String),
    /// The requested name is not valid for a network device.
    #[error("{0:?} cannot be a network device's name: 1 to 15 characters, no space, no slash, no percent sign")]
    NameInvalid(String),
    /// There is no route to this address.
    #[error("no carrier route to {peer}: {cause}; add a route or check the carrier device")]
    NoRoute {
        /// The destination.
        peer: ShownHost,
        /// The reason.
        cause: io::Error,
    },
    /// The requested source address is not an address of this host.
    #[error(
        "no carrier route to {peer} from {from}: {from} is not an address of this host; bring it back, or follow changes with `dynip`"
    )]
    NotOurAddress {
        /// The destination.
        peer: ShownHost,
        /// The requested source address.
        from: ShownHost,
    },
}

fn words(reason: &Option<String>) -> String {
    reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default()
}

fn remedy(cause: &io::Error) -> &'static str {
    match cause.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::PERM) => "; it needs CAP_NET_ADMIN: run as root, or grant it",
        Some(Errno::NOMEM) => {
            "; raise the memory limit of its cgroup (memory.max, MemoryMax= of the service), or free memory"
        }
        _ => "",
    }
}

impl Error {
    /// The kernel's errno, if the kernel refused.
    pub(super) fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { cause, .. } | Self::Io { cause, .. } | Self::NoRoute { cause, .. } => cause.raw_os_error(),
            _ => None,
        }
    }

    /// Whether the kernel refused because the device does not exist.
    #[must_use]
    pub fn is_no_device(&self) -> bool {
        self.is(Errno::NODEV)
    }

    /// Whether the kernel refused with this errno.
    pub(super) fn is(&self, errno: Errno) -> bool {
        self.errno() == Some(errno.raw_os_error())
    }
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// A connection to rtnetlink in the network namespace of the thread that opened it. Clones share it.
#[derive(Clone, Debug)]
pub struct Netlink {
    pub(super) handle: rtnetlink::Handle,
}

impl Netlink {
    /// Opens a connection and spawns the task that serves it; call it in a tokio runtime with I/O and time.
    ///
    /// # Errors
    /// No netlink socket can be opened.
    pub fn new() -> Result<Self> {
        let open = |cause| Error::Io { what: "cannot open a netlink socket".to_owned(), cause };
        let (mut connection, handle, _) = rtnetlink::new_connection().map_err(open)?;
        let socket = connection.socket_mut().socket_mut();
        // The kernel then adds the reason as text, and does not return the request.
        socket.set_ext_ack(true).map_err(open)?;
        socket.set_cap_ack(true).map_err(open)?;
        // The kernel then filters what it lists.
        socket.set_netlink_get_strict_chk(true).map_err(open)?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// Sends one request and collects the answers. `flags` are added to `NLM_F_REQUEST`; `what` begins an error
    /// message.
    pub(super) async fn request(
        &self,
        what: impl FnOnce() -> String,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | flags;
        match tokio::time::timeout(ANSWER_DEADLINE, self.exchange(message)).await {
            Ok(Ok(answers)) => Ok(answers),
            Ok(Err(Some((cause, reason)))) => Err(Error::Refused { what: what(), cause, reason }),
            Ok(Err(None)) | Err(_) => Err(Error::Answer(what())),
        }
    }

    async fn exchange(
        &self,
        message: NetlinkMessage<RouteNetlinkMessage>,
    ) -> std::result::Result<Vec<RouteNetlinkMessage>, Option<(io::Error, Option<String>)>> {
        let mut stream = self.handle.clone().request(message).map_err(|_| None)?;
        let mut answers = Vec::new();
        while let Some(message) = stream.next().await {
            match message.payload {
                NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(Some((error.to_io(), reason(&error.header))));
                }
                _ => {}
            }
        }
        Ok(answers)
    }
}

/// Finds the kernel's message behind the header of the refused request.
fn reason(header: &[u8]) -> Option<String> {
    let attributes = NlasIterator::new(header.get(HEADER_OCTETS..)?);
    let message = attributes.flatten().find(|attribute| attribute.kind() == ERROR_ATTRIBUTE_MESSAGE)?;
    Some(String::from_utf8_lossy(message.value()).trim_end_matches('\0').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_chain_names_the_cause_once() {
        let cause = || io::Error::from_raw_os_error(101);
        for error in [
            Error::NoRoute { peer: ShownHost([198, 51, 100, 1].into(), None), cause: cause() },
            Error::Io { what: "wire0".to_owned(), cause: cause() },
            Error::Refused { what: "wire0".to_owned(), cause: cause(), reason: Some("no".to_owned()) },
        ] {
            let text = format!("{:#}", anyhow::Error::from(error));
            assert_eq!(text.matches("os error 101").count(), 1, "{text}");
        }
    }
}
