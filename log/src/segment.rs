//! Segments: the journal's batches made readable, one file per range of offsets of a partition.
//!
//! ```text
//! entry (placed by State) ──▶ .log      the batches, one after the other
//!                             .headcrc  a value per batch, over the bytes its crc leaves out
//!                             .index    every 4 KiB: offset, largest time so far -> position
//!                             .txnindex aborted ranges, when the segment closes
//! ```
//!
//! A segment holds nothing that the journal does not hold until a checkpoint has synced it, so writes here go to the
//! page cache and nobody waits for them. The sidecars of the last segment of a partition are kept in memory and
//! written when 4 KiB of them have come together, when it closes, and before a checkpoint.
//!
//! Invariants: bytes below a partition's released end are in the file; an `OpenSegment` counts exactly the batches
//! written to its file.

mod files;
mod read;
pub(crate) mod sidecars;

use crate::entry::StoredBatch;
use crate::fs::Fs;
use crate::names::Kind;
use crate::state::{Closed, Segment, SegmentId, State};
use crate::types::{AbortedRange, TopicPartition};
use files::{FileKey, Files, Missing};
use parking_lot::{Mutex, RwLock};
use sidecars::{HEADCRC, INDEX, IndexEntry, Seed};
use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::sync::Arc;

pub(crate) use read::{FileError, Wanted};

/// A batch is noted in the index when this many bytes came since the last noted one.
const INDEX_EVERY: u64 = 4096;
/// Unwritten sidecar bytes that are written at once.
const SIDECAR_BYTES: usize = 4096;
/// Slices in one write: the limit of the system call.
const SLICES: usize = 1000;
/// First and last step by which space is reserved ahead.
const RESERVE: std::ops::RangeInclusive<u64> = 64 << 10..=1 << 20;

pub(crate) struct Segments {
    pub(crate) files: Files,
    open: RwLock<HashMap<TopicPartition, Arc<Mutex<OpenSegment>>>>,
    aborted: Mutex<HashMap<SegmentId, Arc<Vec<AbortedRange>>>>,
    cursors: Mutex<HashMap<(SegmentId, i64), IndexEntry>>,
}

/// The last segment of a partition, as far as it was written.
struct OpenSegment {
    id: SegmentId,
    seed: Seed,
    bytes: u64,
    index: Vec<IndexEntry>,
    heads: Vec<u32>,
    /// The largest timestamp of its records.
    time: i64,
    index_written: usize,
    heads_written: usize,
}

/// Consecutive batches of one segment.
pub(crate) struct Run<'a> {
    pub id: SegmentId,
    pub at: u64,
    pub ordinal: u32,
    pub batches: Vec<&'a StoredBatch>,
}

impl Segments {
    pub(crate) fn new(fs: Arc<dyn Fs>, open_files_max: usize) -> Self {
        Self {
            files: Files::new(fs, open_files_max),
            open: RwLock::default(),
            aborted: Mutex::default(),
            cursors: Mutex::default(),
        }
    }

    /// Takes over the last segments that State names: their sidecars are read, and rebuilt where they are damaged.
    pub(crate) fn load(&self, state: &State) -> Result<(), FileError> {
        for (tp, p) in state.partitions() {
            if let Some(s) = p.segments.last() {
                let id = SegmentId { tp, base: s.base, revision: s.revision };
                let open = self.load_segment(id, s)?;
                self.open.write().insert(tp, Arc::new(Mutex::new(open)));
            }
        }
        Ok(())
    }

    /// Writes batches where State placed them.
    pub(crate) fn write(&self, run: &Run<'_>) -> io::Result<()> {
        let key = (run.id, Kind::Log);
        let file = self.files.get(key, Missing::Create)?;
        let open = self.open_segment(run)?;
        let mut at = run.at;
        for part in run.batches.chunks(SLICES / 2) {
            let slices: Vec<IoSlice<'_>> = part.iter().flat_map(|b| b.slices()).collect();
            file.write_at(&slices, at)?;
            at += part.iter().map(|b| b.len()).sum::<u64>();
        }
        self.files.written(key, &file);
        let mut open = open.lock();
        for batch in &run.batches {
            open.note(batch);
        }
        self.flush(&mut open, SIDECAR_BYTES)
    }

    fn open_segment(&self, run: &Run<'_>) -> io::Result<Arc<Mutex<OpenSegment>>> {
        if let Some(open) = self.open.read().get(&run.id.tp) {
            let known = open.lock();
            if known.id == run.id {
                assert_eq!(
                    (known.bytes, known.heads.len()),
                    (run.at, run.ordinal as usize),
                    "batches are placed in order"
                );
                return Ok(open.clone());
            }
        }
        assert_eq!((run.at, run.ordinal), (0, 0), "the last segment of {} was not taken over", run.id.tp);
        let open = OpenSegment::new(run.id);
        for kind in [Kind::HeadCrc, Kind::Index] {
            self.files.get((run.id, kind), Missing::Create)?;
        }
        let open = Arc::new(Mutex::new(open));
        self.open.write().insert(run.id.tp, open.clone());
        Ok(open)
    }

    /// The segment takes no more batches: writes what its sidecars lack.
    pub(crate) fn close(&self, closed: &Closed) -> io::Result<()> {
        if let Some(open) = self.open.read().get(&closed.segment.tp) {
            let mut open = open.lock();
            if open.id == closed.segment {
                self.flush(&mut open, 1)?;
            }
        }
        if !closed.aborted.is_empty() {
            let key = (closed.segment, Kind::TxnIndex);
            let file = self.files.get(key, Missing::Create)?;
            let seed = Seed::of(closed.segment);
            let ranges = closed.aborted.iter().zip(0..);
            let bytes: Vec<u8> = ranges.flat_map(|(r, i)| sidecars::encode_txn(seed, i, *r)).collect();
            file.write_at(&[IoSlice::new(&bytes)], 0)?;
            self.files.written(key, &file);
        }
        Ok(())
    }

    /// Writes every sidecar byte that is in memory only.
    pub(crate) fn flush_sidecars(&self) -> io::Result<()> {
        let open: Vec<_> = self.open.read().values().cloned().collect();
        open.iter().try_for_each(|open| self.flush(&mut open.lock(), 1))
    }

    /// Writes the sidecars of a segment where at least `bytes` of them are in memory only.
    fn flush(&self, open: &mut OpenSegment, bytes: usize) -> io::Result<()> {
        let seed = open.seed;
        let fresh = &open.heads[open.heads_written..];
        if fresh.len() * HEADCRC >= bytes {
            let numbers = u32::try_from(open.heads_written).expect("batches are counted in 32 bits")..;
            let out: Vec<u8> =
                fresh.iter().zip(numbers).flat_map(|(v, i)| sidecars::encode_head(seed, i, *v)).collect();
            self.put((open.id, Kind::HeadCrc), &out, open.heads_written * HEADCRC)?;
            open.heads_written = open.heads.len();
        }
        let fresh = &open.index[open.index_written..];
        if fresh.len() * INDEX >= bytes {
            let numbers = u32::try_from(open.index_written).expect("fewer than batches")..;
            let encode = |(e, i): (&IndexEntry, u32)| sidecars::encode_index(seed, open.id.base, i, *e);
            let out: Vec<u8> = fresh.iter().zip(numbers).flat_map(encode).collect();
            self.put((open.id, Kind::Index), &out, open.index_written * INDEX)?;
            open.index_written = open.index.len();
        }
        Ok(())
    }

    fn put(&self, key: FileKey, bytes: &[u8], at: usize) -> io::Result<()> {
        let file = self.files.get(key, Missing::Create)?;
        file.write_at(&[IoSlice::new(bytes)], at as u64)?;
        self.files.written(key, &file);
        Ok(())
    }

    /// Cuts a last segment and its sidecars to what State names. Sidecars are written again as far as they go.
    pub(crate) fn cut(&self, id: SegmentId, s: &Segment) -> io::Result<()> {
        let Some(open) = self.open.read().get(&id.tp).cloned() else { return Ok(()) };
        let open = open.lock();
        debug_assert_eq!((open.id, open.bytes, open.heads.len()), (id, s.bytes, s.batches as usize));
        for (kind, bytes) in [
            (Kind::Log, s.bytes),
            (Kind::HeadCrc, (open.heads_written * HEADCRC) as u64),
            (Kind::Index, (open.index_written * INDEX) as u64),
        ] {
            let file = self.files.get((id, kind), Missing::Create)?;
            if file.len()? > bytes {
                file.set_len(bytes)?;
                self.files.written((id, kind), &file);
            }
        }
        Ok(())
    }

    /// Reserves space for the bytes `from..to` of a segment and for what its sidecars then need.
    /// Returns how far space is reserved.
    pub(crate) fn reserve(&self, id: SegmentId, from: u64, to: u64) -> io::Result<u64> {
        let end = to.next_multiple_of(to.next_power_of_two().clamp(*RESERVE.start(), *RESERVE.end()));
        self.files.get((id, Kind::Log), Missing::Create)?.reserve(from, end - from)?;
        // A batch of one small record takes about 80 bytes, and 8 in the sidecar.
        for (kind, part) in [(Kind::HeadCrc, 8), (Kind::Index, 128)] {
            self.files.get((id, kind), Missing::Create)?.reserve(from / part, (end - from) / part)?;
        }
        Ok(end)
    }

    /// Reserves space for the aborted ranges that are written when this segment closes.
    pub(crate) fn reserve_aborted(&self, id: SegmentId, ranges: usize) -> io::Result<()> {
        if ranges == 0 {
            return Ok(());
        }
        let file = self.files.get((id, Kind::TxnIndex), Missing::Create)?;
        file.reserve(0, (ranges * sidecars::TXN) as u64)
    }

    /// Lets go of a topic's partitions.
    pub(crate) fn forget(&self, ids: &[SegmentId]) {
        for id in ids {
            self.open.write().remove(&id.tp);
        }
    }
}

impl OpenSegment {
    fn new(id: SegmentId) -> Self {
        let seed = Seed::of(id);
        Self {
            id,
            seed,
            bytes: 0,
            index: Vec::new(),
            heads: Vec::new(),
            time: i64::MIN,
            index_written: 0,
            heads_written: 0,
        }
    }

    fn note(&mut self, batch: &StoredBatch) {
        let offset = i64::from_be_bytes(batch.head[..8].try_into().expect("8 bytes"));
        let ordinal = u32::try_from(self.heads.len()).expect("a segment holds fewer than 2^32 batches");
        self.heads.push(self.seed.head(ordinal, self.bytes, &batch.head));
        self.note_index(offset, ordinal, self.bytes);
        self.time = self.time.max(batch.facts().time());
        self.bytes += batch.len();
    }

    fn note_index(&mut self, offset: i64, ordinal: u32, at: u64) {
        // Compressed batches can claim any number of offsets. What lies too far from the base is found by walking.
        let near = u32::try_from(offset - self.id.base).is_ok();
        if near && self.index.last().is_none_or(|e| at - e.at >= INDEX_EVERY) {
            self.index.push(IndexEntry { offset, at, ordinal, time_before: self.time });
        }
    }
}
