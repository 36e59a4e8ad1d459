//! What a run shows while it runs, and the handle that stops it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::engine::{Counters, Outlook};
use crate::probe::Probe;

/// What a run is at. Counters grow over restarts within one run; what an aborted epoch counted stays counted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// What the tasks counted so far.
    pub counters: Counters,
    /// Input records whose epoch is committed, since the run began.
    pub rows_committed: u64,
    /// Next offset committed, by input partition; a partition of which nothing was ever committed is not in it.
    pub committed: BTreeMap<u32, i64>,
    /// The same when the current start began, before it read anything.
    pub began: BTreeMap<u32, i64>,
    /// Output records in the open transaction, handed to the log.
    pub open_rows: u64,
    /// Output records committed.
    pub output_committed: u64,
    /// Commits so far.
    pub commits: u64,
    /// The event-time watermark of the job on which the last committed epoch ended; `None` before the first.
    pub event_time: Option<i64>,
    /// Event-time watermarks by input partition; `None` does not take part (it is idle).
    pub partitions: Vec<Option<i64>>,
    /// Changelog records that the last start replayed into the store.
    pub replayed: u64,
    /// Shards that the last start rebuilt, because their position did not hold.
    pub rebuilt: u32,
    /// How long the last start took: fencing, offsets, replay.
    pub recovery: Duration,
    /// Times the run returned to its last commit: the log could not be reached, a transaction was aborted, a record made
    /// the job panic.
    pub restarts: u32,
    /// Why it returned there last.
    pub returned_because: Option<String>,
    /// True once the tasks run.
    pub running: bool,
    /// `starting`, `running`, `aligning`, `ending` or `over`.
    pub phase: &'static str,
    /// Flushes of the store.
    pub flushes: u64,
    /// About how many bytes the store holds, in memory and on disk.
    pub state_bytes: u64,
    /// Changelog records committed, marks included.
    pub changelog_records: u64,
    /// How long tasks were held up by the last commit: from its barrier to the last snapshot.
    pub aligned_in: Duration,
    /// From the last commit's barrier until it was known to be committed; tasks work on meanwhile.
    pub committed_in: Duration,
}

/// How a run is asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    /// It goes on.
    No,
    /// After one more commit.
    AfterCommit,
    /// At once: the open transaction is left to be aborted by the next start.
    AtOnce,
}

/// Watches and stops a run from other threads. Cheap to clone.
#[derive(Clone, Default)]
pub struct Monitor(Arc<Inside>);

#[derive(Default)]
struct Inside {
    stop: AtomicU8,
    state: Mutex<Progress>,
    /// Counters of starts before the current one.
    before: Mutex<Counters>,
    changed: Condvar,
    probe: Probe,
}

impl std::fmt::Debug for Monitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Monitor").field(&self.progress()).finish()
    }
}

impl Monitor {
    /// For one run.
    pub fn new() -> Self {
        Self::default()
    }

    /// For one run that tells `probe` what it is about to do.
    pub fn with_probe(probe: Probe) -> Self {
        Self(Arc::new(Inside { probe, ..Inside::default() }))
    }

    pub(super) fn probe(&self) -> &Probe {
        &self.0.probe
    }

    /// What the run is at.
    pub fn progress(&self) -> Progress {
        self.0.state.lock().clone()
    }

    /// Asks the run to stop: the first call after a commit, the second at once. Safe to call from a signal's thread.
    pub fn stop(&self) {
        let next = |stop| Some(if stop == 0 { 1 } else { 2 });
        let _ = self.0.stop.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next);
        self.0.changed.notify_all();
    }

    /// Asks the run to stop at once.
    pub fn stop_at_once(&self) {
        self.0.stop.store(2, Ordering::SeqCst);
        self.0.changed.notify_all();
    }

    /// Whether and how the run was asked to stop.
    pub fn asked(&self) -> Stop {
        match self.0.stop.load(Ordering::SeqCst) {
            0 => Stop::No,
            1 => Stop::AfterCommit,
            _ => Stop::AtOnce,
        }
    }

    /// Waits until `enough` holds, at most `wait`; says whether it does.
    pub fn wait_until(&self, wait: Duration, mut enough: impl FnMut(&Progress) -> bool) -> bool {
        let deadline = std::time::Instant::now() + wait;
        let mut state = self.0.state.lock();
        while !enough(&state) {
            if self.0.changed.wait_until(&mut state, deadline).timed_out() {
                return enough(&state);
            }
        }
        true
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.0.state.lock());
        self.0.changed.notify_all();
    }

    /// The tasks' counters of the current start.
    pub(super) fn counted(&self, now: &Counters) {
        let mut sum = *self.0.before.lock();
        sum.add(now);
        self.update(|p| p.counters = sum);
    }

    pub(super) fn starting(&self) {
        let sum = self.0.state.lock().counters;
        *self.0.before.lock() = sum;
        self.update(|p| (p.running, p.phase, p.open_rows) = (false, "starting", 0));
    }

    pub(super) fn outlook(&self, outlook: &Outlook, base: &Base) {
        self.update(|p| {
            p.phase = outlook.phase;
            p.open_rows = outlook.open_rows;
            p.output_committed = base.output + outlook.summary.committed_rows;
            p.commits = base.commits + outlook.summary.epochs;
            if outlook.summary.epochs > 0 {
                p.event_time = Some(outlook.reached);
            }
            let read = |(partition, at): (&u32, &i64)| {
                at.saturating_sub(*base.offsets.get(partition).unwrap_or(at)).max(0).unsigned_abs()
            };
            p.rows_committed = outlook.committed.iter().map(read).sum();
            p.committed.clone_from(&outlook.committed);
        });
    }

    /// Waits a while between two starts, or until a stop at once is asked for.
    pub(super) fn pause(&self, wait: Duration) {
        let deadline = std::time::Instant::now() + wait;
        let mut state = self.0.state.lock();
        while self.asked() != Stop::AtOnce && !self.0.changed.wait_until(&mut state, deadline).timed_out() {}
    }
}

/// What a run had reached when its current start began.
#[derive(Clone, Debug, Default)]
pub(super) struct Base {
    /// Where the run began to read, by partition.
    pub(super) offsets: BTreeMap<u32, i64>,
    pub(super) commits: u64,
    pub(super) output: u64,
}
