//! Moments in the life of a run at which whoever started it is called: to tell in which phase it is, or to crash there.
//!
//! ```text
//!   recovery: recover ─▶ fence ─▶ committed ─▶ restore ─▶ replay-marks ─▶ replay ─▶ replayed (per chunk)
//!   running:  running ─▶ output (first of an epoch)
//!   commit:   barrier ─▶ state ─▶ offsets ─▶ end ─▶ outcome ─▶ released      write, flush: on the store's thread
//!   closing:  closing ─▶ … the last commit … ─▶ closed
//! ```
//!
//! Each moment comes just *before* what it is named after, a few times a commit at most and never once a record. The
//! steps of a commit are those of [`COMMIT_STEPS`](crate::engine::COMMIT_STEPS).

use std::fmt;
use std::sync::Arc;

use crate::engine::CommitStep;

/// What a run is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Moment {
    /// Looks its topics up.
    Recover,
    /// Fences older processes of its identity.
    Fence,
    /// Reads the committed offsets.
    Committed,
    /// Compares the store's positions with the changelogs.
    Restore,
    /// Replays marks.
    ReplayMarks,
    /// Replays cells.
    Replay,
    /// Writes a replayed chunk to the store.
    Replayed,
    /// Lets its tasks run.
    Running,
    /// Hands the first output of an epoch to the transaction.
    Output,
    /// Takes a step of a commit.
    Commit(CommitStep),
    /// Goes on after a commit: held output is released.
    Released,
    /// Ends: asked to, or at the end of a bounded run. One more commit follows.
    Closing,
    /// Returns: everything is committed, written and flushed.
    Closed,
}

/// What a process that runs a job is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Before the run: the program starts, the log is opened.
    Start,
    /// From fencing to the last replayed record.
    Recovery,
    /// Rows are processed and no commit is under way.
    Running,
    /// From the barrier until the outcome is known.
    Committing,
    /// The end, with its last commit.
    Closing,
}

impl Moment {
    /// All of them.
    pub const ALL: [Self; 19] = [
        Self::Recover,
        Self::Fence,
        Self::Committed,
        Self::Restore,
        Self::ReplayMarks,
        Self::Replay,
        Self::Replayed,
        Self::Running,
        Self::Output,
        Self::Commit(CommitStep::Barrier),
        Self::Commit(CommitStep::State),
        Self::Commit(CommitStep::Offsets),
        Self::Commit(CommitStep::End),
        Self::Commit(CommitStep::Outcome),
        Self::Commit(CommitStep::Write),
        Self::Commit(CommitStep::Flush),
        Self::Released,
        Self::Closing,
        Self::Closed,
    ];

    /// Its name, unique among all moments of a process that runs a job on a log of its own.
    pub fn name(self) -> &'static str {
        match self {
            Self::Recover => "recover",
            Self::Fence => "fence",
            Self::Committed => "committed",
            Self::Restore => "restore",
            Self::ReplayMarks => "replay-marks",
            Self::Replay => "replay",
            Self::Replayed => "replayed",
            Self::Running => "running",
            Self::Output => "output",
            Self::Commit(CommitStep::Barrier) => "barrier",
            Self::Commit(CommitStep::State) => "state",
            Self::Commit(CommitStep::Offsets) => "offsets",
            Self::Commit(CommitStep::End) => "end",
            Self::Commit(CommitStep::Outcome) => "outcome",
            Self::Commit(CommitStep::Write) => "write",
            Self::Commit(CommitStep::Flush) => "flush",
            Self::Released => "released",
            Self::Closing => "closing",
            Self::Closed => "closed",
        }
    }

    /// The phase that begins with it, or goes on; none for what happens beside the phases, on the store's thread.
    pub fn phase(self) -> Option<Phase> {
        Some(match self {
            Self::Recover
            | Self::Fence
            | Self::Committed
            | Self::Restore
            | Self::ReplayMarks
            | Self::Replay
            | Self::Replayed => Phase::Recovery,
            Self::Running | Self::Output | Self::Released => Phase::Running,
            Self::Commit(CommitStep::Write | CommitStep::Flush) => return None,
            Self::Commit(_) => Phase::Committing,
            Self::Closing | Self::Closed => Phase::Closing,
        })
    }
}

impl Phase {
    /// `start`, `recovery`, `running`, `committing` or `closing`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Recovery => "recovery",
            Self::Running => "running",
            Self::Committing => "committing",
            Self::Closing => "closing",
        }
    }
}

/// Who is called at each [`Moment`], on the thread that reaches it. It must return soon, or not at all. The default is
/// nobody.
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
