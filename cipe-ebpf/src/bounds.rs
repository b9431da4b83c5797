//! Bounds checks that the verifier of every supported kernel understands.
//!
//! The compiler may check a range by one comparison of a shifted copy, or compare a number before it truncates it. It then uses a
//! register that was never compared. The newest verifiers track the relation between the two registers. The verifier of Linux
//! 6.18.15 does not, and verifiers before 6.8 derive no bound from "is not zero".

/// Returns the same number, but hides from the compiler where it came from. The register that is compared next is then the one that
/// is used.
#[inline(always)]
fn opaque(mut number: u64) -> u64 {
    // One instruction, since the kernel rejects line info for a source line that has none.
    // SAFETY: it copies a register to itself.
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) number, options(pure, nomem, nostack, preserves_flags)) };
    number
}

/// Returns the number if it is from `MIN` to `MAX`. Call it right before the number is used. `MIN` is 2 or more,
/// because the compiler turns a comparison with 1 into one with zero.
#[inline(always)]
pub fn within<const MIN: u64, const MAX: u64>(number: u64) -> Option<u64> {
    const { assert!(2 <= MIN && MIN < MAX) };
    // The upper bound comes first: verifiers from Linux 7.3 on track one interval that may wrap around zero. For a number from
    // -20 to 40 they cannot represent "at least 4" and lose it. For a number from 0 to 40 they can.
    let number = opaque(number);
    if number > MAX {
        return None;
    }
    let number = opaque(number);
    if number < MIN {
        return None;
    }
    Some(opaque(number))
}

/// Returns the number modulo `SIZE`, a power of two. Call it right before the number is used as an index.
#[inline(always)]
pub fn masked<const SIZE: usize>(number: usize) -> usize {
    const { assert!(SIZE.is_power_of_two()) };
    opaque(number as u64) as usize & (SIZE - 1)
}
