//! `cipe genkey`.

use std::process::ExitCode;

use anyhow::Context;
use zeroize::Zeroizing;

/// Prints 16 random octets as 32 hexadecimal digits.
pub(super) fn run() -> anyhow::Result<ExitCode> {
    let mut key = Zeroizing::new([0; 16]);
    getrandom::fill(&mut *key).context("the system gives no random numbers")?;
    println!("{}", *Zeroizing::new(hex::encode(*key)));
    Ok(ExitCode::SUCCESS)
}
