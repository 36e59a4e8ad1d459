//! Reading segments back: at open, to take over the last ones, and for fetches. Nothing unverified leaves here.

use super::sidecars::{self, HEADCRC, INDEX, IndexEntry, Seed, TXN};
use super::{Missing, OpenSegment, Segments};
use crate::batch::{self, BatchError, BatchHeader, HEADER_BYTES, OpenBatch};
use crate::entry::HEAD;
use crate::error::Corruption;
use crate::fs::File;
use crate::names::{self, Kind};
use crate::state::{Segment, SegmentId};
use crate::types::AbortedRange;
use bytes::Bytes;
use std::io;
use std::sync::Arc;

/// Bytes read at once while walking over batches.
const CHUNK: u64 = 1 << 20;
/// Most bytes of one batch's records, opened to look for a time.
const OPEN_BYTES_MAX: usize = 64 << 20;
/// Remembered places where readers stopped.
const CURSORS_MAX: usize = 4096;

/// Reading a file failed, or gave bytes that are not what was written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    #[error("{0}")]
    Corrupt(Corruption),
    #[error("reading {file}")]
    Io { file: String, source: io::Error },
}

/// Which batches of a segment a reader wants.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// The batch that holds this offset comes first.
    pub from: i64,
    /// Batches that begin here or later are not wanted.
    pub until: i64,
    pub bytes_max: usize,
}

/// The place of a segment's first batch.
fn first_of(base: i64) -> IndexEntry {
    IndexEntry { offset: base, at: 0, ordinal: 0, time_before: i64::MIN }
}

/// See [`Facts::time`](crate::entry::Facts::time).
fn time_of(header: &BatchHeader) -> i64 {
    if header.is_control() { i64::MIN } else { header.max_timestamp }
}

struct Walked {
    header: BatchHeader,
    at: u64,
    ordinal: u32,
}

fn corrupt(
    id: SegmentId,
    kind: Kind,
    position: u64,
    expected: impl Into<String>,
    found: impl Into<String>,
) -> FileError {
    let file = names::segment_file(id, kind);
    FileError::Corrupt(Corruption { file, position, expected: expected.into(), found: found.into() })
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a part of a segment fits memory")
}

impl Segments {
    fn io<T>(&self, id: SegmentId, kind: Kind, result: io::Result<T>) -> Result<T, FileError> {
        result.map_err(|source| {
            if source.kind() == io::ErrorKind::NotFound {
                return corrupt(id, kind, 0, "the file", "no file");
            }
            FileError::Io { file: names::segment_file(id, kind), source }
        })
    }

    fn read_at(&self, id: SegmentId, kind: Kind, at: u64, bytes: u64) -> Result<Bytes, FileError> {
        let file = self.io(id, kind, self.files.get((id, kind), Missing::Fail))?;
        let mut buf = vec![0; to_usize(bytes)];
        let have = self.io(id, kind, read_up_to(&*file, &mut buf, at))?;
        buf.truncate(have);
        Ok(buf.into())
    }

    /// Checks what a crash could not have spoiled: the length that State names, and the last batch before it.
    pub(crate) fn check_boundary(&self, id: SegmentId, s: &Segment) -> Result<(), FileError> {
        if s.bytes == 0 {
            return Ok(());
        }
        let file = self.io(id, Kind::Log, self.files.get((id, Kind::Log), Missing::Fail))?;
        let len = self.io(id, Kind::Log, file.len())?;
        if len < s.bytes {
            return Err(corrupt(id, Kind::Log, len, format!("{} bytes", s.bytes), format!("{len}")));
        }
        let bytes = self.read_at(id, Kind::Log, s.last_at, s.bytes - s.last_at)?;
        let ordinal = s.batches - 1;
        let heads = self.stored_heads(id, ordinal, 1)?;
        let header = self.check_batch(id, s.last_at, ordinal, &bytes, heads[0])?;
        if header.next_offset() != s.end {
            let found = format!("offset {}", header.next_offset());
            return Err(corrupt(id, Kind::Log, s.last_at, format!("a batch before offset {}", s.end), found));
        }
        Ok(())
    }

    /// The intact values in the `.headcrc` of `count` batches.
    fn stored_heads(&self, id: SegmentId, ordinal: u32, count: u32) -> Result<Vec<Option<u32>>, FileError> {
        let (at, bytes) = (u64::from(ordinal) * HEADCRC as u64, u64::from(count) * HEADCRC as u64);
        let stored = match self.read_at(id, Kind::HeadCrc, at, bytes) {
            Err(FileError::Corrupt(_)) => Bytes::new(), // a sidecar that is gone is rebuilt
            other => other?,
        };
        let seed = Seed::of(id);
        let mut entries = stored.chunks_exact(HEADCRC);
        Ok((ordinal..ordinal + count)
            .map(|i| entries.next().and_then(|e| sidecars::decode_head(seed, i, e)))
            .collect())
    }

    /// Is this the batch that was written here? A damaged sidecar entry (`None`) decides nothing.
    fn check_batch(
        &self,
        id: SegmentId,
        at: u64,
        ordinal: u32,
        bytes: &[u8],
        head: Option<u32>,
    ) -> Result<BatchHeader, FileError> {
        let header =
            batch::verify(bytes).map_err(|e| corrupt(id, Kind::Log, at, "a batch", e.to_string()))?;
        let head_bytes: &[u8; HEAD] = bytes.first_chunk().expect("verified");
        let found = Seed::of(id).head(ordinal, at, head_bytes);
        match head {
            Some(expected) if expected != found => Err(corrupt(
                id,
                Kind::Log,
                at,
                format!("a batch head with crc {expected:08x}"),
                format!("{found:08x}"),
            )),
            _ => Ok(header),
        }
    }

    /// Takes over the last segment of a partition.
    pub(super) fn load_segment(&self, id: SegmentId, s: &Segment) -> Result<OpenSegment, FileError> {
        let mut open = OpenSegment::new(id);
        if s.batches == 0 {
            return Ok(open);
        }
        let seed = open.seed;
        let stored = self.stored_heads(id, 0, s.batches)?;
        let index =
            match self.read_at(id, Kind::Index, 0, s.bytes.div_ceil(super::INDEX_EVERY) * INDEX as u64) {
                Err(FileError::Corrupt(_)) => Bytes::new(),
                other => other?,
            };
        let entries = index
            .chunks_exact(INDEX)
            .zip(0..)
            .map_while(|(b, i)| sidecars::decode_index(seed, id.base, i, b));
        open.index = entries.take_while(|e| e.at < s.bytes && e.ordinal < s.batches).collect();
        open.index_written = open.index.len();
        open.heads_written = stored.iter().take_while(|h| h.is_some()).count();
        let whole = open.heads_written == stored.len();
        // Walk over what the sidecars do not cover; all of it where a value has to be computed again.
        let from = match open.index.last() {
            Some(e) if whole => *e,
            _ => first_of(id.base),
        };
        open.time = from.time_before;
        open.heads = stored.iter().map_while(|h| *h).collect();
        let mut walk = from;
        while walk.at < s.bytes {
            let chunk = self.read_at(id, Kind::Log, walk.at, CHUNK.min(s.bytes - walk.at))?;
            let (walked, next) = self.walk(id, &chunk, walk, s)?;
            for w in walked {
                let head: &[u8; HEAD] =
                    chunk[to_usize(w.at - walk.at)..].first_chunk().expect("walked over it");
                if w.ordinal as usize == open.heads.len() {
                    let value = stored[open.heads.len()].unwrap_or_else(|| seed.head(w.ordinal, w.at, head));
                    open.heads.push(value);
                }
                open.note_index_after(w.header.base_offset, w.ordinal, w.at);
                open.time = open.time.max(time_of(&w.header));
            }
            walk = next;
        }
        if open.heads.len() != s.batches as usize {
            let found = format!("{}", open.heads.len());
            return Err(corrupt(id, Kind::Log, s.bytes, format!("{} batches", s.batches), found));
        }
        open.bytes = s.bytes;
        Ok(open)
    }

    /// The headers of the whole batches in `chunk`, which lies at `start`, and where to go on. A batch that is larger
    /// than the chunk is walked over by its header.
    ///
    /// No crc is checked here, so each header must continue the one before it: a flipped base offset would hide its
    /// batch from a reader who looks for an offset.
    fn walk(
        &self,
        id: SegmentId,
        chunk: &[u8],
        start: IndexEntry,
        s: &Segment,
    ) -> Result<(Vec<Walked>, IndexEntry), FileError> {
        let (mut walked, mut next) = (Vec::new(), start);
        loop {
            let at = next.at;
            let bad = |expected: String, found: String| Err(corrupt(id, Kind::Log, at, expected, found));
            let rest = &chunk[to_usize((at - start.at).min(chunk.len() as u64))..];
            if at >= s.bytes || rest.len() < HEADER_BYTES {
                if walked.is_empty() && at < s.bytes {
                    return bad("a batch".into(), "the end of the file".into());
                }
                return Ok((walked, next));
            }
            let header =
                BatchHeader::parse(rest).map_err(|e| corrupt(id, Kind::Log, at, "a batch", e.to_string()))?;
            let end = at + header.size as u64;
            if end > s.bytes {
                return bad(format!("a batch within {}", s.bytes), format!("{} bytes", header.size));
            }
            let (first, after) = (header.base_offset, header.next_offset());
            // Compaction, which makes revisions, leaves gaps.
            if first < next.offset || id.revision == 0 && first != next.offset {
                return bad(format!("offset {}", next.offset), format!("{first}"));
            }
            if after <= first || after > s.end || id.revision == 0 && end == s.bytes && after != s.end {
                return bad(format!("offsets up to {}", s.end), format!("{first} to {after}"));
            }
            walked.push(Walked { header, at, ordinal: next.ordinal });
            let time_before = next.time_before.max(time_of(&header));
            next = IndexEntry { offset: after, at: end, ordinal: next.ordinal + 1, time_before };
        }
    }

    /// The wanted batches of a segment that has `s.bytes`, verified, and the offset after the last one.
    pub(crate) fn read(
        &self,
        id: SegmentId,
        s: &Segment,
        wanted: Wanted,
    ) -> Result<(Bytes, i64, i32), FileError> {
        let mut start = self.locate(id, s, wanted.from)?;
        let mut want = (wanted.bytes_max as u64 + super::INDEX_EVERY).max(HEADER_BYTES as u64);
        let end_of = |w: &Walked| w.at + w.header.size as u64;
        loop {
            let at = start.at;
            let chunk = self.read_at(id, Kind::Log, at, want.min(s.bytes - at))?;
            let (walked, after) = self.walk(id, &chunk, start, s)?;
            let held = walked.iter().skip_while(|w| w.header.next_offset() <= wanted.from);
            let held: Vec<&Walked> = held.collect();
            let first = match held.first() {
                Some(first) => *first,
                // The chunk lies before the wanted offset: go on behind it.
                None if after.at < s.bytes => {
                    start = after;
                    continue;
                }
                None => {
                    let expected = format!("a batch with offset {}", wanted.from);
                    return Err(corrupt(id, Kind::Log, at, expected, "the end"));
                }
            };
            if end_of(first) - at > chunk.len() as u64 {
                want = end_of(first) - at; // a batch larger than what was asked for comes whole
                continue;
            }
            let most = (first.at + wanted.bytes_max as u64).max(end_of(first)).min(at + chunk.len() as u64);
            let enough = |w: &&Walked| end_of(w) <= most && w.header.base_offset < wanted.until;
            let held: Vec<&Walked> = held.into_iter().take_while(enough).collect();
            let Some(last) = held.last() else {
                return Ok((Bytes::new(), wanted.from, 0)); // what is left begins where the reader may not look yet
            };
            let heads = self.heads(id, first.ordinal, last.ordinal + 1 - first.ordinal)?;
            for (w, head) in held.iter().zip(heads) {
                let (from, to) = (to_usize(w.at - at), to_usize(end_of(w) - at));
                self.check_batch(id, w.at, w.ordinal, &chunk[from..to], head)?;
            }
            let next = last.header.next_offset();
            // A place to go on reading from; nobody asks it for a time.
            let (at_next, ordinal) = (end_of(last), last.ordinal + 1);
            self.remember(id, IndexEntry { offset: next, at: at_next, ordinal, time_before: i64::MIN });
            let bytes = chunk.slice(to_usize(first.at - at)..to_usize(end_of(last) - at));
            return Ok((bytes, next, last.header.leader_epoch));
        }
    }

    /// The head values of some batches, from memory where the segment is a last one.
    fn heads(&self, id: SegmentId, ordinal: u32, count: u32) -> Result<Vec<Option<u32>>, FileError> {
        if let Some(open) = self.open.read().get(&id.tp) {
            let open = open.lock();
            if open.id == id {
                let range = ordinal as usize..(ordinal + count) as usize;
                return Ok(open.heads[range].iter().map(|v| Some(*v)).collect());
            }
        }
        self.stored_heads(id, ordinal, count)
    }

    /// A batch at or before the one that holds `offset`.
    fn locate(&self, id: SegmentId, s: &Segment, offset: i64) -> Result<IndexEntry, FileError> {
        if offset <= s.base {
            return Ok(first_of(s.base));
        }
        if let Some(place) = self.cursors.lock().get(&(id, offset)) {
            return Ok(*place);
        }
        self.last_indexed(id, s, |e| e.offset <= offset)
    }

    /// The last entry of the index for which `before` holds, as it does for a front part of them; the segment's
    /// first batch if it holds for none.
    fn last_indexed(
        &self,
        id: SegmentId,
        s: &Segment,
        before: impl Fn(&IndexEntry) -> bool,
    ) -> Result<IndexEntry, FileError> {
        let start = first_of(s.base);
        if let Some(open) = self.open.read().get(&id.tp) {
            let open = open.lock();
            if open.id == id {
                let after = open.index.partition_point(|e| e.at < s.bytes && before(e));
                return Ok(after.checked_sub(1).map_or(start, |i| open.index[i]));
            }
        }
        let seed = Seed::of(id);
        let Ok(file) = self.files.get((id, Kind::Index), Missing::Fail) else { return Ok(start) };
        let entries = self.io(id, Kind::Index, file.len())? / INDEX as u64;
        let (mut low, mut high) = (0, u32::try_from(entries).unwrap_or(u32::MAX));
        let mut found = start;
        while low < high {
            let middle = low + (high - low) / 2;
            let entry = self.read_at(id, Kind::Index, u64::from(middle) * INDEX as u64, INDEX as u64)?;
            let entry = (entry.len() == INDEX)
                .then(|| sidecars::decode_index(seed, id.base, middle, &entry))
                .flatten();
            match entry {
                Some(e) if e.at < s.bytes && before(&e) => {
                    found = e;
                    low = middle + 1;
                }
                // A damaged entry hides what is above it: the walk then starts lower.
                _ => high = middle,
            }
        }
        Ok(found)
    }

    /// The offset of the first record of the segment that is not older than `timestamp`; `None` if all are. Markers
    /// are no records. The index leads to the 4 KiB where it lies; every batch from there on is verified, because a
    /// damaged time would hide a record, and the one that holds it is opened.
    pub(crate) fn find_time(
        &self,
        id: SegmentId,
        s: &Segment,
        timestamp: i64,
    ) -> Result<Option<i64>, FileError> {
        let mut start = self.last_indexed(id, s, |e| e.time_before < timestamp)?;
        let mut want = super::INDEX_EVERY + HEADER_BYTES as u64;
        while start.at < s.bytes {
            let chunk = self.read_at(id, Kind::Log, start.at, want.min(s.bytes - start.at))?;
            let (walked, after) = self.walk(id, &chunk, start, s)?;
            let heads = self.heads(id, start.ordinal, after.ordinal - start.ordinal)?;
            for (w, head) in walked.iter().zip(heads) {
                let (at, size) = (to_usize(w.at - start.at), w.header.size);
                let batch = match chunk.len() >= at + size {
                    true => chunk.slice(at..at + size),
                    false => self.read_at(id, Kind::Log, w.at, size as u64)?,
                };
                let header = self.check_batch(id, w.at, w.ordinal, &batch, head)?;
                if time_of(&header) < timestamp {
                    continue;
                }
                let bad = |e: BatchError| corrupt(id, Kind::Log, w.at, "a batch", e.to_string());
                let open = OpenBatch::open_verified(&batch, header, OPEN_BYTES_MAX).map_err(bad)?;
                for record in &open {
                    let record = record.map_err(bad)?;
                    if record.timestamp >= timestamp {
                        return Ok(Some(record.offset));
                    }
                }
                // A producer's header may claim a time that none of its records has: go on.
            }
            // In a segment that is in order the first chunk has it; else the walk goes on in larger steps.
            (start, want) = (after, CHUNK);
        }
        Ok(None)
    }

    fn remember(&self, id: SegmentId, place: IndexEntry) {
        let mut cursors = self.cursors.lock();
        if cursors.len() >= CURSORS_MAX {
            cursors.clear();
        }
        cursors.insert((id, place.offset), place);
    }

    /// The aborted ranges of a closed segment, which has `count` of them.
    pub(crate) fn aborted(&self, id: SegmentId, count: u32) -> Result<Arc<Vec<AbortedRange>>, FileError> {
        if let Some(known) = self.aborted.lock().get(&id) {
            return Ok(known.clone());
        }
        let seed = Seed::of(id);
        let bytes = self.read_at(id, Kind::TxnIndex, 0, u64::from(count) * TXN as u64)?;
        let mut entries = bytes.chunks_exact(TXN);
        let ranges = (0..count).map(|i| {
            let entry = entries.next().and_then(|b| sidecars::decode_txn(seed, i, b));
            entry.ok_or_else(|| {
                corrupt(id, Kind::TxnIndex, u64::from(i) * TXN as u64, "an aborted range", "other bytes")
            })
        });
        let ranges = Arc::new(ranges.collect::<Result<Vec<_>, _>>()?);
        let mut cache = self.aborted.lock();
        if cache.len() >= 1024 {
            cache.clear();
        }
        cache.insert(id, ranges.clone());
        Ok(ranges)
    }
}

impl OpenSegment {
    /// Notes a batch that was walked over, unless the index knows it or a later one.
    fn note_index_after(&mut self, offset: i64, ordinal: u32, at: u64) {
        if self.index.last().is_none_or(|e| at > e.at) {
            self.note_index(offset, ordinal, at);
        }
    }
}

fn read_up_to(file: &dyn File, buf: &mut [u8], at: u64) -> io::Result<usize> {
    let mut have = 0;
    while have < buf.len() {
        match file.read_at(&mut buf[have..], at + have as u64)? {
            0 => break,
            n => have += n,
        }
    }
    Ok(have)
}
