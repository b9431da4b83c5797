//! Bounds that every verifier follows.
//!
//! A compiler checks a range by one comparison of a shifted copy, or compares before it shortens, and passes on the register
//! that was never compared. The newest verifiers carry over what they learnt of the one to the other; that of Linux 6.18.15
//! does not, and those before 6.8 learn nothing of "is not zero".

/// The same number, of which the compiler knows nothing: what is compared next is the register that is used.
#[inline(always)]
fn opaque(mut number: u64) -> u64 {
    // One instruction, since the kernel refuses lines of source that have none.
    // SAFETY: it copies a register to itself.
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) number, options(pure, nomem, nostack, preserves_flags)) };
    number
}

/// The number, if it is `LEAST` to `MOST`; to be called right before it is used. `LEAST` is 2 or more, as a comparison with 1
/// becomes one with zero.
#[inline(always)]
pub fn within<const LEAST: u64, const MOST: u64>(number: u64) -> Option<u64> {
    const { assert!(2 <= LEAST && LEAST < MOST) };
    // The upper bound first: verifiers from Linux 7.3 on keep one interval that may go around zero. Of a number from -20 to 40
    // they cannot keep "at least 4" alone, and forget it; once it is 0 to 40, they can.
    let number = opaque(number);
    if number > MOST {
        return None;
    }
    let number = opaque(number);
    if number < LEAST {
        return None;
    }
    Some(opaque(number))
}

/// The number, shortened to be below `SIZE`, a power of two; to be called right before it is used as an index.
#[inline(always)]
pub fn masked<const SIZE: usize>(number: usize) -> usize {
    const { assert!(SIZE.is_power_of_two()) };
    opaque(number as u64) as usize & (SIZE - 1)
}
