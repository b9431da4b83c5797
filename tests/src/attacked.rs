//! Two gateways with somebody on the path between them, who sees each datagram and decides what goes on; and numbered data between the
//! LANs, none of which may be forged or come twice.

use std::collections::HashMap;
use std::net::UdpSocket;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::gateway::Daemon;
use crate::impair::Attack;
use crate::net::pattern;
use crate::offload::Offload;
use crate::options::Options;
use crate::ping::{self, Plan};
use crate::process::patient;
use crate::relayed::Relayed;
use crate::status::Status;
use crate::topology::{Carrier, Side, Topology};

const BOTH: [Side; 2] = [Side::A, Side::B];
/// Octets of a datagram of data.
const OCTETS: usize = 120;

/// Whether a datagram of the carrier is a sealed packet or a message of a handshake.
pub fn is_sealed(datagram: &[u8]) -> bool {
    datagram.starts_with(&[0x80, 0, 0, 0])
}

/// Whether a datagram of the carrier is a message of a handshake: epoch 0.
pub fn is_handshake(datagram: &[u8]) -> bool {
    is_sealed(datagram) && datagram.get(4).is_some_and(|word| word >> 6 == 0)
}

/// Datagrams, each with the side that it came from.
type Recorded = Arc<Mutex<Vec<(usize, Vec<u8>)>>>;

/// A link, and what somebody on the path has seen of it.
pub struct Attacked {
    /// The gateways and the relay.
    pub link: Relayed,
    recorded: Recorded,
    unsealed: Arc<AtomicU64>,
}

/// What goes on in the place of a datagram, as [`Attack`] says.
pub type Act = fn(usize, Vec<u8>) -> Vec<(usize, Vec<u8>)>;

fn attack(act: Act, recorded: &Recorded, unsealed: &Arc<AtomicU64>) -> Attack {
    let (recorded, unsealed) = (recorded.clone(), unsealed.clone());
    Box::new(move |side, datagram| {
        unsealed.fetch_add(u64::from(!is_sealed(&datagram)), Ordering::Relaxed);
        recorded.lock().unwrap_or_else(PoisonError::into_inner).push((side, datagram.clone()));
        act(side, datagram)
    })
}

impl Attacked {
    /// Starts it, with somebody on the path from the first datagram on.
    ///
    /// # Errors
    /// As [`Relayed::start`].
    pub fn start(change: impl Fn(Options) -> Options, act: Act) -> Result<Self> {
        let (recorded, unsealed) = (Arc::default(), Arc::default());
        let net = Topology::new(Carrier::Tapped, Offload::On)?;
        let attack = attack(act, &recorded, &unsealed);
        let link = Relayed::under(net, Daemon::Blowfish, 1, Some(attack), change)?;
        Ok(Self { link, recorded, unsealed })
    }

    /// Sealed ends with keys, and somebody who only looks.
    ///
    /// # Errors
    /// As [`Relayed::start`], or no keys are made.
    pub fn sealed() -> Result<Self> {
        let path = Self::start(Options::sealed, |side, datagram| vec![(side, datagram)])?;
        path.link.pair.wait_for_keys(&path.link.net)?;
        Ok(path)
    }

    /// Lets somebody else decide from now on.
    pub fn act(&self, act: Act) {
        self.link.relay.attack(Some(attack(act, &self.recorded, &self.unsealed)));
    }

    /// Datagrams so far from a side.
    pub fn recorded(&self, side: usize) -> Vec<Vec<u8>> {
        let all = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().filter(|(from, _)| *from == side).map(|(_, datagram)| datagram.clone()).collect()
    }

    /// Datagrams so far that were not sealed.
    pub fn unsealed(&self) -> u64 {
        self.unsealed.load(Ordering::Relaxed)
    }

    /// Sends datagrams as if they came from a side, and waits until the other end has counted them.
    ///
    /// # Errors
    /// As [`Relayed::settle`].
    pub fn inject(&self, side: usize, datagrams: Vec<Vec<u8>>) -> Result<()> {
        /// Fewer than any buffer on the way holds.
        const BATCH: usize = 48;
        for batch in datagrams.chunks(BATCH) {
            self.link.relay.inject(side, batch.to_vec());
            self.link.settle()?;
        }
        Ok(())
    }

    /// Pings both ways, each of which must be answered.
    ///
    /// # Errors
    /// A ping is lost, with what both gateways tell.
    pub fn pings_pass(&self) -> Result<()> {
        for side in BOTH {
            let plan = Plan { interval: Duration::from_millis(2), ..Plan::count(50) };
            let report = ping::run(self.link.net.lan(side), side.other().host(), &plan)?;
            ensure!(report.lost.is_empty() && report.damaged == 0, "from {side:?}: {report:?}\n{}", self.told());
        }
        Ok(())
    }

    /// Pings both ways, none of which may be answered.
    ///
    /// # Errors
    /// One is answered, with what both gateways tell.
    pub fn nothing_passes(&self) -> Result<()> {
        for side in BOTH {
            let plan = Plan { timeout: Duration::from_millis(500), window: 20, ..Plan::count(20) };
            let report = ping::run(self.link.net.lan(side), side.other().host(), &plan)?;
            ensure!(report.received() == 0, "{} from {side:?}\n{}", report.received(), self.told());
        }
        Ok(())
    }

    /// What both gateways tell.
    pub fn told(&self) -> String {
        let of = |side| {
            let gateway = self.link.pair.of(side);
            format!("{side:?}: {:?}\n{}", gateway.status(), gateway.log().text())
        };
        format!("{}\n{}", of(Side::A), of(Side::B))
    }

    /// Both status.
    ///
    /// # Errors
    /// As [`Gateway::status`](crate::gateway::Gateway::status).
    pub fn statuses(&self) -> Result<[Status; 2]> {
        Ok([self.link.pair.a.status()?, self.link.pair.b.status()?])
    }
}

/// Sockets in both LANs, for numbered data.
pub struct Data {
    sockets: [UdpSocket; 2],
}

impl Data {
    /// Opens the sockets.
    ///
    /// # Errors
    /// A socket cannot be opened.
    pub fn new(path: &Attacked) -> Result<Self> {
        let bind = |side: Side| path.link.net.lan(side).run(|| UdpSocket::bind((side.host(), 0)));
        let sockets = [bind(Side::A)?, bind(Side::B)?];
        for (at, socket) in sockets.iter().enumerate() {
            socket.connect(sockets[1 - at].local_addr()?)?;
            socket.set_read_timeout(Some(patient(Duration::from_millis(300))))?;
        }
        Ok(Self { sockets })
    }

    /// Sends these numbers each way.
    ///
    /// # Errors
    /// A host has no route.
    pub fn send(&self, numbers: Range<u32>) -> Result<()> {
        for number in numbers {
            for socket in &self.sockets {
                socket.send(&pattern(number, OCTETS))?;
            }
        }
        Ok(())
    }

    /// How many of these numbers have come to A and to B since the last call; each must be whole, and have come once.
    ///
    /// # Errors
    /// Other octets have come, or a number has come twice.
    pub fn take(&self, numbers: Range<u32>) -> Result<[usize; 2]> {
        let genuine: HashMap<Vec<u8>, u32> = numbers.map(|number| (pattern(number, OCTETS), number)).collect();
        let mut came = [0; 2];
        for (at, socket) in self.sockets.iter().enumerate() {
            let mut octets = [0; 2048];
            let mut seen = Vec::new();
            while let Ok(length) = socket.recv(&mut octets) {
                let number = genuine.get(&octets[..length]);
                let number = number.with_context(|| format!("{length} octets that nobody has sent, or late ones"))?;
                ensure!(!seen.contains(number), "{number} has come twice");
                seen.push(*number);
            }
            came[at] = seen.len();
        }
        Ok(came)
    }
}
