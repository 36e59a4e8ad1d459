//! The checkpointer: a copy of the released State into a slot, so that the journal behind it can be used again.
//!
//! ```text
//! Idle ─half the journal used, asked for─▶ copy State (N), C ─▶ sync segments, sidecars, directories
//!      ─▶ write the older slot, sync ─▶ free journal files and unlink dropped files below both slots
//!      ─still no free file─▶ the same State into the other slot ─▶ Idle
//! ```
//!
//! The copy is of the *released* State: the journal is synced through N and the segments are written through N
//! already, so a checkpoint never waits for the writer, and the writer, thanks to admission, never for long for a
//! checkpoint. It also keeps one spare journal file ready, since zero-filling one takes a while.

use crate::core::Shared;
use crate::fault;
use crate::fs::OpenHow;
use crate::journal::End;
use crate::names::{self, Kind};
use crate::probe::Moment;
use crate::slot::{self, SlotHead};
use crate::state::State;
use crate::writer::Step;
use std::io;

pub(crate) struct Checkpointer {
    doing: Option<Doing>,
}

struct Doing {
    head: SlotHead,
    /// The last entry of the rounds below C.
    c_n: u64,
    state: State,
    files: Vec<(crate::state::SegmentId, Kind)>,
    dirs: Vec<String>,
    asked: bool,
    second: bool,
}

impl Checkpointer {
    pub(crate) fn new() -> Self {
        Self { doing: None }
    }

    pub(crate) fn step(&mut self, shared: &Shared) -> Step {
        match self.try_step(shared) {
            Ok(step) => step,
            Err((doing, e)) => {
                shared.poison(doing, &e);
                Step::Idle
            }
        }
    }

    fn try_step(&mut self, shared: &Shared) -> Result<Step, (&'static str, io::Error)> {
        if shared.core.lock().stopped.is_some() {
            return Ok(Step::Idle);
        }
        let Some(doing) = &mut self.doing else {
            if spare_file(shared).map_err(|e| ("making a journal file", e))? {
                return Ok(Step::Worked);
            }
            self.doing = begin(shared).map_err(|e| ("writing sidecars", e))?;
            return Ok(if self.doing.is_some() { Step::Worked } else { Step::Idle });
        };
        if !doing.files.is_empty() {
            let rest = doing.files.len().saturating_sub(shared.fs.syncs_at_once().max(1));
            let (skipped, keys): (Vec<_>, Vec<_>) =
                doing.files.drain(rest..).partition(|(_, kind)| sync_skipped(*kind));
            skipped.into_iter().for_each(|key| shared.segments.files.forget(key));
            shared.segments.files.sync_all(&keys).map_err(|e| ("syncing segments", e))?;
            return Ok(Step::Worked);
        }
        if let Some(dir) = doing.dirs.pop() {
            if fault::active("sync:segment-dir") {
                shared.segments.files.forget_dir(&dir);
            } else {
                shared.segments.files.sync_dir(&dir).map_err(|e| ("syncing a directory", e))?;
            }
            return Ok(Step::Worked);
        }
        doing.write_slot(shared).map_err(|e| ("writing a checkpoint", e))?;
        unlink_gone(shared).map_err(|e| ("removing files of deleted topics", e))?;
        let again = !doing.second && {
            let core = shared.core.lock();
            core.want_checkpoint || core.journal.free.is_empty()
        };
        if again {
            // When space is short the same State goes into the other slot: both are then past the old files.
            doing.second = true;
            doing.head.sequence += 1;
        } else {
            let asked = doing.asked;
            self.doing = None;
            if asked {
                shared.notify.notify();
            }
        }
        Ok(Step::Worked)
    }
}

/// Only seeded bugs skip the sync of a segment's file.
fn sync_skipped(kind: Kind) -> bool {
    fault::active(if kind == Kind::Log { "sync:segment" } else { "sync:sidecar" })
}

/// Makes one more journal file while the budget allows it and none is free.
fn spare_file(shared: &Shared) -> io::Result<bool> {
    let number = {
        let mut core = shared.core.lock();
        if !core.wants_file(shared.config.journal_files_max) {
            return Ok(false);
        }
        core.journal.next_file += 1;
        core.journal.next_file - 1
    };
    let path = names::journal_file(number);
    let bytes = shared.core.lock().journal.geometry.file_bytes;
    let made = shared.fs.open(&path, OpenHow::CreateNew).and_then(|file| {
        file.zero_fill(bytes)?;
        file.sync() // nothing relies on it; the first round in the file would have to wait for it otherwise
    });
    let mut core = shared.core.lock();
    match made {
        Ok(()) => {
            core.journal.files.insert(number);
            core.journal.free.insert(number);
        }
        Err(e) if matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
            tracing::warn!(%e, "no space for a further journal file; going on with those there are");
            core.journal.grown_out = true;
            core.want_checkpoint = true;
            drop(core);
            let _ = shared.fs.unlink(&path);
            return Ok(true);
        }
        Err(e) => return Err(e),
    }
    core.count_room();
    core.drain_backlog(shared);
    drop(core);
    shared.writer_wake.notify_one();
    Ok(true)
}

fn begin(shared: &Shared) -> io::Result<Option<Doing>> {
    let (head, c_n, state, asked) = {
        let mut core = shared.core.lock();
        if !(core.want_checkpoint || core.half_used(shared.config.journal_files_max)) {
            return Ok(None);
        }
        let asked = std::mem::take(&mut core.want_checkpoint);
        // Broken on purpose: the sequenced State, though journal and segments hold it only through C.
        let through_c = fault::active("slot-through-c");
        let state = if through_c { core.seq.clone() } else { shared.released.read().clone() };
        let (c, c_n) = core.journal.c_of(state.n);
        let [a, b] = core.journal.slots;
        if !asked && a.1 == c && b.1 == c {
            return Ok(None); // nothing that a checkpoint could free
        }
        let sequence = a.0.max(b.0) + 1;
        let synced_through = core.journal.synced.max(c.lsn);
        (SlotHead { sequence, incarnation: shared.incarnation, synced_through, c }, c_n, state, asked)
    };
    shared.config.probe.at(Moment::Checkpoint);
    shared.segments.flush_sidecars()?;
    let files = shared.segments.files.dirty();
    let dirs = shared.segments.files.dirty_dirs();
    tracing::debug!(n = state.n, c = head.c.lsn, files = files.len(), "checkpoint");
    Ok(Some(Doing { head, c_n, state, files, dirs, asked, second: false }))
}

impl Doing {
    fn write_slot(&mut self, shared: &Shared) -> io::Result<()> {
        let older = {
            let [a, b] = shared.core.lock().journal.slots;
            usize::from(b.0 < a.0)
        };
        shared.config.probe.at(Moment::Slot);
        let file = shared.fs.open(names::SLOTS[older], OpenHow::Write)?;
        slot::write(&*file, &slot::encode(shared.directory.as_u128(), &self.head, &self.state))?;
        shared.config.probe.at(Moment::SlotWritten);
        fault::synced("sync:slot", || file.sync())?;
        shared.count_sync();
        shared.config.probe.at(Moment::SlotSynced);
        let mut core = shared.core.lock();
        core.journal.slots[older] = (self.head.sequence, self.head.c, self.c_n);
        core.journal.find_free();
        core.count_room();
        core.drain_backlog(shared);
        drop(core);
        shared.writer_wake.notify_one();
        Ok(())
    }
}

/// Unlinks the files of entries that both slots are past.
fn unlink_gone(shared: &Shared) -> io::Result<()> {
    loop {
        let gone = {
            let mut core = shared.core.lock();
            let past = core.journal.past_n();
            match core.gone.front() {
                Some(g) if g.n <= past => core.gone.pop_front().expect("it has a front"),
                _ => return Ok(()),
            }
        };
        for id in &gone.segments {
            shared.segments.files.drop_segment(*id);
            for kind in Kind::ALL {
                ignore_missing(shared.fs.unlink(&names::segment_file(*id, kind)))?;
            }
        }
        if let Some((topic, partitions)) = gone.topic {
            let dirs = (0..partitions)
                .map(|partition| names::partition_dir(crate::types::TopicPartition { topic, partition }));
            for dir in dirs {
                shared.segments.files.drop_dir(&dir);
                remove_dir(shared, &dir)?;
            }
            remove_dir(shared, &names::topic_dir(topic))?;
        }
    }
}

/// A directory may hold files that no entry named, e.g. space reserved for a batch that was then refused: the next
/// open removes those.
fn remove_dir(shared: &Shared, dir: &str) -> io::Result<()> {
    match shared.fs.remove_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        other => ignore_missing(other),
    }
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The end of both slots, for a log that was just recovered.
pub(crate) fn slots_at(heads: [SlotHead; 2], n: u64) -> [(u64, End, u64); 2] {
    heads.map(|h| (h.sequence, h.c, n))
}
