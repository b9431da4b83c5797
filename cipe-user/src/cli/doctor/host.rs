//! The machine as /proc and /sys show it.

use std::fs;
use std::path::Path;

use super::{Finding, Grade};

/// The oldest kernel with everything that is needed: tcx links, AF_XDP in several pieces.
const OLDEST: (u32, u32) = (6, 6);
/// Kernels with faults that others have met, and which.
const KNOWN_BAD: &[((u32, u32), &str)] = &[((6, 17), "checksum offload of virtual devices is broken")];

/// Capabilities (capability.h) without which an engine cannot work.
const NEEDED: &[(u32, &str)] = &[(12, "CAP_NET_ADMIN"), (13, "CAP_NET_RAW"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];
/// Stands for the last two.
const SYS_ADMIN: u32 = 21;

pub fn findings() -> Vec<Finding> {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut findings = vec![kernel(text("/proc/sys/kernel/osrelease").trim()), rights(&text("/proc/self/status"))];
    let mounts = text("/proc/mounts");
    findings.push(match mounts.lines().any(|line| line.split_whitespace().nth(2) == Some("bpf")) {
        true => Finding::new(Grade::Good, "a bpffs is mounted"),
        false => Finding::new(Grade::Note, "no bpffs is mounted; none is needed by this version"),
    });
    findings
}

/// Names of the network devices.
pub fn devices() -> Vec<String> {
    let entries = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The driver of a device with hardware.
pub fn driver(name: &str) -> Option<String> {
    let link = fs::read_link(Path::new("/sys/class/net").join(name).join("device/driver")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

fn kernel(release: &str) -> Finding {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().ok());
    let (Some(Some(major)), Some(Some(minor))) = (numbers.next(), numbers.next()) else {
        return Finding::new(Grade::Note, format!("kernel {release}: no version that is known here"));
    };
    let version = (major, minor);
    if version < OLDEST {
        let text = format!("kernel {release}: {}.{} or later is needed", OLDEST.0, OLDEST.1);
        return Finding::new(Grade::Bad, text);
    }
    match KNOWN_BAD.iter().find(|(bad, _)| *bad == version) {
        Some((_, why)) => Finding::new(Grade::Note, format!("kernel {release}: {why}; take another one")),
        None => Finding::new(Grade::Good, format!("kernel {release}")),
    }
}

fn rights(status: &str) -> Finding {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or_default();
    let has = |bit: u32| bits >> bit & 1 == 1 || bit >= 38 && bits >> SYS_ADMIN & 1 == 1;
    let missing: Vec<&str> = NEEDED.iter().filter(|(bit, _)| !has(*bit)).map(|(_, name)| *name).collect();
    match missing.is_empty() {
        true => Finding::new(Grade::Good, "all capabilities that an engine needs"),
        false => Finding::new(Grade::Bad, format!("{} missing; run it as root", missing.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_judged_by_their_version() {
        for (release, grade) in [
            ("6.18.44-fc", Grade::Good),
            ("6.6.0", Grade::Good),
            ("7.0-rc1", Grade::Good),
            ("6.17.3", Grade::Note),
            ("6.5.13", Grade::Bad),
            ("5.15.0-100-generic", Grade::Bad),
            ("odd", Grade::Note),
            ("", Grade::Note),
        ] {
            assert_eq!(kernel(release).grade, grade, "{release}");
        }
    }

    #[test]
    fn missing_rights_are_named() {
        assert_eq!(rights("Name:\tcipe\nCapEff:\t000001ffffffffff\n").grade, Grade::Good);
        // Before CAP_BPF there was CAP_SYS_ADMIN, which still holds it.
        assert_eq!(rights("CapEff:\t0000000000203000\n").grade, Grade::Good);
        let finding = rights("CapEff:\t0000000000001000\n");
        assert_eq!(finding.grade, Grade::Bad);
        assert!(finding.text.contains("CAP_NET_RAW, CAP_PERFMON, CAP_BPF"), "{finding:?}");
        assert_eq!(rights("").grade, Grade::Bad);
    }
}
