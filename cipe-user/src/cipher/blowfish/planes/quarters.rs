//! Look-ups by `vpermb`, one quarter of a table at a time under a mask: one operation of port 5 on Intel's cores, where
//! `vpermt2b` takes three. In assembly, because the compiler turns intrinsics into tests and sums that also use port 5.
//!
//! The order of a round keeps port 5 busy while carries go from plane to plane: first the two tables that are added,
//! then the other two by pairs of planes; the sums of one pair are ready for the next round while the next pair is
//! looked up.

use super::{State, Tables};
use std::arch::asm;
use std::arch::x86_64::*;

/// The masks of the octets of `$index` with bit 7, with bit 6 and with both.
macro_rules! masks {
    ($index:literal, [$bit7:literal, $bit6:literal, $both:literal], $temporary:literal) => {
        concat!(
            "vpsllw {",
            $temporary,
            "}, {",
            $index,
            "}, 1\n",
            "vpmovb2m ",
            $bit7,
            ", {",
            $index,
            "}\n",
            "vpmovb2m ",
            $bit6,
            ", {",
            $temporary,
            "}\n",
            "kandq ",
            $both,
            ", ",
            $bit7,
            ", ",
            $bit6,
            "\n",
        )
    };
}

/// Sets plane `$word` from the quarter at offset `$at` of the table at `$table`, for the octets of `$index` that the
/// mask selects.
macro_rules! find {
    ($word:literal, $mask:expr, $index:literal, $table:literal, $at:expr) => {
        concat!("vpermb {", $word, "}", $mask, ", {", $index, "}, [{s} + ", $table, " + ", $at, "]\n")
    };
}

/// All planes of one table. The results for octets with bit 7 overwrite the first ones, then those with bit 6, then
/// those with both.
macro_rules! look_up {
    ($index:literal, $table:literal, [$bit7:literal, $bit6:literal, $both:literal], $words:tt, $temporary:literal) => {
        concat!(
            masks!($index, [$bit7, $bit6, $both], $temporary),
            look_up!(@quarter $words, "", $index, $table, "0"),
            look_up!(@quarter $words, concat!(" {{", $bit7, "}}"), $index, $table, "128"),
            look_up!(@quarter $words, concat!(" {{", $bit6, "}}"), $index, $table, "64"),
            look_up!(@quarter $words, concat!(" {{", $both, "}}"), $index, $table, "192"),
        )
    };
    (@quarter [$w0:literal, $w1:literal, $w2:literal, $w3:literal], $mask:expr, $index:literal, $table:literal, $at:literal) => {
        concat!(
            find!($w0, $mask, $index, $table, $at),
            find!($w1, $mask, $index, $table, concat!("256 + ", $at)),
            find!($w2, $mask, $index, $table, concat!("512 + ", $at)),
            find!($w3, $mask, $index, $table, concat!("768 + ", $at)),
        )
    };
}

/// Looks up two planes, from octet `$plane` of the words on, in the tables of `l1` and `l0`.
macro_rules! look_up_last {
    ($plane:literal, $c:tt, $d:tt) => {
        concat!(
            look_up_last!(@quarter $c, $d, "", "", $plane, "0"),
            look_up_last!(@quarter $c, $d, " {{k1}}", " {{k4}}", $plane, "128"),
            look_up_last!(@quarter $c, $d, " {{k2}}", " {{k5}}", $plane, "64"),
            look_up_last!(@quarter $c, $d, " {{k3}}", " {{k6}}", $plane, "192"),
        )
    };
    (@quarter [$c0:literal, $c1:literal], [$d0:literal, $d1:literal], $mask_c:literal, $mask_d:literal, $plane:literal, $at:literal) => {
        concat!(
            find!($c0, $mask_c, "l1", "2048", concat!($plane, " + ", $at)),
            find!($c1, $mask_c, "l1", "2048 + 256", concat!($plane, " + ", $at)),
            find!($d0, $mask_d, "l0", "3072", concat!($plane, " + ", $at)),
            find!($d1, $mask_d, "l0", "3072 + 256", concat!($plane, " + ", $at)),
        )
    };
}

/// Plane `$sum` of a sum, and in `$a` its carry, 0 or -1. As in [`super::pairs::add`], the carry comes from the top
/// bits, and a bit matrix spreads it over the octet.
macro_rules! add {
    ($sum:literal, $a:literal, $b:literal, "") => {
        concat!("vpaddb {", $sum, "}, {", $a, "}, {", $b, "}\n", add!(@carry $sum, $a, $b))
    };
    ($sum:literal, $a:literal, $b:literal, $carry:literal) => {
        concat!(add!(@last $sum, $a, $b, $carry), add!(@carry $sum, $a, $b))
    };
    (@last $sum:literal, $a:literal, $b:literal, $carry:literal) => {
        concat!(
            "vpaddb {", $sum, "}, {", $a, "}, {", $b, "}\n",
            "vpsubb {", $sum, "}, {", $sum, "}, {", $carry, "}\n",
        )
    };
    (@carry $sum:literal, $a:literal, $b:literal) => {
        concat!(
            "vpternlogd {", $a, "}, {", $b, "}, {", $sum, "}, 0xd4\n",
            "vgf2p8affineqb {", $a, "}, {", $a, "}, {top_bit}, 0\n",
        )
    };
}

/// Two rounds of all groups; `p` holds the round keys that are XORed into their results.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
pub(super) fn two_rounds<const G: usize>(tables: &Tables, p: [&[u32; 4]; 2], state: &mut [State; G]) {
    let top_bit = _mm512_set1_epi8(0x80u8 as i8);
    for [l0, l1, l2, l3, r0, r1, r2, r3] in &mut *state {
        [*r0, *r1, *r2, *r3] = round(tables, p[0], [*l0, *l1, *l2, *l3], [*r0, *r1, *r2, *r3], top_bit);
    }
    for [l0, l1, l2, l3, r0, r1, r2, r3] in state {
        [*l0, *l1, *l2, *l3] = round(tables, p[1], [*r0, *r1, *r2, *r3], [*l0, *l1, *l2, *l3], top_bit);
    }
}

/// Returns the right words after a round: exclusive or with the round function of the left words and with the next
/// round key `p`. `top_bit` is the bit matrix that spreads the top bit over its octet.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
fn round(tables: &Tables, p: &[u32; 4], left: [__m512i; 4], right: [__m512i; 4], top_bit: __m512i) -> [__m512i; 4] {
    let [mut r0, mut r1, mut r2, mut r3] = right;
    // SAFETY: instructions of the enabled features; they read the 4 KiB at `tables.s`, aligned to 64 octets, and the
    // four words of `p`.
    unsafe {
        asm!(
            look_up!("l2", "1024", ["k4", "k5", "k6"], ["b0", "b1", "b2", "b3"], "t"),
            look_up!("l3", "0", ["k1", "k2", "k3"], ["a0", "a1", "a2", "a3"], "t"),
            // The sums in t, b0, b1, b2.
            add!("t", "a0", "b0", ""),
            add!("b0", "a1", "b1", "a0"),
            add!("b1", "a2", "b2", "a1"),
            add!(@last "b2", "a3", "b3", "a2"),
            masks!("l1", ["k1", "k2", "k3"], "b3"),
            masks!("l0", ["k4", "k5", "k6"], "b3"),
            look_up_last!("0", ["a0", "a1"], ["d0", "d1"]),
            "vpxord {a0}, {a0}, {t}",
            add!("b3", "a0", "d0", ""),
            "vpternlogd {r0}, {b3}, dword ptr [{p}] {{1to16}}, 0x96",
            "vpxord {a1}, {a1}, {b0}",
            add!("d0", "a1", "d1", "a0"),
            "vpternlogd {r1}, {d0}, dword ptr [{p} + 4] {{1to16}}, 0x96",
            look_up_last!("512", ["a2", "a3"], ["d2", "d3"]),
            "vpxord {a2}, {a2}, {b1}",
            add!("d1", "a2", "d2", "a1"),
            "vpternlogd {r2}, {d1}, dword ptr [{p} + 8] {{1to16}}, 0x96",
            "vpxord {a3}, {a3}, {b2}",
            add!(@last "d2", "a3", "d3", "a2"),
            "vpternlogd {r3}, {d2}, dword ptr [{p} + 12] {{1to16}}, 0x96",
            s = in(reg) &raw const tables.s,
            p = in(reg) p.as_ptr(),
            top_bit = in(zmm_reg) top_bit,
            l0 = in(zmm_reg) left[0],
            l1 = in(zmm_reg) left[1],
            l2 = in(zmm_reg) left[2],
            l3 = in(zmm_reg) left[3],
            r0 = inout(zmm_reg) r0,
            r1 = inout(zmm_reg) r1,
            r2 = inout(zmm_reg) r2,
            r3 = inout(zmm_reg) r3,
            a0 = out(zmm_reg) _,
            a1 = out(zmm_reg) _,
            a2 = out(zmm_reg) _,
            a3 = out(zmm_reg) _,
            b0 = out(zmm_reg) _,
            b1 = out(zmm_reg) _,
            b2 = out(zmm_reg) _,
            b3 = out(zmm_reg) _,
            d0 = out(zmm_reg) _,
            d1 = out(zmm_reg) _,
            d2 = out(zmm_reg) _,
            d3 = out(zmm_reg) _,
            t = out(zmm_reg) _,
            out("k1") _,
            out("k2") _,
            out("k3") _,
            out("k4") _,
            out("k5") _,
            out("k6") _,
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    [r0, r1, r2, r3]
}
