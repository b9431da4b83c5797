//! ICMP errors for what a tunnel sent, by either door: they name its carrier port, so its UDP socket gets them.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};

use super::{BATCH, Worker};
use crate::control::protocol::Event;
use crate::kernel::zone;

impl Worker {
    /// Empties a tunnel's error queue. That a datagram was too large for the path is no fault of the network: the kernel
    /// has noted the path MTU, which is now looked up. All else is told to the daemon, once a batch.
    pub(super) fn hear_errors(&self, number: u16) {
        let (Some(endpoint), Some(tunnel)) = (self.endpoints.get(&number), self.datapath.tunnels.get(&number)) else {
            return;
        };
        let (mut too_large, mut other) = (false, None);
        let mut room = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
        for _ in 0..BATCH {
            let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
            // The datagram that it was about is of no interest.
            let received = recvmsg::<SockaddrStorage>(endpoint.udp.as_raw_fd(), &mut [], Some(&mut room), flags);
            let Ok(message) = received else { break };
            for control in message.cmsgs().into_iter().flatten() {
                let (ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _)) = control
                else {
                    continue;
                };
                match Errno::from_raw(error.ee_errno as i32) {
                    Errno::EMSGSIZE => too_large = true,
                    errno => other = Some(errno),
                }
            }
        }
        if let Some(target) = tunnel.target().filter(|_| too_large) {
            self.next_hops.look_again(target.ip());
        }
        if let Some(errno) = other {
            let peer = tunnel.peer.map_or("the peer".to_owned(), |peer| zone::Shown(peer).to_string());
            self.tell(number, Event::NetworkError { message: format!("{peer}: {}", errno.desc()) });
        }
    }
}
