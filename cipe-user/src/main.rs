//! The `cipe` binary; also `ciped-cb` and `ciped-ci` by name.

fn main() -> std::process::ExitCode {
    std::process::ExitCode::FAILURE
}
