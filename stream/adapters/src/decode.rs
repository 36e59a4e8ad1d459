//! Fetched bytes become the engine's batches: what was aborted is left out, the rest keeps the fetched buffer.

use bytes::Bytes;
use tidemill_broker as broker;
use tidemill_broker::batch::{BatchHeader, Batches, Compression, HeaderRef, HeadersRef, OpenBatch, verify};
use tidemill_stream::io::{Fetched, LogError};
use tidemill_stream::record::{Header, RecordBatch};

use crate::log::{from_broker, partition_error, refused};

/// Most bytes one batch may hold once uncompressed: far above what any producer of ours builds.
const BATCH_BYTES_MAX: usize = 64 << 20;

/// Bytes of the shortest record: its length and six fields of one byte.
const RECORD_BYTES_MIN: usize = 7;

/// Cuts an answer's attachment by its partitions.
pub(crate) fn split(
    fetched: broker::Fetched,
    mut bytes: Bytes,
) -> Result<Vec<(broker::FetchedPartition, Bytes)>, LogError> {
    let mut parts = Vec::with_capacity(fetched.partitions.len());
    for part in fetched.partitions {
        let len = part.bytes as usize;
        if len > bytes.len() {
            return Err(refused(format!(
                "a fetch says {len} bytes of {} and brings {}",
                part.partition,
                bytes.len()
            )));
        }
        let own = bytes.split_to(len);
        parts.push((part, own));
    }
    Ok(parts)
}

/// Decodes what one partition gave; records before `from` (of a batch that holds it) are left out.
pub(crate) fn partition(
    topic: &str,
    part: &broker::FetchedPartition,
    bytes: &Bytes,
    from: i64,
) -> Result<Fetched, LogError> {
    let number = part.partition.partition;
    if let Some(error) = &part.error {
        return Err(partition_error(topic, number, from, error.clone()));
    }
    let bad = |e: tidemill_broker::batch::BatchError| refused(format!("a batch of {topic}-{number}: {e}"));
    let mut batches = Vec::new();
    for batch in Batches::new(bytes.clone()) {
        let (header, batch) = batch.map_err(bad)?;
        if header.is_control() || aborted(&header, &part.aborted) {
            continue;
        }
        let header = verify(&batch).map_err(bad)?;
        let open = OpenBatch::open_verified(&batch, header, BATCH_BYTES_MAX).map_err(bad)?;
        // Uncompressed records are slices of the stored batch itself; others of what it was unpacked to.
        let owner =
            if header.compression == Compression::None { batch.clone() } else { open.payload().clone() };
        let mut records = RecordBatch::over(owner);
        // The header's count is a claim: room is made for no more than the bytes can hold.
        let count = usize::try_from(header.record_count).unwrap_or(0);
        records.reserve(count.min(open.payload().len() / RECORD_BYTES_MIN + 1));
        for record in &open {
            let record = record.map_err(bad)?;
            records.push(record.offset, record.timestamp, record.key, record.value);
            if !record.headers.is_empty() {
                records.set_headers(copied(record.headers));
            }
        }
        records.cut(from, part.next.offset.max(from));
        if !records.is_empty() {
            batches.push(records);
        }
    }
    Ok(Fetched {
        partition: number,
        batches,
        next: from_broker(part.next),
        caught_up: part.next.offset >= part.offsets.high_watermark,
    })
}

fn copied(headers: HeadersRef<'_>) -> Vec<Header> {
    let header = |h: HeaderRef<'_>| Header {
        name: Bytes::copy_from_slice(h.key),
        value: h.value.map(Bytes::copy_from_slice),
    };
    headers.iter().map(header).collect()
}

/// Whether the batch belongs to an aborted transaction.
fn aborted(header: &BatchHeader, ranges: &[broker::AbortedRange]) -> bool {
    header.is_transactional()
        && ranges
            .iter()
            .any(|r| r.producer_id == header.producer_id && (r.first..=r.last).contains(&header.base_offset))
}
