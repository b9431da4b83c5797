//! The `cipe` binary; also `ciped-cb` and `ciped-ci` by name.

fn main() -> std::process::ExitCode {
    cipe_user::cli::main(std::env::args_os().collect())
}
