//! Entries of the files beside a segment. Each carries its own check, so a torn page costs entries, not the file.
//!
//! ```text
//! .headcrc   8 bytes a batch       crc of the batch's first 21 bytes | check
//! .index    24 bytes per >= 4 KiB  offset - base | position | ordinal of the batch | largest time before it (8) | check
//! .txnindex 28 bytes a range       producer id | first | last (8 each) | check; closed segments only
//! ```
//!
//! Values and checks are crc32c, seeded with topic uuid, partition, base offset and revision, and with the entry's
//! number: bytes that belong to another file or place do not pass. Integers are little-endian.

use crate::entry::HEAD;
use crate::state::SegmentId;
use crate::types::AbortedRange;

pub(crate) const HEADCRC: usize = 8;
pub(crate) const INDEX: usize = 24;
pub(crate) const TXN: usize = 28;

/// What seeds the checks of one segment's files.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seed(u32);

impl Seed {
    pub(crate) fn of(id: SegmentId) -> Self {
        let mut bytes = [0; 32];
        bytes[..16].copy_from_slice(id.tp.topic.as_bytes());
        bytes[16..20].copy_from_slice(&id.tp.partition.to_le_bytes());
        bytes[20..28].copy_from_slice(&id.base.to_le_bytes());
        bytes[28..32].copy_from_slice(&id.revision.to_le_bytes());
        Self(crc32c::crc32c(&bytes))
    }

    fn check(self, number: u32, bytes: &[u8]) -> u32 {
        crc32c::crc32c_append(crc32c::crc32c_append(self.0, &number.to_le_bytes()), bytes)
    }

    /// The value that covers a batch's head: the batch is `ordinal`-th of its segment and begins at `at`.
    pub(crate) fn head(self, ordinal: u32, at: u64, head: &[u8; HEAD]) -> u32 {
        crc32c::crc32c_append(self.check(ordinal, &at.to_le_bytes()), head)
    }
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(b[at..at + 4].try_into().expect("4 bytes"))
}

fn i64_at(b: &[u8], at: usize) -> i64 {
    i64::from_le_bytes(b[at..at + 8].try_into().expect("8 bytes"))
}

pub(crate) fn encode_head(seed: Seed, ordinal: u32, value: u32) -> [u8; HEADCRC] {
    let mut out = [0; HEADCRC];
    out[0..4].copy_from_slice(&value.to_le_bytes());
    out[4..8].copy_from_slice(&seed.check(ordinal, &value.to_le_bytes()).to_le_bytes());
    out
}

/// The value of an intact entry; `None` for one to rebuild.
pub(crate) fn decode_head(seed: Seed, ordinal: u32, b: &[u8]) -> Option<u32> {
    (seed.check(ordinal, &b[..4]) == u32_at(b, 4)).then(|| u32_at(b, 0))
}

/// A batch whose place is noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IndexEntry {
    pub offset: i64,
    pub at: u64,
    pub ordinal: u32,
    /// The largest record timestamp of the segment's batches before this one, markers left out; `i64::MIN` before the
    /// first. It only grows from entry to entry, so a time is looked up like an offset.
    pub time_before: i64,
}

pub(crate) fn encode_index(seed: Seed, base: i64, number: u32, e: IndexEntry) -> [u8; INDEX] {
    let mut out = [0; INDEX];
    let delta = u32::try_from(e.offset - base).expect("a segment spans fewer than 2^32 offsets");
    out[0..4].copy_from_slice(&delta.to_le_bytes());
    out[4..8].copy_from_slice(&u32::try_from(e.at).expect("segments are below 2 GiB").to_le_bytes());
    out[8..12].copy_from_slice(&e.ordinal.to_le_bytes());
    out[12..20].copy_from_slice(&e.time_before.to_le_bytes());
    let check = seed.check(number, &out[..20]);
    out[20..24].copy_from_slice(&check.to_le_bytes());
    out
}

pub(crate) fn decode_index(seed: Seed, base: i64, number: u32, b: &[u8]) -> Option<IndexEntry> {
    (seed.check(number, &b[..20]) == u32_at(b, 20)).then(|| IndexEntry {
        offset: base + i64::from(u32_at(b, 0)),
        at: u64::from(u32_at(b, 4)),
        ordinal: u32_at(b, 8),
        time_before: i64_at(b, 12),
    })
}

pub(crate) fn encode_txn(seed: Seed, number: u32, r: AbortedRange) -> [u8; TXN] {
    let mut out = [0; TXN];
    out[0..8].copy_from_slice(&r.producer_id.to_le_bytes());
    out[8..16].copy_from_slice(&r.first.to_le_bytes());
    out[16..24].copy_from_slice(&r.last.to_le_bytes());
    let check = seed.check(number, &out[..24]);
    out[24..28].copy_from_slice(&check.to_le_bytes());
    out
}

pub(crate) fn decode_txn(seed: Seed, number: u32, b: &[u8]) -> Option<AbortedRange> {
    (seed.check(number, &b[..24]) == u32_at(b, 24)).then(|| AbortedRange {
        producer_id: i64_at(b, 0),
        first: i64_at(b, 8),
        last: i64_at(b, 16),
    })
}
