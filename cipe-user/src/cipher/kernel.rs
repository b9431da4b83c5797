//! The interface of a cipher kernel.

use super::stage::Rows;
use super::{Algorithm, BLOCK};

/// An implementation of a block cipher, `lanes()` blocks wide. `S` is the cipher's key schedule.
pub(super) trait Kernel<S>: Send {
    /// The name in the environment, in `cipe doctor` and in tables.
    fn name(&self) -> &'static str;

    /// Maximum lanes of one call.
    fn lanes(&self) -> usize;

    /// Lanes to use while more messages than [`Self::lanes`] are queued.
    fn steady_lanes(&self) -> usize {
        self.lanes()
    }

    /// Whether the lanes of one call may have different keys.
    fn mixes_keys(&self) -> bool;

    /// Whether no address and no branch depends on keys or data.
    fn constant_time(&self) -> bool;

    /// CBC-encrypts the first `steps` rows of the first `keys.len()` columns. `chain[l]` is the last ciphertext of lane
    /// `l`, or its IV, and is updated. Columns from `keys.len()` to `lanes()` may be overwritten; columns from
    /// `lanes()` on are left unchanged.
    fn encrypt(&mut self, keys: &[&S], chain: &mut [u64], rows: &mut Rows, steps: usize);

    /// CBC-encrypts one message in place, from the IV `chain`. Returns false, and does nothing, if this kernel has no
    /// method that is faster than [`Self::encrypt`].
    fn encrypt_alone(&mut self, _: &S, _: Algorithm, _chain: u64, _blocks: &mut [[u8; BLOCK]]) -> bool {
        false
    }

    /// Decrypts any number of blocks without chaining.
    fn decrypt(&mut self, key: &S, blocks: &mut [u64]);

    /// Erases all data that was derived from keys, at the end of a batch.
    fn wipe(&mut self) {}
}
