//! The veth pairs of Ethernet tunnels.

use aya::Pod;
use aya::maps::{HashMap, MapData};
use cipe_common::maps::{EthernetDevice, names};

use super::{Error, Programs, forgotten, in_map};

/// [`EthernetDevice`] in a type of ours, for which aya's trait can be implemented.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(super) struct DeviceValue(EthernetDevice);

// SAFETY: two u32, no padding, every bit pattern valid.
unsafe impl Pod for DeviceValue {}

/// By ifindex of either end.
pub(super) type Devices = HashMap<MapData, u32, DeviceValue>;

impl Programs {
    /// Registers the tunnel of the pair with these ends.
    ///
    /// # Errors
    /// [`Error::Map`] if the table is full.
    pub fn set_ethernet_device(&mut self, ends: [u32; 2], device: EthernetDevice) -> Result<(), Error> {
        for ifindex in ends {
            self.ethernet.insert(ifindex, DeviceValue(device), 0).map_err(in_map(names::ETHERNET_DEVICES))?;
        }
        Ok(())
    }

    /// Removes a pair: frames that enter it are dropped. No error if it was not registered.
    ///
    /// # Errors
    /// [`Error::Map`] with the kernel's answer.
    pub fn remove_ethernet_device(&mut self, ends: [u32; 2]) -> Result<(), Error> {
        for ifindex in ends {
            forgotten(self.ethernet.remove(&ifindex)).map_err(in_map(names::ETHERNET_DEVICES))?;
        }
        Ok(())
    }
}
