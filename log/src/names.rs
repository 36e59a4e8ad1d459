//! The names of the files of a data directory, each built here and nowhere else.

use crate::state::SegmentId;
use crate::types::TopicPartition;
use uuid::Uuid;

pub(crate) const FORMAT: &str = "format";
/// Exists while a directory is being created: what is beside it then holds nothing yet.
pub(crate) const FORMAT_NEW: &str = "format.new";
pub(crate) const JOURNAL: &str = "journal";
pub(crate) const TOPICS: &str = "topics";
pub(crate) const SLOTS: [&str; 2] = ["checkpoint.a", "checkpoint.b"];

/// The files of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    Log,
    HeadCrc,
    Index,
    TxnIndex,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [Self::Log, Self::HeadCrc, Self::Index, Self::TxnIndex];

    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::HeadCrc => "headcrc",
            Self::Index => "index",
            Self::TxnIndex => "txnindex",
        }
    }
}

pub(crate) fn journal_file(number: u64) -> String {
    format!("{JOURNAL}/{number:010}.wal")
}

/// The number of a journal file, from its name in the journal's directory.
pub(crate) fn journal_number(name: &str) -> Option<u64> {
    let number = name.strip_suffix(".wal")?.parse().ok()?;
    (journal_file(number).strip_prefix("journal/") == Some(name)).then_some(number)
}

pub(crate) fn topic_dir(topic: Uuid) -> String {
    format!("{TOPICS}/{topic}")
}

pub(crate) fn partition_dir(tp: TopicPartition) -> String {
    format!("{TOPICS}/{}/{}", tp.topic, tp.partition)
}

pub(crate) fn segment_file(id: SegmentId, kind: Kind) -> String {
    let (dir, suffix) = (partition_dir(id.tp), kind.suffix());
    match id.revision {
        0 => format!("{dir}/{:020}.{suffix}", id.base),
        revision => format!("{dir}/{:020}.{revision}.{suffix}", id.base),
    }
}
