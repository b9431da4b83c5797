//! The checksum of packets and messages.

/// The protocol's CRC-32: reflected 0xEDB88320, initial value 0, no final inversion (trap 2).
pub fn crc(data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(!0);
    hasher.update(data);
    !hasher.finalize()
}
