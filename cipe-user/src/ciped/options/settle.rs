//! Turns options as read into options as used: resolves names, and checks the rules between options.

mod places;

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use super::endpoint::EndpointName;
use super::key::KeyText;
use super::permission::check_script;
use super::prefix;
use super::problem::{Mistake, Origin, Problem, Severity};
use super::table::{Draft, Setting};
use super::value::{CipherName, GuardPolicy, IdeaWords, SealedPolicy};
use crate::control::protocol::{CarrierChoice, Cipher, Interface, KeyOctets, MAX_MTU, Protocol};
use crate::kernel::bpf::XdpMode;

/// A carrier address and the text it was resolved from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// As written, such as `gw.example.org:6789`.
    pub text: String,
    /// As resolved.
    pub address: SocketAddr,
}

/// The settings of a tunnel. [`super::SPECS`] describes the options.
#[derive(Clone, Debug)]
pub struct Options {
    /// Interface; `None`: the first free one of [`Options::prefix`].
    pub device: Option<String>,
    /// Foreground, log to stderr.
    pub debug: bool,
    /// The kind of packets that the tunnel carries.
    pub protocol: Protocol,
    /// Cipher and word order.
    pub cipher: Cipher,
    /// Own address on the tunnel; unspecified: none, for an Ethernet tunnel only.
    pub ipaddr: IpAddr,
    /// The peer's address on the tunnel; unspecified: none.
    pub ptpaddr: IpAddr,
    /// Device MTU in octets.
    pub mtu: u32,
    /// The interface's settings other than its addresses and MTU.
    pub interface: Interface,
    /// Outer TTL; 0: the inner packet's.
    pub cttl: u8,
    /// Own carrier address; the system chooses unspecified parts.
    pub me: Endpoint,
    /// The peer's carrier address; unspecified: it is learned.
    pub peer: Endpoint,
    /// The name of the peer, to be resolved again; `None`: the option has an address.
    pub peer_name: Option<EndpointName>,
    /// Never follow the peer to another carrier address.
    pub pin_peer: bool,
    /// SOCKS5 server, as written and as resolved.
    pub socks: Option<(EndpointName, SocketAddr)>,
    /// Static key; `None`: `nokey`.
    pub key: Option<KeyOctets>,
    /// The digits a to f of the key were read as 1 to 6.
    pub keybug: bool,
    /// Whether packets are sealed; [`SealedPolicy::No`] without a key.
    pub sealed: SealedPolicy,
    /// Whether data may be sent under the static key; `None`: until the peer is known to run this program.
    pub static_data: Option<bool>,
    /// Seconds until an unanswered exchange is started again.
    pub tokxc: u32,
    /// Lifetime of a dynamic key in seconds.
    pub tokey: u32,
    /// Maximum difference of a time stamp in seconds; 0: unchecked.
    pub tokxts: u32,
    /// Seconds between CT_PINGs; 0: none.
    pub ping: u32,
    /// Seconds to wait for a CT_PONG; 0: not at all.
    pub toping: u32,
    /// Errors between two exchanges until the daemon ends; `None`: any number.
    pub maxerr: Option<u32>,
    /// Script to run when the tunnel is up.
    pub ipup: PathBuf,
    /// Script to run when the tunnel is down.
    pub ipdown: PathBuf,
    /// Last argument of both scripts.
    pub arg: OsString,
    /// Own carrier address may change.
    pub dynip: bool,
    /// UDP checksums over IPv4.
    pub checksum: bool,
    /// Ignore the carrier's path MTU.
    pub force_mtu: bool,
    /// Do not copy DF.
    pub ignore_df: bool,
    /// Clamp TCP MSS.
    pub mss_clamp: bool,
    /// Maximum microseconds that the engine busy-polls for the next packet.
    pub busy_poll: u32,
    /// Device that the carrier socket is bound to.
    pub carrier_device: Option<String>,
    /// How datagrams reach the carrier network.
    pub carrier: CarrierChoice,
    /// Where XDP programs run.
    pub xdp_mode: XdpMode,
    /// Mark of the datagrams; 0: none.
    pub mark: u32,
    /// How long routes into the tunnel are guarded.
    pub guard: GuardPolicy,
    /// LAN card with a short cut.
    pub lan: Option<String>,
}

impl Options {
    /// Default device MTU in octets (protocol section 2).
    pub const MTU: u32 = 1442;

    /// The default by protocol: that of an Ethernet tunnel is smaller by the Ethernet header.
    pub const fn mtu_of(protocol: Protocol) -> u32 {
        Self::MTU - protocol.header() as u32
    }

    /// `cipcb`, `cipci`, `cipdb` or `cipdi`.
    pub const fn prefix(&self) -> &'static str {
        prefix(self.protocol, self.cipher)
    }
}

/// Resolves names and checks the rules between options. Adds what it finds to `problems`, which come from
/// [`super::load`]. Returns options if no problem is an error.
pub fn settle(draft: &Draft, mut problems: Vec<Problem>) -> (Option<Options>, Vec<Problem>) {
    let settled = Settle { draft, problems: &mut problems }.run();
    let failed = problems.iter().any(|problem| problem.severity == Severity::Error);
    (settled.filter(|_| !failed), problems)
}

struct Settle<'a> {
    draft: &'a Draft,
    problems: &'a mut Vec<Problem>,
}

impl Settle<'_> {
    fn run(mut self) -> Option<Options> {
        // Every check runs, so that all problems are reported at once; only then are missing values fatal.
        let key = self.key();
        let tunnel = self.tunnel_addresses();
        let socks = self.socks();
        let carrier = self.carrier_addresses(socks.as_ref().and_then(|socks| socks.as_ref()).map(|socks| socks.1.ip()));
        let interface = self.interface(tunnel.map(|(ipaddr, _)| ipaddr));
        self.sealed();
        self.scripts();
        self.warn_of_idle_options();
        let ethernet = self.ethernet();
        let (key, (ipaddr, ptpaddr), (me, peer), socks) = (key?, tunnel?, carrier?, socks?);
        ethernet?;
        let draft = self.draft;
        Some(Options {
            device: draft.device.value.clone(),
            debug: draft.debug.value,
            protocol: draft.protocol,
            cipher: match (draft.cipher.value, draft.idea_words.value) {
                (CipherName::Blowfish, _) => Cipher::Blowfish,
                (CipherName::Idea, IdeaWords::Big) => Cipher::Idea,
                (CipherName::Idea, IdeaWords::Little) => Cipher::IdeaLittle,
            },
            ipaddr,
            ptpaddr,
            mtu: draft.mtu.value,
            interface: interface?,
            cttl: draft.cttl.value,
            me,
            peer,
            peer_name: draft.peer.value.clone().filter(|name| !name.is_address()),
            pin_peer: draft.pinpeer.value,
            socks,
            key: match key {
                KeyChoice::NoKey => None,
                KeyChoice::Key(key) => Some(key),
            },
            keybug: draft.keybug.value,
            sealed: if draft.nokey.value { SealedPolicy::No } else { draft.sealed.value },
            static_data: draft.staticdata.value,
            tokxc: draft.tokxc.value,
            tokey: draft.tokey.value,
            tokxts: draft.tokxts.value,
            ping: draft.ping.value,
            toping: draft.toping.value,
            maxerr: u32::try_from(draft.maxerr.value).ok(),
            ipup: draft.ipup.value.clone(),
            ipdown: draft.ipdown.value.clone(),
            arg: draft.arg.value.clone(),
            dynip: draft.dynip.value,
            checksum: draft.checksum.value,
            force_mtu: draft.forcemtu.value,
            ignore_df: draft.ignoredf.value,
            mss_clamp: draft.mssclamp.value,
            busy_poll: draft.busypoll.value,
            carrier_device: draft.carrier_device.value.clone(),
            carrier: draft.carrier.value,
            xdp_mode: draft.xdp_mode.value,
            mark: draft.mark.value,
            guard: draft.guard.value,
            lan: draft.lan.value.clone(),
        })
    }

    fn error<T>(&mut self, mistake: Mistake, origin: &Origin) -> Option<T> {
        self.problems.push(Problem::error(mistake, origin.clone()));
        None
    }

    fn warn(&mut self, what: impl Into<String>, fix: &str, origin: &Origin) {
        self.problems.push(Problem::warning(Mistake::new(what, fix), origin.clone()));
    }

    fn set<'b, T>(&mut self, setting: &'b Setting<Option<T>>, name: &str, example: &str) -> Option<&'b T> {
        // A missing value has been reported already if it was refused; or it may be in a file that could not be read.
        let told = format!("option `{name}`:");
        let told =
            |problem: &Problem| problem.mistake.what.starts_with(&told) || matches!(problem.origin, Origin::Path(_));
        if setting.value.is_none() && !self.problems.iter().any(told) {
            let mistake =
                Mistake::new(format!("option `{name}` is missing"), format!("set it, such as `{name} {example}`"));
            return self.error(mistake, &Origin::Unset);
        }
        setting.value.as_ref()
    }

    fn resolved<T>(&mut self, name: &str, outcome: Result<T, Mistake>, origin: &Origin) -> Option<T> {
        match outcome {
            Ok(value) => Some(value),
            Err(Mistake { what, fix }) => self.error(Mistake::new(format!("option `{name}`: {what}"), fix), origin),
        }
    }

    fn key(&mut self) -> Option<KeyChoice> {
        let (key, nokey) = (&self.draft.key, &self.draft.nokey);
        match (&key.value, nokey.value) {
            (Some(_), true) => {
                let what = format!("`key` ({}) and `nokey` exclude each other", key.origin);
                self.error(Mistake::new(what, "remove one of them"), &nokey.origin)
            }
            (None, true) => {
                let fix = "use it for tests only, and set `key` for anything else";
                self.warn("NO ENCRYPTION: `nokey` sends all traffic in the clear", fix, &nokey.origin);
                Some(KeyChoice::NoKey)
            }
            _ => {
                let text: &KeyText = self.set(key, "key", "32-HEX-DIGITS")?;
                if text.digits > 32 {
                    self.warn(
                        format!("option `key`: has {} digits; the first 32 are used", text.digits),
                        "remove the others, and make sure that the other end uses the same",
                        &key.origin,
                    );
                }
                let octets = if self.draft.keybug.value { text.keybug_octets } else { text.octets };
                Some(KeyChoice::Key(KeyOctets::new(&octets)))
            }
        }
    }

    /// Sealed packets need a key; what nobody has asked for is no mistake.
    fn sealed(&mut self) {
        let (sealed, nokey) = (&self.draft.sealed, &self.draft.nokey);
        if nokey.value && sealed.value != SealedPolicy::No && sealed.origin != Origin::Default {
            let what = format!("`sealed` ({}) needs a key, and `nokey` says that there is none", sealed.origin);
            self.error::<()>(Mistake::new(what, "set `key` in place of `nokey`, or write `sealed no`"), &nokey.origin);
        }
    }

    /// Scripts run as root, so whoever can write them has as much power as with the option file.
    fn scripts(&mut self) {
        let draft = self.draft;
        for (name, setting) in [("ipup", &draft.ipup), ("ipdown", &draft.ipdown)] {
            if setting.value.exists() {
                self.resolved(name, check_script(&setting.value), &setting.origin);
            }
        }
    }

    /// Rules for an Ethernet tunnel.
    fn ethernet(&mut self) -> Option<()> {
        let draft = self.draft;
        let largest = MAX_MTU - draft.protocol.header() as u32;
        if let (Protocol::Ethernet, Some(lan)) = (draft.protocol, &draft.lan.value) {
            let what = format!("`lan {lan}`: an Ethernet tunnel has no short cut, its frames are not routed");
            let fix = "remove it, or run ciped-cb or ciped-ci at both ends";
            return self.error(Mistake::new(what, fix), &draft.lan.origin);
        }
        if draft.mtu.value > largest {
            let what = format!("option `mtu`: `{}` is too large for an Ethernet tunnel", draft.mtu.value);
            return self.error(Mistake::new(what, format!("write at most {largest}")), &draft.mtu.origin);
        }
        Some(())
    }

    fn warn_of_idle_options(&mut self) {
        let draft = self.draft;
        if draft.idea_words.origin != Origin::Default && draft.cipher.value == CipherName::Blowfish {
            self.warn(
                "`idea_words` has no effect with cipher blowfish",
                "remove it, or set `cipher idea`",
                &draft.idea_words.origin,
            );
        }
        if draft.sealed.value == SealedPolicy::Require {
            for (name, is_set, origin) in [
                ("staticdata", draft.staticdata.value == Some(true), &draft.staticdata.origin),
                ("tokey", draft.tokey.origin != Origin::Default, &draft.tokey.origin),
                ("tokxts", draft.tokxts.value > 0, &draft.tokxts.origin),
            ] {
                if is_set {
                    let what =
                        format!("`{name}` has no effect with `sealed require`, which uses none of protocol 3's keys");
                    self.warn(what, "remove it", origin);
                }
            }
        }
        if draft.keybug.value && draft.nokey.value {
            self.warn("`keybug` has no effect with `nokey`", "remove it", &draft.keybug.origin);
        }
        if let Some(lan) = draft.lan.value.as_ref().filter(|_| draft.protocol == Protocol::Ip) {
            self.warn(
                format!("`lan {lan}` goes around the firewall: netfilter and tc see only a part of the packets"),
                "omit it if they must filter, count or shape more than new TCP connections",
                &draft.lan.origin,
            );
        }
        if draft.toping.value > 0 && draft.ping.value == 0 {
            self.warn("`toping` has no effect without `ping`", "set `ping` too", &draft.toping.origin);
        }
        if draft.toping.value > draft.ping.value && draft.ping.value > 0 {
            self.warn(
                "`toping` is longer than `ping`",
                "set it to less, so that the daemon waits for the answer to each CT_PING",
                &draft.toping.origin,
            );
        }
    }
}

enum KeyChoice {
    NoKey,
    Key(KeyOctets),
}
