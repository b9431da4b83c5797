//! `cargo xtask test --kernel`: tests on other kernels.

use std::fs;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::kernel::{Kernel, Wanted};
use super::machine::{self, End, Shape};
use super::plan::{Plan, Step};
use super::table::{Outcome, Reader};
use super::{need_guests, programs};
use crate::tools::{self, SCENARIOS, UNIT_TESTS};

/// Time limit of the tests of a file, in seconds.
const DEADLINE_SECONDS: u64 = 3600;

/// Factor by which deadlines are longer in an emulated guest with the host's clock.
const SLOWNESS: &str = "10";

/// Environment variable with another factor, for a busy host.
const SLOWNESS_VARIABLE: &str = "CIPE_TEST_SLOWNESS";

/// Most guests that are started for a kernel if emulation itself fails.
const MAX_GUEST_ATTEMPTS: u32 = 4;

/// Environment variable with the eBPF object to use in place of the committed one.
const OBJECT: &str = "CIPE_BPF_OBJECT";

/// The unit tests of cipe-user, as `--only` names them.
const LIBRARY: &str = "cipe_user";

/// The unit tests that load each program of the eBPF object, and probe the kernel for missing features.
const LOADS: &[&str] = &["every_program_loads", "a_kernel_lacks_only_what_came_after_it"];

/// The kernels of `--kernel all`: Debian 12's, Debian 13's, the last long-term line, the newest.
const ALL: &[Wanted] = &[Wanted::Line(6, 1), Wanted::Line(6, 12), Wanted::Line(6, 18), Wanted::Newest];

/// The requested kernels.
#[derive(Clone, Debug)]
pub(crate) struct Kernels(Vec<Wanted>);

impl std::str::FromStr for Kernels {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let one = |word: &str| if word == "all" { Ok(ALL.to_vec()) } else { word.parse().map(|kernel| vec![kernel]) };
        let lists: Result<Vec<_>, String> = text.split(',').map(one).collect();
        Ok(Self(lists?.concat()))
    }
}

/// The requested tests.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Which<'a> {
    /// All scenarios.
    All,
    /// Those of the files named, or `FILE::PART` for the tests of that file whose names contain PART.
    Only(&'a [String]),
    /// Only tests that each program of the eBPF object loads, both of the committed object and of the one in `CIPE_BPF_OBJECT`,
    /// and that the kernel lacks the features of later kernels.
    Loads,
}

/// The requested tests of one program.
struct Choice {
    /// Its name in the table.
    name: String,
    program: PathBuf,
    /// Parts of the names of tests; none for all.
    parts: Vec<String>,
    /// The eBPF object in place of the committed one.
    object: Option<String>,
}

/// Runs tests on each kernel, on `at_once` of them at the same time, and prints a table.
///
/// # Errors
/// Files that failed, or a guest that did not start or ended early.
pub(crate) fn run(kernels: &Kernels, which: Which<'_>, shape: &Shape, at_once: usize) -> Result<()> {
    need_guests()?;
    tools::clean_up_on_signals(machine::end_all)?;
    let cipe = match which {
        Which::Loads => None,
        // Emulation is slow, and the program has deadlines of its own, so a guest gets an optimised build.
        Which::All | Which::Only(_) => Some(tools::build_cipe(true)?),
    };
    let choices = choices(which)?;
    let found: Result<Vec<Kernel>> = kernels.0.iter().map(|&wanted| Kernel::get(wanted)).collect();
    let found = found?;
    let (mut outcomes, mut broken) = (Vec::new(), Vec::new());
    for some in found.chunks(at_once.max(1)) {
        let ended: Vec<_> = std::thread::scope(|scope| {
            let (cipe, choices) = (cipe.as_deref(), &choices[..]);
            let start = |kernel| scope.spawn(move || on_kernel(kernel, cipe, choices, shape));
            let threads: Vec<_> = some.iter().map(start).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
        });
        for (kernel, (mut of_kernel, result)) in some.iter().zip(ended) {
            outcomes.append(&mut of_kernel);
            if let Err(error) = result {
                eprintln!("{}: {error:#}", kernel.release);
                broken.push(kernel.release.clone());
            }
        }
    }
    println!("\n==> summary");
    for outcome in &outcomes {
        println!("{}", outcome.line());
    }
    let failed = outcomes.iter().filter(|outcome| !outcome.is_right());
    broken.extend(failed.map(|outcome| format!("{} on {}", outcome.name, outcome.kernel)));
    if !broken.is_empty() {
        bail!("failed: {}", broken.join(", "));
    }
    Ok(())
}

fn choices(which: Which<'_>) -> Result<Vec<Choice>> {
    let fresh = std::env::var(OBJECT).ok();
    let only = match which {
        Which::All => &[][..],
        Which::Only(only) => only,
        Which::Loads => return objects(fresh.as_deref()),
    };
    let mut choices = Vec::new();
    let mut found = programs::build(SCENARIOS, "test")?;
    if only.iter().any(|entry| entry.split("::").next() == Some(LIBRARY)) {
        found.extend(programs::build(UNIT_TESTS, "lib")?);
    }
    for entry in only {
        let file = entry.split("::").next().unwrap_or_default();
        ensure!(found.iter().any(|(name, _)| name == file), "no file of tests is called {file}");
    }
    for (name, program) in found {
        if let Some(parts) = wanted(&name, only) {
            choices.push(Choice { name, program, parts, object: fresh.clone() });
        }
    }
    Ok(choices)
}

/// The tests that the committed object loads, and the fresh one, if there is one.
fn objects(fresh: Option<&str>) -> Result<Vec<Choice>> {
    let programs = programs::build(UNIT_TESTS, "lib")?;
    let (_, program) = programs.into_iter().find(|(name, _)| name == LIBRARY).context("cipe-user has unit tests")?;
    let choice = |name: &str, object: Option<&str>| Choice {
        name: name.to_owned(),
        program: program.clone(),
        parts: LOADS.iter().copied().map(str::to_owned).collect(),
        object: object.map(str::to_owned),
    };
    let fresh = fresh.map(|object| choice("fresh object", Some(object)));
    Ok(std::iter::once(choice("committed object", None)).chain(fresh).collect())
}

/// The requested tests of a file: `None` for none, else parts of names; an empty list means all.
fn wanted(file: &str, only: &[String]) -> Option<Vec<String>> {
    if only.is_empty() {
        return Some(Vec::new());
    }
    let of_file = only.iter().filter_map(|entry| entry.strip_prefix(file));
    let parts: Vec<&str> = of_file.filter(|rest| rest.is_empty() || rest.starts_with("::")).collect();
    if parts.is_empty() {
        return None;
    }
    // The whole file if it is given without a part.
    let parts: Option<Vec<String>> = parts.into_iter().map(|part| part.strip_prefix("::").map(str::to_owned)).collect();
    Some(parts.unwrap_or_default())
}

/// The results on one kernel, as far as it got.
fn on_kernel(kernel: &Kernel, cipe: Option<&Path>, choices: &[Choice], shape: &Shape) -> (Vec<Outcome>, Result<()>) {
    let mut reader = Reader::new(&kernel.release);
    let result = run_guests(kernel, cipe, choices, shape, &mut reader);
    (reader.outcomes, result)
}

fn run_guests(
    kernel: &Kernel,
    cipe: Option<&Path>,
    choices: &[Choice],
    shape: &Shape,
    reader: &mut Reader,
) -> Result<()> {
    let home = machine::home(&format!("{}-{}", kernel.release, std::process::id()));
    let kept = home.join("programs");
    fs::create_dir_all(&kept)?;
    // A build meanwhile must not change the programs that the guest runs.
    let cipe = cipe.map(|cipe| keep(cipe, &kept)).transpose()?;
    let slowness = if machine::has_kvm() || shape.counts_instructions() { "1" } else { SLOWNESS };
    let steps: Result<Vec<Step>> =
        choices.iter().map(|choice| step(choice, cipe.as_deref(), &kept, slowness)).collect();
    let steps = steps?;
    let way = if machine::has_kvm() { "KVM" } else { "emulation" };
    println!("\n==> {}: {} file(s) of tests by {way}", kernel.release, steps.len());
    let start = Instant::now();
    let mut guests = 1;
    let result = loop {
        let plan = Plan { steps: steps[reader.outcomes.len()..].to_vec() };
        match machine::run(kernel, &plan, shape, &home, |told| reader.take(told, start)) {
            Ok(End::Done) => break Ok(()),
            Ok(End::StaleCode) if guests < MAX_GUEST_ATTEMPTS => {
                guests += 1;
                println!(
                    "{}: qemu has emulated code that the kernel had changed already: guest {guests} takes what is left",
                    kernel.release
                );
                reader.forget_unfinished();
            }
            Ok(End::StaleCode) => break Err(anyhow!("{guests} guests were ended by faults of the emulation")),
            Err(error) => break Err(error),
        }
    };
    fs::remove_dir_all(&kept)?;
    println!("{}: {:.0} s in all; logs: {}", kernel.release, start.elapsed().as_secs_f64(), home.display());
    result
}

/// The step in which the guest runs the tests of one program.
fn step(choice: &Choice, cipe: Option<&Path>, kept: &Path, slowness: &str) -> Result<Step> {
    let arguments = ["--test-threads=1", "--show-output", "--color=never"].into_iter();
    let variables = [
        ("CIPE_BIN", cipe.map(|cipe| cipe.display().to_string())),
        (SLOWNESS_VARIABLE, Some(std::env::var(SLOWNESS_VARIABLE).unwrap_or_else(|_| slowness.to_owned()))),
        (OBJECT, choice.object.clone()),
    ];
    let variables = variables.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    Ok(Step {
        name: choice.name.clone(),
        program: keep(&choice.program, kept)?,
        arguments: arguments.chain(choice.parts.iter().map(String::as_str)).map(str::to_owned).collect(),
        folder: tools::workspace().join("tests"),
        environment: variables.collect(),
        deadline: DEADLINE_SECONDS,
    })
}

/// A hard link to a program, which a later build does not change.
fn keep(program: &Path, folder: &Path) -> Result<PathBuf> {
    let name = program.file_name().with_context(|| program.display().to_string())?;
    let kept = folder.join(name);
    if !kept.is_file() && fs::hard_link(program, &kept).is_err() {
        fs::copy(program, &kept).with_context(|| program.display().to_string())?;
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_named_whole_or_by_parts_of_its_tests() {
        let only = ["bed", "mtu::cut", "mtu::told", "lan::a", "lan"].map(str::to_owned);
        assert_eq!(wanted("bed", &only), Some(vec![]));
        assert_eq!(wanted("mtu", &only), Some(vec!["cut".to_owned(), "told".to_owned()]));
        assert_eq!(wanted("lan", &only), Some(vec![]));
        assert_eq!(wanted("be", &only), None);
        assert_eq!(wanted("be", &[]), Some(vec![]));
    }
}
