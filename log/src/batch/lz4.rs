//! LZ4 frames around `lz4_flex`'s blocks.
//!
//! The frame is read here and not by a library because a library allocates what the frame's header declares (up to
//! 4 MiB a block) before it has seen the bytes. Here a block's room is bounded by what its bytes can expand to, by the
//! declared block size and by the caller's budget. Frame and block checksums are skipped, not verified: the batch's
//! crc covers every byte of the frame.
//!
//! Written: independent blocks of 64 KiB, no checksums, the end mark; Kafka's Java reader takes nothing linked.
//! Read: any frame of format 1.x without a dictionary, several frames in a row, skippable frames too.

use super::BatchError;

const MAGIC: [u8; 4] = [0x04, 0x22, 0x4d, 0x18];
/// Version 01, independent blocks; 64 KiB; and the header checksum of these two bytes.
const DESCRIPTOR: [u8; 3] = [0x60, 0x40, 0x82];
const BLOCK_BYTES: usize = 64 << 10;
const STORED: u32 = 1 << 31;
/// One byte of a block becomes at most this many.
const EXPANSION_MAX: usize = 255;
/// What a record's bytes usually become, rounded up: so that unpacking rarely moves what it has unpacked.
const EXPANSION_GUESS: usize = 5;
/// How far back a linked block may refer.
const WINDOW_BYTES: usize = 64 << 10;

/// Appends `input` to `out` as one frame.
pub(super) fn compress(input: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&DESCRIPTOR);
    for block in input.chunks(BLOCK_BYTES) {
        let at = out.len();
        out.resize(at + 4 + lz4_flex::block::get_maximum_output_size(block.len()), 0);
        let packed = match lz4_flex::block::compress_into(block, &mut out[at + 4..]) {
            Ok(n) if n < block.len() => n as u32, // at most 64 KiB
            _ => {
                out[at + 4..at + 4 + block.len()].copy_from_slice(block);
                block.len() as u32 | STORED
            }
        };
        out[at..at + 4].copy_from_slice(&packed.to_le_bytes());
        out.truncate(at + 4 + (packed & !STORED) as usize);
    }
    out.extend_from_slice(&[0; 4]);
}

/// The bytes inside the frames of `input`, at most `budget` of them.
pub(super) fn decompress(mut input: &[u8], budget: usize) -> Result<Vec<u8>, BatchError> {
    // Log lines and JSON become three to five times as long. It is a guess within what the bytes can become: a hostile
    // batch gains nothing by it.
    let mut out = Vec::with_capacity(input.len().saturating_mul(EXPANSION_GUESS).min(budget));
    while !input.is_empty() {
        let magic = take::<4>(&mut input)?;
        if magic == MAGIC {
            frame(&mut input, &mut out, budget)?;
        } else if magic[0] & 0xf0 == 0x50 && magic[1..] == [0x2a, 0x4d, 0x18] {
            let skipped = u32::from_le_bytes(take(&mut input)?);
            slice(&mut input, skipped as usize)?;
        } else {
            return Err(BatchError::Lz4("unknown magic"));
        }
    }
    Ok(out)
}

fn frame(input: &mut &[u8], out: &mut Vec<u8>, budget: usize) -> Result<(), BatchError> {
    let [flags, sizes] = take(input)?;
    if flags >> 6 != 1 || flags & 2 != 0 || sizes & 0x8f != 0 {
        return Err(BatchError::Lz4("unknown version or reserved bits"));
    }
    if flags & 1 != 0 {
        return Err(BatchError::Lz4("needs a dictionary"));
    }
    let block_bytes_max = match sizes >> 4 {
        code @ 4..=7 => BLOCK_BYTES << (2 * (code - 4)),
        _ => return Err(BatchError::Lz4("unknown block size")),
    };
    let independent = flags & 0x20 != 0;
    let block_checksum = flags & 0x10 != 0;
    if flags & 0x08 != 0 {
        take::<8>(input)?; // the content size: never needed, never believed
    }
    take::<1>(input)?;
    let start = out.len();
    loop {
        let size = u32::from_le_bytes(take(input)?);
        if size == 0 {
            break;
        }
        let data = slice(input, (size & !STORED) as usize)?;
        if block_checksum {
            take::<4>(input)?;
        }
        let room = budget - out.len();
        if size & STORED != 0 {
            if data.len() > block_bytes_max {
                return Err(BatchError::Lz4("block is larger than declared"));
            }
            if data.len() > room {
                return Err(BatchError::Budget(budget));
            }
            out.extend_from_slice(data);
            continue;
        }
        let limit = block_bytes_max.min(data.len().saturating_mul(EXPANSION_MAX));
        let old = out.len();
        out.resize(old + limit.min(room), 0);
        let (before, target) = out.split_at_mut(old);
        let window =
            if independent { &[][..] } else { &before[start.max(old.saturating_sub(WINDOW_BYTES))..] };
        let unpacked = if window.is_empty() {
            lz4_flex::block::decompress_into(data, target)
        } else {
            lz4_flex::block::decompress_into_with_dict(data, target, window)
        };
        match unpacked {
            Ok(n) => out.truncate(old + n),
            Err(lz4_flex::block::DecompressError::OutputTooSmall { .. }) if room < limit => {
                return Err(BatchError::Budget(budget));
            }
            Err(_) => return Err(BatchError::Lz4("bad block")),
        }
    }
    if flags & 0x04 != 0 {
        take::<4>(input)?;
    }
    Ok(())
}

fn take<const N: usize>(input: &mut &[u8]) -> Result<[u8; N], BatchError> {
    let (head, rest) = input.split_first_chunk::<N>().ok_or(BatchError::Lz4("cut off"))?;
    *input = rest;
    Ok(*head)
}

fn slice<'a>(input: &mut &'a [u8], n: usize) -> Result<&'a [u8], BatchError> {
    let (head, rest) = input.split_at_checked(n).ok_or(BatchError::Lz4("cut off"))?;
    *input = rest;
    Ok(head)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};

    use super::*;

    fn text(bytes: usize) -> Vec<u8> {
        (0..bytes as u32).flat_map(|i| (i * i % 977).to_le_bytes()).take(bytes).collect()
    }

    #[test]
    fn frames_of_every_kind_are_read() {
        for bytes in [0, 1, 100, BLOCK_BYTES, 3 * BLOCK_BYTES + 5] {
            let input = text(bytes);
            for mode in [BlockMode::Independent, BlockMode::Linked] {
                for size in [BlockSize::Max64KB, BlockSize::Max256KB, BlockSize::Max4MB] {
                    for sums in [false, true] {
                        let info = FrameInfo::new()
                            .block_mode(mode)
                            .block_size(size)
                            .block_checksums(sums)
                            .content_checksum(sums)
                            .content_size(sums.then_some(bytes as u64));
                        let mut encoder = FrameEncoder::with_frame_info(info, Vec::new());
                        encoder.write_all(&input).unwrap();
                        let frame = encoder.finish().unwrap();
                        let read = decompress(&frame, bytes);
                        assert_eq!(read.as_ref(), Ok(&input), "{bytes} {mode:?} {size:?} {sums}");
                        if bytes > 0 {
                            assert_eq!(decompress(&frame, bytes - 1), Err(BatchError::Budget(bytes - 1)));
                            assert!(decompress(&frame[..frame.len() - 1], bytes).is_err());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn frames_in_a_row_and_skipped_ones() {
        let mut frames = Vec::new();
        compress(b"one", &mut frames);
        frames.extend_from_slice(&[0x5a, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9]);
        compress(b"two", &mut frames);
        assert_eq!(decompress(&frames, 6).unwrap(), b"onetwo");
        frames.extend_from_slice(b"tail");
        assert!(decompress(&frames, 6).is_err());
    }

    /// The library's decoder checks the header's checksum, which is a constant here.
    #[test]
    fn what_is_written_is_a_frame_for_others() {
        let input = text(2 * BLOCK_BYTES + 7);
        let mut frame = Vec::new();
        compress(&input, &mut frame);
        assert!(frame.len() < input.len());
        let mut read = Vec::new();
        std::io::Read::read_to_end(&mut lz4_flex::frame::FrameDecoder::new(frame.as_slice()), &mut read)
            .unwrap();
        assert_eq!(read, input);
        let noise: Vec<u8> =
            (0..BLOCK_BYTES as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
        let mut frame = Vec::new();
        compress(&noise, &mut frame);
        assert_eq!(decompress(&frame, noise.len()).unwrap(), noise);
    }
}
