//! A flame graph: the width of a function is its time on the stack, and it is above its caller; the thread is at the bottom.

use std::collections::BTreeMap;

use super::stacks::{Frame, Stacks};
use crate::svg::Svg;

const WIDTH: f64 = 1400.0;
const MARGIN: f64 = 12.0;
const ROW: f64 = 17.0;
const TOP: f64 = 62.0;
/// Least width of a drawn function, in pixels.
const NARROW: f64 = 0.4;
/// Approximate width of a letter, in pixels.
const LETTER: f64 = 6.1;

/// A function and its callees.
#[derive(Default)]
struct Node {
    count: u64,
    calls: BTreeMap<Frame, Self>,
}

impl Node {
    fn add(&mut self, frames: &[Frame], count: u64) {
        self.count += count;
        if let Some((frame, rest)) = frames.split_first() {
            self.calls.entry(frame.clone()).or_default().add(rest, count);
        }
    }

    /// Drawn rows of this function and its callees.
    fn depth(&self, least: u64) -> usize {
        let deepest = self.calls.values().filter(|node| node.count >= least).map(|node| node.depth(least)).max();
        1 + deepest.unwrap_or_default()
    }
}

/// The graph of all stacks.
pub(super) fn svg(title: &str, stacks: &Stacks) -> String {
    let mut threads: BTreeMap<&str, Node> = BTreeMap::new();
    for (thread, frames, count) in stacks.iter() {
        threads.entry(thread).or_default().add(frames, count);
    }
    let total = stacks.total().max(1);
    let pixels = (WIDTH - 2.0 * MARGIN) / total as f64;
    let least = (NARROW / pixels).ceil() as u64;
    let rows = threads.values().map(|node| node.depth(least)).max().unwrap_or_default();
    let height = TOP + ROW * rows as f64 + MARGIN;
    let mut svg = Svg::new(WIDTH, height);
    svg.text((MARGIN, 28.0), "fill=\"#1f2933\" font-size=\"16\" font-weight=\"600\"", title);
    let about = format!(
        "{total} samples of tunnel, load and softirqs; blue: user space, orange: kernel, grey: thread. Point at a function."
    );
    svg.text((MARGIN, 47.0), "fill=\"#7b8794\"", &about);
    let mut canvas = Canvas { svg, pixels, total, least };
    let (mut x, bottom) = (MARGIN, height - MARGIN - ROW);
    for (thread, node) in &threads {
        canvas.draw((x, bottom), thread, "#c3ccd5", node);
        x += node.count as f64 * pixels;
    }
    canvas.svg.finish()
}

struct Canvas {
    svg: Svg,
    /// Width of a sample.
    pixels: f64,
    total: u64,
    /// Samples of the narrowest function that is drawn.
    least: u64,
}

impl Canvas {
    fn draw(&mut self, (x, y): (f64, f64), name: &str, color: &str, node: &Node) {
        if node.count < self.least {
            return;
        }
        let width = node.count as f64 * self.pixels;
        let share = node.count as f64 * 100.0 / self.total as f64;
        self.svg.hinted(&format!("{name}: {share:.2} %, {} samples", node.count), |svg| {
            svg.rect((x, y), ((width - 0.5).max(0.3), ROW - 1.0), &format!("rx=\"1.5\" fill=\"{color}\""));
            if let Some(label) = shortened(name, ((width - 6.0) / LETTER).max(0.0) as usize) {
                svg.text((x + 3.0, y + 12.0), "fill=\"#1f2933\" font-size=\"11\"", &label);
            }
        });
        let mut at = x;
        for (frame, call) in &node.calls {
            self.draw((at, y - ROW), &frame.name, &color_of(frame), call);
            at += call.count as f64 * self.pixels;
        }
    }
}

/// The name, shortened to this number of letters; `None` if it would be too short to read.
pub(super) fn shortened(name: &str, letters: usize) -> Option<String> {
    if name.chars().count() <= letters {
        return Some(name.to_owned());
    }
    (letters >= 4).then(|| name.chars().take(letters - 1).chain(['…']).collect())
}

/// A colour by the name, so that neighbours differ and a function has the same colour everywhere.
fn color_of(frame: &Frame) -> String {
    let shade = frame.name.bytes().fold(7_u32, |sum, octet| sum.wrapping_mul(31).wrapping_add(octet.into())) % 16;
    let (hue, lightness) = if frame.kernel { (30, 62 + shade) } else { (215, 66 + shade) };
    format!("hsl({hue},78%,{lightness}%)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_cut_only_where_it_must_be() {
        assert_eq!(shortened("veth_xmit", 9).as_deref(), Some("veth_xmit"));
        assert_eq!(shortened("veth_xmit", 6).as_deref(), Some("veth_…"));
        assert_eq!(shortened("veth_xmit", 3), None);
    }

    #[test]
    fn callers_stand_below_what_they_call() {
        let stacks = Stacks::parse("t 1 \n\tffffffff81000000 inner\n\t1000 outer\n", |_| true);
        let picture = svg("title", &stacks);
        let y = |name: &str| {
            let after = picture.split_once(&format!("<title>{name}:")).expect("drawn").1;
            let value = after.split_once("y=\"").expect("a rectangle").1;
            value.split_once('"').expect("an end").0.parse::<f64>().expect("a number")
        };
        assert!(y("inner") < y("outer") && y("outer") < y("t"));
    }
}
