//! Bar plots: a row for each tunnel, panels side by side, a whisker from the least to the greatest round.

use super::number;
use crate::bench::record::Series;
use crate::bench::tunnel::{Kind, Tunnel};
use crate::svg::Svg;

/// A plot.
pub(super) struct Plot {
    /// Title.
    pub title: String,
    /// Unit, and which direction is good.
    pub subtitle: String,
    /// Sort order of the rows: the best is on top.
    pub best: Best,
    /// Panels side by side.
    pub panels: Vec<Panel>,
}

/// Which values are good; decides the scale, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Best {
    /// Rates, on a linear scale.
    Highest,
    /// Costs, on a linear scale.
    Lowest,
    /// Times that differ by orders of magnitude, on a logarithmic scale.
    LowestLogarithmic,
}

/// One panel.
pub(super) struct Panel {
    /// Title of this panel.
    pub title: String,
    /// Its rows.
    pub bars: Vec<(Tunnel, Series)>,
}

const PANEL: f64 = 460.0;
const LABEL: f64 = 116.0;
const BAR: f64 = 262.0;
const ROW: f64 = 25.0;
const THICK: f64 = 15.0;
const TOP: f64 = 122.0;
const BOTTOM: f64 = 36.0;
const MARGIN: f64 = 20.0;
const INK: &str = "fill=\"#1f2933\"";
const FAINT: &str = "fill=\"#7b8794\"";

impl Plot {
    /// The picture.
    pub(super) fn svg(&self) -> String {
        let rows = self.panels.iter().map(|panel| panel.bars.len()).max().unwrap_or_default();
        let (width, height) = (PANEL * self.panels.len() as f64 + 2.0 * MARGIN, TOP + ROW * rows as f64 + BOTTOM);
        let mut svg = Svg::new(width, height);
        svg.text((MARGIN, 32.0), &format!("{INK} font-size=\"17\" font-weight=\"600\""), &self.title);
        svg.text((MARGIN, 51.0), FAINT, &self.subtitle);
        let mut x = MARGIN;
        for kind in [Kind::Ours, Kind::Peer, Kind::Kernel, Kind::Clear] {
            svg.rect((x, 64.0), (12.0, 12.0), &format!("rx=\"2\" fill=\"{}\"", color(kind)));
            svg.text((x + 18.0, 74.0), INK, legend(kind));
            x += 42.0 + 6.2 * legend(kind).len() as f64;
        }
        for (place, panel) in self.panels.iter().enumerate() {
            self.panel(&mut svg, MARGIN + PANEL * place as f64, rows, panel);
        }
        svg.finish()
    }

    fn panel(&self, svg: &mut Svg, left: f64, rows: usize, panel: &Panel) {
        let start = left + LABEL;
        let scale = Scale::new(self.best, panel);
        svg.text((start, TOP - 16.0), &format!("{INK} font-weight=\"600\""), &panel.title);
        let bottom = TOP + ROW * rows as f64;
        for tick in scale.ticks() {
            let x = start + BAR * scale.place(tick);
            svg.line((x, TOP - 6.0), (x, bottom), "stroke=\"#e4e7eb\"");
            let style = format!("{FAINT} font-size=\"11\" text-anchor=\"middle\"");
            svg.text((x, bottom + 16.0), &style, &short(tick));
        }
        let mut bars: Vec<&(Tunnel, Series)> = panel.bars.iter().collect();
        bars.sort_by(|one, other| one.1.median().total_cmp(&other.1.median()));
        if self.best == Best::Highest {
            bars.reverse();
        }
        for (row, (tunnel, series)) in bars.into_iter().enumerate() {
            let middle = TOP + ROW * (row as f64 + 0.5);
            let hint = format!(
                "{}: {} ({} to {}, {} rounds)",
                tunnel.name(),
                number(series.median()),
                number(series.min()),
                number(series.max()),
                series.rounds()
            );
            svg.hinted(&hint, |svg| {
                let weight = if tunnel.kind() == Kind::Ours { "600" } else { "400" };
                let style = format!("{INK} text-anchor=\"end\" font-weight=\"{weight}\"");
                svg.text((start - 8.0, middle + 4.0), &style, &tunnel.name());
                let length = BAR * scale.place(series.median());
                let style = format!("rx=\"2\" fill=\"{}\"", color(tunnel.kind()));
                svg.rect((start, middle - THICK / 2.0), (length, THICK), &style);
                let (least, greatest) = (scale.place(series.min()), scale.place(series.max()));
                let (from, to) = (start + BAR * least, start + BAR * greatest);
                if series.rounds() > 1 {
                    svg.line((from, middle), (to, middle), "stroke=\"#1f2933\" stroke-width=\"1.3\"");
                    for x in [from, to] {
                        svg.line((x, middle - 4.0), (x, middle + 4.0), "stroke=\"#1f2933\" stroke-width=\"1.3\"");
                    }
                }
                svg.text((to.max(start + length) + 7.0, middle + 4.0), INK, &number(series.median()));
            });
        }
    }
}

fn legend(kind: Kind) -> &'static str {
    match kind {
        Kind::Ours => "this project",
        Kind::Peer => "other encrypting tunnels, in user space",
        Kind::Kernel => "the kernel's own ciphers",
        Kind::Clear => "the kernel, without any cipher",
    }
}

fn color(kind: Kind) -> &'static str {
    match kind {
        Kind::Ours => "#2f6fde",
        Kind::Peer => "#a9b4c0",
        Kind::Kernel => "#6aa67a",
        Kind::Clear => "#e8c26a",
    }
}

/// Maps values to positions in the panel, 0 to 1.
struct Scale {
    logarithmic: bool,
    low: f64,
    high: f64,
}

impl Scale {
    fn new(best: Best, panel: &Panel) -> Self {
        let greatest = panel.bars.iter().map(|(_, series)| series.max()).fold(f64::MIN_POSITIVE, f64::max);
        if best == Best::LowestLogarithmic {
            let least = panel.bars.iter().map(|(_, series)| series.min()).fold(greatest, f64::min).max(1e-3);
            // Start a whole decade lower, so that the least value has a bar, too.
            return Self { logarithmic: true, low: 10_f64.powf((least / 1.5).log10().floor()), high: greatest };
        }
        Self { logarithmic: false, low: 0.0, high: greatest }
    }

    fn place(&self, value: f64) -> f64 {
        if self.logarithmic {
            let (low, high) = (self.low.ln(), self.high.ln());
            return ((value.max(self.low).ln() - low) / (high - low).max(1e-9)).clamp(0.0, 1.0);
        }
        (value / self.high).clamp(0.0, 1.0)
    }

    /// Round values, about five of them, or the decades.
    fn ticks(&self) -> Vec<f64> {
        if self.logarithmic {
            let decades = std::iter::successors(Some(self.low), |tick| Some(tick * 10.0));
            return decades.take_while(|&tick| tick <= self.high * 1.001).collect();
        }
        let rough = self.high / 4.0;
        let decade = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|factor| factor * decade).into_iter().find(|&step| step >= rough);
        let step = step.unwrap_or(rough);
        (0..).map(|number| f64::from(number) * step).take_while(|&tick| tick <= self.high * 1.001).collect()
    }
}

/// A tick's label: thousands as `k`.
fn short(value: f64) -> String {
    if value >= 10_000.0 { format!("{}k", value / 1000.0) } else { format!("{value}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let scale = Scale { logarithmic: false, low: 0.0, high: 9376.0 };
        assert_eq!(scale.ticks(), [0.0, 2500.0, 5000.0, 7500.0]);
        let scale = Scale { logarithmic: false, low: 0.0, high: 612_000.0 };
        assert_eq!(scale.ticks(), [0.0, 200_000.0, 400_000.0, 600_000.0]);
        let scale = Scale { logarithmic: true, low: 1.0, high: 5000.0 };
        assert_eq!(scale.ticks(), [1.0, 10.0, 100.0, 1000.0]);
        assert_eq!((scale.place(1.0), scale.place(5000.0)), (0.0, 1.0));
    }
}
