//! The only list of options: name, type, default, parser and meaning.

use std::ffi::OsString;
use std::path::PathBuf;

use super::endpoint::{self, EndpointName};
use super::key::{self, KeyText};
use super::problem::{Mistake, Origin};
use super::value::{self, CipherName, GuardPolicy, HostName, IdeaWords, Mac, Mask, SealedPolicy, Show};
use super::{Options, Program};
use crate::control::protocol::{CarrierChoice, MAX_MTU, MIN_MTU, Protocol};
use crate::kernel::bpf::XdpMode;

/// A value and where it was set.
#[derive(Clone, Debug)]
pub struct Setting<T> {
    /// The value.
    pub value: T,
    /// Where it was set.
    pub origin: Origin,
}

/// The description of an option.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// Name in files and on the command line.
    pub name: &'static str,
    /// One line of help.
    pub help: &'static str,
}

macro_rules! options {
    ($($field:ident: $type:ty = $default:expr, $parse:expr, $name:literal, $help:literal;)*) => {
        /// Every option, in the order of the manual.
        pub const SPECS: &[Spec] = &[$(Spec { name: $name, help: $help },)*];

        /// Options as read, each value well-formed by itself; see [`super::settle()`] for the rules between them.
        #[derive(Clone, Debug)]
        pub struct Draft {
            /// The kind of packets that the tunnel carries, from the program's name.
            pub protocol: Protocol,
            $(#[doc = $help] pub $field: Setting<$type>,)*
        }

        impl Draft {
            /// All defaults.
            pub fn new(program: Program) -> Self {
                let protocol = program.protocol();
                let mut draft = Self { protocol, $($field: Setting { value: $default, origin: Origin::Default },)* };
                draft.cipher = Setting { value: program.cipher(), origin: Origin::Program(program.name()) };
                draft.mtu.value = Options::mtu_of(protocol);
                draft
            }

            /// Sets one option from its text; `None` if there is no option of this name.
            ///
            /// # Errors
            /// What is wrong with the value; the option then keeps its former value.
            pub fn assign(&mut self, name: &str, text: &[u8], origin: &Origin) -> Option<Result<(), Mistake>> {
                match name {
                    $($name => Some(match ($parse)(text) {
                        Ok(value) => {
                            self.$field = Setting { value, origin: origin.clone() };
                            Ok(())
                        }
                        Err(Mistake { what, fix }) => Err(Mistake { what: format!("option `{name}`: {what}"), fix }),
                    }),)*
                    _ => None,
                }
            }

            /// Names of the options whose values differ, in the order of [`SPECS`].
            pub fn changes(&self, other: &Self) -> Vec<&'static str> {
                let mut names = Vec::new();
                $(if self.$field.value != other.$field.value {
                    names.push($name);
                })*
                names
            }

            /// Copies the settings of these names from `other`.
            pub fn take_over(&mut self, other: &Self, names: &[&str]) {
                $(if names.contains(&$name) {
                    self.$field = other.$field.clone();
                })*
            }

            /// Name and value of every option but `key`, for the environment of a script.
            pub fn environment(&self) -> Vec<(&'static str, OsString)> {
                let mut all = vec![$(($name, self.$field.value.plain()),)*];
                all.retain(|(name, _)| *name != "key");
                all
            }

            /// Name, value as text and origin of every option, in the order of [`SPECS`]. Keys are not shown.
            pub fn effective(&self) -> Vec<(&'static str, String, &Origin)> {
                vec![$(($name, self.$field.value.show(), &self.$field.origin),)*]
            }
        }
    };
}

options! {
    device: Option<String> = None, value::device, "device", "interface; the next free cipcbN, cipciN, cipdbN or cipdiN if not given";
    debug: bool = false, value::flag, "debug", "stay in the foreground, log to stderr";
    cipher: CipherName = CipherName::Blowfish, value::choice, "cipher", "blowfish or idea; the default depends on the program's name";
    ipaddr: Option<HostName> = None, value::host, "ipaddr", "own address on the tunnel; required, except for an Ethernet tunnel";
    ptpaddr: Option<HostName> = None, value::host, "ptpaddr", "the peer's address on the tunnel; required, except for an Ethernet tunnel";
    mtu: u32 = Options::MTU, value::number::<u32, { MIN_MTU as i64 }, { MAX_MTU as i64 }>, "mtu", "device MTU in octets, by default 1442, or 1428 for an Ethernet tunnel";
    metric: u32 = 1, value::number::<u32, 0, 0x7FFF_FFFF>, "metric", "metric of the routes that come with the addresses";
    cttl: u8 = 0, value::number::<u8, 0, 255>, "cttl", "outer TTL; 0 copies the inner packet's, and is 64 for Ethernet frames";
    me: Option<EndpointName> = None, endpoint::own_endpoint, "me", "own carrier address:port; the system chooses parts that are zero or omitted";
    peer: Option<EndpointName> = None, endpoint::endpoint, "peer", "the peer's carrier address:port; 0.0.0.0:0 learns it; required";
    pinpeer: bool = false, value::flag, "pinpeer", "never follow the peer to another carrier address";
    key: Option<KeyText> = None, key::key, "key", "static key, 32 hexadecimal digits; only in a file";
    keybug: bool = false, value::flag, "keybug", "read the digits a to f as 1 to 6, as versions before 1.4.0 did";
    nokey: bool = false, value::flag, "nokey", "NO ENCRYPTION AT ALL; for tests";
    sealed: SealedPolicy = SealedPolicy::Auto, value::choice, "sealed", "auto, require or no: authenticated packets with forward secrecy, with a peer that is this program; once, or nothing else, or never";
    staticdata: Option<bool> = None, value::flag_if_any, "staticdata", "whether data may go under the static key while no dynamic key is agreed; if not given, until the peer is known to be this program";
    idea_words: IdeaWords = IdeaWords::Big, value::choice, "idea_words", "big or little: word order of IDEA on the wire";
    socks: Option<EndpointName> = None, endpoint::endpoint, "socks", "SOCKS5 server address:port to reach the peer through; user and password from SOCKS5_USER and SOCKS5_PASSWD";
    tokxc: u32 = 10, value::number::<u32, 1, 86_400>, "tokxc", "seconds until an unanswered key exchange is started again";
    tokey: u32 = 600, value::number::<u32, 1, 31_536_000>, "tokey", "lifetime of a dynamic key in seconds";
    tokxts: u32 = 0, value::number::<u32, 0, 31_536_000>, "tokxts", "seconds that a key exchange message's time stamp may be off; 0 does not check";
    ping: u32 = 0, value::number::<u32, 0, 86_400>, "ping", "seconds between CT_PINGs; 0 sends none";
    toping: u32 = 0, value::number::<u32, 0, 86_400>, "toping", "seconds to wait for the CT_PONG; then one error; 0 does not wait";
    maxerr: i32 = 8, value::number::<i32, -1, 0x7FFF_FFFF>, "maxerr", "network errors without a message from the peer until the daemon gives up; -1 never";
    ipup: PathBuf = PathBuf::from("/etc/cipe/ip-up"), value::path, "ipup", "script to run when the tunnel is up";
    ipdown: PathBuf = PathBuf::from("/etc/cipe/ip-down"), value::path, "ipdown", "script to run when the tunnel is down";
    arg: OsString = OsString::new(), value::text, "arg", "last argument of both scripts";
    dynip: bool = false, value::flag, "dynip", "follow the own carrier address where it changes";
    checksum: bool = false, value::flag, "checksum", "send UDP checksums over IPv4 too";
    forcemtu: bool = false, value::flag, "forcemtu", "ignore the carrier's path MTU";
    ignoredf: bool = false, value::flag, "ignoredf", "do not copy DF to the outer packet";
    mssclamp: bool = true, value::flag, "mssclamp", "clamp the MSS of TCP through the tunnel";
    carrier: CarrierChoice = CarrierChoice::Auto, value::choice, "carrier", "auto, xdp or udp: how datagrams reach the carrier network";
    carrier_device: Option<String> = None, value::device, "carrier-device", "device, or VRF, that sends and receives carrier datagrams";
    xdp_mode: XdpMode = XdpMode::Auto, value::choice, "xdp-mode", "auto, native or generic: where XDP programs run";
    mark: u32 = 0, value::mark, "mark", "mark of the datagrams for rules and firewalls (SO_MARK), decimal or 0x...; 0: none";
    guard: GuardPolicy = GuardPolicy::Yes, value::choice, "guard", "yes, always or no: unreachable routes beside the routes into the tunnel, until a stop that was asked for, after it too, or never";
    lan: Option<String> = None, value::device, "lan", "LAN card with a short cut to the tunnel, AROUND THE FIREWALL";
    busypoll: u32 = 0, value::number::<u32, 0, 1_000_000>, "busypoll", "maximum microseconds that the engine busy-polls for the next packet; 0 never";
    ifconfig: bool = false, value::flag, "ifconfig", "leave the addresses of the interface to ip-up";
    mask: Option<Mask> = None, value::mask, "mask", "netmask of the network around ptpaddr that is routed into the tunnel; of an Ethernet tunnel, around ipaddr";
    bcast: Option<HostName> = None, value::host, "bcast", "broadcast address of the interface";
    hwaddr: Option<Mac> = None, value::hwaddr, "hwaddr", "Ethernet address of the interface";
}
