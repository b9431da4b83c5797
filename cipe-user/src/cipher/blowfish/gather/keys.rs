//! The key of each lane.

use super::{GROUP, LANES};
use crate::cipher::blowfish::{ROUNDS, Schedule};
use std::arch::x86_64::*;
use std::ptr;
use zeroize::Zeroize;

/// A key for each lane: the offset of its tables from those of the first lane's key, and its round keys, which are not
/// gathered.
#[repr(C, align(64))]
pub(super) struct Each {
    /// In words.
    offsets: [[i32; GROUP]; LANES / GROUP],
    p: [[[u32; GROUP]; LANES / GROUP]; ROUNDS + 2],
}

impl Each {
    pub(super) fn new() -> Self {
        Self { offsets: [[0; GROUP]; LANES / GROUP], p: [[[0; GROUP]; LANES / GROUP]; ROUNDS + 2] }
    }

    pub(super) fn wipe(&mut self) {
        self.p.as_flattened_mut().as_flattened_mut().zeroize();
    }
}

/// The keys of a call: one for all lanes or, if `MANY`, those of an [`Each`].
#[derive(Clone, Copy)]
pub(super) struct Keys<'a, const MANY: bool> {
    first: &'a Schedule,
    each: &'a Each,
}

impl<'a> Keys<'a, false> {
    /// Creates the keys for one key in all lanes; the contents of `each` are not used.
    pub(super) fn one(first: &'a Schedule, each: &'a Each) -> Self {
        Self { first, each }
    }
}

impl<'a> Keys<'a, true> {
    /// Creates the keys of up to [`LANES`] lanes; `None` if they are too far apart in memory (8 GiB or more).
    pub(super) fn many(keys: &[&'a Schedule], each: &'a mut Each) -> Option<Self> {
        let first = *keys.first()?;
        // Lanes without a key use the first one.
        each.offsets = Default::default();
        for (lane, key) in keys.iter().enumerate() {
            let distance =
                ptr::from_ref(*key).expose_provenance() as i64 - ptr::from_ref(first).expose_provenance() as i64;
            let (group, column) = (lane / GROUP, lane % GROUP);
            each.offsets[group][column] = i32::try_from(distance / size_of::<u32>() as i64).ok()?;
            for (row, p) in each.p.iter_mut().zip(key.p) {
                row[group][column] = p;
            }
        }
        Some(Self { first, each })
    }
}

impl<const MANY: bool> Keys<'_, MANY> {
    /// Returns the words of table `table` for a group of lanes and indices below 256.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(super) fn look_up(self, table: usize, index: __m512i, group: usize) -> __m512i {
        let table = &raw const self.first.s[table];
        let index = _mm512_and_si512(index, _mm512_set1_epi32(0xff));
        if MANY {
            let table = ptr::with_exposed_provenance::<i32>(table.addr());
            let index = _mm512_add_epi32(index, load(&self.each.offsets[group]));
            // SAFETY: each offset is the distance from the first key to another one; the caller of `many` still holds that
            // key, and `many` exposed its address. The index stays below the table's length.
            unsafe { _mm512_i32gather_epi32::<4>(index, table) }
        } else {
            // SAFETY: the index stays below the table's length.
            unsafe { _mm512_i32gather_epi32::<4>(index, table.cast()) }
        }
    }

    /// Returns round key `i` of a group of lanes.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(super) fn p(self, i: usize, group: usize) -> __m512i {
        if MANY { load(&self.each.p[i][group]) } else { _mm512_set1_epi32(self.first.p[i] as i32) }
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load<T: Word>(words: &[T; GROUP]) -> __m512i {
    // SAFETY: the array has the vector's 64 octets, and the instruction asks for no alignment.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

/// A type of which 16 fill a vector.
trait Word {}
impl Word for u32 {}
impl Word for i32 {}
