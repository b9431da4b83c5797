//! The `cipe` binary; also `ciped-cb` and `ciped-ci` by name.

fn main() -> std::process::ExitCode {
    tracing_subscriber::fmt().with_max_level(tracing::Level::INFO).init();
    match cipe_user::engine::run(Default::default(), || Ok(println!("ready"))) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
