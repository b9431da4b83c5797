//! Traffic of the interface, for the log at the end.

use std::fmt::Write as _;
use std::time::Duration;

use super::Daemon;
use crate::control::protocol::{Event, Request, Status};

/// Maximum time for the engine to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(2);

impl Daemon {
    /// Logs the tunnel's statistics, if an engine answers.
    pub(super) async fn log_statistics(&mut self) {
        let device = &self.facts.device;
        let Some(engine) = &mut self.engine else { return };
        let answer = async {
            engine.send(&Request::OwnStatus).ok()?;
            loop {
                match engine.receive().await {
                    Ok(Some(Event::Status(status))) => break Some(status),
                    Ok(Some(Event::StatusEnd) | None) | Err(_) => break None,
                    Ok(Some(_)) => {}
                }
            }
        };
        match tokio::time::timeout(ANSWER_DEADLINE, answer).await {
            Ok(Some(status)) => tracing::info!("{device}: {}", line(&status)),
            _ => tracing::debug!("{device}: the engine reports no statistics"),
        }
    }
}

fn line(status: &Status) -> String {
    let count = |name: &str| status.verdicts.get(name).copied().unwrap_or_default();
    let (sent, delivered) = status.octets;
    let mut text = format!(
        "statistics: {} packets ({sent} octets) sent, {} packets ({delivered} octets) delivered",
        count("sent"),
        count("delivered")
    );
    for (name, count) in status.verdicts.iter().filter(|(name, _)| !matches!(name.as_str(), "sent" | "delivered")) {
        // Writing to a String does not fail.
        let _ = write!(text, "; {name} {count}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::Cipher;

    #[test]
    fn statistics_name_each_verdict_that_occurred() {
        let verdicts = [("sent", 5), ("control-sent", 2), ("bad-crc", 1)];
        let status = Status {
            device: "cipcb0".to_owned(),
            name: String::new(),
            orphaned_seconds: None,
            protocol: crate::control::protocol::Protocol::Ip,
            cipher: Cipher::Blowfish,
            me: "192.0.2.1:1".parse().unwrap(),
            peer: None,
            keys: Vec::new(),
            key_seconds: Default::default(),
            sealed: None,
            verdicts: verdicts.map(|(name, count)| (name.to_owned(), count)).into(),
            octets: (420, 0),
            doors: Vec::new(),
            lacks: Vec::new(),
            workers: Vec::new(),
        };
        assert_eq!(
            line(&status),
            "statistics: 5 packets (420 octets) sent, 0 packets (0 octets) delivered; bad-crc 1; control-sent 2"
        );
    }
}
