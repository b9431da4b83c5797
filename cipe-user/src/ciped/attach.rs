//! How a daemon gets its tunnel from the engine.

use std::net::SocketAddr;
use std::time::Duration;

use super::heartbeat::Heartbeat;
use super::options::GuardPolicy;
use super::session::{ORIGINAL_PACKETS, RECEIVE_PACKETS, SEND_OCTETS};
use super::setup::Setup;
use crate::control::channel::SendError;
use crate::control::client::{Client, ConnectError};
use crate::control::protocol::{Attach, AttachSealed, Descriptor, Event, Request, SessionKeys, VERSION};
use crate::control::watch;

/// How long the engine may take to make a tunnel.
const ATTACH_DEADLINE: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub(super) enum AttachError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("{0}")]
    Refused(String),
    #[error("the engine ended while it made the tunnel; look at the system log for its reason")]
    Gone,
    #[error("the engine did not make the tunnel in {} s; look at the system log, or restart it", ATTACH_DEADLINE.as_secs())]
    Late,
    #[error("control socket: {0}; are engine and daemon of the same version?")]
    Socket(String),
}

impl From<SendError> for AttachError {
    fn from(error: SendError) -> Self {
        match error {
            // The engine was about to end, because it had no more tunnels.
            SendError::Closed => Self::Gone,
            error => Self::Socket(error.to_string()),
        }
    }
}

/// The properties of a tunnel that may differ from its options.
pub(super) struct Placement {
    /// Interface; `None`: the next free.
    pub device: Option<String>,
    /// Own carrier address.
    pub me: SocketAddr,
    /// The peer's carrier address.
    pub peer: SocketAddr,
    /// Packets under one send key.
    pub send_packets: u64,
    /// Whether data may be sent under the static key.
    pub static_data: bool,
    /// The use of sealed packets.
    pub sealed: Option<AttachSealed>,
    /// The keys to go on under.
    pub resume: Option<SessionKeys>,
    /// The ledger of the engine before.
    pub ledger: Option<Descriptor>,
}

/// A tunnel that the engine has made.
pub(super) struct Attached {
    /// The connection that owns it.
    pub engine: Client,
    /// Interface.
    pub device: String,
    /// Own carrier address as bound.
    pub me: SocketAddr,
    /// Whether it goes on under the keys of [`Placement::resume`].
    pub resumed: bool,
    /// The watch over the engine, if it answers [`Request::Beat`].
    pub heartbeat: Option<Heartbeat>,
    /// Its ledger: a new one, or that of [`Placement::ledger`]; `None` if it writes none, so that no older one is of use any more.
    pub ledger: Option<Descriptor>,
}

/// Connects to the engine, starts it if necessary, and requests the tunnel. Logs the modes in use.
pub(super) async fn attach(setup: &Setup, place: Placement) -> Result<Attached, AttachError> {
    let mut engine = Client::connect_or_start(&setup.run_dir, &setup.engine).await?;
    let name = setup.identity().name;
    let mut heartbeat = engine.process().filter(|_| watch::is_allowed()).map(Heartbeat::new);
    let former_ledger = place.ledger.clone();
    engine.send(&Request::Attach(Box::new(attach_request(name.clone(), setup, place))))?;
    let answer = tokio::time::timeout(ATTACH_DEADLINE, async {
        loop {
            match next_event(&mut engine, &mut heartbeat, &name).await {
                Ok(Some(event @ Event::Attached { .. })) => break Ok(event),
                Ok(Some(Event::Failed { message })) => break Err(AttachError::Refused(message)),
                Ok(Some(Event::Notice { message, well: true })) => tracing::info!("{message}"),
                Ok(Some(Event::Notice { message, well: false })) => tracing::warn!("{message}"),
                Ok(Some(_)) => {}
                Ok(None) => break Err(AttachError::Gone),
                Err(error) => break Err(AttachError::Socket(error.to_string())),
            }
        }
    });
    let Event::Attached { device, me, notes, resumed, beats, keeps_ledger, ledger } =
        answer.await.unwrap_or(Err(AttachError::Late))?
    else {
        return Err(AttachError::Gone);
    };
    for note in notes {
        tracing::info!("{device}: {note}");
    }
    heartbeat = heartbeat.filter(|_| beats);
    let ledger = ledger.or(former_ledger.filter(|_| keeps_ledger));
    Ok(Attached { engine, device, me, resumed, heartbeat, ledger })
}

/// Waits for an event of the engine, which is watched meanwhile: it may hang with the attach in its socket.
async fn next_event(
    engine: &mut Client,
    heartbeat: &mut Option<Heartbeat>,
    tunnel: &str,
) -> std::io::Result<Option<Event>> {
    loop {
        let Some(watch) = heartbeat.as_mut() else { return engine.receive().await };
        tokio::select! {
            event = engine.receive() => {
                watch.heard();
                return event;
            }
            () = tokio::time::sleep_until(watch.deadline()) => {}
        }
        // What cannot be sent is noticed by the next receive.
        if watch.watch(tunnel)
            && let Err(error) = engine.send(&Request::Beat)
        {
            tracing::debug!("{tunnel}: {error}");
        }
    }
}

/// Whether a service manager started this daemon. Then it may run at boot before the network is up, or on a standby
/// that does not have its address yet.
fn is_service() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

fn attach_request(name: String, setup: &Setup, place: Placement) -> Attach {
    let options = &setup.options;
    Attach {
        version: VERSION,
        sealed: place.sealed,
        name,
        stays: options.guard != GuardPolicy::No,
        device: place.device,
        prefix: options.prefix().to_owned(),
        protocol: options.protocol,
        cipher: options.cipher,
        key: options.key.clone(),
        journal: options.key.is_some().then(|| setup.memory.journal()),
        ipaddr: options.ipaddr,
        ptpaddr: options.ptpaddr,
        mtu: options.mtu,
        interface: options.interface.clone(),
        me: place.me,
        me_may_come: options.dynip || is_service(),
        peer: place.peer,
        pin_peer: options.pin_peer,
        cttl: options.cttl,
        checksum: options.checksum,
        ignore_df: options.ignore_df,
        force_mtu: options.force_mtu,
        mss_clamp: options.mss_clamp,
        busy_poll_us: options.busy_poll,
        static_data: place.static_data,
        dynip: options.dynip,
        socks: options.socks.as_ref().map(|(_, address)| *address),
        carrier_device: options.carrier_device.clone(),
        carrier: options.carrier,
        xdp_mode: options.xdp_mode,
        mark: options.mark,
        lan: options.lan.clone(),
        // The peer counts as an original until it identifies itself. Without keys there is no exchange in which it could,
        // and pacing would cost a single stream most of its rate for ever.
        paced: options.key.is_some() && place.send_packets == ORIGINAL_PACKETS,
        send_packets: place.send_packets,
        send_octets: SEND_OCTETS,
        receive_packets: RECEIVE_PACKETS,
        send_seconds: options.tokey.into(),
        retry_seconds: options.tokxc.into(),
        resume: place.resume,
        ledger: place.ledger,
    }
}
