//! `cipe vectors`: runs packets with known results; counts passed and failed by cipher variant.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;

use crate::cipher::Lanes;
use crate::wire::vectors::Vectors;

/// Checks the cipher engine against a file of known answers.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// File in the format of cipe-v3.json.
    file: PathBuf,
}

/// Runs the file, prints a line for each failed case, and a table; exits with 1 on a failure.
///
/// # Errors
/// The file cannot be read or is not in the format.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let file = args.file.display();
    let text = std::fs::read_to_string(&args.file).with_context(|| format!("{file}: cannot be read"))?;
    let vectors = Vectors::parse(&text).map_err(|error| anyhow::anyhow!("{file}: {error}"))?;
    let report = Report::of(&vectors);
    print!("{report}");
    Ok(if report.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The results of all cases.
struct Report<'a> {
    /// Passed and failed, by cipher and variant.
    counts: BTreeMap<(&'a str, &'a str), (usize, usize)>,
    /// Name of the case, and the difference.
    failures: Vec<(&'a str, String)>,
}

impl<'a> Report<'a> {
    fn of(vectors: &'a Vectors) -> Self {
        let mut lanes = Lanes::new();
        let mut report = Self { counts: BTreeMap::new(), failures: Vec::new() };
        for case in &vectors.cases {
            let (passed, failed) = report.counts.entry((&case.cipher, &case.cipher_variant)).or_default();
            match case.check(&mut lanes) {
                Ok(()) => *passed += 1,
                Err(difference) => {
                    *failed += 1;
                    report.failures.push((&case.name, difference));
                }
            }
        }
        report
    }
}

impl std::fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (name, difference) in &self.failures {
            writeln!(f, "FAILED {name}: {difference}")?;
        }
        writeln!(f, "{:<10} {:<14} {:>7} {:>7}", "cipher", "variant", "passed", "failed")?;
        for ((cipher, variant), (passed, failed)) in &self.counts {
            writeln!(f, "{cipher:<10} {variant:<14} {passed:>7} {failed:>7}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = include_str!("../../../tests/vectors/cipe-v3.json");

    #[test]
    fn the_table_counts_by_cipher_variant() {
        let wrong = FILE.replace("67161bfd", "67161bfe");
        let vectors = Vectors::parse(&wrong).unwrap();
        let expected = "\
FAILED bf-data-13-dyn: CRC differs
cipher     variant         passed  failed
blowfish   le32-words          35       1
idea       le16-words          36       0
idea       standard-be16       36       0
";
        assert_eq!(Report::of(&vectors).to_string(), expected);
    }

    #[test]
    fn a_failed_case_or_a_bad_file_is_a_failure() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("vectors.json");
        let run_on = |text: &str| {
            std::fs::write(&file, text).unwrap();
            run(Args { file: file.clone() })
        };
        assert_eq!(run_on(FILE).unwrap(), ExitCode::SUCCESS);
        assert_eq!(run_on(&FILE.replace("67161bfd", "67161bfe")).unwrap(), ExitCode::FAILURE);
        let message = run_on("{}").unwrap_err().to_string();
        assert!(
            message
                .ends_with("vectors.json: not in the format of cipe-v3.json: missing field `cases` at line 1 column 2")
        );
        assert!(run(Args { file: directory.path().into() }).is_err());
    }
}
