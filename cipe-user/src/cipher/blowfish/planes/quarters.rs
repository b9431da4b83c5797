//! Look-ups by `vpermb`, a quarter of a table at a time under a mask: one operation of port 5 on Intel's cores, whose
//! `vpermt2b` takes three. In assembly, for out of intrinsics the compiler makes tests and sums for port 5, too.

use super::{State, Tables};
use std::arch::asm;
use std::arch::x86_64::*;

/// One quarter, `$at`, of the four planes of the table at `$table`, where the mask has it.
macro_rules! quarter {
    ($index:literal, $table:literal, $at:literal, $mask:literal, [$o0:literal, $o1:literal, $o2:literal, $o3:literal]) => {
        concat!(
            "vpermb {",
            $o0,
            "}",
            $mask,
            ", {",
            $index,
            "}, [{s} + ",
            $table,
            " + ",
            $at,
            "]\n",
            "vpermb {",
            $o1,
            "}",
            $mask,
            ", {",
            $index,
            "}, [{s} + ",
            $table,
            " + 256 + ",
            $at,
            "]\n",
            "vpermb {",
            $o2,
            "}",
            $mask,
            ", {",
            $index,
            "}, [{s} + ",
            $table,
            " + 512 + ",
            $at,
            "]\n",
            "vpermb {",
            $o3,
            "}",
            $mask,
            ", {",
            $index,
            "}, [{s} + ",
            $table,
            " + 768 + ",
            $at,
            "]\n",
        )
    };
}

/// The words of the table at `$table` for the octets of plane `$index`, as planes. Indices with bit 7 overwrite what the
/// others found, then those with bit 6, then those with both.
macro_rules! look_up {
    ($index:literal, $table:literal, $words:tt, $temporary:literal) => {
        concat!(
            "vpsllw {",
            $temporary,
            "}, {",
            $index,
            "}, 1\n",
            "vpmovb2m k1, {",
            $index,
            "}\n",
            quarter!($index, $table, "0", "", $words),
            "vpmovb2m k2, {",
            $temporary,
            "}\n",
            quarter!($index, $table, "128", " {{k1}}", $words),
            "kandq k3, k1, k2\n",
            quarter!($index, $table, "64", " {{k2}}", $words),
            quarter!($index, $table, "192", " {{k3}}", $words),
        )
    };
}

/// Sums of words modulo 2^32: of `$a` and `$b` in `$t` and the first three of `$b`. As in [`super::pairs::add`], the
/// carry of a plane is made of its top bits and spread over the octet by a bit matrix.
macro_rules! add {
    ([$a0:literal, $a1:literal, $a2:literal, $a3:literal], [$b0:literal, $b1:literal, $b2:literal, $b3:literal], $t:literal) => {
        concat!(
            "vpaddb {",
            $t,
            "}, {",
            $a0,
            "}, {",
            $b0,
            "}\n",
            "vpternlogd {",
            $a0,
            "}, {",
            $b0,
            "}, {",
            $t,
            "}, 0xd4\n",
            "vgf2p8affineqb {",
            $a0,
            "}, {",
            $a0,
            "}, {top_bit}, 0\n",
            "vpaddb {",
            $b0,
            "}, {",
            $a1,
            "}, {",
            $b1,
            "}\n",
            "vpsubb {",
            $b0,
            "}, {",
            $b0,
            "}, {",
            $a0,
            "}\n",
            "vpternlogd {",
            $a1,
            "}, {",
            $b1,
            "}, {",
            $b0,
            "}, 0xd4\n",
            "vgf2p8affineqb {",
            $a1,
            "}, {",
            $a1,
            "}, {top_bit}, 0\n",
            "vpaddb {",
            $b1,
            "}, {",
            $a2,
            "}, {",
            $b2,
            "}\n",
            "vpsubb {",
            $b1,
            "}, {",
            $b1,
            "}, {",
            $a1,
            "}\n",
            "vpternlogd {",
            $a2,
            "}, {",
            $b2,
            "}, {",
            $b1,
            "}, 0xd4\n",
            "vgf2p8affineqb {",
            $a2,
            "}, {",
            $a2,
            "}, {top_bit}, 0\n",
            "vpaddb {",
            $b2,
            "}, {",
            $a3,
            "}, {",
            $b3,
            "}\n",
            "vpsubb {",
            $b2,
            "}, {",
            $b2,
            "}, {",
            $a2,
            "}\n",
        )
    };
}

/// Two rounds of all groups; `p` are the round keys that their results go with.
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

/// The right words after a round: exclusive or with the round function of the left words and with the next round key
/// `p`. `top_bit` is the bit matrix that makes eight of an octet's top bit.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
fn round(tables: &Tables, p: &[u32; 4], left: [__m512i; 4], right: [__m512i; 4], top_bit: __m512i) -> [__m512i; 4] {
    let [mut r0, mut r1, mut r2, mut r3] = right;
    // SAFETY: instructions of the enabled features; they read the 4 KiB at `tables.s`, aligned to 64 octets, and the four
    // words of `p`.
    unsafe {
        asm!(
            look_up!("l2", "1024", ["b0", "b1", "b2", "b3"], "t"),
            look_up!("l3", "0", ["a0", "a1", "a2", "a3"], "t"),
            add!(["a0", "a1", "a2", "a3"], ["b0", "b1", "b2", "b3"], "t"),
            look_up!("l1", "2048", ["a0", "a1", "a2", "a3"], "b3"),
            "vpxord {a0}, {a0}, {t}",
            "vpxord {a1}, {a1}, {b0}",
            "vpxord {a2}, {a2}, {b1}",
            "vpxord {a3}, {a3}, {b2}",
            look_up!("l0", "3072", ["b0", "b1", "b2", "b3"], "t"),
            add!(["a0", "a1", "a2", "a3"], ["b0", "b1", "b2", "b3"], "t"),
            "vpternlogd {r0}, {t}, dword ptr [{p}] {{1to16}}, 0x96",
            "vpternlogd {r1}, {b0}, dword ptr [{p} + 4] {{1to16}}, 0x96",
            "vpternlogd {r2}, {b1}, dword ptr [{p} + 8] {{1to16}}, 0x96",
            "vpternlogd {r3}, {b2}, dword ptr [{p} + 12] {{1to16}}, 0x96",
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
            t = out(zmm_reg) _,
            out("k1") _,
            out("k2") _,
            out("k3") _,
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    [r0, r1, r2, r3]
}
