//! `cargo xtask bench cipher`: every cipher kernel of this CPU beside the usual libraries, in one run.

mod inspect;
mod plot;

use crate::tools;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Measure the cipher kernels beside OpenSSL, libgcrypt, Botan and RustCrypto
#[derive(clap::Args, Debug)]
pub(crate) struct BenchCipher {
    /// Write one JSON object a figure: cipher, kernel, direction, packet, batch, mbps, cycles_per_byte
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where the plot goes
    #[arg(long, value_name = "FILE", default_value = "docs/cipher-bench.svg")]
    plot: PathBuf,
    /// Install the libraries to compare with (Debian, root)
    #[arg(long)]
    install: bool,
    /// Times that ours and theirs are measured in turn; the best counts
    #[arg(long, default_value_t = 3)]
    passes: usize,
    /// Milliseconds a figure and pass
    #[arg(long, default_value_t = 20)]
    millis: u64,
}

/// Debian's packages of the libraries to compare with.
const PACKAGES: [&str; 6] = ["gcc", "g++", "pkg-config", "libssl-dev", "libgcrypt20-dev", "libbotan-2-dev"];

/// One figure.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Row {
    cipher: String,
    /// The kernel, `auto` for the engine's choice, `auto-many-keys` for that with a key for each packet, or a library's
    /// name.
    kernel: String,
    direction: String,
    packet: usize,
    batch: usize,
    mbps: f64,
    cycles_per_byte: Option<f64>,
}

/// Builds the programs, measures them in turn, prints table and ratios, and writes the plot.
///
/// # Errors
/// A program of ours does not build or run. A missing library is left out, with a line about it.
pub(crate) fn run(args: &BenchCipher) -> Result<()> {
    if args.install {
        shell(Command::new("apt-get").args(["install", "--yes", "--no-install-recommends"]).args(PACKAGES))?;
    }
    let build = ["build", "--release", "--package", "cipe-user", "--bin", "cipe", "--example", "rustcrypto_cbc"];
    tools::check(&mut tools::cargo(&build))?;
    let (root, target) = (tools::workspace(), tools::target());
    let release = target.join("release");
    inspect::run(&release.join("cipe"))?;
    let libraries = build_anchors(&target.join("anchors"))?;
    let millis = args.millis.to_string();

    let mut rows: Vec<Row> = Vec::new();
    for pass in 1..=args.passes {
        eprintln!("pass {pass} of {}", args.passes);
        let mut ours = Command::new(release.join("cipe"));
        ours.args(["bench-cipher", "--json", "--millis", &millis]);
        let mut rustcrypto = Command::new(release.join("examples/rustcrypto_cbc"));
        rustcrypto.arg(&millis);
        for line in output(&mut ours)?.lines().chain(output(&mut rustcrypto)?.lines()) {
            keep_best(&mut rows, serde_json::from_str(line).with_context(|| format!("not a figure: {line}"))?);
        }
        for library in &libraries {
            for line in output(Command::new(library).arg(&millis))?.lines() {
                keep_best(&mut rows, parse_anchor(line).with_context(|| format!("not a figure: {line}"))?);
            }
        }
    }

    print_table(&rows);
    print_ratios(&rows);
    let plot = root.join(&args.plot);
    fs::write(&plot, plot::svg(&rows)).with_context(|| format!("{}: cannot write the plot", plot.display()))?;
    println!("\nplot: {}", plot.display());
    if let Some(path) = &args.json {
        let lines: Vec<String> = rows.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
        fs::write(path, lines.join("\n") + "\n").with_context(|| format!("{}: cannot write", path.display()))?;
    }
    Ok(())
}

/// Compiles the programs that measure the libraries, for each installed library.
fn build_anchors(into: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(into)?;
    let mut built = Vec::new();
    let mut compile = |compiler: &str, name: &str, extension: &str, source: &str, flags: &[String]| -> Result<()> {
        let (file, program) = (into.join(format!("{name}.{extension}")), into.join(name));
        fs::write(&file, source)?;
        shell(Command::new(compiler).arg("-O2").arg(&file).arg("-o").arg(&program).args(flags))?;
        built.push(program);
        Ok(())
    };
    for (library, define) in [("libcrypto", "-DOPENSSL"), ("libgcrypt", "-DGCRYPT")] {
        if let Some(mut flags) = package_flags(library) {
            flags.push(define.into());
            compile("cc", library, "c", include_str!("bench_cipher/anchors.c"), &flags)?;
        }
    }
    if let Some(flags) = package_flags("botan-2") {
        compile("c++", "botan", "cpp", include_str!("bench_cipher/anchors.cpp"), &flags)?;
    }
    Ok(built)
}

/// The compiler's flags for a library; none, with a printed line, if it is not installed.
fn package_flags(library: &str) -> Option<Vec<String>> {
    let found = Command::new("pkg-config").args(["--cflags", "--libs", library]).output().ok();
    let Some(found) = found.filter(|found| found.status.success()) else {
        println!("left out: {library} (not installed; --install does it on Debian)");
        return None;
    };
    Some(String::from_utf8_lossy(&found.stdout).split_whitespace().map(String::from).collect())
}

/// A line of an anchor program: cipher kernel direction packet seconds cycles.
fn parse_anchor(line: &str) -> Option<Row> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [cipher, kernel, direction, packet, seconds, cycles] = words[..] else { return None };
    let packet: usize = packet.parse().ok()?;
    let (seconds, cycles): (f64, f64) = (seconds.parse().ok()?, cycles.parse().ok()?);
    Some(Row {
        cipher: cipher.into(),
        kernel: kernel.into(),
        direction: direction.into(),
        packet,
        batch: 1,
        mbps: packet as f64 / seconds / 1e6,
        cycles_per_byte: (cycles > 0.0).then(|| cycles / packet as f64),
    })
}

fn keep_best(rows: &mut Vec<Row>, row: Row) {
    let key = |row: &Row| (row.cipher.clone(), row.kernel.clone(), row.direction.clone(), row.packet, row.batch);
    match rows.iter_mut().find(|old| key(old) == key(&row)) {
        Some(old) if old.mbps < row.mbps => *old = row,
        Some(_) => {}
        None => rows.push(row),
    }
}

fn print_table(rows: &[Row]) {
    println!(
        "{:9} {:11} {:8} {:>6} {:>5} {:>8} {:>12}",
        "cipher", "kernel", "", "packet", "batch", "MB/s", "cycles/byte"
    );
    for Row { cipher, kernel, direction, packet, batch, mbps, cycles_per_byte } in rows {
        let cycles = cycles_per_byte.map_or("-".into(), |cycles| format!("{cycles:.2}"));
        println!("{cipher:9} {kernel:11} {direction:8} {packet:>6} {batch:>5} {mbps:>8.0} {cycles:>12}");
    }
}

/// Ratios of ours to each library, for 1440-octet packets.
fn print_ratios(rows: &[Row]) {
    println!("\ntimes as fast as the library, packets of 1440 octets");
    for cipher in ["blowfish", "idea"] {
        for direction in ["encrypt", "decrypt"] {
            let of = |row: &&Row| row.cipher == cipher && row.direction == direction && row.packet == 1440;
            for library in rows.iter().filter(of).filter(|row| plot::is_library(&row.kernel)) {
                print!("{cipher:9} {direction} {:11}", library.kernel);
                for batch in [1, 8, 48, 128] {
                    let ours = rows.iter().filter(of).find(|row| row.kernel == "auto" && row.batch == batch);
                    if let Some(ours) = ours {
                        print!("  batch {batch}: {:5.2}", ours.mbps / library.mbps);
                    }
                }
                println!();
            }
        }
    }
}

fn output(command: &mut Command) -> Result<String> {
    let done = command.output().with_context(|| format!("{command:?}: cannot run"))?;
    ensure!(done.status.success(), "{command:?}: {}: {}", done.status, String::from_utf8_lossy(&done.stderr));
    Ok(String::from_utf8(done.stdout)?)
}

fn shell(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("{command:?}: cannot run"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_anchor_line_becomes_a_row_and_garbage_does_not() {
        let row = parse_anchor("blowfish openssl encrypt 1440 0.000009 24000").expect("a row");
        assert_eq!((row.batch, row.mbps.round() as u64, row.cycles_per_byte), (1, 160, Some(24000.0 / 1440.0)));
        assert!(parse_anchor("no such line").is_none());
    }

    #[test]
    fn the_better_of_two_figures_is_kept() {
        let row = |seconds: &str| parse_anchor(&format!("idea botan decrypt 64 {seconds} 0")).expect("a row");
        let mut rows = vec![row("2e-6")];
        keep_best(&mut rows, row("1e-6"));
        keep_best(&mut rows, row("3e-6"));
        assert_eq!((rows.len(), rows[0].mbps.round() as u64), (1, 64));
    }
}
