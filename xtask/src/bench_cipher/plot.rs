//! Cycles a byte over packets a batch, both logarithmic, a panel for each cipher and direction.

use super::Row;
use std::fmt::Write;

/// Size of a panel's axes, and margins for labels.
const WIDTH: f64 = 380.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 50.0;
const RIGHT: f64 = 110.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 40.0;

/// Limits of the axes: packets a batch, cycles a byte.
const BATCHES: [f64; 2] = [1.0, 128.0];
const CYCLES: [f64; 2] = [0.5, 64.0];

const LIBRARIES: [&str; 4] = ["openssl", "libgcrypt", "botan", "rustcrypto"];
const COLOURS: [(&str, &str); 9] = [
    ("scalar", "#1b6ca8"),
    ("gather", "#8a5fbf"),
    ("planes-pairs", "#c0392b"),
    ("planes-quarters", "#d68910"),
    ("avx2", "#8a5fbf"),
    ("avx512", "#c0392b"),
    ("auto", "#111111"),
    ("auto-many-keys", "#2e8b57"),
    ("", "#888888"),
];

/// Whether a row is of a library, not of a kernel.
pub(super) fn is_library(kernel: &str) -> bool {
    LIBRARIES.contains(&kernel)
}

/// The plot of the rows for 1440-octet packets.
pub(super) fn svg(rows: &[Row]) -> String {
    let (width, height) = (LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM);
    let mut panels = String::new();
    for (column, direction) in ["encrypt", "decrypt"].into_iter().enumerate() {
        for (line, cipher) in ["blowfish", "idea"].into_iter().enumerate() {
            let of = |row: &&Row| row.cipher == cipher && row.direction == direction && row.packet == 1440;
            let rows: Vec<&Row> = rows.iter().filter(of).collect();
            let (x, y) = (LEFT + column as f64 * width, TOP + line as f64 * height);
            let _ = writeln!(panels, "<g transform=\"translate({x} {y})\">{}</g>", panel(cipher, direction, &rows));
        }
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{panels}</svg>\n",
        2.0 * width,
        2.0 * height,
    )
}

fn panel(cipher: &str, direction: &str, rows: &[&Row]) -> String {
    let mut out = format!(
        "<text y=\"-18\" font-size=\"14\">{cipher} {direction}, packets of 1440 octets</text>\
         <text x=\"-40\" y=\"-4\">TSC cycles a byte</text>\
         <text x=\"{}\" y=\"{}\" text-anchor=\"middle\">packets a batch</text>",
        WIDTH / 2.0,
        HEIGHT + 34.0,
    );
    for batch in [1, 2, 4, 8, 16, 32, 48, 64, 128] {
        let x = across(f64::from(batch));
        let _ = write!(out, "<path d=\"M{x} 0V{HEIGHT}\" stroke=\"#eee\"/>");
        let _ = write!(out, "<text x=\"{x}\" y=\"{}\" text-anchor=\"middle\">{batch}</text>", HEIGHT + 16.0);
    }
    for cycles in [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0] {
        let y = down(cycles);
        let _ = write!(out, "<path d=\"M0 {y}H{WIDTH}\" stroke=\"#eee\"/>");
        let _ = write!(out, "<text x=\"-6\" y=\"{}\" text-anchor=\"end\">{cycles}</text>", y + 4.0);
    }
    let mut labels: Vec<(f64, &str, &str)> = Vec::new();
    let mut kernels: Vec<&str> = rows.iter().map(|row| row.kernel.as_str()).collect();
    kernels.dedup();
    for kernel in kernels {
        let points = rows.iter().filter(|row| row.kernel == kernel);
        let points: Vec<(f64, f64)> =
            points.filter_map(|row| Some((across(row.batch as f64), down(row.cycles_per_byte?)))).collect();
        let Some(&(_, last)) = points.last() else { continue };
        let colour = COLOURS.iter().find(|(name, _)| *name == kernel).unwrap_or(&COLOURS[COLOURS.len() - 1]).1;
        let (path, dashes) = if is_library(kernel) {
            (format!("M0 {last}H{WIDTH}"), " stroke-dasharray=\"5 4\"")
        } else {
            let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
            (
                format!("M{}", points.join("L")),
                if kernel.starts_with("auto") { " stroke-dasharray=\"2 3\"" } else { "" },
            )
        };
        let _ = write!(out, "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dashes}/>");
        labels.push((last, kernel, colour));
    }
    labels.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut free = f64::NEG_INFINITY;
    for (y, kernel, colour) in labels {
        let y = y.max(free);
        free = y + 13.0;
        let _ = write!(out, "<text x=\"{}\" y=\"{}\" fill=\"{colour}\">{kernel}</text>", WIDTH + 6.0, y + 4.0);
    }
    out
}

fn across(batch: f64) -> f64 {
    WIDTH * (batch / BATCHES[0]).log2() / (BATCHES[1] / BATCHES[0]).log2()
}

fn down(cycles: f64) -> f64 {
    HEIGHT * (CYCLES[1] / cycles.clamp(CYCLES[0], CYCLES[1])).log2() / (CYCLES[1] / CYCLES[0]).log2()
}
