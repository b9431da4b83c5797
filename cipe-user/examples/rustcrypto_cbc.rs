//! CBC of the crates `blowfish`, `idea` and `cbc`, one packet at a time: a reference for `cargo xtask bench cipher`.
//! Prints lines like `cipe bench-cipher --json`.

use cbc::cipher::{Array, Block, BlockCipherDecrypt, BlockCipherEncrypt, BlockModeDecrypt, BlockModeEncrypt};
use cbc::cipher::{InnerIvInit, KeyInit, consts::U8};
use cipe_user::cli::bench_cipher::{Row, best};

fn main() -> anyhow::Result<()> {
    let millis = std::env::args().nth(1).map_or(Ok(20), |text| text.parse())?;
    let key = b"sixteen octets..";
    measure("blowfish", &blowfish::BlowfishLE::new_from_slice(key)?, millis)?;
    measure("idea", &idea::Idea::new(&Array(*key)), millis)
}

fn measure<C>(name: &str, cipher: &C, millis: u64) -> anyhow::Result<()>
where
    C: BlockCipherEncrypt<BlockSize = U8> + BlockCipherDecrypt<BlockSize = U8>,
{
    let iv = Array(*b"an IV...");
    for packet in [64, 576, 1440] {
        let mut blocks = vec![Block::<C>::default(); packet / 8];
        let row = |direction: &str, run: &mut dyn FnMut()| {
            Row::new([name, "rustcrypto", direction], packet, 1, best(millis, run)).print(true)
        };
        row("encrypt", &mut || cbc::Encryptor::inner_iv_init(cipher, &iv).encrypt_blocks(&mut blocks))?;
        row("decrypt", &mut || cbc::Decryptor::inner_iv_init(cipher, &iv).decrypt_blocks(&mut blocks))?;
    }
    Ok(())
}
