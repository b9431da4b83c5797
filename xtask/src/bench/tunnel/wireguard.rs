//! WireGuard in user space: wireguard-go, boringtun, gotatun. They are configured by the protocol of their control socket
//! (the "cross-platform userspace implementation" page of wireguard.com), so that no further tool is needed.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cipe_tests::topology::{Side, Topology};

use super::catalogue::Tunnel;
use super::process::{Process, device, socket, start_both};
use crate::bench::program::{Need, Source};

/// Programs that wireguard-go needs.
pub(super) const NEEDS_GO: &[Need] =
    &[Need { program: "wireguard-go", source: Source::Debian("wireguard-go"), version: &["--version"] }];
/// Programs that boringtun needs.
pub(super) const NEEDS_BORINGTUN: &[Need] =
    &[Need { program: "boringtun-cli", source: Source::Crate("boringtun-cli"), version: &["--version"] }];
/// Programs that gotatun needs.
pub(super) const NEEDS_GOTATUN: &[Need] =
    &[Need { program: "gotatun", source: Source::Crate("gotatun-cli"), version: &["--version"] }];

const PORT: u16 = 51820;

/// Private and public key of a side, in hexadecimal. Made once for this bench; not a secret.
fn keys(side: Side) -> (&'static str, &'static str) {
    match side {
        Side::A => (
            "0008b4e230d4a8aed0bf2d63c6210724cbb9487d440912a052070ecc570b2e7a",
            "c833aab40fa775fd1dd8c73af91459c1e5bf9a4abbbbc0c047b14bc0489edd6b",
        ),
        Side::B => (
            "9078849377c7249acb7af922f75560d87fbe04f261d0fb2cf71bfdb21a93e778",
            "8b98107e5188d29b9668ec3bdf8bf545c105aa1a333dbbe57990666e79987b4f",
        ),
    }
}

/// Starts both ends in the foreground and makes them peers.
pub(super) fn start(tunnel: Tunnel, net: &Topology) -> Result<[Process; 2]> {
    let program = tunnel.needs().first().context("each of the three is a program")?.program;
    let mut ends = start_both(net, program, |side, command| {
        command.arg("-f");
        if tunnel != Tunnel::WireguardGo {
            command.arg("--disable-drop-privileges");
        }
        command.arg(device(side));
        Ok(())
    })?;
    for (side, end) in [Side::A, Side::B].into_iter().zip(&mut ends) {
        let mut stream = None;
        end.wait_by_looking("the control socket", || {
            stream = UnixStream::connect(socket(side)).ok();
            stream.is_some()
        })?;
        let stream = stream.context("the wait ended with a connection")?;
        set(stream, side).with_context(|| end.log())?;
    }
    Ok(ends)
}

fn set(mut stream: UnixStream, side: Side) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let (private, public) = (keys(side).0, keys(side.other()).1);
    let remote = side.other().carrier();
    write!(
        stream,
        "set=1\nprivate_key={private}\nlisten_port={PORT}\npublic_key={public}\nendpoint={remote}:{PORT}\n\
         replace_allowed_ips=true\nallowed_ip=0.0.0.0/0\n\n"
    )?;
    let mut answer = [0; 256];
    let length = stream.read(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer[..length]);
    ensure!(answer.lines().any(|line| line == "errno=0"), "it answered {answer:?}");
    Ok(())
}
