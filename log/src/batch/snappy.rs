//! Snappy blocks of `snap`, framed as the xerial library does, which is what Kafka's Java client writes.
//!
//! ```text
//! 82 53 4e 41 50 50 59 00 | version i32 = 1 | compatible i32 = 1 | (length i32 | block)*
//! ```
//!
//! Integers are big-endian. Written: blocks of 32 KiB. Read: that, and a single bare block, which other clients write.
//! A block declares how long it becomes; it is believed as far as its bytes can go and the caller's budget allows.

use snap::raw::{Decoder, Encoder, decompress_len, max_compress_len};

use super::BatchError;

const MAGIC: [u8; 8] = *b"\x82SNAPPY\0";
const HEADER: [u8; 16] = *b"\x82SNAPPY\0\0\0\0\x01\0\0\0\x01";
const BLOCK_BYTES: usize = 32 << 10;
/// Three bytes of a block copy at most 64.
const EXPANSION_MAX: usize = 22;

/// Appends `input` to `out`, framed.
pub(super) fn compress(input: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&HEADER);
    let mut encoder = Encoder::new();
    for block in input.chunks(BLOCK_BYTES) {
        let at = out.len();
        out.resize(at + 4 + max_compress_len(block.len()), 0);
        let packed = encoder.compress(block, &mut out[at + 4..]).expect("the room is what snap asks for");
        let length = u32::try_from(packed).expect("32 KiB and a little");
        out[at..at + 4].copy_from_slice(&length.to_be_bytes());
        out.truncate(at + 4 + packed);
    }
}

/// The bytes inside `input`, at most `budget` of them.
pub(super) fn decompress(mut input: &[u8], budget: usize) -> Result<Vec<u8>, BatchError> {
    let mut out = Vec::new();
    if !input.starts_with(&MAGIC) {
        block(input, &mut out, budget)?;
        return Ok(out);
    }
    let Some((_, rest)) = input.split_at_checked(HEADER.len()) else { return Err(malformed()) };
    input = rest;
    while !input.is_empty() {
        let (length, rest) = input.split_first_chunk::<4>().ok_or_else(malformed)?;
        let length = u32::from_be_bytes(*length) as usize;
        let (packed, rest) = rest.split_at_checked(length).ok_or_else(malformed)?;
        block(packed, &mut out, budget)?;
        input = rest;
    }
    Ok(out)
}

fn block(packed: &[u8], out: &mut Vec<u8>, budget: usize) -> Result<(), BatchError> {
    let length = decompress_len(packed).map_err(|_| malformed())?;
    if length > budget - out.len() {
        return Err(BatchError::Budget(budget));
    }
    if length > packed.len().saturating_mul(EXPANSION_MAX) {
        return Err(malformed());
    }
    let at = out.len();
    out.resize(at + length, 0);
    let unpacked = Decoder::new().decompress(packed, &mut out[at..]).map_err(|_| malformed())?;
    out.truncate(at + unpacked);
    Ok(())
}

fn malformed() -> BatchError {
    BatchError::Compressed("snappy")
}
