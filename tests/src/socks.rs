//! Debian's SOCKS5 server (dante-server) in a namespace: a real one, as operators use.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use crate::log::Log;
use crate::namespace::Namespace;
use crate::{SOON, process};

/// The user that a server with passwords knows, and the password.
pub const USER: &str = "cipetest";
/// See [`USER`]. Not a secret.
pub const PASSWORD: &str = "secret";
/// `crypt(3)` of the password.
const HASH: &str = "$6$cipetest$GZ9Lc8BCALSierb05b0rhbhYeLDx29Ci453/AEImXe8Q/b7D0WJ1Tv8Yi0Zq13n8gwBgiG3cplf9jnxwU75Oi.";
/// The port that it listens on.
pub const PORT: u16 = 1080;
const PROGRAM: &str = "danted";

/// Whether the server's program is there; installs it if it is missing. If that fails, prints why the test is skipped.
pub fn may_have_server() -> bool {
    if program().is_some() {
        return true;
    }
    for arguments in [&["update", "-qq"][..], &["install", "-qq", "-y", "--no-install-recommends", "dante-server"]] {
        let mut apt = Command::new("apt-get");
        apt.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null()).stdout(Stdio::null());
        match apt.status() {
            Ok(status) if status.success() => {}
            outcome => {
                eprintln!("skipped: no SOCKS5 server: apt-get {}: {outcome:?}", arguments.join(" "));
                return false;
            }
        }
    }
    program().is_some()
}

fn program() -> Option<PathBuf> {
    ["/usr/sbin", "/sbin", "/usr/bin"].iter().map(|folder| Path::new(folder).join(PROGRAM)).find(|path| path.is_file())
}

/// A running server. Dropping it stops it.
pub struct Server {
    child: Child,
    namespace: PathBuf,
    log: Log,
}

impl Server {
    /// Starts one that listens at `inside` and relays from `outside`; with `password` it accepts [`USER`] only.
    ///
    /// # Errors
    /// The server does not listen within [`SOON`]; the error has its log.
    pub fn start(
        namespace: &Namespace,
        folder: &Path,
        (inside, outside): (Ipv4Addr, Ipv4Addr),
        password: bool,
    ) -> Result<Self> {
        let method = if password { "username" } else { "none" };
        let text = format!(
            "logoutput: stderr\ninternal: {inside} port = {PORT}\nexternal: {outside}\nclientmethod: none\n\
             socksmethod: {method}\nuser.privileged: root\nuser.unprivileged: nobody\n\
             client pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}\n\
             socks pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 command: udpassociate udpreply }}\n"
        );
        if password {
            namespace.set_etc("passwd", &with_line("/etc/passwd", &format!("{USER}:x:65533:65533::/:/bin/false"))?)?;
            namespace.set_etc("shadow", &with_line("/etc/shadow", &format!("{USER}:{HASH}:19000:0:99999:7:::"))?)?;
        }
        let path = folder.join("danted.conf");
        fs::write(&path, text)?;
        let mut command = namespace.command(program().context("danted (Debian package dante-server)")?);
        command.arg("-f").arg(&path).arg("-p").arg(folder.join("danted.pid"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let log = Log::follow(child.stderr.take().context("stderr is a pipe")?);
        let mut server = Self { child, namespace: namespace.path(), log };
        let (deadline, address) = (Instant::now() + process::patient(SOON), SocketAddr::from((inside, PORT)));
        while namespace.run(|| TcpStream::connect(address)).is_err() {
            if let Some(status) = server.child.try_wait()? {
                bail!("danted ended with {status}:\n{}", server.log.text());
            }
            if Instant::now() > deadline {
                bail!("danted does not listen at {address}:\n{}", server.log.text());
            }
        }
        Ok(server)
    }

    /// The log so far.
    pub fn log(&self) -> String {
        self.log.text()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // After SIGTERM it would still serve its connections: a relay would stay as long as its client keeps it.
        let mut ended = || -> Result<()> {
            for pid in process::in_namespace(&self.namespace)? {
                if process::arguments(pid).first().is_some_and(|name| name.contains(PROGRAM)) {
                    process::signal(pid, Signal::KILL)?;
                    process::wait_gone(pid, SOON)?;
                }
            }
            self.child.wait()?;
            Ok(())
        };
        if let Err(error) = ended() {
            eprintln!("{PROGRAM}: {error:#}");
        }
    }
}

fn with_line(path: &str, line: &str) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| path.to_owned())?;
    Ok(format!("{text}\n{line}\n"))
}
