//! The fault bank: one broken rule at a time, to see that the tests notice. Empty in normal builds.
//!
//! Cargo feature `faults` compiles the breaks in; `set` chooses one for the calling thread. Names and meanings are
//! those of the executable model of time, where it has them.

/// A rule that can be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Late by the event-time watermark the keyed task has reached, not by the stamp.
    LateByChannel,
    /// A returning or appearing partition keeps its own value and does not take the floor.
    ReturnKeepsOwn,
    /// A task reads the job value, and sends it and raises the floor in a later step, outside the lock.
    FloorSetLater,
    /// Where no partition takes part, a task sends nothing, not even the last job value.
    AllIdleSilent,
    /// A start forgets the floor.
    FloorNotRestored,
    /// A partition that is idle at a barrier commits its own value, not max(own, floor).
    IdleCommitsOwn,
    /// A partition without a committed value takes minus infinity at every start.
    NewAtStartLow,
    /// At a start every partition is raised to the floor, idle or not.
    FloorForAllAtStart,
    /// At a start each task registers its partitions by itself, while others already publish.
    JoinAlone,
    /// A start forgets `closed_through`.
    ClosedNotRestored,
    /// A bounded end keeps the `closed_through` of one task only.
    ClosedPerTask,
    /// A partition at its captured end leaves the minimum before the others are there.
    FinishedLeaves,
    /// A keyed task snapshots at its first barrier and reads on.
    BarrierNotAligned,
    /// Local combining first, then the late test with the newest stamp of the group.
    CombineBeforeLate,
    /// The local table is not flushed at a barrier.
    CombineOverBarrier,
    /// A value that closes a window is sent before the local table is flushed.
    TimeBeforeFlush,
    /// A store write takes values from the overlay.
    BatchFromOverlay,
    /// A store write skips windows that only the running epoch closed.
    BatchSkipsOpenEpoch,
    /// A commit also cleans cells that the next epoch has dirtied.
    CleanAll,
    /// Offsets are committed outside the transaction.
    OffsetsOutside,
    /// The store is written before the transaction ended.
    StoreBeforeCommit,
    /// Replay leaves out the last record of each shard.
    ReplayStopsShort,
    /// The store's position is taken to be the end of the changelog.
    PositionNotChecked,
    /// An unknown outcome is taken for a commit.
    UnknownIsCommitted,
    /// The next epoch's output goes into the transaction that is ending.
    OutputNotHeld,
    /// After an eviction a miss is still taken for a new key.
    EvictedIsComplete,
    /// A window found in the store at the start is taken for complete.
    LoadedIsComplete,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 27] = [
        Self::LateByChannel,
        Self::ReturnKeepsOwn,
        Self::FloorSetLater,
        Self::AllIdleSilent,
        Self::FloorNotRestored,
        Self::IdleCommitsOwn,
        Self::NewAtStartLow,
        Self::FloorForAllAtStart,
        Self::JoinAlone,
        Self::ClosedNotRestored,
        Self::ClosedPerTask,
        Self::FinishedLeaves,
        Self::BarrierNotAligned,
        Self::CombineBeforeLate,
        Self::CombineOverBarrier,
        Self::TimeBeforeFlush,
        Self::BatchFromOverlay,
        Self::BatchSkipsOpenEpoch,
        Self::CleanAll,
        Self::OffsetsOutside,
        Self::StoreBeforeCommit,
        Self::ReplayStopsShort,
        Self::PositionNotChecked,
        Self::UnknownIsCommitted,
        Self::OutputNotHeld,
        Self::EvictedIsComplete,
        Self::LoadedIsComplete,
    ];
}

#[cfg(feature = "faults")]
mod chosen {
    use std::cell::Cell;

    use super::Fault;

    thread_local! {
        static CHOSEN: Cell<Option<Fault>> = const { Cell::new(None) };
    }

    /// Breaks this rule, or none, on the calling thread from now on.
    pub fn set(fault: Option<Fault>) {
        CHOSEN.set(fault);
    }

    pub(crate) fn active(fault: Fault) -> bool {
        CHOSEN.get() == Some(fault)
    }
}

#[cfg(not(feature = "faults"))]
mod chosen {
    use super::Fault;

    pub(crate) const fn active(_: Fault) -> bool {
        false
    }
}

pub(crate) use chosen::active;
#[cfg(feature = "faults")]
pub use chosen::set;
