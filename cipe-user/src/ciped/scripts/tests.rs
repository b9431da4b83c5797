use super::*;
use crate::control::protocol::Cipher;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

fn facts() -> Facts {
    Facts {
        device: "cipcb7".to_owned(),
        me: "192.0.2.1:6789".parse().unwrap(),
        peer: None,
        ipaddr: "10.9.0.1".parse().unwrap(),
        ptpaddr: "10.9.0.2".parse().unwrap(),
        mtu: 1442,
        cipher: Cipher::Idea,
        arg: "two words; $(no shell)".into(),
        relay: None,
        options: vec![
            ("me", ":6789".into()),
            ("peer", "0.0.0.0:0".into()),
            ("tokey", "60".into()),
            ("xdp-mode", "auto".into()),
        ],
    }
}

/// A directory where only root can write, as scripts require. Without root these tests fail, and a daemon would not run
/// either.
pub(in crate::ciped) fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/run").unwrap()
}

/// Never stopped.
fn never() -> std::future::Pending<()> {
    std::future::pending()
}

fn script(directory: &Path, text: &str) -> PathBuf {
    let path = directory.join("ip-up");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    path
}

#[tokio::test(flavor = "current_thread")]
async fn a_script_gets_six_arguments_an_environment_and_three_descriptors() {
    let directory = directory();
    let out = directory.path().join("out");
    // An inherited descriptor that is not close-on-exec.
    let stray = rustix::io::dup(std::io::stdin()).unwrap();
    let text = format!(
        "#!/bin/sh\nexec >{out} 2>&1\nprintf '%s\\n' \"$#\" \"$@\" \
         \"$CIPE_DEVICE $CIPE_ME [$CIPE_PEER] $CIPE_MTU $CIPE_CIPHER $CIPE_ARG\" \"$device $me $peer $ptpaddr $tokey $xdp_mode $arg\"\n\
         readlink /proc/self/fd/0\ntest -e /proc/$$/fd/{stray} && echo stray\necho end\n",
        out = out.display(),
        stray = stray.as_raw_fd(),
    );
    run(&script(directory.path(), &text), &facts(), MAX_RUN_TIME, never()).await.unwrap();
    let text = std::fs::read_to_string(out).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let pid = std::process::id().to_string();
    let facts_line = "cipcb7 192.0.2.1:6789 [] 1442 idea two words; $(no shell)";
    let options_line = "cipcb7 192.0.2.1:6789 0.0.0.0:0 10.9.0.2 60 auto two words; $(no shell)";
    let arguments = ["6", "cipcb7", "192.0.2.1:6789", &pid, "10.9.0.1", "10.9.0.2", "two words; $(no shell)"];
    assert_eq!(lines, [&arguments[..], &[facts_line, options_line, "/dev/null", "end"]].concat());
}

#[tokio::test(flavor = "current_thread")]
async fn a_missing_script_is_no_error() {
    run(Path::new("/nonexistent/ip-up"), &facts(), MAX_RUN_TIME, never()).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn failures_are_reported_with_the_way_out() {
    let directory = directory();
    let failed =
        run(&script(directory.path(), "#!/bin/sh\nexit 3\n"), &facts(), MAX_RUN_TIME, never()).await.unwrap_err();
    assert!(failed.to_string().contains("exit status: 3"), "{failed}");
    let no_interpreter = run(&script(directory.path(), "exit 0\n"), &facts(), MAX_RUN_TIME, never()).await.unwrap_err();
    assert!(no_interpreter.to_string().contains("#!/bin/sh"), "{no_interpreter}");
}

#[tokio::test(flavor = "current_thread")]
async fn a_script_that_hangs_is_ended_with_its_children() {
    let directory = directory();
    let path = script(directory.path(), "#!/bin/sh\nsleep 600\n");
    let late = run(&path, &facts(), Duration::from_millis(50), never()).await.unwrap_err();
    assert!(matches!(late, ScriptError::Late { .. }), "{late}");
}

#[tokio::test(flavor = "current_thread")]
async fn what_a_script_leaves_in_the_background_does_not_hold_the_daemon() {
    let directory = directory();
    let pid_file = directory.path().join("pid");
    let text = format!("#!/bin/sh\nsleep 600 & echo $! >{}\n", pid_file.display());
    run(&script(directory.path(), &text), &facts(), MAX_RUN_TIME, never()).await.unwrap();
    let pid: i32 = std::fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
    rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn output_is_cut_into_printable_lines() {
    let long = [b'x'; MAX_LINE_OCTETS + 5];
    let text = [b"one\r\n\ntwo\x1b[1m\xFF\n", &long[..], b"\nlast"].concat();
    let mut reader = BufReader::with_capacity(7, &text[..]);
    let mut lines = Vec::new();
    while let Some(line) = next_line(&mut reader).await {
        lines.push(line);
    }
    let x = |n| "x".repeat(n);
    assert_eq!(lines, ["one", "", "two?[1m\u{FFFD}", &x(MAX_LINE_OCTETS), &x(5), "last"]);
}

#[test]
fn the_environment_has_values_in_effect_and_no_key() {
    let text = format!("tokey 60\nkey {}\n", "0123456789abcdef".repeat(2));
    let mut draft = options::Draft::new(options::Program::Cb);
    options::read_text(text.as_bytes(), Path::new("/x"), &mut draft, &mut Vec::new());
    let facts = Facts {
        peer: Some("192.0.2.9:1".parse().unwrap()),
        relay: Some("198.51.100.1:1080".parse().unwrap()),
        options: draft.environment(),
        ..facts()
    };
    let all: std::collections::BTreeMap<_, _> = facts.environment().into_iter().collect();
    for spec in options::SPECS {
        assert_eq!(all.contains_key(spec.name), spec.name != "key", "{}", spec.name);
    }
    assert!(!all.values().any(|value| value.to_string_lossy().contains("0123")));
    for (name, value) in [
        ("tokey", "60"),
        ("debug", "no"),
        ("socks", ""),
        ("peer", "192.0.2.9:1"),
        ("me", "198.51.100.1:1080"),
        ("CIPE_ME", "192.0.2.1:6789"),
    ] {
        assert_eq!(all[name], value, "{name}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_script_that_is_stopped_ends_with_all_that_it_started() {
    for trap in ["", "trap '' TERM\n"] {
        let directory = directory();
        let (fifo, pid_file) = (directory.path().join("fifo"), directory.path().join("pid"));
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let text = format!(
            "#!/bin/sh\n{trap}sleep 600 &\necho $! >{}\necho up >{}\nwait\nwait\n",
            pid_file.display(),
            fifo.display()
        );
        let path = script(directory.path(), &text);
        let background = std::cell::RefCell::new(None);
        let started = async {
            tokio::task::spawn_blocking(move || std::fs::read(fifo).unwrap()).await.unwrap();
            let pid: i32 = std::fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
            let pid = Pid::from_raw(pid).unwrap();
            background.replace(Some(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap()));
        };
        let stopped = run(&path, &facts(), MAX_RUN_TIME, started).await.unwrap_err();
        assert!(matches!(stopped, ScriptError::Stopped { .. }), "{stopped}");
        let background = background.into_inner().unwrap();
        let mut ended = [rustix::event::PollFd::new(&background, rustix::event::PollFlags::IN)];
        let deadline = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut ended, Some(&deadline)).unwrap(), 1);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_script_that_others_can_write_is_not_run() {
    let directory = directory();
    let out = directory.path().join("out");
    let path = script(directory.path(), &format!("#!/bin/sh\necho run >{}\n", out.display()));
    let set = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    for (script_mode, directory_mode, name) in
        [(0o775, 0o755, "script"), (0o757, 0o755, "script"), (0o755, 0o1777, "directory")]
    {
        set(&path, script_mode);
        set(directory.path(), directory_mode);
        let refused = run(&path, &facts(), MAX_RUN_TIME, never()).await.unwrap_err().to_string();
        assert!(refused.starts_with(name) && refused.contains("not run; chmod go-w"), "{refused}");
        assert!(!out.exists());
    }
    set(directory.path(), 0o755);
    set(&path, 0o755);
    run(&path, &facts(), MAX_RUN_TIME, never()).await.unwrap();
    assert!(out.exists());
}
