//! Carries out what daemons ask for sealed packets (docs/SEALED.md), in the order in which it comes.
//!
//! A key is in use in all workers as soon as it is here: a worker looks at the keys when a packet comes ([`SealedTunnel`]). So an
//! answer that is transmitted after its receive key never comes back too early.

use std::time::Duration;

use anyhow::Context as _;
use cipe_common::Verdict;

use super::keys::Keyring;
use super::platform::log_failure;
use super::shared::Shared;
use super::sizes;
use super::tunnels::Tenant;
use crate::control::protocol::{Event, SealedEvent, SealedRequest};
use crate::engine::ledger::{Handed, boottime};
use crate::engine::tunnel::sealed::SealedTunnel;
use crate::engine::worker::Command;

/// Carries out a request for a tunnel.
///
/// # Errors
/// The tunnel was attached without sealed packets.
pub(super) fn requested(
    number: u16,
    request: SealedRequest,
    keys: &mut Keyring,
    shared: &mut Shared,
) -> anyhow::Result<()> {
    let tenant = shared.tunnels.get_mut(number).context("the tunnel has gone")?;
    let sealed = tenant.sealed.clone().context("the tunnel was attached without sealed packets")?;
    let workers = &shared.platform.workers;
    let changed = match request {
        SealedRequest::Receive(key) => sealed.receive(&key, Handed::New),
        SealedRequest::Send { key, renew_ms } => sealed.send(&key, Duration::from_millis(renew_ms), Handed::New),
        SealedRequest::Forget { serial } => {
            sealed.forget(serial);
            Ok(())
        }
        SealedRequest::StopSending => {
            sealed.stop_sending();
            Ok(())
        }
        SealedRequest::Unsealed(unsealed) => {
            if !unsealed.accepts {
                keys.clear_dynamic(number);
            }
            sealed.set_unsealed(unsealed);
            Ok(())
        }
        SealedRequest::Confirm => {
            workers.tell_home(number, Command::SendConfirmation(number));
            return Ok(());
        }
        SealedRequest::Transmit { datagram, to } => {
            workers.tell_home(number, Command::SendHandshake(number, datagram, to));
            return Ok(());
        }
        SealedRequest::Judged { refused } => {
            let verdict = refused.map_or(Verdict::ControlReceived, Verdict::from);
            tenant.counters.of_control().count(verdict);
            return Ok(());
        }
    };
    if changed.is_err() {
        tracing::warn!("{}: the record of a key cannot be kept; keys are exchanged again", tenant.device.name);
        shared.daemons.tell(number, Event::Sealed(SealedEvent::KeysLost));
    }
    follow(number, &sealed, shared);
    Ok(())
}

/// Follows a change of a tunnel's keys, or of its use of other packets.
fn follow(number: u16, sealed: &SealedTunnel, shared: &mut Shared) {
    let Shared { tunnels, platform, daemons, .. } = shared;
    let Some(tenant) = tunnels.get_mut(number) else { return };
    let keys = sealed.keys();
    let notices = tenant.set_sealed(number, keys.send.is_some() || !keys.unsealed.sends, platform);
    log_failure(platform.programs().set_tunnel(number.into(), tenant.entry()));
    platform.workers.tell_all(|_| Command::SealedChanged(number));
    notices.notices.into_iter().for_each(|notice| daemons.notice(number, notice));
    if notices.is_too_small {
        daemons.notice(number, sizes::TOO_SMALL.to_owned());
    }
}

/// Sends an event of a worker to a tunnel's daemon. If it does not get there, a handshake message is counted here, as the daemon does
/// not judge it, and the first packet of a session is told with the next one.
pub(super) fn tell(number: u16, event: Event, shared: &Shared) {
    let (is_handshake, opened) = match &event {
        Event::Sealed(SealedEvent::Handshake { .. }) => (true, None),
        Event::Sealed(SealedEvent::Opened { serial }) => (false, Some(*serial)),
        _ => (false, None),
    };
    if shared.daemons.tell(number, event) {
        return;
    }
    let Some(tenant) = shared.tunnels.get(number) else { return };
    if is_handshake {
        tenant.counters.of_control().count(Verdict::ControlFull);
    }
    if let Some((sealed, serial)) = tenant.sealed.as_ref().zip(opened) {
        sealed.tell_again(serial);
    }
}

/// Looks which send keys are old.
pub(super) fn poll(shared: &Shared) {
    let now = boottime();
    let sealed = shared.tunnels.iter().filter_map(|(_, tenant): (u16, &Tenant)| tenant.sealed.as_ref());
    sealed.for_each(|sealed| sealed.poll(now));
}
