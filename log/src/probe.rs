//! Moments in the life of a log at which whoever opened it is called: to tell where the log is, or to crash there.
//!
//! ```text
//! open      open ─▶ decided ─▶ redone ─▶ other-slot ─▶ both-slots ─▶ serving
//! journal   recycle ─▶ recycled ─▶ round ─▶ written ─▶ synced ─▶ acked        segments: beside it
//! slots     checkpoint ─▶ slot ─▶ slot-written ─▶ slot-synced
//! end       close ─▶ closed
//! ```
//!
//! A moment comes once a round, a checkpoint or an open, never once a record, and costs a test of an option where
//! nobody listens.

use std::fmt;
use std::sync::Arc;

/// A moment, named after what has just happened or is about to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Moment {
    /// An open begins; nothing was read.
    Open,
    /// Recovery has decided what to keep; nothing was changed.
    Decided,
    /// Segments are rewritten from the journal and synced; no slot was written.
    Redone,
    /// The slot the open did not start from is written and synced, the one it started from is not.
    OtherSlot,
    /// Both slots are synced; files that State does not name are still there.
    BothSlots,
    /// Everything the open wrote is durable; requests come next.
    Serving,
    /// A round is laid out; nothing of it is written.
    Round,
    /// A round is written and not synced.
    Written,
    /// A round is synced; its acks have not left.
    Synced,
    /// The acks of a round have left, as far as its segments are written.
    Acked,
    /// The segments have the bytes of some entries; nobody was told.
    Segments,
    /// A free journal file was chosen; it has its old name.
    Recycle,
    /// A journal file has its new name; the directory was not synced.
    Recycled,
    /// A checkpoint has copied State; segments were not synced.
    Checkpoint,
    /// Segments are synced; the slot was not written.
    Slot,
    /// A slot is written and not synced.
    SlotWritten,
    /// A slot is synced; what it frees was not freed.
    SlotSynced,
    /// A close begins.
    Close,
    /// A close has written everything; threads still run.
    Closed,
}

impl Moment {
    /// All of them.
    pub const ALL: [Self; 19] = [
        Self::Open,
        Self::Decided,
        Self::Redone,
        Self::OtherSlot,
        Self::BothSlots,
        Self::Serving,
        Self::Round,
        Self::Written,
        Self::Synced,
        Self::Acked,
        Self::Segments,
        Self::Recycle,
        Self::Recycled,
        Self::Checkpoint,
        Self::Slot,
        Self::SlotWritten,
        Self::SlotSynced,
        Self::Close,
        Self::Closed,
    ];

    /// Its name, unique among all moments of a process that runs a job on a log of its own.
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "log-open",
            Self::Decided => "log-decided",
            Self::Redone => "log-redone",
            Self::OtherSlot => "log-other-slot",
            Self::BothSlots => "log-both-slots",
            Self::Serving => "log-serving",
            Self::Round => "log-round",
            Self::Written => "log-written",
            Self::Synced => "log-synced",
            Self::Acked => "log-acked",
            Self::Segments => "log-segments",
            Self::Recycle => "log-recycle",
            Self::Recycled => "log-recycled",
            Self::Checkpoint => "log-checkpoint",
            Self::Slot => "log-slot",
            Self::SlotWritten => "log-slot-written",
            Self::SlotSynced => "log-slot-synced",
            Self::Close => "log-close",
            Self::Closed => "log-closed",
        }
    }
}

/// Who is called at each [`Moment`], on the thread that reaches it, with locks of the log held or not: it must return
/// soon, or not at all, and must not use the log. The default is nobody.
#[derive(Clone, Default)]
pub struct Probe(Option<Arc<dyn Fn(Moment) + Send + Sync>>);

impl Probe {
    /// A probe that calls `listener`.
    pub fn new(listener: impl Fn(Moment) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(listener)))
    }

    pub(crate) fn at(&self, moment: Moment) {
        if let Some(listener) = &self.0 {
            listener(moment);
        }
    }
}

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Probe(listening)" } else { "Probe(nobody)" })
    }
}
