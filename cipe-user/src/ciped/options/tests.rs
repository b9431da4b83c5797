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
    let mut draft = Draft::new(Program::Cb);
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
    assert_eq!(options.key.unwrap().0[15], 15);
    assert_eq!(options.ipup, Path::new("/etc/cipe/ip-up"));
}

#[test]
fn the_program_name_chooses_cipher_and_prefix_unless_an_option_does() {
    for (program, text, cipher, device_prefix) in [
        (Program::Cb, "", Cipher::Blowfish, "cipcb"),
        (Program::Ci, "", Cipher::Idea, "cipci"),
        (Program::Cb, "cipher idea\n", Cipher::Idea, "cipci"),
        (Program::Ci, "idea_words little\n", Cipher::IdeaLittle, "cipci"),
    ] {
        let mut draft = Draft::new(program);
        let problems = read_into(&mut draft, &format!("{GOOD}{text}"), "/x");
        let options = settle(&draft, problems).0.unwrap();
        assert_eq!((options.cipher, options.prefix()), (cipher, device_prefix));
    }
    assert_eq!(Program::from_name(b"/usr/sbin/ciped-ci"), Some(Program::Ci));
    assert_eq!(Program::from_name(b"cipe"), None);
}

#[test]
fn later_sources_win_and_every_value_knows_its_origin() {
    let sources = Sources {
        program: Program::Cb,
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
        ("mtu=1400", ["unknown option `mtu=1400`", "/etc/cipe/b:7", "blank between name and value"]),
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
        ("peer 192.0.2.2:no-such-service", ["no UDP service", "/etc/cipe/b:7", "/etc/services"]),
        ("ptpaddr 10.9.0.1", ["both 10.9.0.1", "/etc/cipe/b:7", "its own address"]),
        ("ipaddr 0.0.0.0", ["0.0.0.0 is no address", "/etc/cipe/b:7", "this end"]),
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
    assert_eq!(options.unwrap().key.unwrap().0[10..], [1, 2, 3, 4, 5, 6]);
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
        settled(&format!("{GOOD}mask 255.255.255.255\nbcast 10.0.0.255\nmetric 7\nifconfig no\ntoping 3\n"));
    assert!(options.is_some_and(|options| !options.interface.configure));
    assert_eq!(problems.len(), 4, "{problems:?}");
}

#[test]
fn the_interface_is_described_as_ifconfig_would_take_it() {
    let (options, problems) =
        settled(&format!("{GOOD}mask 255.255.255.0\nbcast 10.0.0.255\nhwaddr 2:0:0:0:0:1\nifconfig\nmetric 7\n"));
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
fn every_option_of_the_protocol_is_known() {
    let names = "device debug cipher ipaddr ptpaddr mtu metric cttl me peer key nokey socks tokxc tokey tokxts ping \
                 toping maxerr ipup ipdown arg dynip ifconfig checksum forcemtu ignoredf mask bcast hwaddr keybug \
                 idea_words carrier xdp-mode mssclamp staticdata busypoll lan";
    for name in names.split_whitespace() {
        assert!(SPECS.iter().any(|spec| spec.name == name), "{name}");
    }
}

proptest! {
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
        // Values that would be looked up in DNS are left out: tests must not depend on a resolver.
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
