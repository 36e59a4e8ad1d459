//! The fault bank: one broken rule at a time, to see that the tests notice. Empty in normal builds.
//!
//! Cargo feature `faults` compiles the breaks in; `set` chooses one for the calling thread. Names and meanings are
//! those of the executable model of time, where it has them. What notices each of them at the least cost is a table that
//! `stream/tests/faults.rs` makes and holds: `docs/engine-faults.md`.

macro_rules! faults {
    ($($fault:ident, $name:literal, $rule:literal;)*) => {
        /// A rule that can be broken.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Fault {
            $(#[doc = $rule] $fault,)*
        }

        impl Fault {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$fault),*];

            /// Its name in tables.
            pub fn name(self) -> &'static str {
                match self { $(Self::$fault => $name),* }
            }

            /// What is done wrong.
            pub fn rule(self) -> &'static str {
                match self { $(Self::$fault => $rule),* }
            }
        }
    };
}

faults! {
    LateByChannel, "late-by-channel", "Late by the event-time watermark the keyed task has reached, not by the stamp.";
    ReturnKeepsOwn, "return-keeps-own", "A returning or appearing partition keeps its own value and does not take the floor.";
    FloorSetLater, "floor-set-later", "A task reads the job value, and sends it and raises the floor in a later step, outside the lock.";
    AllIdleSilent, "all-idle-silent", "Where no partition takes part, a task sends nothing, not even the last job value.";
    FloorNotRestored, "floor-not-restored", "A start forgets the floor.";
    IdleCommitsOwn, "idle-commits-own", "A partition that is idle at a barrier commits its own value, not max(own, floor).";
    NewAtStartLow, "new-at-start-low", "A partition without a committed value takes minus infinity at every start.";
    FloorForAllAtStart, "floor-for-all-at-start", "At a start every partition is raised to the floor, idle or not.";
    JoinAlone, "join-alone", "At a start each task registers its partitions by itself, while others already publish.";
    ClosedNotRestored, "closed-not-restored", "A start forgets `closed_through`.";
    ClosedPerTask, "closed-per-task", "A bounded end keeps the `closed_through` of one task only.";
    FinishedLeaves, "finished-leaves", "A partition at its captured end leaves the minimum before the others are there.";
    BarrierNotAligned, "barrier-not-aligned", "A keyed task snapshots at its first barrier and reads on.";
    CombineBeforeLate, "combine-before-late", "Local combining first, then the late test with the newest stamp of the group.";
    CombineOverBarrier, "combine-over-barrier", "The local table is not flushed at a barrier.";
    TimeBeforeFlush, "time-before-flush", "A value that closes a window is sent before the local table is flushed.";
    BatchFromOverlay, "batch-from-overlay", "A store write takes values from the overlay.";
    BatchSkipsOpenEpoch, "batch-skips-open-epoch", "A store write skips windows that only the running epoch closed.";
    CleanAll, "clean-all", "A commit also cleans cells that the next epoch has dirtied.";
    OffsetsOutside, "offsets-outside", "Offsets are committed outside the transaction.";
    StoreBeforeCommit, "store-before-commit", "The store is written before the transaction ended.";
    ReplayStopsShort, "replay-stops-short", "Replay leaves out the last record of each shard.";
    ReplayedTwice, "replayed-twice", "A start replays again what the store already holds.";
    EpochNotChecked, "epoch-not-checked", "Whether a store's position is of the history that the changelog has now is not asked, only whether it is in it.";
    PositionNotChecked, "position-not-checked", "The store's position is taken to be the end of the changelog.";
    UnknownIsCommitted, "unknown-is-committed", "An unknown outcome is taken for a commit.";
    OutputNotHeld, "output-not-held", "The next epoch's output goes into the transaction that is ending.";
    EvictedIsComplete, "evicted-is-complete", "After an eviction a miss is still taken for a new key.";
    LoadedIsComplete, "loaded-is-complete", "A window found in the store at the start is taken for complete.";
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
