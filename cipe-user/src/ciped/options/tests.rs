use std::net::Ipv4Addr;

use std::path::Path;

use proptest::prelude::*;

use super::*;

const GOOD: &str = "# gateway B
ipaddr 10.9.0.1
ptpaddr 10.9.0.2
me 192.0.2.1:6789
peer 192.0.2.2:6789
key 000102030405060708090a0b0c0d0e0f
";

fn read_into(draft: &mut Draft, text: &str, path: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    read_text(text.as_bytes(), Path::new(path), draft, &mut problems);
    problems
}

fn settled(text: &str) -> (Option<Options>, Vec<String>) {
    settled_as(Program::Cb, text)
}

fn settled_as(program: Program, text: &str) -> (Option<Options>, Vec<String>) {
    let mut draft = Draft::new(program);
    let problems = read_into(&mut draft, text, "/etc/cipe/b");
    let (options, problems) = settle(&draft, problems);
    (options, problems.iter().map(ToString::to_string).collect())
}

#[test]
fn a_classic_file_means_what_it_meant() {
    let (options, problems) = settled(GOOD);
    let options = options.unwrap();
    assert_eq!(problems, Vec::<String>::new());
    assert_eq!(options.ipaddr.to_string(), "10.9.0.1");
    assert_eq!(options.peer.address, "192.0.2.2:6789".parse().unwrap());
    assert_eq!((options.mtu, options.tokxc, options.tokey, options.maxerr), (1442, 10, 600, Some(8)));
    assert_eq!(options.cipher, Cipher::Blowfish);
    assert_eq!(options.key.unwrap()[15], 15);
    assert_eq!(options.ipup, Path::new("/etc/cipe/ip-up"));
}

#[test]
fn the_program_name_chooses_cipher_and_prefix_unless_an_option_does() {
    for (program, text, cipher, device_prefix) in [
        (Program::Cb, "", Cipher::Blowfish, "cipcb"),
        (Program::Ci, "", Cipher::Idea, "cipci"),
        (Program::Cb, "cipher idea\n", Cipher::Idea, "cipci"),
        (Program::Ci, "idea_words little\n", Cipher::IdeaLittle, "cipci"),
        (Program::Db, "", Cipher::Blowfish, "cipdb"),
        (Program::Di, "", Cipher::Idea, "cipdi"),
        (Program::Db, "cipher idea\n", Cipher::Idea, "cipdi"),
    ] {
        let mut draft = Draft::new(program);
        let problems = read_into(&mut draft, &format!("{GOOD}{text}"), "/x");
        let options = settle(&draft, problems).0.unwrap();
        assert_eq!((options.cipher, options.prefix()), (cipher, device_prefix));
    }
    assert_eq!(Program::from_name(b"/usr/sbin/ciped-ci"), Some(Program::Ci));
    assert_eq!(Program::from_name(b"/usr/local/sbin/ciped"), Some(Program::Cb));
    assert_eq!(Program::from_name(b"cipe"), None);
    for program in Program::ALL {
        assert_eq!(Program::from_name(program.name().as_bytes()), Some(program));
    }
}

#[test]
fn later_sources_win_and_every_value_knows_its_origin() {
    let sources = Sources {
        program: Program::Cb,
        guard: None,
        system: PathBuf::from("/nonexistent/cipe/options"),
        files: Vec::new(),
        arguments: vec!["tokey=60".into(), "debug".into()],
    };
    let mut draft = Draft::new(Program::Cb);
    read_into(&mut draft, "tokey 1\nmtu 1400\n", "/etc/cipe/options");
    read_into(&mut draft, "tokey 2\n", "/etc/cipe/b");
    assert_eq!(draft.tokey.value, 2);
    for argument in &sources.arguments {
        let (name, value) = file::split_argument(argument.as_bytes());
        draft.assign(std::str::from_utf8(name).unwrap(), value, &Origin::CommandLine).unwrap().unwrap();
    }
    let origin = |name: &str| {
        draft.effective().into_iter().find(|(n, ..)| *n == name).map(|(_, v, o)| (v, o.to_string())).unwrap()
    };
    assert_eq!(origin("tokey"), ("60".to_owned(), "command line".to_owned()));
    assert_eq!(origin("mtu"), ("1400".to_owned(), "/etc/cipe/options:2".to_owned()));
    assert_eq!(origin("debug"), ("yes".to_owned(), "command line".to_owned()));
    assert_eq!(origin("ping"), ("0".to_owned(), "default".to_owned()));
    assert_eq!(origin("cipher"), ("blowfish".to_owned(), "called as ciped-cb".to_owned()));
    assert_eq!(load(&sources).0.tokey.value, 60);
}

#[test]
fn each_mistake_says_what_where_and_how_to_fix() {
    for (text, parts) in [
        ("pear 1.2.3.4:5", ["unknown option `pear`", "/etc/cipe/b:7", "`peer`"]),
        ("mtu=1400", ["unknown option `mtu=`", "/etc/cipe/b:7", "blank between name and value"]),
        (" # x", ["unknown option `#`", "/etc/cipe/b:7", "first column"]),
        ("mtu", ["option `mtu`: has no value", "/etc/cipe/b:7", "write one"]),
        ("mtu 67", ["option `mtu`: `67`", "/etc/cipe/b:7", "68 to 3500"]),
        ("mtu 9000", ["option `mtu`: `9000`", "/etc/cipe/b:7", "68 to 3500"]),
        ("debug maybe", ["option `debug`: `maybe`", "/etc/cipe/b:7", "yes, no"]),
        ("cipher rot13", ["option `cipher`: `rot13`", "/etc/cipe/b:7", "blowfish, idea"]),
        ("nokey", ["`key` (/etc/cipe/b:6) and `nokey`", "/etc/cipe/b:7", "remove one"]),
        ("key 00", ["the key has 2 digits", "/etc/cipe/b:7", "32 hexadecimal digits"]),
        ("peer 192.0.2.2:0", ["the port is 0", "/etc/cipe/b:7", "UDP port"]),
        ("peer [2001:db8::1]:9", ["no IPv4 address", "/etc/cipe/b:7", "one address family"]),
        ("peer 192.0.2.2:no-such-service", ["nor a UDP service", "/etc/cipe/b:7", "/etc/services"]),
        ("ptpaddr 10.9.0.1", ["both 10.9.0.1", "/etc/cipe/b:7", "its own address"]),
        ("ipaddr 0.0.0.0", ["0.0.0.0 is not a usable address", "/etc/cipe/b:7", "this end"]),
        ("socks 192.0.2.3:1080\ncarrier xdp", ["SOCKS5 server is reached by UDP", "/etc/cipe/b:8", "remove one"]),
    ] {
        let (options, problems) = settled(&format!("{GOOD}{text}\n"));
        assert!(options.is_none(), "{text}");
        assert_eq!(problems.len(), 1, "{text}: {problems:?}");
        for part in parts {
            assert!(problems[0].contains(part), "{text}: {}", problems[0]);
        }
    }
}

/// Layouts of real files.
#[test]
fn old_files_mean_what_they_meant() {
    let classic = "ipaddr 10.20.1.1 \nptpaddr 10.20.2.1 \npeer 198.51.100.20:9999 \n";
    let key = "key 00112233445566778899aabbccddeeff \n";
    let file = |text: &str| settled(&format!("{classic}{text}"));

    let (options, problems) = file(&format!(" \nme 192.0.2.10:9999 \n{key}cttl 64 \n"));
    assert_eq!(options.map(|options| options.cttl), Some(64), "blanks at the ends of lines: {problems:?}");
    for (me, address) in [("192.0.2.10", "192.0.2.10:0"), (":9999", "0.0.0.0:9999")] {
        let (options, problems) = file(&format!("me {me}\n{key}"));
        assert_eq!(options.map(|options| options.me.address.to_string()).as_deref(), Some(address), "{problems:?}");
        assert_eq!(problems, [""; 0]);
    }
    let (options, problems) = file("key 0123456789012345678901234567890123456789\n");
    assert_eq!(options.unwrap().key.unwrap()[..4], [0x01, 0x23, 0x45, 0x67]);
    assert!(problems.len() == 1 && problems[0].contains("has 40 digits; the first 32 are used"), "{problems:?}");
    for (ifconfig, daemon_configures) in
        [("", true), ("ifconfig\n", false), ("ifconfig yes\n", false), ("ifconfig no\n", true)]
    {
        let (options, problems) = file(&format!("{key}{ifconfig}"));
        assert_eq!(options.map(|o| o.interface.configure), Some(daemon_configures), "{ifconfig}: {problems:?}");
    }
    let (options, problems) = file(&format!("key {}\n", "0".repeat(32)));
    assert!(options.is_none() && problems.len() == 1 && problems[0].contains("all zeros"), "{problems:?}");
    let (options, problems) = file("key=00112233445566778899aabbccddeeff\n");
    let text = problems.join("\n");
    assert!(options.is_none() && text.contains("unknown option `key=`; /etc/cipe/b:4; "), "{text}");
    assert!(text.contains("`key VALUE`") && !text.contains("00112233"), "{text}");
}

#[test]
fn the_own_address_without_an_address_takes_the_family_of_the_peer() {
    let text = GOOD.replace("me 192.0.2.1:6789", "me :9999").replace("192.0.2.2:6789", "[2001:db8::2]:6789");
    assert_eq!(settled(&text).0.unwrap().me.address, "[::]:9999".parse().unwrap());
}

#[test]
fn a_link_local_carrier_is_named_as_such() {
    let text = GOOD.replace("192.0.2.1:6789", "[fe80::a]:6789").replace("192.0.2.2:6789", "[fe80::b]:6789");
    let (options, problems) = settled(&text);
    assert!(options.is_none() && problems[0].contains("`me`: fe80::a is a link-local address"), "{problems:?}");
}

#[test]
fn a_link_local_carrier_has_one_device() {
    // The loopback device has the same index in each network namespace.
    let text = GOOD.replace("192.0.2.1:6789", "[fe80::a%lo]:6789").replace("192.0.2.2:6789", "[fe80::b%1]:6789");
    let (options, problems) = settled(&text);
    let options = options.unwrap();
    assert_eq!(problems, [""; 0]);
    assert_eq!(
        (options.me.address, options.peer.address),
        ("[fe80::a%1]:6789".parse().unwrap(), "[fe80::b%1]:6789".parse().unwrap())
    );
    assert_eq!(options.me.text, "[fe80::a%lo]:6789");
    assert!(options.peer_name.is_none(), "no resolver is asked for an address");
    for (text, told) in [
        (text.replace("%1", ""), "`peer`: fe80::b is a link-local address, which is not usable without its device"),
        (text.replace("%lo", "%no-such-dev"), "no network device is called `no-such-dev`"),
        (format!("{text}carrier-device no-such-dev\n"), "`me` is on lo, and `carrier-device` is no-such-dev"),
    ] {
        let (options, problems) = settled(&text);
        assert!(options.is_none() && problems[0].contains(told), "{problems:?}");
    }
    assert!(settled(&format!("{text}carrier-device lo\n")).0.is_some());
}

#[test]
fn an_own_address_on_the_loopback_is_said() {
    // A name that is a loopback address on every host.
    let (options, problems) = settled(&GOOD.replace("192.0.2.1:6789", "localhost:6789"));
    assert_eq!(options.unwrap().me.address, "0.0.0.0:6789".parse().unwrap());
    assert!(problems[0].contains("127.0.0.1, a loopback address; the system chooses another"), "{problems:?}");
    let (options, problems) = settled(&GOOD.replace("192.0.2.1", "127.0.1.1"));
    assert!(options.is_none() && problems[0].contains("127.0.1.1 is a loopback address"), "{problems:?}");
    for peer in ["127.0.0.1:6790", "0.0.0.0:0"] {
        let text = GOOD.replace("192.0.2.1", "127.0.0.1").replace("192.0.2.2:6789", peer);
        assert_eq!(settled(&text).1, [""; 0]);
    }
}

#[test]
fn all_problems_are_told_at_once() {
    let (options, problems) = settled("mtu x\nipaddr 10.0.0.1\nbogus 1\npeer nonsense\n");
    assert!(options.is_none());
    let text = problems.join("\n");
    for part in ["`mtu`", "`bogus`", "`ptpaddr` is missing", "`key` is missing", "`nonsense`"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!text.contains("`peer` is missing"), "{text}");
}

#[test]
fn a_key_on_the_command_line_is_refused_without_repeating_it() {
    let mut draft = Draft::new(Program::Cb);
    let mut problems = Vec::new();
    assign(&mut draft, &mut problems, b"key", b"deadbeefdeadbeefdeadbeefdeadbeef", &Origin::CommandLine);
    assert!(draft.key.value.is_none());
    let text = problems[0].to_string();
    assert!(text.contains("refused on a command line") && !text.contains("dead"), "{text}");
}

#[test]
fn nokey_is_warned_of_and_started() {
    let (options, problems) = settled(&GOOD.replace("key 000102030405060708090a0b0c0d0e0f", "nokey"));
    assert!(options.unwrap().key.is_none());
    assert!(problems[0].contains("NO ENCRYPTION"), "{problems:?}");
}

#[test]
fn a_short_cut_around_the_firewall_is_warned_of() {
    assert!(settled(GOOD).0.unwrap().lan.is_none());
    let (options, problems) = settled(&format!("{GOOD}lan eth1\n"));
    assert_eq!(options.unwrap().lan.as_deref(), Some("eth1"));
    assert!(problems[0].contains("`lan eth1` goes around the firewall"), "{problems:?}");
}

#[test]
fn keybug_reads_letters_as_versions_before_1_4_0_did() {
    let (options, _) = settled(&format!("{GOOD}keybug\n"));
    assert_eq!(options.unwrap().key.unwrap()[10..], [1, 2, 3, 4, 5, 6]);
}

#[test]
fn a_peer_to_be_learned_has_no_address() {
    for peer in ["0.0.0.0:0", "0.0.0.0:6789", "127.0.0.1:9"] {
        let (options, problems) = settled(&format!("{GOOD}peer {peer}\n"));
        assert_eq!(options.unwrap().peer.address, "0.0.0.0:0".parse().unwrap(), "{problems:?}");
    }
    let (options, problems) = settled(&format!("{GOOD}peer 0.0.0.0:0\npinpeer\n"));
    assert!(options.is_none() && problems[0].contains("`pinpeer`"), "{problems:?}");
}

#[test]
fn the_own_carrier_address_takes_the_family_of_the_peer() {
    let text = GOOD.replace("me 192.0.2.1:6789\n", "").replace("192.0.2.2:6789", "[2001:db8::2]:6789");
    let options = settled(&text).0.unwrap();
    assert_eq!(options.me.address, "[::]:0".parse().unwrap());
    assert_eq!(options.peer.text, "[2001:db8::2]:6789");
}

#[test]
fn options_without_effect_are_said_and_do_not_stop_the_start() {
    let (options, problems) =
        settled(&format!("{GOOD}mask 255.255.255.255\nbcast 10.0.0.255\nmetric 7\nifconfig\ntoping 3\n"));
    assert!(options.is_some_and(|options| !options.interface.configure));
    assert_eq!(problems.len(), 4, "{problems:?}");
}

#[test]
fn the_interface_is_described_as_ifconfig_would_take_it() {
    let (options, problems) =
        settled(&format!("{GOOD}mask 255.255.255.0\nbcast 10.0.0.255\nhwaddr 2:0:0:0:0:1\nifconfig no\nmetric 7\n"));
    let interface = options.unwrap().interface;
    assert_eq!((interface.configure, interface.metric, interface.prefix), (true, 7, Some(24)));
    assert_eq!(interface.broadcast, Some(Ipv4Addr::new(10, 0, 0, 255)));
    assert_eq!(interface.mac, Some([2, 0, 0, 0, 0, 1]));
    assert_eq!(problems, [""; 0]);
}

#[test]
fn a_peer_behind_a_socks_server_is_known_and_has_an_ipv4_address() {
    let (options, problems) = settled(&format!("{GOOD}socks 192.0.2.3:1080\n"));
    assert_eq!(options.unwrap().socks.unwrap().1, "192.0.2.3:1080".parse().unwrap(), "{problems:?}");
    for (peer, word) in [("[2001:db8::2]:6789", "no IPv4 address"), ("0.0.0.0:0", "known peer")] {
        let (options, problems) = settled(&format!("{GOOD}socks 192.0.2.3:1080\npeer {peer}\n"));
        assert!(options.is_none() && problems[0].contains(word), "{problems:?}");
    }
}

#[test]
fn a_peer_s_name_is_kept_and_its_address_is_none() {
    assert!(settled(GOOD).0.unwrap().peer_name.is_none());
    let name = settled(&format!("{GOOD}peer localhost:6789\n")).0.unwrap().peer_name.unwrap();
    assert_eq!(name.to_string(), "localhost:6789");
}

#[test]
fn a_mark_is_decimal_or_hexadecimal() {
    for (text, mark) in [("0", 0), ("7", 7), ("0x2a", 42), ("0XFFFFFFFF", u32::MAX), ("4294967295", u32::MAX)] {
        assert_eq!(settled(&format!("{GOOD}mark {text}\n")).0.unwrap().mark, mark, "{text}");
    }
    for text in ["-1", "+1", "0x", "0x+1", "0x100000000", "4294967296", "2a", "0x1 2"] {
        let (options, problems) = settled(&format!("{GOOD}mark {text}\n"));
        assert!(options.is_none() && problems[0].contains("option `mark`"), "{text}: {problems:?}");
    }
}

#[test]
fn sealed_packets_are_the_default_and_need_a_key() {
    for (text, expected) in
        [("", SealedPolicy::Auto), ("sealed require\n", SealedPolicy::Require), ("sealed no\n", SealedPolicy::No)]
    {
        let (options, problems) = settled(&format!("{GOOD}{text}"));
        assert_eq!((options.unwrap().sealed, problems.len()), (expected, 0), "{text}");
    }
    let without_key = GOOD.replace("key 000102030405060708090a0b0c0d0e0f", "nokey");
    for text in ["", "sealed no\n"] {
        let (options, problems) = settled(&format!("{without_key}{text}"));
        assert_eq!((options.unwrap().sealed, problems.len()), (SealedPolicy::No, 1), "{text}: {problems:?}");
    }
    for text in ["sealed auto\n", "sealed require\n"] {
        let (options, problems) = settled(&format!("{without_key}{text}"));
        let told = |part| problems.iter().any(|problem| problem.contains(part));
        assert!(options.is_none() && told("`sealed` (/etc/cipe/b:7) needs a key") && told("sealed no"), "{problems:?}");
    }
}

#[test]
fn options_of_protocol_3_have_no_effect_where_it_is_not_used() {
    let extra = "staticdata yes\ntokey 60\ntokxts 30\n";
    for (policy, warnings) in [("auto", 0), ("require", 3)] {
        let (options, problems) = settled(&format!("{GOOD}{extra}sealed {policy}\n"));
        assert!(options.is_some() && problems.len() == warnings, "{problems:?}");
    }
}

#[test]
fn every_option_of_the_protocol_is_known() {
    let names = "device debug cipher ipaddr ptpaddr mtu metric cttl me peer key nokey socks tokxc tokey tokxts ping \
                 toping maxerr ipup ipdown arg dynip ifconfig checksum forcemtu ignoredf mask bcast hwaddr keybug \
                 idea_words carrier xdp-mode mssclamp staticdata busypoll lan mark";
    for name in names.split_whitespace() {
        assert!(SPECS.iter().any(|spec| spec.name == name), "{name}");
    }
}

proptest! {
    /// A key that is in the wrong place, or broken, by a typing error or a mistake.
    #[test]
    fn no_text_about_a_file_repeats_a_part_of_its_key(
        key in "[0-9a-fA-F]{32,64}",
        before in prop::sample::select(vec![
            "", "key=", "KEY=", "key:", "key\"", "key", "key 0x", "key '", "Key ", "key\u{a0}", "mtu ", "me ", "peer ", "debug ",
            "device ", "mask ", "hwaddr ", "cipher ", "ipup ", "xdp-mode ", "socks ", "arg ", "arg /", "ipdown /", "mtu=", "lan ",
        ]),
        behind in prop::sample::select(vec!["", "\"", ";", " extra", ":", ":6789", "x", "\u{fffd}", "=1"]),
        cut in 0_usize..8,
    ) {
        // Short ends are no secret, and may equal a number of an option by chance.
        let line = format!("{before}{}{behind}", &key[cut..]);
        let mut draft = Draft::new(Program::Cb);
        let mut problems = Vec::new();
        read_text(line.as_bytes(), Path::new("/x"), &mut draft, &mut problems);
        let mut text: String = draft.effective().into_iter().map(|(_, value, _)| format!("{value}\n")).collect();
        // Values that would be looked up in DNS.
        draft.me.value = None;
        draft.peer.value = None;
        draft.socks.value = None;
        let (_, problems) = settle(&draft, problems);
        for problem in problems {
            text.push_str(&format!("{problem}\n{problem:?}\n"));
        }
        for run in key.as_bytes().windows(8) {
            let run = std::str::from_utf8(run).unwrap();
            prop_assert!(!text.contains(run), "{run} in {text}");
        }
    }

    #[test]
    fn whatever_is_in_a_file_ends_in_options_or_errors(text: Vec<u8>) {
        let mut draft = Draft::new(Program::Cb);
        let mut problems = Vec::new();
        read_text(&text, Path::new("/x"), &mut draft, &mut problems);
        let failed = problems.iter().any(|problem| problem.severity == Severity::Error);
        let (options, problems) = settle(&draft, problems);
        prop_assert!(options.is_none() || !failed);
        prop_assert!(options.is_some() || problems.iter().any(|problem| problem.severity == Severity::Error));
    }

    #[test]
    fn known_names_with_any_value_never_panic(lines in prop::collection::vec((0..SPECS.len(), "[ -~]{0,40}"), 0..8)) {
        // Values that would be looked up in DNS are omitted: tests must not depend on a resolver.
        let text: String = lines.iter().map(|(index, value)| format!("{} {value}\n", SPECS[*index].name)).collect();
        let mut draft = Draft::new(Program::Ci);
        let mut problems = Vec::new();
        read_text(text.as_bytes(), Path::new("/x"), &mut draft, &mut problems);
        for problem in problems {
            prop_assert!(problem.to_string().matches("; ").count() >= 2);
        }
        prop_assert_eq!(draft.effective().len(), SPECS.len());
    }
}

#[test]
fn an_ethernet_tunnel_needs_no_addresses_and_has_room_for_the_header() {
    let bare = GOOD.replace("ipaddr 10.9.0.1\nptpaddr 10.9.0.2\n", "");
    let (options, problems) = settled_as(Program::Db, &bare);
    assert_eq!(problems, Vec::<String>::new());
    let options = options.unwrap();
    assert!(options.ipaddr.is_unspecified() && options.ptpaddr.is_unspecified());
    assert_eq!((options.protocol, options.protocol.number(), options.mtu), (Protocol::Ethernet, 4, 1428));
    assert!(settled(&bare).0.is_none(), "protocol 3 needs them");
    // The peer's address without the own one is a mistake.
    let (options, problems) = settled_as(Program::Db, &format!("{bare}ptpaddr 10.9.0.2\n"));
    assert!(options.is_none() && problems[0].contains("`ipaddr` is missing"), "{problems:?}");
    // A wrong value does not count as omitted.
    let (options, problems) = settled_as(Program::Db, &format!("{bare}ipaddr 10.9.0.1:6789\n"));
    assert!(options.is_none() && problems.len() == 1, "{problems:?}");
}

#[test]
fn an_ethernet_tunnel_has_the_network_of_its_mask() {
    let own = GOOD.replace("ptpaddr 10.9.0.2\n", "");
    for (mask, broadcast) in
        [("255.255.255.0", Some("10.9.0.255")), ("255.255.255.254", None), ("255.255.255.255", None)]
    {
        let (options, problems) = settled_as(Program::Db, &format!("{own}mask {mask}\n"));
        let interface = options.unwrap().interface;
        assert_eq!(interface.broadcast, broadcast.map(|text| text.parse().unwrap()), "{mask}: {problems:?}");
    }
    let (options, _) = settled_as(Program::Db, &format!("{own}mask 255.255.0.0\nbcast 10.9.1.255\n"));
    let interface = options.unwrap().interface;
    assert_eq!((interface.prefix, interface.broadcast), (Some(16), Some("10.9.1.255".parse().unwrap())));
    let (options, problems) =
        settled_as(Program::Db, &format!("{}mask 255.255.0.0\n", own.replace("ipaddr 10.9.0.1\n", "")));
    assert!(options.is_some() && problems[0].contains("`mask` has no effect without `ipaddr`"), "{problems:?}");
}

#[test]
fn what_an_ethernet_tunnel_cannot_have_is_refused() {
    for (text, part) in [("lan eth1", "has no short cut"), ("mtu 3500", "at most 3486")] {
        let (options, problems) = settled_as(Program::Db, &format!("{GOOD}{text}\n"));
        assert!(options.is_none() && problems.len() == 1 && problems[0].contains(part), "{problems:?}");
        assert!(settled(&format!("{GOOD}{text}\n")).0.is_some(), "{text}");
    }
}

#[test]
fn the_environment_sets_the_default_of_guard_and_files_override_it() {
    let directory = tempfile::tempdir().unwrap();
    let sources = |guard: Option<&str>, arguments: &[&str]| Sources {
        program: Program::Cb,
        guard: guard.map(Into::into),
        system: directory.path().join("none"),
        files: Vec::new(),
        arguments: arguments.iter().map(Into::into).collect(),
    };
    let guard = |sources: &Sources| load(sources).0.guard.value;
    assert_eq!(guard(&sources(None, &[])), GuardPolicy::Yes);
    assert_eq!(guard(&sources(Some("always"), &[])), GuardPolicy::Always);
    assert_eq!(guard(&sources(Some("always"), &["guard=no"])), GuardPolicy::No);
    let (_, problems) = load(&sources(Some("maybe"), &[]));
    let text = problems[0].to_string();
    assert!(text.contains("CIPE_GUARD in the environment") && text.contains("yes, always, no"), "{text}");
}
