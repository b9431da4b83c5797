//! fastd with `salsa2012+umac`. It has no Blowfish.

use std::fs;

use anyhow::{Context, Result};
use cipe_tests::topology::{Side, Topology};

use super::catalogue::INNER_MTU;
use super::process::{Process, device, output, start_both};
use crate::bench::program::{Need, Source};

/// Programs that it needs.
pub(super) const NEEDS: &[Need] =
    &[Need { program: "fastd", source: Source::Debian("fastd"), version: &["--version"] }];

const PORT: u16 = 10000;

/// Starts both ends with new keys.
pub(super) fn start(net: &Topology) -> Result<[Process; 2]> {
    let keys = [KeyPair::generate()?, KeyPair::generate()?];
    let of = |side: Side| if side == Side::A { &keys[0] } else { &keys[1] };
    start_both(net, "fastd", |side, command| {
        let file = net.directory().join(format!("fastd{}.conf", side.letter()));
        let other = side.other();
        let conf = format!(
            "log level warn;\nmode tun;\ninterface \"{}\";\nmtu {INNER_MTU};\nmethod \"salsa2012+umac\";\n\
             bind {}:{PORT};\nsecret \"{}\";\npeer \"other\" {{ key \"{}\"; remote {}:{PORT}; }}\n",
            device(side),
            side.carrier(),
            of(side).secret,
            of(other).public,
            other.carrier()
        );
        fs::write(&file, conf)?;
        command.arg("-c").arg(file);
        Ok(())
    })
}

struct KeyPair {
    secret: String,
    public: String,
}

impl KeyPair {
    fn generate() -> Result<Self> {
        let text = output("fastd", &["--generate-key"])?;
        let field = |name: &str| {
            let found = text.lines().find_map(|line| line.strip_prefix(name));
            found.map(|value| value.trim().to_owned()).with_context(|| format!("fastd --generate-key: {text}"))
        };
        Ok(Self { secret: field("Secret:")?, public: field("Public:")? })
    }
}
