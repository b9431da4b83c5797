//! Checks in machine code that the compiler kept the constant-time kernels constant in time.
//!
//! Plaintext, ciphertext and all data derived from keys are in vector and mask registers there. An address or a branch can
//! depend on them only by a gather or scatter, or by a move to a general register or to the flags. So none of these
//! instructions may occur.

use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::Command;

/// Beginnings of the demangled names of the kernels' functions; all are compiled for more than the base CPU, so the compiler
/// does not inline them into code for the base CPU.
const KERNELS: [&str; 3] =
    ["cipe_user::cipher::blowfish::planes::", "cipe_user::cipher::idea::avx2::", "cipe_user::cipher::idea::avx512::"];
const WORKERS: [&str; 4] = ["encrypt", "encrypt_uniform", "encrypt_mixed", "decrypt"];

/// Inspects every constant-time kernel in `program`. Without objdump it prints that and does nothing.
///
/// # Errors
/// A forbidden instruction is found, or a kernel is not found.
pub(super) fn run(program: &Path) -> Result<()> {
    if !cfg!(target_arch = "x86_64") {
        println!("constant time: not inspected; the vector kernels are for x86-64");
        return Ok(());
    }
    let objdump =
        Command::new("objdump").args(["--disassemble", "--demangle", "--no-show-raw-insn"]).arg(program).output();
    let Ok(listing) = objdump else {
        println!("constant time: not inspected; objdump (binutils) is not installed");
        return Ok(());
    };
    ensure!(listing.status.success(), "objdump: {}", String::from_utf8_lossy(&listing.stderr));
    let found = inspect(&String::from_utf8_lossy(&listing.stdout))?;
    for kernel in KERNELS {
        ensure!(found.iter().any(|name| name.starts_with(kernel)), "{kernel}: not in {}", program.display());
    }
    println!("constant time: inspected {}", found.join(", "));
    Ok(())
}

/// The inspected functions.
fn inspect(listing: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut inside = false;
    for line in listing.lines() {
        if let Some(name) = line.strip_suffix(">:").and_then(|line| Some(line.split_once('<')?.1)) {
            let name = name.split("::h").next().unwrap_or(name);
            let worker = |rest: &str| WORKERS.contains(&rest.split("::").next().unwrap_or(rest));
            inside = KERNELS.iter().any(|kernel| name.strip_prefix(kernel).is_some_and(worker));
            if inside {
                found.push(name.to_owned());
            }
        } else if inside {
            let instruction = line.split('\t').nth(1).unwrap_or_default();
            let function = found.last().context("inside of a function")?;
            ensure!(!leaks(instruction), "{function}: {instruction}: what is secret must stay in vectors");
        }
    }
    Ok(found)
}

/// Whether an instruction, in AT&T syntax, takes an address from vectors, or moves data from vector or mask registers to
/// registers or flags that addresses and branches depend on.
fn leaks(instruction: &str) -> bool {
    let (mnemonic, operands) = instruction.split_once(char::is_whitespace).unwrap_or((instruction, ""));
    let operands: Vec<&str> = operands.trim().split(',').collect();
    let from_vector = |operand: &&str| ["%xmm", "%ymm", "%zmm", "%k"].iter().any(|kind| operand.starts_with(kind));
    let general = operands.last().is_some_and(|last| last.starts_with('%') && !from_vector(last));
    let flags = ["kortest", "ktest", "vptest", "ptest", "vtestp", "vucomi", "vcomi", "ucomi", "comi"];
    mnemonic.contains("gather")
        || mnemonic.contains("scatter")
        || flags.iter().any(|prefix| mnemonic.starts_with(prefix))
            && !["vptestm", "vptestnm"].iter().any(|mask| mnemonic.starts_with(mask))
        || general && operands.iter().any(from_vector)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lets_secrets_out_is_told_from_what_does_not() {
        for leak in [
            "vpgatherdd (%rsi,%zmm17,4),%zmm3{%k2}",
            "vmovd  %xmm0,%eax",
            "kmovq  %k1,%rax",
            "vpextrq $0x1,%xmm0,%rdx",
            "kortestq %k1,%k1",
            "vptest %ymm0,%ymm0",
        ] {
            assert!(leaks(leak), "{leak}");
        }
        for fine in [
            "vpermt2b 0x40(%rbx),%zmm13,%zmm12",
            "vptestnmw %zmm1,%zmm2,%k1",
            "vmovdqu8 %zmm1,%zmm12{%k1}",
            "vpbroadcastd -0x4(%rdi,%r9,1),%zmm6",
            "vpmovb2m %zmm13,%k1",
            "kmovq  %rax,%k1",
            "add    $0x10,%r9",
            "jne    25cb0",
        ] {
            assert!(!leaks(fine), "{fine}");
        }
    }

    #[test]
    fn only_the_kernels_are_inspected() {
        let other = "0000 <cipe_user::cipher::lanes::encrypt_set::h0>:\n 1:\tvmovd  %xmm0,%eax\n";
        assert!(inspect(other).expect("nothing to object to").is_empty());
        let kernel = other.replace("lanes::encrypt_set", "blowfish::planes::encrypt");
        assert!(inspect(&kernel).is_err());
    }
}
