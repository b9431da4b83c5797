//! Many daemons at once start one engine and connect to it; nothing is left when it has ended.
//!
//! Without the usual harness: this program also acts as the engine, which must write nothing but "ready" on stdout.

#![expect(clippy::unwrap_used, reason = "all of this file is a test, which clippy sees by the harness only")]

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use cipe_user::control::client::{Client, ConnectError};
use cipe_user::control::launch::{Launch, Readiness, report_failure};
use cipe_user::control::protocol::{Event, Request};
use cipe_user::control::run_dir::RunDir;
use cipe_user::control::server::Server;

const DAEMONS: usize = 24;

fn main() {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    match arguments.as_slice() {
        [role, base, mode] if role == "engine" => runtime.block_on(engine(Path::new(base), mode == "works")),
        // Tools ask for the list of tests.
        [first, ..] if first == "--list" => println!("start: test"),
        _ => {
            runtime.block_on(many_daemons_at_once_start_one_engine());
            runtime.block_on(an_engine_that_fails_tells_every_daemon_why());
            println!(
                "many_daemons_at_once_start_one_engine ... ok\nan_engine_that_fails_tells_every_daemon_why ... ok"
            );
        }
    }
}

/// Acts as the engine: answers each connection's Status, and ends when all connections have closed.
async fn engine(base: &Path, works: bool) {
    let readiness = Readiness::begin().unwrap();
    let mut log = std::fs::OpenOptions::new().create(true).append(true).open(base.join("engines")).unwrap();
    writeln!(log, "{}", std::process::id()).unwrap();
    if !works {
        report_failure("no AF_XDP; this kernel; use another");
        return;
    }
    let server = match Server::bind(RunDir::new(base, 1)) {
        Ok(server) => server,
        Err(error) => return report_failure(&error.to_string()),
    };
    readiness.up().unwrap();
    let mut connections = tokio::task::JoinSet::new();
    // Every daemon of the test connects; then all close.
    for _ in 0..DAEMONS {
        let mut connection = server.accept().await.unwrap();
        connections.spawn(async move {
            while let Some(request) = connection.receive().await.unwrap() {
                assert_eq!(request, Request::Status);
                connection.send(&Event::StatusEnd).unwrap();
            }
        });
    }
    while connections.join_next().await.is_some() {}
}

fn launch(base: &Path, mode: &str) -> Launch {
    Launch {
        program: std::env::current_exe().unwrap(),
        name: "engine".into(),
        arguments: vec!["engine".into(), base.into(), mode.into()],
        deadline: Duration::from_secs(60),
    }
}

async fn many_daemons_at_once_start_one_engine() {
    let base = tempfile::tempdir().unwrap();
    let run = RunDir::new(base.path(), 1);
    assert!(matches!(Client::connect(&run), Err(ConnectError::NotRunning { .. })));
    let mut daemons = tokio::task::JoinSet::new();
    for _ in 0..DAEMONS {
        let (run, launch) = (run.clone(), launch(base.path(), "works"));
        daemons.spawn(async move {
            let mut client = Client::connect_or_start(&run, &launch).await.unwrap();
            client.send(&Request::Status).unwrap();
            assert_eq!(client.receive().await.unwrap(), Some(Event::StatusEnd));
            client
        });
    }
    let mut clients = daemons.join_all().await;
    let engines = std::fs::read_to_string(base.path().join("engines")).unwrap();
    assert_eq!(engines.lines().count(), 1, "{engines}");
    let mut last = clients.pop().unwrap();
    drop(clients);
    // A second engine finds the first and reports it.
    let error = tokio::task::spawn_blocking({
        let launch = launch(base.path(), "works");
        move || cipe_user::control::launch::launch(&launch).unwrap_err().to_string()
    });
    let error = error.await.unwrap();
    assert!(error.contains(&format!("(pid {})", engines.trim())), "{error}");
    last.send(&Request::Status).unwrap();
    assert_eq!(last.receive().await.unwrap(), Some(Event::StatusEnd));
    drop(last);
    // The engine is a child of this process: it has ended and removed its files when its lock is free.
    let lock = run.engine_lock();
    let free = tokio::task::spawn_blocking(move || {
        use cipe_user::control::lock::{Lock, Wait};
        std::fs::create_dir_all(lock.parent().unwrap()).unwrap();
        Lock::take(&lock, Wait::Block)
    });
    drop(free.await.unwrap());
    run.remove();
    assert!(!run.path().exists());
}

async fn an_engine_that_fails_tells_every_daemon_why() {
    let base = tempfile::tempdir().unwrap();
    let run = RunDir::new(base.path(), 1);
    let attempts: Vec<_> = (0..3).map(|_| (run.clone(), launch(base.path(), "fails"))).collect();
    let attempts = attempts
        .into_iter()
        .map(|(run, launch)| async move { Client::connect_or_start(&run, &launch).await.unwrap_err().to_string() });
    for error in futures_util::future::join_all(attempts).await {
        assert_eq!(error, "no AF_XDP; this kernel; use another");
    }
    assert!(!run.path().exists());
}
