//! Entries: what the journal is a sequence of. One kind, one encoding.
//!
//! ```text
//! entry   = u32 length of what follows | u32 length of head | head (postcard) | batches, one after the other
//! head    = aging clock | change | for each batch its partition and length
//! ```
//!
//! Integers are little-endian. The round's checksum covers entries; nothing here is checksummed again.
//!
//! A batch is kept as the 21 bytes that the log fills in (base offset, length, leader epoch, magic, crc) and the
//! producer's own bytes after them, so it is never copied between the request, the journal and the segment.

use crate::batch::{HEADER_BYTES, UNCOVERED_BYTES};
use crate::types::{Cleanup, Mode, OffsetCommit, Outcome, Position, Producer, TopicPartition};
use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use std::io::IoSlice;
use uuid::Uuid;

/// Bytes of a batch that its crc does not cover.
pub(crate) const HEAD: usize = UNCOVERED_BYTES;

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub clock: i64,
    pub change: Change,
    pub batches: Vec<(TopicPartition, StoredBatch)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Change {
    /// The directory was opened.
    Open {
        incarnation: u32,
        wall_ms: i64,
    },
    CreateTopic {
        uuid: Uuid,
        name: String,
        partitions: u32,
        segment_bytes_max: u64,
        mode: Mode,
        cleanup: Cleanup,
    },
    DeleteTopic {
        uuid: Uuid,
    },
    /// Gives a producer its (id, epoch); the batches are the markers of the transaction it aborts.
    Init {
        transactional_id: Option<String>,
        local: bool,
        timeout_ms: u32,
        producer: Producer,
        replaces: Option<i64>,
        carried: Option<Producer>,
    },
    /// One batch; a transactional one opens its producer's transaction or adds the partition to it.
    Append,
    AddOffsets {
        transactional_id: String,
        group: String,
        offsets: Vec<CommittedOffset>,
    },
    CommitOffsets {
        group: String,
        offsets: Vec<CommittedOffset>,
    },
    /// Ends a transaction; the batches are its markers.
    End {
        transactional_id: String,
        outcome: Outcome,
        next: Producer,
    },
    /// Forgets producers that were not used for long.
    Expire {
        producers: Vec<i64>,
        transactional_ids: Vec<String>,
    },
    /// A topic's settings from here on, all of them; partitions are only ever added. Behind the others, because the
    /// order of these is the number each has on disk.
    AlterTopic {
        uuid: Uuid,
        partitions: u32,
        segment_bytes_max: u64,
        cleanup: Cleanup,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CommittedOffset {
    pub partition: TopicPartition,
    pub position: Position,
    pub metadata: Bytes,
}

impl From<OffsetCommit> for CommittedOffset {
    fn from(o: OffsetCommit) -> Self {
        Self { partition: o.partition, position: o.position, metadata: o.metadata }
    }
}

/// A batch with the head that the log gave it.
#[derive(Clone, PartialEq)]
pub(crate) struct StoredBatch {
    pub head: [u8; HEAD],
    pub rest: Bytes,
}

impl std::fmt::Debug for StoredBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let t = self.facts();
        write!(f, "batch {}+{} by {:?}", t.base_offset, t.count, t.producer)
    }
}

/// What `apply` reads of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub base_offset: i64,
    pub leader_epoch: i32,
    pub count: i32,
    pub producer: Producer,
    pub sequence: i32,
    pub transactional: bool,
    pub control: bool,
    pub max_timestamp: i64,
}

impl StoredBatch {
    /// Gives a checked batch its place. `batch` holds at least [`HEADER_BYTES`] bytes.
    pub(crate) fn new(batch: &Bytes, base_offset: i64, leader_epoch: i32) -> Self {
        let mut head: [u8; HEAD] = batch[..HEAD].try_into().expect("checked batch");
        head[0..8].copy_from_slice(&base_offset.to_be_bytes());
        head[12..16].copy_from_slice(&leader_epoch.to_be_bytes());
        Self { head, rest: batch.slice(HEAD..) }
    }

    fn from_stored(stored: &Bytes) -> Option<Self> {
        if stored.len() < HEADER_BYTES {
            return None;
        }
        Some(Self { head: stored[..HEAD].try_into().ok()?, rest: stored.slice(HEAD..) })
    }

    pub(crate) fn len(&self) -> u64 {
        (HEAD + self.rest.len()) as u64
    }

    pub(crate) fn slices(&self) -> [IoSlice<'_>; 2] {
        [IoSlice::new(&self.head), IoSlice::new(&self.rest)]
    }

    pub(crate) fn facts(&self) -> Facts {
        Facts::read(&self.head, &self.rest)
    }
}

impl Facts {
    /// The facts of a batch's first [`HEADER_BYTES`] bytes.
    pub(crate) fn of(batch: &[u8]) -> Self {
        let (head, rest) = batch.split_at(HEAD);
        Self::read(head.try_into().expect("21 bytes"), rest)
    }

    fn read(head: &[u8; HEAD], rest: &[u8]) -> Self {
        let i32_at = |b: &[u8], at: usize| i32::from_be_bytes(b[at..at + 4].try_into().expect("4 bytes"));
        let i64_at = |b: &[u8], at: usize| i64::from_be_bytes(b[at..at + 8].try_into().expect("8 bytes"));
        let attributes = rest[1];
        Self {
            base_offset: i64_at(head, 0),
            leader_epoch: i32_at(head, 12),
            count: i32_at(rest, 2).saturating_add(1),
            producer: Producer {
                id: i64_at(rest, 22),
                epoch: i16::from_be_bytes(rest[30..32].try_into().expect("2 bytes")),
            },
            sequence: i32_at(rest, 32),
            transactional: attributes & 0x10 != 0,
            control: attributes & 0x20 != 0,
            max_timestamp: i64_at(rest, 14),
        }
    }

    /// What the batch counts for where records are looked up by time: its largest timestamp, or none for a marker.
    pub(crate) fn time(&self) -> i64 {
        if self.control { i64::MIN } else { self.max_timestamp }
    }

    pub(crate) fn next_offset(&self) -> i64 {
        self.base_offset + i64::from(self.count)
    }
}

#[derive(Serialize)]
struct HeadRef<'a> {
    clock: i64,
    change: &'a Change,
    batches: Vec<(TopicPartition, u32)>,
}

#[derive(Deserialize)]
struct HeadOwned {
    clock: i64,
    change: Change,
    batches: Vec<(TopicPartition, u32)>,
}

impl Entry {
    /// Everything but the batches' bytes, which follow it.
    pub(crate) fn encode_head(&self) -> Bytes {
        let batches: Vec<_> = self
            .batches
            .iter()
            .map(|(tp, b)| (*tp, u32::try_from(b.len()).expect("a batch fits a journal file")))
            .collect();
        let bodies: usize = self.batches.iter().map(|(_, b)| HEAD + b.rest.len()).sum();
        let head = HeadRef { clock: self.clock, change: &self.change, batches };
        let mut out = BytesMut::with_capacity(256);
        out.extend_from_slice(&[0; 8]);
        let encoded = postcard::to_extend(&head, out).expect("State's types encode");
        let mut out = encoded;
        let head_len = out.len() - 8;
        let total = 4 + head_len + bodies;
        out[0..4].copy_from_slice(&u32::try_from(total).expect("an entry fits a journal file").to_le_bytes());
        out[4..8].copy_from_slice(&u32::try_from(head_len).expect("a part of it too").to_le_bytes());
        out.freeze()
    }

    /// Takes one entry off the front of `bytes`; `None` if they do not begin with one.
    pub(crate) fn decode(bytes: &mut Bytes) -> Option<Self> {
        let len_at =
            |b: &Bytes, at: usize| Some(u32::from_le_bytes(b.get(at..at + 4)?.try_into().ok()?) as usize);
        let total = len_at(bytes, 0)?;
        if total < 4 || bytes.len() - 4 < total {
            return None;
        }
        let mut body = bytes.split_to(4 + total);
        let head_len = len_at(&body, 4)?;
        if head_len > total - 4 {
            return None;
        }
        let head = body.slice(8..8 + head_len);
        let head: HeadOwned = postcard::from_bytes(&head).ok()?;
        let _ = body.split_to(8 + head_len);
        let mut batches = Vec::new();
        for (tp, len) in head.batches {
            let len = len as usize;
            if len > body.len() {
                return None;
            }
            batches.push((tp, StoredBatch::from_stored(&body.split_to(len))?));
        }
        body.is_empty().then_some(Self { clock: head.clock, change: head.change, batches })
    }
}
