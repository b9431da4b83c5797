//! The configuration of a socket.

use super::Error;

/// How packets pass between UMEM and driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Mode {
    /// Zero copy if the driver supports it, otherwise copies. Tries zero copy at each bind; use [`Mode::Copy`] for a
    /// driver that is known not to support it (veth).
    #[default]
    Auto,
    /// Copies; works with any driver.
    Copy,
    /// Zero copy, or fail.
    ZeroCopy,
}

/// The handling of packets larger than a frame, as several descriptors (`XDP_USE_SG`, kernel 6.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum MultiBuffer {
    /// They are dropped.
    No,
    /// They can be received and sent, except if this would prevent zero copy: many drivers support only one of the two.
    Wanted,
    /// They can be received and sent, or the bind fails.
    #[default]
    Needed,
}

/// The configuration of a socket. Ring sizes count descriptors and are powers of two up to 2^20.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketConfig {
    /// Receive ring, or 0 for a socket that only sends.
    pub rx: u32,
    /// Transmit ring, or 0 for a socket that only receives.
    pub tx: u32,
    /// Fill ring.
    pub fill: u32,
    /// Completion ring.
    pub completion: u32,
    /// Copy or zero copy.
    pub mode: Mode,
    /// Packets larger than a frame.
    pub multi_buffer: MultiBuffer,
    /// Whether the kernel sleeps instead of spinning, and sets a flag when it needs a system call
    /// (`XDP_USE_NEED_WAKEUP`).
    pub need_wakeup: bool,
}

impl Default for SocketConfig {
    fn default() -> Self {
        Self::USUAL
    }
}

impl SocketConfig {
    /// The default.
    pub const USUAL: Self = Self {
        rx: 2048,
        tx: 2048,
        fill: 2048,
        completion: 2048,
        mode: Mode::Auto,
        multi_buffer: MultiBuffer::Needed,
        need_wakeup: true,
    };

    pub(super) fn check(&self) -> Result<(), Error> {
        let refuse = |what, value: u32, rule| Err(Error::Size { what, value: value.into(), rule });
        if self.rx == 0 && self.tx == 0 {
            return refuse("rx ring", 0, "a socket needs an rx ring or a tx ring");
        }
        let optional = |slots: u32| if slots == 0 { 1 } else { slots };
        let rings = [
            ("rx ring", optional(self.rx)),
            ("tx ring", optional(self.tx)),
            ("fill ring", self.fill),
            ("completion ring", self.completion),
        ];
        for (what, value) in rings {
            if !value.is_power_of_two() || value > 1 << 20 {
                return refuse(what, value, "it must be a power of two up to 1048576");
            }
        }
        Ok(())
    }
}
