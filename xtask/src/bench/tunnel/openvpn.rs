//! OpenVPN over UDP, point to point, without its kernel module: Blowfish-CBC, a former default, and AES-256-GCM.

use std::process::Command;

use anyhow::{Context, Result};
use cipe_tests::topology::{Side, Topology};

use super::catalogue::INNER_MTU;
use super::process::{Process, device, output, start_both};
use crate::bench::program::{Need, Source};

const OPENVPN: Need = Need { program: "openvpn", source: Source::Debian("openvpn"), version: &["--version"] };
/// Programs that it needs with a static key.
pub(super) const NEEDS_BF: &[Need] = &[OPENVPN];
/// Programs that it needs with TLS.
pub(super) const NEEDS_AES: &[Need] =
    &[OPENVPN, Need { program: "openssl", source: Source::Debian("openssl"), version: &["version"] }];

/// Blowfish-CBC and HMAC-SHA1 under a static key.
pub(super) fn start_bf(net: &Topology) -> Result<[Process; 2]> {
    let key = net.directory().join("openvpn.key");
    output("openvpn", &["--genkey", "secret", &key.to_string_lossy()])?;
    start_both(net, "openvpn", |side, command| {
        common(side, command);
        command.arg("--secret").arg(&key).args(["--cipher", "BF-CBC", "--auth", "SHA1"]);
        // OpenSSL 3 keeps Blowfish in its legacy provider.
        command.args(["--providers", "legacy", "default"]);
        Ok(())
    })
}

/// AES-256-GCM under keys of TLS, each end knowing the other's certificate by its fingerprint.
pub(super) fn start_aes(net: &Topology) -> Result<[Process; 2]> {
    let path = |side: Side, what: &str| net.directory().join(format!("openvpn.{}.{what}.pem", side.letter()));
    for side in [Side::A, Side::B] {
        let (key, certificate) = (path(side, "key"), path(side, "cert"));
        let curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"];
        let files = ["-keyout", &key.to_string_lossy(), "-out", &certificate.to_string_lossy()];
        let subject = format!("/CN={}", side.letter());
        let rest = ["-nodes", "-days", "2", "-subj", &subject];
        output("openssl", &[&["req", "-x509"], &curve[..], &rest, &files].concat())?;
    }
    start_both(net, "openvpn", |side, command| {
        common(side, command);
        let other = path(side.other(), "cert");
        let print = output("openssl", &["x509", "-in", &other.to_string_lossy(), "-noout", "-fingerprint", "-sha256"])?;
        let print = print.trim().split_once('=').context("openssl prints a fingerprint")?.1.to_owned();
        command.arg("--cert").arg(path(side, "cert")).arg("--key").arg(path(side, "key"));
        command.args(["--peer-fingerprint", &print, "--data-ciphers", "AES-256-GCM", "--cipher", "AES-256-GCM"]);
        match side {
            Side::A => command.args(["--tls-server", "--dh", "none"]),
            Side::B => command.arg("--tls-client"),
        };
        Ok(())
    })
}

fn common(side: Side, command: &mut Command) {
    command.args(["--dev", &device(side), "--dev-type", "tun", "--proto", "udp", "--lport", "1194", "--rport", "1194"]);
    command.args(["--local", &side.carrier().to_string(), "--remote", &side.other().carrier().to_string()]);
    command.args(["--tun-mtu", &INNER_MTU.to_string(), "--mssfix", "0", "--ifconfig-noexec", "--disable-dco"]);
}
