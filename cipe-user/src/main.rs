//! The `cipe` program; it is also `ciped-cb`, `ciped-ci`, `ciped-db` and `ciped-di`, by name.

/// Wipes memory when it is freed, since it may have held a key.
#[global_allocator]
static WIPING: zeroizing_alloc::ZeroAlloc<std::alloc::System> = zeroizing_alloc::ZeroAlloc(std::alloc::System);

fn main() -> std::process::ExitCode {
    cipe_user::cli::main(std::env::args_os().collect())
}
