//! Whether engine and daemons watch each other: an engine that hangs is killed, and replaced.

/// Environment variable that forbids it, for those who stop an engine with a debugger or SIGSTOP.
pub const VARIABLE: &str = "CIPE_WATCHDOG";

/// Whether the environment allows it: unless [`VARIABLE`] is `no` or `0`.
pub fn is_allowed() -> bool {
    !std::env::var_os(VARIABLE).is_some_and(|value| value == "no" || value == "0")
}
