//! tinc 1.0 in router mode with Blowfish-CBC, its former default, and SHA-1 truncated to four octets, its default.

use std::fs;

use anyhow::{Context, Result};
use cipe_tests::topology::{Side, Topology};

use super::process::{Process, device, output, start_both};
use crate::bench::program::{Need, Source};

/// Programs that it needs.
pub(super) const NEEDS: &[Need] = &[Need { program: "tincd", source: Source::Debian("tinc"), version: &["--version"] }];

/// OpenSSL 3 keeps Blowfish in its legacy provider.
const OPENSSL: &str = "openssl_conf = init\n[init]\nproviders = both\n[both]\ndefault = on\nlegacy = on\n\
                       [on]\nactivate = 1\n";

/// Starts both ends; each makes its own keys.
pub(super) fn start(net: &Topology) -> Result<[Process; 2]> {
    let folder = |side: Side| net.directory().join(format!("tinc{}", side.letter()));
    let host = |at: Side, of: Side| folder(at).join(format!("hosts/n{}", of.letter()));
    for side in [Side::A, Side::B] {
        let (own, other) = (side.letter(), side.other().letter());
        fs::create_dir_all(folder(side).join("hosts"))?;
        // Until its path MTU probes are done, tinc sends large packets over its TCP connection, which has another cipher.
        let conf = format!(
            "Name = n{own}\nConnectTo = n{other}\nDeviceType = tun\nInterface = {}\nMode = router\n\
             AddressFamily = ipv4\nPMTUDiscovery = no\nReplayWindow = 64\n",
            device(side)
        );
        fs::write(folder(side).join("tinc.conf"), conf)?;
        let about = format!(
            "Address = {}\nSubnet = {}/32\nSubnet = {}\nCipher = bf-cbc\nDigest = sha1\nPMTUDiscovery = no\n",
            side.carrier(),
            side.tunnel(),
            side.lan()
        );
        fs::write(host(side, side), about)?;
        output("tincd", &["-c", &folder(side).to_string_lossy(), "-K2048"])?;
    }
    for side in [Side::A, Side::B] {
        fs::copy(host(side, side), host(side.other(), side)).context("tinc's host files")?;
    }
    let openssl = net.directory().join("tinc-openssl.cnf");
    fs::write(&openssl, OPENSSL)?;
    start_both(net, "tincd", |side, command| {
        let pid = folder(side).join("pid");
        command.env("OPENSSL_CONF", &openssl).arg("-c").arg(folder(side)).arg("-D").arg("--pidfile").arg(pid);
        Ok(())
    })
}
