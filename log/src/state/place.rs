//! Where the next batch of a partition goes: pure, so that space is reserved for exactly what `apply` will do.

use super::{State, Topic};
use crate::types::TopicPartition;
use serde::{Deserialize, Serialize};

/// One file of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct SegmentId {
    pub tp: TopicPartition,
    pub base: i64,
    pub revision: u32,
}

/// The place of the next batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    pub segment: SegmentId,
    pub at: u64,
    pub ordinal: u32,
    /// The segment begins with it.
    pub rolls: bool,
}

/// Markers stay in the segment that is open, however full: their space was reserved there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Roll {
    WhenFull,
    Never,
}

impl State {
    /// Where a batch of `bytes` would go.
    pub(crate) fn place(&self, tp: TopicPartition, bytes: u64) -> Option<Placement> {
        self.topics.get(&tp.topic)?.place(tp, bytes, Roll::WhenFull)
    }
}

impl Topic {
    pub(super) fn place(&self, tp: TopicPartition, bytes: u64, roll: Roll) -> Option<Placement> {
        let p = self.partitions.get(tp.partition as usize)?;
        let fits = |len: u64| roll == Roll::Never || len.saturating_add(bytes) <= self.segment_bytes_max;
        Some(match p.segments.last() {
            Some(s) if s.bytes == 0 || fits(s.bytes) => Placement {
                segment: SegmentId { tp, base: s.base, revision: s.revision },
                at: s.bytes,
                ordinal: s.batches,
                rolls: false,
            },
            _ => Placement {
                segment: SegmentId { tp, base: p.log_end, revision: 0 },
                at: 0,
                ordinal: 0,
                rolls: true,
            },
        })
    }
}
