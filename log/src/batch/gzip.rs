//! gzip members around `flate2` (its pure-Rust backend).
//!
//! Nothing is allocated from a declared length: a member declares none that counts, and output grows as it comes, up to
//! the caller's budget. The members' own checksums are verified by the reader; several in a row are read as one.

use std::io::{Read, Write};

use flate2::bufread::MultiGzDecoder;
use flate2::write::GzEncoder;

use super::BatchError;

/// Appends `input` to `out` as one member.
pub(super) fn compress(input: &[u8], out: &mut Vec<u8>) {
    let mut encoder = GzEncoder::new(out, flate2::Compression::default());
    let written = encoder.write_all(input).and_then(|()| encoder.finish().map(drop));
    written.expect("a vector takes every write");
}

/// The bytes inside the members of `input`, at most `budget` of them.
pub(super) fn decompress(input: &[u8], budget: usize) -> Result<Vec<u8>, BatchError> {
    let mut out = Vec::new();
    // One byte beyond the budget tells a bomb from a batch that just fits.
    let mut limited = MultiGzDecoder::new(input).take((budget as u64).saturating_add(1));
    limited.read_to_end(&mut out).map_err(|_| BatchError::Compressed("gzip"))?;
    if out.len() > budget {
        return Err(BatchError::Budget(budget));
    }
    Ok(out)
}
