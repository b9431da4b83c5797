//! This machine according to /proc and /sys.

use std::fs;
use std::path::Path;

use super::{Finding, Grade};
use crate::kernel::known_bad;
use crate::kernel::release::{self, Release};

/// The oldest kernel on which this was tested.
const OLDEST_KERNEL: Release = Release::new(6, 1, 0);

/// Capabilities (capability.h) that an engine needs.
const NEEDED_CAPABILITIES: &[(u32, &str)] =
    &[(12, "CAP_NET_ADMIN"), (13, "CAP_NET_RAW"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];
/// Includes the last two.
const SYS_ADMIN_BIT: u32 = 21;

pub(super) fn findings() -> Vec<Finding> {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut findings = kernel(&release::running(), Release::running());
    findings.push(rights(&text("/proc/self/status")));
    let mounts = text("/proc/mounts");
    findings.push(match mounts.lines().any(|line| line.split_whitespace().nth(2) == Some("bpf")) {
        true => Finding::new(Grade::Good, "a bpffs is mounted"),
        false => Finding::new(Grade::Note, "no bpffs is mounted; this version does not need one"),
    });
    findings
}

/// Names of the network devices.
pub(super) fn devices() -> Vec<String> {
    let entries = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The driver of a device, if it has hardware.
pub(super) fn driver(name: &str) -> Option<String> {
    let link = fs::read_link(Path::new("/sys/class/net").join(name).join("device/driver")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

fn kernel(release: &str, version: Option<Release>) -> Vec<Finding> {
    let Some(version) = version else {
        return vec![Finding::new(Grade::Note, format!("kernel {release}: unknown form of a version"))];
    };
    let mut findings = vec![match version < OLDEST_KERNEL {
        true => {
            Finding::new(Grade::Bad, format!("kernel {release}: {OLDEST_KERNEL} or later is needed (docs/KERNELS.md)"))
        }
        false => Finding::new(Grade::Good, format!("kernel {release}")),
    }];
    findings.extend(known_bad::of(version).map(|fault| Finding::new(Grade::Note, fault.to_string())));
    findings
}

fn rights(status: &str) -> Finding {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or_default();
    let has = |bit: u32| bits >> bit & 1 == 1 || bit >= 38 && bits >> SYS_ADMIN_BIT & 1 == 1;
    let missing: Vec<&str> = NEEDED_CAPABILITIES.iter().filter(|(bit, _)| !has(*bit)).map(|(_, name)| *name).collect();
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
        for (release, grades) in [
            ("6.18.44-fc", vec![Grade::Good]),
            ("6.1.0-50-amd64", vec![Grade::Good]),
            ("7.2-rc1", vec![Grade::Good]),
            ("6.17.3", vec![Grade::Good, Grade::Note, Grade::Note]),
            ("6.0.13", vec![Grade::Bad]),
            ("5.15.0-100-generic", vec![Grade::Bad]),
            ("odd", vec![Grade::Note]),
            ("", vec![Grade::Note]),
        ] {
            let got: Vec<Grade> = kernel(release, release.parse().ok()).iter().map(|finding| finding.grade).collect();
            assert_eq!(got, grades, "{release}");
        }
    }

    #[test]
    fn missing_rights_are_named() {
        assert_eq!(rights("Name:\tcipe\nCapEff:\t000001ffffffffff\n").grade, Grade::Good);
        // Before CAP_BPF, CAP_SYS_ADMIN had its rights, and it still has them.
        assert_eq!(rights("CapEff:\t0000000000203000\n").grade, Grade::Good);
        let finding = rights("CapEff:\t0000000000001000\n");
        assert_eq!(finding.grade, Grade::Bad);
        assert!(finding.text.contains("CAP_NET_RAW, CAP_PERFMON, CAP_BPF"), "{finding:?}");
        assert_eq!(rights("").grade, Grade::Bad);
    }
}
