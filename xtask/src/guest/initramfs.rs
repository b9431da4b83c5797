//! The initramfs of a guest: a shell, the modules for the host's file system, and a script that starts the guest's program
//! there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

use super::debian::Client;
use super::folder;
use super::kernel::Kernel;

/// Modules for the root file system: the host's by 9p, with an overlay in memory.
const MODULES: &[&str] = &["virtio_pci", "9pnet_virtio", "9p", "overlay"];

/// Mount tag of the host's file system.
pub(super) const HOST: &str = "host";

/// Writes the initramfs of a guest that runs `plan` to `path`.
///
/// # Errors
/// A module is missing, or a file cannot be read or written.
pub(super) fn write(kernel: &Kernel, plan: &Path, path: &Path) -> Result<()> {
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "proc", "sys", "host", "memory", "root"] {
        archive.add(folder, FOLDER, &[]);
    }
    let busybox = busybox()?;
    archive.add("bin/busybox", PROGRAM, &fs::read(&busybox).with_context(|| busybox.display().to_string())?);
    archive.add("bin/sh", LINK, b"busybox");
    let mut load = String::new();
    for (number, file) in kernel.in_order(MODULES)?.iter().enumerate() {
        let name = format!("{number}.ko");
        archive.add(&name, FILE, &module(file)?);
        load += &format!("insmod /{name}\n");
    }
    archive.add("init", PROGRAM, script(kernel, plan, &load)?.as_bytes());
    archive.add("TRAILER!!!", FILE, &[]);
    fs::write(path, &archive.octets).with_context(|| path.display().to_string())
}

/// The script that the kernel starts. It runs as process 1 until the end, so that it inherits orphans. It changes its own root,
/// which is also the root of the kernel's threads: the kernel loads modules by the `modprobe` there. The script loads the
/// drivers of network cards, which udev would load.
fn script(kernel: &Kernel, plan: &Path, load: &str) -> Result<String> {
    let this = std::env::current_exe()?;
    let (this, plan, modules) = (this.display(), plan.display(), kernel.modules.display());
    let release = &kernel.release;
    Ok(format!(
        r#"#!/bin/sh
set -e
for applet in mount mkdir mknod insmod hostname chroot; do alias $applet="/bin/busybox $applet"; done
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
{load}mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000 {HOST} /host
mount -t tmpfs memory /memory
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work root /root
mount -t proc proc /root/proc
mount -t sysfs sys /root/sys
mount -t devtmpfs dev /root/dev
mkdir -p /root/dev/pts /root/dev/shm /root/dev/net
mknod /root/dev/net/tun c 10 200
mount -t devpts pts /root/dev/pts
mount -t tmpfs shm /root/dev/shm
mount -t tmpfs -o mode=755 run /root/run
mount -t bpf bpf /root/sys/fs/bpf
mount -t cgroup2 cgroup /root/sys/fs/cgroup
echo +memory >/root/sys/fs/cgroup/cgroup.subtree_control
mount -t tracefs tracing /root/sys/kernel/tracing
mkdir -p /root/lib/modules/{release} /root/run/busybox
mount -o bind "/host{modules}" /root/lib/modules/{release}
mount -o bind /bin /root/run/busybox
hostname cipe-guest
exec /bin/busybox chroot /root /run/busybox/sh -c '
busybox=/run/busybox/busybox
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
for alias in $(grep -hs -e bc02 -e virtio:d00000001 /sys/bus/pci/devices/*/modalias /sys/bus/virtio/devices/*/modalias); do
    modprobe -q "$alias"
done
$busybox stty -F /dev/ttyS1 raw -echo
"{this}" guest-inside "{plan}" </dev/null >/dev/ttyS1 2>&1
$busybox poweroff -f
'
"#
    ))
}

/// A busybox that needs no libraries, unpacked from Debian's package.
fn busybox() -> Result<PathBuf> {
    // Guests may start at the same time; one of them fetches it for all.
    static FETCHING: Mutex<()> = Mutex::new(());
    let _fetching = FETCHING.lock().unwrap_or_else(PoisonError::into_inner);
    let home = folder().join("busybox");
    if !home.is_dir() {
        let fresh = folder().join("busybox.fresh");
        Client::get()?.unpack(&["busybox-static"], &fresh)?;
        fs::rename(&fresh, &home)?;
    }
    let places = ["usr/bin/busybox", "bin/busybox"].map(|place| home.join(place));
    places.into_iter().find(|path| path.is_file()).with_context(|| format!("{}: no busybox in it", home.display()))
}

/// A module in the form that the kernel accepts.
fn module(file: &Path) -> Result<Vec<u8>> {
    if file.extension().is_some_and(|extension| extension == "xz") {
        let output = Command::new("xz").args(["--decompress", "--stdout"]).arg(file).output()?;
        anyhow::ensure!(output.status.success(), "{}: {}", file.display(), String::from_utf8_lossy(&output.stderr));
        return Ok(output.stdout);
    }
    fs::read(file).with_context(|| file.display().to_string())
}

const FOLDER: u32 = 0o40755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const LINK: u32 = 0o120_777;

/// A cpio archive in the format that the kernel reads ("newc", Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    octets: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a file, a folder or, with its target as content, a symbolic link.
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let (number, length, name_length) = (self.entries, content.len(), name.len() + 1);
        // Number, mode, owner, group, links, time, length, device, its own device, length of the name, check sum.
        let header = format!(
            "070701{number:08X}{mode:08X}{:08X}{:08X}{:08X}{:08X}{length:08X}{:08X}{:08X}{:08X}{:08X}{name_length:08X}{:08X}",
            0, 0, 1, 0, 0, 0, 0, 0, 0
        );
        self.octets.extend_from_slice(header.as_bytes());
        self.octets.extend_from_slice(name.as_bytes());
        self.octets.push(0);
        self.pad();
        self.octets.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.octets.resize(self.octets.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_a_header_a_name_and_a_content_each_padded_to_four_octets() {
        let mut archive = Archive::default();
        archive.add("init", PROGRAM, b"abcde");
        let text = String::from_utf8(archive.octets).expect("ASCII");
        let header = "070701\
                      00000001000081ED000000000000000000000001000000000000000500000000000000000000000000000000\
                      0000000500000000";
        assert_eq!(text, format!("{header}init\0\0abcde\0\0\0"));
    }
}
