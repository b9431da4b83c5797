//! The table as lines of text.

use clap::ValueEnum;

use super::super::status::{Rates, age, scaled};
use crate::control::protocol::Status;
use crate::kernel::zone::Shown;

/// The order of the tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Sort {
    /// The tunnel with the most bits per second first.
    Traffic,
    /// By interface name.
    Name,
}

impl Sort {
    /// The other order.
    pub(super) fn other(self) -> Self {
        match self {
            Self::Traffic => Self::Name,
            Self::Name => Self::Traffic,
        }
    }
}

/// One tunnel.
#[derive(Debug)]
pub(super) struct Row {
    device: String,
    peer: String,
    keys: String,
    /// `None` in the first table.
    rates: Option<Rates>,
}

impl Row {
    /// A tunnel's current status, and its rates since the last answer.
    pub(super) fn new(status: &Status, rates: Option<Rates>) -> Self {
        let shown = |seconds: Option<&u64>| seconds.map_or_else(|| "-".to_owned(), |seconds| age(*seconds));
        let key = |name| shown(status.key_seconds.get(name));
        let sealed = status.sealed.as_ref().filter(|sealed| sealed.suite.is_some() || !sealed.unsealed.sends);
        Self {
            device: status.device.clone(),
            peer: status.peer.map_or_else(|| "not known yet".to_owned(), |peer| Shown(peer).to_string()),
            keys: match (status.orphaned_seconds, sealed) {
                (Some(seconds), _) => format!("ORPHANED {}", age(seconds)),
                (None, Some(sealed)) => {
                    let (send, receive) = (sealed.send_seconds.as_ref(), sealed.receive_seconds.first());
                    format!("sealed {} / {}", shown(send), shown(receive))
                }
                (None, None) if status.keys.is_empty() => "NO ENCRYPTION".to_owned(),
                (None, None) => format!("{} / {}", key("send"), key("receive")),
            },
            rates,
        }
    }

    fn bits(&self) -> f64 {
        self.rates.as_ref().map_or(0.0, |rates| rates.out.bits + rates.inward.bits)
    }

    fn cells(&self) -> [String; COLUMNS] {
        let rate = |of: fn(&Rates) -> f64| self.rates.as_ref().map_or("-".to_owned(), |rates| number(of(rates)));
        let drops = self.rates.as_ref().map_or("-".to_owned(), |rates| match &rates.drops[..] {
            [] => "0".to_owned(),
            drops => {
                drops.iter().map(|(name, rate)| format!("{name} {}", number(*rate))).collect::<Vec<_>>().join(", ")
            }
        });
        [
            self.device.clone(),
            self.peer.clone(),
            self.keys.clone(),
            rate(|rates| rates.out.packets),
            rate(|rates| rates.out.bits),
            rate(|rates| rates.inward.packets),
            rate(|rates| rates.inward.bits),
            drops,
        ]
    }
}

/// As [`scaled`], without the space at the end; a rate below one is not shown as zero.
fn number(value: f64) -> String {
    if value > 0.0 && value < 1.0 { "<1".to_owned() } else { scaled(value).trim_end().to_owned() }
}

const COLUMNS: usize = 8;

/// Head of each column, and whether the column has numbers. Keys: the ages of the send key and the receive key.
const HEADS: [(&str, bool); COLUMNS] = [
    ("tunnel", false),
    ("peer", false),
    ("key out / in", false),
    ("out p/s", true),
    ("bit/s", true),
    ("in p/s", true),
    ("bit/s", true),
    ("drops/s", false),
];

/// The head and a line for each tunnel, none longer than `width`.
pub(super) fn lines(rows: &[Row], sort: Sort, width: usize) -> Vec<String> {
    let mut rows: Vec<&Row> = rows.iter().collect();
    match sort {
        Sort::Traffic => rows.sort_by(|a, b| b.bits().total_cmp(&a.bits())),
        Sort::Name => rows.sort_by(|a, b| a.device.cmp(&b.device)),
    }
    let cells: Vec<_> =
        std::iter::once(HEADS.map(|(head, _)| head.to_owned())).chain(rows.iter().map(|row| row.cells())).collect();
    let widths: [usize; COLUMNS] =
        std::array::from_fn(|column| cells.iter().map(|cells| cells[column].len()).max().unwrap_or(0));
    let line = |cells: &[String; COLUMNS]| {
        let padded = cells.iter().zip(HEADS).zip(widths).map(|((cell, (_, is_number)), width)| match is_number {
            true => format!("{cell:>width$}"),
            false => format!("{cell:<width$}"),
        });
        let line: String = padded.collect::<Vec<_>>().join("  ").trim_end().chars().take(width).collect();
        line
    };
    cells.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::super::super::status::{example, example_sealed};
    use super::*;

    fn rows() -> Vec<Row> {
        let before = example("cipcb0", (0, 0), &[]);
        let after = example("cipcb0", (1_250_000, 1250), &[("sent", 1000), ("delivered", 2), ("bad-crc", 20)]);
        let mut bare = example("cipcb1", (0, 0), &[]);
        bare.keys.clear();
        bare.peer = None;
        let mut orphan = example("cipcb2", (0, 0), &[]);
        orphan.keys.clear();
        orphan.orphaned_seconds = Some(180);
        let busy = example("cipci0", (1 << 40, 0), &[("sent", 1 << 30)]);
        let rates = |now| Some(Rates::between(&before, now, 2.0));
        vec![
            Row::new(&after, rates(&after)),
            Row::new(&bare, None),
            Row::new(&orphan, None),
            Row::new(&busy, rates(&busy)),
        ]
    }

    #[test]
    fn a_tunnel_is_a_line() {
        let expected = "\
tunnel  peer            key out / in    out p/s  bit/s  in p/s  bit/s  drops/s
cipcb0  192.0.2.2:6789  12 s / -            500  5.0 M       1  5.0 k  bad-crc 10
cipcb1  not known yet   NO ENCRYPTION         -      -       -      -  -
cipcb2  192.0.2.2:6789  ORPHANED 3 min        -      -       -      -  -
cipci0  192.0.2.2:6789  12 s / -          537 M  4.4 T       0      0  0";
        assert_eq!(lines(&rows(), Sort::Name, 100).join("\n"), expected);
    }

    #[test]
    fn a_tunnel_that_seals_has_the_ages_of_those_keys() {
        let keys = |sealed| Row::new(&Status { sealed, ..example("cipcb0", (0, 0), &[]) }, None).keys;
        let mut waits = example_sealed(None);
        assert_eq!(keys(Some(waits.clone())), "12 s / -");
        waits.unsealed.sends = false;
        assert_eq!(
            (keys(Some(waits)), keys(Some(example_sealed(Some(75))))),
            ("sealed - / -".into(), "sealed 1 min / 1 min".into())
        );
    }

    #[test]
    fn the_busiest_comes_first_and_no_line_is_too_long() {
        let lines = lines(&rows(), Sort::Traffic, 30);
        assert!(lines[1].starts_with("cipci0"), "{lines:?}");
        assert!(lines.iter().all(|line| line.len() <= 30), "{lines:?}");
    }

    #[test]
    fn what_is_rare_is_not_nothing() {
        assert_eq!([0.0, 0.5, 1.0, 1500.0].map(number), ["0", "<1", "1", "1.5 k"]);
    }
}
