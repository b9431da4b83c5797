//! Notifications of rtnetlink's multicast groups.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::sys::{AsyncSocket, SocketAddr};

use super::netlink::{Error, Result};

/// Size of the receive buffer in octets: a routing daemon may change hundreds of routes at once.
const RECEIVE_BUFFER_OCTETS: u32 = 1 << 20;

/// If no notification comes for this long, all queued ones have been read.
const DRAINED_AFTER: Duration = Duration::from_millis(10);

/// Maximum time for reading the queued notifications.
const DRAIN_DEADLINE: Duration = Duration::from_secs(1);

/// The groups that report every change of routing.
pub(super) const FORWARDING: [MulticastGroup; 8] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
];

/// An item of a subscription.
#[derive(Debug)]
pub(super) enum NetlinkEvent {
    /// A notification.
    Message(Box<RouteNetlinkMessage>),
    /// Notifications came faster than they were read, and some are lost: read everything again.
    Lost,
}

type Notification = (NetlinkMessage<RouteNetlinkMessage>, SocketAddr);

/// A subscription to groups of notifications. It has its own socket, so that a flood of them cannot displace an answer.
pub(super) struct NetlinkEvents {
    stream: Pin<Box<dyn Stream<Item = Notification> + Send>>,
    connection: tokio::task::JoinHandle<()>,
}

impl NetlinkEvents {
    /// Subscribes. Changes after this returns are delivered.
    pub(super) fn open(groups: &[MulticastGroup]) -> Result<Self> {
        let open = |cause| Error::Io { what: "cannot subscribe to netlink notifications".to_owned(), cause };
        let (mut connection, _, stream) = rtnetlink::new_multicast_connection(groups).map_err(open)?;
        // The system's limit reduces it silently; the only effect is an earlier `Event::Lost`.
        connection.socket_mut().socket_mut().set_rx_buf_sz(RECEIVE_BUFFER_OCTETS).map_err(open)?;
        Ok(Self { stream: Box::pin(stream), connection: tokio::spawn(connection) })
    }
}

/// Notifications for a copy of kernel tables. [`NetlinkEvent::Lost`] comes after all older notifications were read and
/// discarded, because they must not be applied after everything has been read again.
pub(super) struct Changes<E> {
    events: E,
    /// Some notifications are lost, and older ones are still queued.
    lost: bool,
}

impl<E: Stream<Item = NetlinkEvent> + Unpin> Changes<E> {
    /// Creates the queue for a subscription.
    pub(super) fn new(events: E) -> Self {
        Self { events, lost: false }
    }

    /// Waits for the next notification; `None`: the subscription has ended, and nothing can be followed any longer.
    /// Cancel safe.
    pub(super) async fn next(&mut self) -> Option<NetlinkEvent> {
        if !self.lost {
            match self.events.next().await {
                Some(NetlinkEvent::Lost) => self.lost = true,
                event => return event,
            }
        }
        let all = async { while let Ok(Some(_)) = tokio::time::timeout(DRAINED_AFTER, self.events.next()).await {} };
        // If notifications never stop, this discards those of the last second.
        let _ = tokio::time::timeout(DRAIN_DEADLINE, all).await;
        self.lost = false;
        Some(NetlinkEvent::Lost)
    }
}

impl Stream for NetlinkEvents {
    type Item = NetlinkEvent;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<NetlinkEvent>> {
        loop {
            let Some((message, _)) = std::task::ready!(self.stream.as_mut().poll_next(context)) else {
                return Poll::Ready(None);
            };
            match message.payload {
                NetlinkPayload::InnerMessage(message) => {
                    return Poll::Ready(Some(NetlinkEvent::Message(Box::new(message))));
                }
                NetlinkPayload::Overrun(_) => return Poll::Ready(Some(NetlinkEvent::Lost)),
                _ => {}
            }
        }
    }
}

impl Drop for NetlinkEvents {
    fn drop(&mut self) {
        self.connection.abort();
    }
}
