//! The `cipe` program; it is also `ciped-cb`, `ciped-ci`, `ciped-db` and `ciped-di`, by name.

fn main() -> std::process::ExitCode {
    cipe_user::cli::main(std::env::args_os().collect())
}
