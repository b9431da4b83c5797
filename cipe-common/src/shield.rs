//! The shield: tells a datagram that no key can open by its first and last block. The programs and the engine share the rules, and
//! the layout of the keys in the map.

/// Octets of a cipher block and of an IV.
pub const BLOCK: usize = 8;
/// Octets of P and the CRC behind the padding.
const TRAILER: usize = 5;
/// The most octets of padding.
const MAX_PADDING: usize = 7;
/// Octets of the least headers of an IPv4 packet, an IPv6 packet and an Ethernet frame.
const IPV4: usize = 20;
const IPV6: usize = 40;
const ETHERNET: usize = 14;

/// The type of a packet according to P (protocol section 2).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Control,
}

/// Whether this octet is the type of an encrypted message (protocol section 3).
#[inline(always)]
pub const fn is_message(number: u8) -> bool {
    matches!(number, 1..=3 | 0x70..=0x74)
}

/// Whether a datagram of `len` octets, 16 or more and a multiple of 8, may be accepted, by its first and last block, decrypted.
/// `carries_ip`: a data packet must be an IP packet; otherwise it is an Ethernet frame, of which nothing more can be told. What the
/// whole check accepts is always possible. Random octets are possible with a probability of 2^-10, or 2^-5 if the tunnel carries
/// frames.
#[inline(always)]
pub fn is_possible(first: [u8; BLOCK], last: [u8; BLOCK], len: usize, carries_ip: bool) -> bool {
    let p = last[BLOCK - TRAILER];
    // A correct sender never sets bits 7, 3 and 0 of P, and sends the types 00 and 01 in bits 2 and 1 only.
    let kind = match p & 0b1000_1111 {
        0 => Kind::Data,
        0b010 => Kind::Control,
        _ => return false,
    };
    let (longest, padding) = (len - BLOCK - TRAILER, usize::from(p >> 4));
    padding <= longest && begins(first, kind, longest - padding, carries_ip)
}

/// Whether a datagram of `len` octets may begin with this block, decrypted, whatever its last block is.
pub fn may_begin(first: [u8; BLOCK], len: usize, carries_ip: bool) -> bool {
    let longest = len.saturating_sub(BLOCK + TRAILER);
    let mut payloads = longest.saturating_sub(MAX_PADDING)..=longest;
    payloads.any(|n| begins(first, Kind::Data, n, carries_ip) || begins(first, Kind::Control, n, carries_ip))
}

/// Whether a payload of `n` octets may begin with this block.
#[inline(always)]
fn begins(first: [u8; BLOCK], kind: Kind, n: usize, carries_ip: bool) -> bool {
    match (kind, first[0] >> 4) {
        (Kind::Control, _) => n > 0 && is_message(first[0]),
        (Kind::Data, _) if !carries_ip => n >= ETHERNET,
        (Kind::Data, 4) => {
            let header = usize::from(first[0] & 0xF) * 4;
            IPV4 <= header && header <= n && usize::from(u16::from_be_bytes([first[2], first[3]])) == n
        }
        (Kind::Data, 6) => usize::from(u16::from_be_bytes([first[4], first[5]])) + IPV6 == n,
        (Kind::Data, _) => false,
    }
}

/// The most tunnels that the programs can shield at a time.
pub const MAX_SHIELDS: u32 = 64;
/// Words of a key: the four tables of Blowfish and its round keys.
pub const KEY_WORDS: usize = TABLES + ROUND_KEYS;
/// Words of the tables of Blowfish.
const TABLES: usize = 4 * 256;
/// Round keys of Blowfish.
const ROUND_KEYS: usize = 18;
/// Subkeys of IDEA.
pub const SUBKEYS: usize = 52;

/// Value of `SHIELDS`: the keys of a tunnel, expanded for decryption. Only the engine's control thread writes it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Shield {
    /// Odd during a write, and another number after it. A program that sees it change lets its datagram pass.
    pub generation: u64,
    /// The number of the cipher, one of the constants below.
    pub cipher: u32,
    /// 1 if the tunnel carries IP packets; 0: Ethernet frames.
    pub carries_ip: u32,
    /// The static key, the receive key and the previous receive key.
    pub keys: [ShieldKey; Self::KEYS],
}

impl Shield {
    /// Blowfish.
    pub const BLOWFISH: u32 = 1;
    /// IDEA.
    pub const IDEA: u32 = 2;
    /// IDEA with little-endian words.
    pub const IDEA_LITTLE: u32 = 3;
    /// Keys that datagrams may be decrypted with.
    pub const KEYS: usize = 3;
}

/// An expanded key.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ShieldKey {
    /// 1 if there is a key.
    pub live: u32,
    /// Zero.
    pub reserved: u32,
    /// Blowfish: the tables, then the round keys in the order of decryption. IDEA: one subkey of decryption for each word.
    pub words: [u32; KEY_WORDS],
}

const _: () =
    assert!(size_of::<Shield>() == 16 + Shield::KEYS * size_of::<ShieldKey>() && size_of::<Shield>().is_multiple_of(8));

/// Decrypts the first and the last block of a datagram, without chaining.
#[inline(always)]
pub fn decrypt(cipher: u32, words: &[u32; KEY_WORDS], blocks: [[u8; BLOCK]; 2]) -> [[u8; BLOCK]; 2] {
    match cipher {
        Shield::BLOWFISH => blowfish(words, blocks.map(u64::from_le_bytes)).map(u64::to_le_bytes),
        Shield::IDEA => blocks.map(|block| idea(words, u64::from_be_bytes(block)).to_be_bytes()),
        _ => blocks.map(|block| swap_words(idea(words, swap_words(u64::from_be_bytes(block)))).to_be_bytes()),
    }
}

/// Swaps the octets of each 16-bit word.
#[inline(always)]
pub const fn swap_words(block: u64) -> u64 {
    const LOW: u64 = 0x00FF_00FF_00FF_00FF;
    (block & LOW) << 8 | block >> 8 & LOW
}

/// Blowfish on two blocks; the first word is the low half. While one waits for its tables, the other is in work.
#[inline(always)]
pub fn blowfish(words: &[u32; KEY_WORDS], [a, b]: [u64; 2]) -> [u64; 2] {
    let (mut al, mut ar) = (a as u32, (a >> 32) as u32);
    let (mut bl, mut br) = (b as u32, (b >> 32) as u32);
    for round in (0..ROUND_KEYS - 2).step_by(2) {
        al ^= words[TABLES + round];
        bl ^= words[TABLES + round];
        ar ^= mix(words, al);
        br ^= mix(words, bl);
        ar ^= words[TABLES + round + 1];
        br ^= words[TABLES + round + 1];
        al ^= mix(words, ar);
        bl ^= mix(words, br);
    }
    let (p, q) = (words[TABLES + ROUND_KEYS - 2], words[TABLES + ROUND_KEYS - 1]);
    let join = |left: u32, right: u32| u64::from(right ^ q) | u64::from(left ^ p) << 32;
    // The halves are exchanged after each round but the last.
    [join(al, ar), join(bl, br)]
}

/// The round function of Blowfish.
#[inline(always)]
fn mix(words: &[u32; KEY_WORDS], half: u32) -> u32 {
    let table = |number: usize, octet: u32| words[256 * number + (octet & 0xFF) as usize];
    (table(0, half >> 24).wrapping_add(table(1, half >> 16)) ^ table(2, half >> 8)).wrapping_add(table(3, half))
}

/// IDEA on a block; the first word is the highest.
#[inline(always)]
pub fn idea(words: &[u32; KEY_WORDS], block: u64) -> u64 {
    let [mut x1, mut x2, mut x3, mut x4] = [48, 32, 16, 0].map(|shift| (block >> shift) as u32 & 0xFFFF);
    for i in (0..SUBKEYS - 4).step_by(6) {
        let (y1, y2) = (multiply(x1, words[i]), x2.wrapping_add(words[i + 1]) & 0xFFFF);
        let (y3, y4) = (x3.wrapping_add(words[i + 2]) & 0xFFFF, multiply(x4, words[i + 3]));
        let t = multiply(y1 ^ y3, words[i + 4]);
        let u = multiply((y2 ^ y4).wrapping_add(t) & 0xFFFF, words[i + 5]);
        let v = t.wrapping_add(u) & 0xFFFF;
        [x1, x2, x3, x4] = [y1 ^ u, y3 ^ u, y2 ^ v, y4 ^ v];
    }
    let (y1, y4) = (multiply(x1, words[SUBKEYS - 4]), multiply(x4, words[SUBKEYS - 1]));
    let (y2, y3) = (x3.wrapping_add(words[SUBKEYS - 3]) & 0xFFFF, x2.wrapping_add(words[SUBKEYS - 2]) & 0xFFFF);
    u64::from(y1) << 48 | u64::from(y2) << 32 | u64::from(y3) << 16 | u64::from(y4)
}

/// The product modulo 65537 of words below 2^16, where 0 means 65536, without a branch. A factor 65536 is -1, so the result is then 1
/// less both factors.
#[inline(always)]
fn multiply(a: u32, b: u32) -> u32 {
    let is_zero = |x: u32| (x.wrapping_sub(1) as i32 >> 31) as u32;
    let instead = 1u32.wrapping_sub(a).wrapping_sub(b) & (is_zero(a) | is_zero(b));
    let product = a.wrapping_mul(b);
    let regular = (product & 0xFFFF).wrapping_sub(product >> 16);
    regular.wrapping_add(instead).wrapping_add(regular >> 31) & 0xFFFF
}
