//! What a reader sees of the batches a fetch returned.
//!
//! A log stores uncommitted, committed and aborted records in one order and never rewrites them; which of them count
//! is said beside the bytes. A read-committed reader gets batches below the last stable offset only and leaves out
//! those that lie in an aborted range of their producer; markers are left out always.

use bytes::Bytes;
use tidemill_log::batch::{BatchError, BatchHeader, Batches, OpenBatch, RecordRef, verify};

use crate::api::{AbortedRange, Isolation};

/// A batch's records may open to this much; more is a bomb, or damage.
pub const OPEN_BYTES_MAX: usize = 64 << 20;

/// One batch that a reader sees, verified.
#[derive(Clone, Debug)]
pub struct VisibleBatch {
    /// Its header.
    pub header: BatchHeader,
    /// All of it, as stored.
    pub bytes: Bytes,
}

impl VisibleBatch {
    /// Its records, uncompressed.
    pub fn open(&self) -> Result<OpenBatch, BatchError> {
        OpenBatch::open_verified(&self.bytes, self.header, OPEN_BYTES_MAX)
    }
}

/// The batches of one fetched partition that count, each verified.
pub fn visible(
    fetched: Bytes,
    aborted: &[AbortedRange],
    isolation: Isolation,
) -> Result<Vec<VisibleBatch>, BatchError> {
    let mut batches = Vec::new();
    for batch in Batches::new(fetched) {
        let (_, bytes) = batch?;
        let header = verify(&bytes)?;
        let is_aborted = isolation == Isolation::ReadCommitted
            && header.is_transactional()
            && aborted.iter().any(|range| {
                range.producer_id == header.producer_id
                    && (range.first..=range.last).contains(&header.base_offset)
            });
        if !header.is_control() && !is_aborted {
            batches.push(VisibleBatch { header, bytes });
        }
    }
    Ok(batches)
}

/// Calls `each` with the records of `batches` from offset `from` on: the first batch of a fetch may begin before the
/// offset that was asked for.
pub fn for_each_record(
    batches: &[VisibleBatch],
    from: i64,
    mut each: impl FnMut(RecordRef<'_>),
) -> Result<(), BatchError> {
    for batch in batches {
        let open = batch.open()?;
        for record in &open {
            let record = record?;
            if record.offset >= from {
                each(record);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tidemill_log::batch::{
        BatchBuilder, BatchOptions, Marker, ProducerStamp, RecordParts, control_batch, set_position,
    };

    use super::*;

    fn batch(id: i64, base_offset: i64, transactional: bool, values: &[&str]) -> Vec<u8> {
        let mut builder = BatchBuilder::new(BatchOptions { transactional, ..BatchOptions::default() });
        for value in values {
            assert!(builder.push(RecordParts { value: Some(value.as_bytes()), ..RecordParts::default() }));
        }
        let mut bytes = Vec::from(builder.build(ProducerStamp { id, epoch: 0, sequence: 0 }));
        set_position(&mut bytes, base_offset, 1);
        bytes
    }

    fn values(fetched: &[u8], aborted: &[AbortedRange], isolation: Isolation, from: i64) -> Vec<String> {
        let batches = visible(Bytes::copy_from_slice(fetched), aborted, isolation).unwrap();
        let mut values = Vec::new();
        for_each_record(&batches, from, |record| {
            values.push(String::from_utf8(record.value.unwrap().to_vec()).unwrap());
        })
        .unwrap();
        values
    }

    #[test]
    fn aborted_ranges_hit_their_own_producer_and_markers_are_never_seen() {
        let mut marker = Vec::from(control_batch(Marker::Abort, 1, 0, 0, 1));
        set_position(&mut marker, 5, 1);
        let fetched = [
            batch(1, 0, true, &["a", "b"]),
            batch(2, 2, true, &["c"]),
            batch(1, 3, true, &["d"]),
            batch(3, 4, false, &["e"]),
            marker,
            batch(1, 6, true, &["f"]),
        ]
        .concat();
        let aborted = [AbortedRange { producer_id: 1, first: 0, last: 5 }];
        assert_eq!(values(&fetched, &aborted, Isolation::ReadCommitted, 0), ["c", "e", "f"]);
        assert_eq!(values(&fetched, &aborted, Isolation::ReadCommitted, 3), ["e", "f"]);
        assert_eq!(values(&fetched, &[], Isolation::ReadUncommitted, 1), ["b", "c", "d", "e", "f"]);
    }

    #[test]
    fn a_flipped_bit_is_an_error() {
        let mut fetched = batch(1, 0, false, &["a"]);
        *fetched.last_mut().unwrap() ^= 1;
        assert!(visible(fetched.into(), &[], Isolation::ReadCommitted).is_err());
    }
}
