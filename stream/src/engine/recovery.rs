//! Start: from what was committed to a running job.
//!
//! ```text
//!   guarded arguments ─▶ topics ─▶ fence ─▶ committed offsets ─▶ changelog ends ─▶ per shard: keep | replay | rebuild ─▶ Start
//!                                    └ waits until the fenced transaction is resolved
//! ```
//!
//! Invariants:
//!
//! * Offsets are read after fencing and changelog ends after the offsets: nothing can be committed in between.
//! * A shard whose stored position does not hold (another incarnation of the topic, an unknown leader epoch, beyond the
//!   end) is emptied and rebuilt from the changelog. The keyed changelog must also still have the record it names; a
//!   window store's start moves up only past windows that are closed, so there replay begins at the log start.
//! * Each replayed chunk writes data and position together: a crash in the middle of a replay costs nothing.
//! * Marks come first: cells of windows they close are dead and are not written.

use crate::codec;
use crate::error::StartError;
use crate::fault::{self, Fault};
use crate::io::{Cleanup, Log, LogError, NewTopic, Position, TopicId, TopicInfo, Transactions};
use crate::key::Shard;
use crate::names::{Identity, JOBS_TOPIC, JobRecord, PartitionMark};
use crate::plan::Plan;
use crate::probe::{Moment, Probe};
use crate::record::OutRecord;
use crate::state::{
    CellBatchBuilder, Marks, ShardPosition, StateBackend, StateError, StoreBatch, StoreId,
    mark_of_changelog_key, stored_marks, stored_position, stored_windows, window_and_key,
};
use crate::time::MIN;

use super::{Changelogs, Layout, Mode, Start, StartPartition};
use std::sync::Arc;

/// Bytes read from a changelog at once.
const CHUNK_BYTES: usize = 4 << 20;

/// What a run is asked to be.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The plan.
    pub plan: Plan,
    /// The job's name, or `--name`.
    pub identity: Identity,
    /// Tasks and limits.
    pub layout: Layout,
    /// How it ends.
    pub mode: Mode,
}

/// A run that may begin.
pub struct Started {
    /// What its machines are made from.
    pub start: Start,
    /// The transactional producer; older processes of the same identity are fenced.
    pub transactions: Box<dyn Transactions>,
}

/// Brings the store to the last commit and fences older processes. Blocks for input and output.
///
/// # Errors
///
/// If the job may not start, or log or store fail.
pub fn start(setup: &Setup, log: &dyn Log, backend: &dyn StateBackend) -> Result<Started, StartError> {
    start_watched(setup, log, backend, &Probe::default())
}

/// [`start`], telling `probe` what it is at.
pub(crate) fn start_watched(
    setup: &Setup,
    log: &dyn Log,
    backend: &dyn StateBackend,
    probe: &Probe,
) -> Result<Started, StartError> {
    probe.at(Moment::Recover);
    let Setup { plan, identity, layout, mode } = setup;
    let record = plan.record(layout.shards);
    // First of all: a run with wrong arguments must not stop the right one, nor be told to make the topic it names wrongly,
    // and nothing is made for it.
    if let Some(jobs) = log.topic(JOBS_TOPIC)? {
        check_record(log, &jobs, identity, &record)?;
    }
    let input = log.topic(&plan.source().topic)?;
    let input = input.ok_or_else(|| StartError::NoInput { topic: plan.source().topic.clone() })?;
    let jobs = NewTopic { name: JOBS_TOPIC.to_owned(), partitions: 1, cleanup: Cleanup::Compact };
    let jobs = log.create_topic(&jobs)?;
    let sinks = plan.sinks().iter().map(|sink| {
        let new =
            NewTopic { name: sink.topic.clone(), partitions: input.partitions, cleanup: Cleanup::Delete };
        log.create_topic(&new)
    });
    let sinks = sinks.collect::<Result<Vec<_>, _>>()?;
    let changelogs = match plan.step() {
        Some(step) => Some(Changelogs {
            keyed: changelog(log, identity.keyed_changelog()?, layout.shards)?,
            windows: changelog(log, identity.changelog(&step.name)?, layout.shards)?,
        }),
        None => None,
    };
    probe.at(Moment::Fence);
    let transactions = log.fence(identity.as_str())?;
    probe.at(Moment::Committed);
    let committed = log.committed(identity.as_str())?;
    let known = check_record(log, &jobs, identity, &record)?;

    let mut floor = MIN;
    let mut partitions = Vec::with_capacity(input.partitions as usize);
    for partition in 0..input.partitions {
        let ends = log.ends(&input.id, partition)?;
        let at = committed.iter().find(|c| c.topic.name == input.id.name && c.partition == partition);
        let end = (*mode == Mode::UntilEnd).then_some(ends.last_stable);
        let found = match at {
            Some(c) => {
                let mark = PartitionMark::decode(&c.metadata).ok_or_else(|| StartError::Corrupt {
                    identity: identity.to_string(),
                    what: format!("the metadata of partition {partition}'s offset"),
                })?;
                floor = floor.max(mark.floor);
                StartPartition { partition, position: c.position, watermark: Some(mark.watermark), end }
            }
            None => {
                let position = Position::beginning(ends.log_start);
                StartPartition { partition, position, watermark: None, end }
            }
        };
        partitions.push(found);
    }

    let mut restored = Restored { marks: Marks::NONE, replayed: 0, rebuilt: 0 };
    let mut stored = false;
    if let Some((changelogs, step)) = changelogs.as_ref().zip(plan.step()) {
        let restore = Restore { log, backend, changelogs, store: step.store, shards: layout.shards, probe };
        restore.run(&mut restored)?;
        for shard in 0..layout.shards {
            stored = stored || !stored_windows(backend, step.store, Shard(shard), MIN)?.is_empty();
        }
    }
    let job_record = (!known).then(|| {
        let value = serde_json::to_vec(&record).expect("a record of strings and numbers is JSON");
        let key = identity.as_str().as_bytes().to_vec();
        let record =
            OutRecord { timestamp: 0, key: Some(key.into()), value: Some(value.into()), headers: Vec::new() };
        (jobs.id.clone(), record)
    });
    let start = Start {
        plan: plan.clone(),
        layout: *layout,
        mode: *mode,
        group: identity.to_string(),
        input,
        partitions,
        floor,
        marks: restored.marks,
        sinks,
        changelogs,
        job_record,
        replayed: restored.replayed,
        rebuilt: restored.rebuilt,
        care: super::poison::Care::default(),
        stored,
    };
    Ok(Started { start, transactions })
}

fn changelog(log: &dyn Log, name: String, shards: u16) -> Result<TopicId, StartError> {
    let new = NewTopic { name, partitions: u32::from(shards), cleanup: Cleanup::Compact };
    let info = log.create_topic(&new)?;
    if info.partitions != u32::from(shards) {
        return Err(StartError::Changelog { topic: new.name, found: info.partitions, shards });
    }
    Ok(info.id)
}

/// Refuses a run that differs from what the identity committed to. Says whether it committed to just this.
fn check_record(
    log: &dyn Log,
    jobs: &TopicInfo,
    identity: &Identity,
    record: &JobRecord,
) -> Result<bool, StartError> {
    let mut committed: Option<Vec<u8>> = None;
    each_record(log, &jobs.id, 0, Position::default(), &mut |key, value| {
        if key == identity.as_str().as_bytes() {
            committed = (!value.is_empty()).then(|| value.to_vec());
        }
    })?;
    let Some(bytes) = committed else { return Ok(false) };
    let parsed: JobRecord = serde_json::from_slice(&bytes).map_err(|e| StartError::Corrupt {
        identity: identity.to_string(),
        what: format!("its record in {JOBS_TOPIC} ({e})"),
    })?;
    if parsed.resetting {
        return Err(StartError::ResetBegan { identity: identity.to_string() });
    }
    record.check(identity, &parsed)?;
    Ok(*record == parsed)
}

/// Visits key and value of every committed record of a partition from `from` to its stable end.
fn each_record(
    log: &dyn Log,
    topic: &TopicId,
    partition: u32,
    from: Position,
    each: &mut dyn FnMut(&[u8], &[u8]),
) -> Result<(), StartError> {
    let ends = log.ends(topic, partition)?;
    let mut at = if from.offset < ends.log_start { Position::beginning(ends.log_start) } else { from };
    while at.offset < ends.last_stable {
        let fetched = log.read(topic, partition, at, CHUNK_BYTES)?;
        for batch in &fetched.batches {
            for i in 0..batch.len() {
                let record = batch.record(i);
                each(record.key().unwrap_or_default(), record.value().unwrap_or_default());
            }
        }
        if fetched.next.offset <= at.offset {
            return Err(LogError::nothing_read(topic, partition, at.offset, ends.last_stable).into());
        }
        at = fetched.next;
    }
    Ok(())
}

struct Restored {
    marks: Marks,
    replayed: u64,
    rebuilt: u32,
}

struct Restore<'a> {
    log: &'a dyn Log,
    backend: &'a dyn StateBackend,
    changelogs: &'a Changelogs,
    store: StoreId,
    shards: u16,
    probe: &'a Probe,
}

impl Restore<'_> {
    fn run(&self, restored: &mut Restored) -> Result<(), StartError> {
        self.probe.at(Moment::Restore);
        let mut from = Vec::with_capacity(usize::from(self.shards));
        for shard in (0..self.shards).map(Shard) {
            let positions = self.positions(shard)?;
            restored.rebuilt += u32::from(positions.rebuild);
            from.push((positions.keyed, positions.windows));
        }
        self.probe.at(Moment::ReplayMarks);
        // Marks first: they say which windows are dead. All shards carry the same; a shard whose last marks were
        // compacted away or not yet written must not lower them.
        for (shard, (keyed, _)) in (0..self.shards).map(Shard).zip(&from) {
            restored.marks.raise(stored_marks(self.backend, shard, self.store)?);
            self.replay_marks(shard, *keyed, restored)?;
        }
        self.probe.at(Moment::Replay);
        for (shard, (_, windows)) in (0..self.shards).map(Shard).zip(&from) {
            self.replay_windows(shard, *windows, restored)?;
        }
        Ok(())
    }

    /// Where replay begins. Empties the shard if a position does not hold.
    fn positions(&self, shard: Shard) -> Result<Positions, StartError> {
        let (mut rebuild, mut known) = (false, false);
        let mut begin = [Position::default(); 2];
        for (i, topic) in [&self.changelogs.keyed, &self.changelogs.windows].into_iter().enumerate() {
            let partition = u32::from(shard.0);
            let ends = self.log.ends(topic, partition)?;
            let start = Position::beginning(ends.log_start);
            if fault::active(Fault::PositionNotChecked) {
                begin[i] = ends.end;
                continue;
            }
            match stored_position(self.backend, shard, topic.uuid)? {
                None => begin[i] = start,
                Some(position) => {
                    known = true;
                    let keyed = i == 0;
                    let holds = match fault::active(Fault::EpochNotChecked) {
                        true => position.offset <= ends.end.offset,
                        false => self.log.holds(topic, partition, position)?,
                    };
                    if !holds || (keyed && position.offset < ends.log_start) {
                        rebuild = true;
                    }
                    let again = fault::active(Fault::ReplayedTwice);
                    begin[i] = if again || position.offset < ends.log_start { start } else { position };
                }
            }
        }
        // A store with no position at all may still hold what an older incarnation of the topics left there.
        if rebuild || !known {
            let wipe = vec![(StoreId(0), shard), (self.store, shard)];
            self.backend.write(&StoreBatch { wipe, ..StoreBatch::default() })?;
            for (i, topic) in [&self.changelogs.keyed, &self.changelogs.windows].into_iter().enumerate() {
                if !fault::active(Fault::PositionNotChecked) {
                    let ends = self.log.ends(topic, u32::from(shard.0))?;
                    begin[i] = Position::beginning(ends.log_start);
                }
            }
        }
        Ok(Positions { keyed: begin[0], windows: begin[1], rebuild })
    }

    fn replay_marks(&self, shard: Shard, from: Position, restored: &mut Restored) -> Result<(), StartError> {
        let topic = &self.changelogs.keyed;
        self.replay(topic, shard, from, &mut |records| {
            let mut found = None;
            for (key, value) in records {
                restored.replayed += 1;
                match (mark_of_changelog_key(key), Marks::decode(value)) {
                    (Some(store), Some(marks)) if store == self.store => found = Some(marks),
                    _ => return Err(self.corrupt(shard, format!("record {key:02x?} in {}", topic.name))),
                }
            }
            if let Some(marks) = found {
                restored.marks.raise(marks);
            }
            Ok(StoreBatch {
                marks: found.map(|m| (self.store, shard, m)).into_iter().collect(),
                ..StoreBatch::default()
            })
        })
    }

    fn replay_windows(
        &self,
        shard: Shard,
        from: Position,
        restored: &mut Restored,
    ) -> Result<(), StartError> {
        let topic = &self.changelogs.windows;
        let closed = restored.marks.closed;
        let mut builder = CellBatchBuilder::default();
        self.replay(topic, shard, from, &mut |records| {
            for (key, value) in records {
                restored.replayed += 1;
                let Some((end, key)) = window_and_key(key) else {
                    return Err(self.corrupt(shard, format!("key {key:02x?} in {}", topic.name)));
                };
                if value.first().is_some_and(|v| *v != codec::state::VERSION) {
                    return Err(self.corrupt(shard, format!("codec version {} in {}", value[0], topic.name)));
                }
                // Closed windows are dead: what a compaction has not dropped yet is skipped here.
                if end > closed && !value.is_empty() {
                    builder.push(end, key, |to| to.extend_from_slice(value));
                }
            }
            let cells = builder.finish(self.store, shard).map(Arc::new);
            Ok(StoreBatch { cells: cells.into_iter().collect(), ..StoreBatch::default() })
        })
    }

    fn corrupt(&self, shard: Shard, what: String) -> StartError {
        StateError::Corrupt { place: "changelog", store: self.store.0, shard: shard.0, what }.into()
    }

    /// Reads a changelog partition to its end and writes what `chunk` makes of each read, with the position behind it.
    #[allow(clippy::type_complexity, reason = "one callback, named by its parameter")]
    fn replay(
        &self,
        topic: &TopicId,
        shard: Shard,
        from: Position,
        chunk: &mut dyn FnMut(&[(&[u8], &[u8])]) -> Result<StoreBatch, StartError>,
    ) -> Result<(), StartError> {
        let partition = u32::from(shard.0);
        let end = self.log.ends(topic, partition)?.last_stable;
        let mut at = from;
        while at.offset < end {
            let fetched = self.log.read(topic, partition, at, CHUNK_BYTES)?;
            if fetched.next.offset <= at.offset {
                return Err(LogError::nothing_read(topic, partition, at.offset, end).into());
            }
            at = fetched.next;
            let mut records: Vec<(&[u8], &[u8])> = Vec::new();
            for batch in &fetched.batches {
                for record in (0..batch.len()).map(|i| batch.record(i)) {
                    records.push((record.key().unwrap_or_default(), record.value().unwrap_or_default()));
                }
            }
            if fault::active(Fault::ReplayStopsShort) && at.offset >= end {
                records.pop();
            }
            let mut batch = chunk(&records)?;
            batch.positions.push(ShardPosition { shard, topic: topic.uuid, position: at });
            self.probe.at(Moment::Replayed);
            self.backend.write(&batch)?;
        }
        Ok(())
    }
}

struct Positions {
    keyed: Position,
    windows: Position,
    rebuild: bool,
}
