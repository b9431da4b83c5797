//! The engine's status of its tunnels, and the rates between two answers.

use std::time::Duration;

use anyhow::{Context, bail};
use cipe_common::Verdict;

use crate::control::client::{Client, ConnectError};
use crate::control::protocol::{Event, Request, Status};
use crate::control::run_dir::RunDir;

/// How long the engine may take to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// Connects to the engine of this network namespace; `None` if none runs.
///
/// # Errors
/// An engine runs, but the connection fails.
pub(super) fn connect() -> anyhow::Result<Option<Client>> {
    let run_dir = RunDir::of_this_namespace().context("own network namespace not found; is /proc mounted?")?;
    match Client::connect(&run_dir) {
        Ok(engine) => Ok(Some(engine)),
        Err(ConnectError::NotRunning { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The status of all tunnels, by name.
///
/// # Errors
/// The engine has ended, does not answer, or refuses.
pub(super) async fn query(engine: &mut Client) -> anyhow::Result<Vec<Status>> {
    engine.send(&Request::Status).context("the engine does not take requests; restart it")?;
    let collect = async {
        let mut all = Vec::new();
        loop {
            match engine.receive().await? {
                Some(Event::Status(status)) => all.push(*status),
                Some(Event::StatusEnd) => break Ok(all),
                Some(Event::Failed { message }) => bail!("{message}"),
                Some(_) => {}
                None => bail!("the engine has gone; start it with ciped-cb or ciped-ci"),
            }
        }
    };
    let mut all =
        tokio::time::timeout(ANSWER_DEADLINE, collect).await.context("the engine does not answer; restart it")??;
    all.sort_by(|a, b| a.device.cmp(&b.device));
    Ok(all)
}

/// One direction, per second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Flow {
    /// Packets.
    pub packets: f64,
    /// Payload bits.
    pub bits: f64,
}

/// The rates of a tunnel between two answers, per second.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Rates {
    /// Sent.
    pub out: Flow,
    /// Delivered.
    pub inward: Flow,
    /// Dropped, by verdict, the most frequent first; zeros left out.
    pub drops: Vec<(&'static str, f64)>,
}

impl Rates {
    /// The rates between two states of one tunnel, `seconds` apart. All are zero if the tunnel was made again
    /// meanwhile.
    pub(super) fn between(before: &Status, now: &Status, seconds: f64) -> Self {
        let rate = |before: u64, now: u64| now.saturating_sub(before) as f64 / seconds;
        let of = |name: &str| rate(count(before, name), count(now, name));
        let flow = |verdict: Verdict, before: u64, now: u64| Flow {
            packets: of(verdict.name()),
            bits: rate(before, now) * 8.0,
        };
        let drops = Verdict::ALL.iter().filter(|verdict| verdict.is_drop());
        let mut drops: Vec<_> = drops.map(|verdict| (verdict.name(), of(verdict.name()))).collect();
        drops.retain(|(_, rate)| *rate > 0.0);
        drops.sort_by(|a, b| b.1.total_cmp(&a.1));
        Self {
            out: flow(Verdict::Sent, before.octets.0, now.octets.0),
            inward: flow(Verdict::Delivered, before.octets.1, now.octets.1),
            drops,
        }
    }
}

/// Packets of a tunnel under one verdict.
pub(super) fn count(status: &Status, verdict: &str) -> u64 {
    status.verdicts.get(verdict).copied().unwrap_or_default()
}

/// A number with three digits and a decimal prefix, or a space instead of the prefix.
pub(super) fn scaled(value: f64) -> String {
    let mut value = value;
    for prefix in ["", "k", "M", "G", "T"] {
        if value < 999.5 {
            let digits = if value >= 99.95 || prefix.is_empty() { 0 } else { 1 };
            return format!("{value:.digits$} {prefix}");
        }
        value /= 1000.0;
    }
    format!("{value:.0} P")
}

/// A time in its largest whole unit: `59 s`, `12 min`, `3 h`, `2 d`.
pub(super) fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// A status for tests.
#[cfg(test)]
pub(super) fn example(device: &str, octets: (u64, u64), verdicts: &[(&str, u64)]) -> Status {
    use crate::control::protocol::Cipher;

    Status {
        device: device.to_owned(),
        name: "gateway-b".to_owned(),
        orphaned_seconds: None,
        protocol: crate::control::protocol::Protocol::Ip,
        cipher: Cipher::Blowfish,
        me: "192.0.2.1:6789".parse().unwrap(),
        peer: Some("192.0.2.2:6789".parse().unwrap()),
        keys: vec!["static".to_owned(), "send".to_owned()],
        key_seconds: [("static".to_owned(), 86_400), ("send".to_owned(), 12)].into(),
        sealed: None,
        verdicts: verdicts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect(),
        octets,
        doors: vec!["wire0: native XDP".to_owned()],
        lacks: Vec::new(),
        workers: Vec::new(),
    }
}

/// How a tunnel seals, for tests: by a key of this age in seconds, or not.
#[cfg(test)]
pub(super) fn example_sealed(seconds: Option<u64>) -> crate::control::protocol::SealedStatus {
    use crate::control::protocol::{SealedStatus, Unsealed};

    SealedStatus {
        unsealed: Unsealed { sends: seconds.is_none(), accepts: seconds.is_none() },
        suite: seconds.map(|_| crate::sealed::cipher::Suite::Aes256Gcm),
        send_seconds: seconds,
        send_counter: seconds.map(|_| 1_000),
        receive_seconds: seconds.into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_what_happened_meanwhile() {
        let before = example("cipcb0", (1000, 0), &[("sent", 10), ("bad-crc", 5), ("replayed", 1)]);
        let now = example("cipcb0", (251_000, 0), &[("sent", 210), ("bad-crc", 9), ("replayed", 7), ("fragmented", 3)]);
        let rates = Rates::between(&before, &now, 2.0);
        assert_eq!(rates.out, Flow { packets: 100.0, bits: 1e6 });
        assert_eq!(rates.inward, Flow::default());
        assert_eq!(rates.drops, [("replayed", 3.0), ("bad-crc", 2.0)], "what arrived in fragments was not dropped");
        assert_eq!(Rates::between(&now, &before, 2.0), Rates::default(), "made anew");
    }

    #[test]
    fn numbers_have_three_digits() {
        for (value, expected) in [
            (0.0, "0 "),
            (999.0, "999 "),
            (999.6, "1.0 k"),
            (12_345.0, "12.3 k"),
            (123_456.0, "123 k"),
            (9.4e9, "9.4 G"),
        ] {
            assert_eq!(scaled(value), expected);
        }
    }

    #[test]
    fn ages_have_one_unit() {
        let expected = [(0, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "59 min"), (7200, "2 h"), (200_000, "2 d")];
        for (seconds, text) in expected {
            assert_eq!(age(seconds), text);
        }
    }
}
