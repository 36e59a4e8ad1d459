//! The live log: what a process that owns a data directory works with. A thin shell of threads around
//! the state machines of [`open`](crate::open); requests go to the sequencer, readers to the released State.

use crate::config::Config;
use crate::core::Shared;
use crate::error::{Corruption, OpenError, ReadError, WriteError};
use crate::fault;
use crate::fs::Fs;
use crate::names;
use crate::open::{Machine, open};
use crate::plan::{AlterTopic, AppendBatch, CreateTopic, DeleteTopic, check_alter, check_topic, checked};
use crate::probe::Moment;
use crate::segment::{FileError, Wanted};
use crate::segment_writer;
use crate::state::{Partition, Segment, SegmentId};
use crate::ticket::Ticket;
use crate::types::*;
use crate::writer::{Seal, Step};
use bytes::Bytes;
use parking_lot::Mutex;
use rand::{RngExt, SeedableRng};
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// The journal is sealed when nothing came for this long.
const IDLE: Duration = Duration::from_millis(50);
/// How often time-outs of transactions are looked for.
const TICK: Duration = Duration::from_millis(50);

/// An open data directory. Clones share it; cheap to clone, safe to use from any thread.
///
/// The threads stop when the last clone is dropped; [`Log::close`] also writes a checkpoint, so that the next open
/// has nothing to replay.
#[derive(Clone)]
pub struct Log {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    uuids: Mutex<Option<rand_chacha::ChaCha8Rng>>,
}

/// How a log is doing.
#[derive(Clone, Debug)]
pub struct Status {
    /// The number of times the directory was opened.
    pub incarnation: u32,
    /// Entries sequenced since the directory was created.
    pub sequenced: u64,
    /// Entries released, i.e. acknowledged and visible.
    pub released: u64,
    /// Syncs of the journal and the slots since open.
    pub syncs: u64,
    /// A durable seal follows the last entry: rot there is told from a tail. It comes once the log is idle.
    pub sealed: bool,
    /// Why the directory is read-only.
    pub damage: Option<Corruption>,
    /// Why the log stopped.
    pub stopped: Option<Arc<str>>,
}

/// Tells that something was released: see [`Log::released`].
pub struct Released {
    shared: Arc<Shared>,
    seen: u64,
}

impl Released {
    /// Completes once something was released after the last call (or after the subscription). Cancel safe.
    pub async fn changed(&mut self) {
        let seen = self.seen;
        self.seen = poll_fn(|cx| self.shared.notify.poll(seen, cx)).await;
    }

    /// The same for threads; false if nothing was released in time.
    pub fn wait(&mut self, at_most: Duration) -> bool {
        let before = self.seen;
        self.seen = self.shared.notify.wait(before, at_most);
        self.seen > before
    }
}

impl Log {
    /// Opens or creates a data directory, recovering it first. The caller holds the directory's lock.
    ///
    /// A damaged directory opens read-only: [`Log::status`] says where, reads work as far as bytes are intact, and
    /// every other request is answered with [`WriteError::Damaged`].
    pub fn open(fs: Arc<dyn Fs>, config: Config) -> Result<Self, OpenError> {
        let seed = config.seed;
        config.probe.at(Moment::Open);
        let mut machine = open(fs, config)?;
        // What the open itself wrote is durable before anything is served.
        let drained = machine.drain();
        let stopped = machine.shared.core.lock().stopped.clone();
        if let Some(why) = stopped {
            return Err(OpenError::Io {
                doing: why.to_string(),
                source: io::Error::other("the log stopped"),
            });
        }
        if !drained {
            let doing = "opening: there is no journal file to write to and no space for one".into();
            return Err(OpenError::Io { doing, source: io::ErrorKind::StorageFull.into() });
        }
        let uuids = seed.map(|seed| {
            let incarnation = machine.shared.incarnation;
            rand_chacha::ChaCha8Rng::seed_from_u64(seed ^ u64::from(incarnation) << 32)
        });
        let shared = machine.shared.clone();
        let threads = if shared.damage.is_none() { spawn(machine)? } else { Vec::new() };
        shared.config.probe.at(Moment::Serving);
        Ok(Self { inner: Arc::new(Inner { shared, threads: Mutex::new(threads), uuids: Mutex::new(uuids) }) })
    }

    fn shared(&self) -> &Shared {
        &self.inner.shared
    }

    /// Creates a topic. Refused where the name exists. Blocks while its directories are made.
    pub fn create_topic(&self, topic: NewTopic) -> Ticket<TopicInfo> {
        if let Err(why) = check_topic(&topic) {
            return Ticket::ready(Err(why.into()));
        }
        let uuid = match &mut *self.inner.uuids.lock() {
            Some(rng) => Uuid::from_u128(rng.random()),
            None => Uuid::new_v4(),
        };
        create_topic(self.shared(), topic, uuid)
    }

    /// Deletes a topic with everything in it. Its files go after the next checkpoints.
    pub fn delete_topic(&self, topic: Uuid, if_used: IfUsed) -> Ticket<()> {
        self.shared().submit(DeleteTopic { uuid: topic, if_used })
    }

    /// Changes a topic. Blocks while the directories of new partitions are made.
    pub fn alter_topic(&self, topic: Uuid, alter: TopicChange) -> Ticket<TopicInfo> {
        alter_topic(self.shared(), topic, alter)
    }

    /// The topics, by name.
    pub fn topics(&self) -> Vec<TopicInfo> {
        let state = self.shared().released.read();
        let mut topics: Vec<_> = state.topics.iter().map(|(uuid, t)| t.info(*uuid)).collect();
        topics.sort_by(|a, b| a.name.cmp(&b.name));
        topics
    }

    /// One topic.
    pub fn topic(&self, name: &str) -> Option<TopicInfo> {
        let state = self.shared().released.read();
        state.topic_named(name).map(|(uuid, t)| t.info(uuid))
    }

    /// A producer id, or the next epoch of one; aborts the transactional id's open transaction and fences its producer.
    pub fn init_producer(&self, init: InitProducer) -> Ticket<Producer> {
        self.shared().submit(init)
    }

    /// Appends one batch. A transactional batch opens its producer's transaction, or adds the partition to it.
    ///
    /// The batch is checked on this thread; only its base offset and leader epoch are changed, and its bytes are
    /// shared, not copied, until they are in the files.
    pub fn append(&self, to: TopicPartition, batch: Bytes, connection: Connection) -> Ticket<Appended> {
        match checked(&batch) {
            Ok(()) => self.shared().submit(AppendBatch { to, batch, connection }),
            Err(why) => Ticket::ready(Err(why.into())),
        }
    }

    /// Adds group offsets to the producer's transaction, opening it if need be.
    pub fn add_offsets(&self, add: AddOffsets) -> Ticket<()> {
        self.shared().submit(add)
    }

    /// Commits group offsets at once.
    pub fn commit_offsets(&self, commit: CommitOffsets) -> Ticket<()> {
        self.shared().submit(commit)
    }

    /// Ends a transaction in one entry.
    pub fn end_transaction(&self, end: EndTxn) -> Ticket<Ended> {
        self.shared().submit(end)
    }

    /// Reads whole batches from `from`, about `bytes_max` (at least one batch where there is one). Blocks on files.
    pub fn read(
        &self,
        partition: TopicPartition,
        from: Position,
        bytes_max: usize,
        isolation: Isolation,
    ) -> Result<ReadBatches, ReadError> {
        read(self.shared(), partition, from, bytes_max, isolation)
    }

    /// The position of the first record that is not older than `timestamp` (milliseconds since the epoch), among those
    /// released; `None` if all are older. It may belong to a transaction that is open or was aborted. Blocks on files.
    pub fn position_at(
        &self,
        partition: TopicPartition,
        timestamp: i64,
    ) -> Result<Option<Position>, ReadError> {
        position_at(self.shared(), partition, timestamp)
    }

    /// A partition's offsets.
    pub fn offsets(&self, partition: TopicPartition) -> Result<PartitionOffsets, ReadError> {
        let state = self.shared().released.read();
        state.partition(partition).map(Partition::offsets).ok_or(ReadError::UnknownPartition(partition))
    }

    /// What a group has committed; `None` means every partition it has.
    pub fn group_offsets(&self, group: &str, partitions: Option<&[TopicPartition]>) -> GroupOffsets {
        let state = self.shared().released.read();
        let wanted = |tp: &TopicPartition| partitions.is_none_or(|some| some.contains(tp));
        let committed = state.groups.get(group).into_iter().flatten().filter(|(tp, _)| wanted(tp));
        let pending = state.owners.values().filter_map(|o| o.txn.as_ref()?.offsets.get(group));
        GroupOffsets {
            committed: committed
                .map(|(tp, o)| OffsetCommit {
                    partition: *tp,
                    position: o.position,
                    metadata: o.metadata.clone(),
                })
                .collect(),
            pending: pending.flat_map(|offsets| offsets.keys()).filter(|tp| wanted(tp)).copied().collect(),
        }
    }

    /// Subscribes to releases: new records to read, ended transactions, committed offsets, new topics.
    pub fn released(&self) -> Released {
        Released { shared: self.inner.shared.clone(), seen: self.shared().notify.version() }
    }

    /// How the log is doing.
    pub fn status(&self) -> Status {
        let shared = self.shared();
        let core = shared.core.lock();
        Status {
            incarnation: shared.incarnation,
            sequenced: core.seq.n,
            released: core.released_n,
            syncs: shared.syncs.load(Ordering::Relaxed),
            sealed: core.journal.sealed && core.journal.seal_synced && core.queue.is_empty(),
            damage: shared.damage.clone(),
            stopped: core.stopped.clone(),
        }
    }

    /// Writes a checkpoint soon.
    pub fn checkpoint(&self) {
        self.shared().core.lock().want_checkpoint = true;
        self.shared().checkpoint_wake.notify_all();
    }

    /// Finishes what is queued, writes a checkpoint, and stops the threads. Later requests are answered with
    /// [`WriteError::Stopped`]. Blocks; an error means that not everything queued became durable in time.
    pub fn close(&self, at_most: Duration) -> Result<(), WriteError> {
        let shared = self.shared();
        let until = Instant::now() + at_most;
        shared.config.probe.at(Moment::Close);
        shared.core.lock().closing = true;
        shared.wake_all();
        let mut seen = shared.notify.version();
        let result = loop {
            {
                let core = shared.core.lock();
                if let Some(why) = &core.stopped {
                    break Err(WriteError::Stopped(why.clone()));
                }
                if shared.damage.is_some() || core.released_n == core.seq.n && core.is_quiet() {
                    break Ok(());
                }
            }
            let now = Instant::now();
            if now >= until {
                break Err(WriteError::Deadline);
            }
            seen = shared.notify.wait(seen, (until - now).min(TICK));
        };
        if result.is_ok() && shared.damage.is_none() {
            self.checkpoint();
            let done = || {
                let core = shared.core.lock();
                let checkpointed = core.journal.slots.iter().any(|(_, _, n)| *n >= core.released_n);
                core.stopped.is_some() || checkpointed && !core.want_checkpoint
            };
            while !done() && Instant::now() < until {
                seen = shared.notify.wait(seen, TICK);
            }
        }
        shared.config.probe.at(Moment::Closed);
        self.inner.stop_threads();
        result
    }
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Log").field("directory", &self.shared().directory).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Released {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Released").field("seen", &self.seen).finish_non_exhaustive()
    }
}

impl Inner {
    fn stop_threads(&self) {
        self.shared.core.lock().stop("it was closed".into());
        self.shared.wake_all();
        for thread in self.threads.lock().drain(..) {
            // A panic in it was reported where it happened; its requests were failed by `stop`.
            let _ = thread.join();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop_threads();
    }
}

/// Makes a topic's directories, then asks for its entry.
pub(crate) fn create_topic(shared: &Shared, topic: NewTopic, uuid: Uuid) -> Ticket<TopicInfo> {
    // The sequenced State, against which the request is planned: after a delete that is not released yet, the released
    // one still has the name, and the topic would be made without its directories.
    let made = shared.damage.is_none() && shared.core.lock().seq.topic_named(&topic.name).is_none();
    if made {
        let done = make_directory(&*shared.fs, &names::topic_dir(uuid))
            .and_then(|()| make_partitions(&*shared.fs, uuid, 0..topic.partitions))
            .and_then(|()| sync_directory(&*shared.fs, "sync:topics-dir", names::TOPICS))
            .and_then(|()| sync_directory(&*shared.fs, "sync:topic-dir", &names::topic_dir(uuid)));
        if let Err(refused) = settle(shared, uuid, done) {
            return Ticket::ready(Err(refused));
        }
    }
    shared.submit(CreateTopic { topic, uuid, made })
}

/// Makes the directories of new partitions, then asks for the entry.
pub(crate) fn alter_topic(shared: &Shared, uuid: Uuid, alter: TopicChange) -> Ticket<TopicInfo> {
    // The sequenced State, against which the request is planned: a topic may be in use before it is released.
    let find = || shared.core.lock().seq.topics.get(&uuid).map(|topic| topic.info(uuid));
    let mut directories = 0;
    if let Some(topic) = find().filter(|_| shared.damage.is_none()) {
        // Nothing is made for a change that cannot be; whether it can be is decided again where it is sequenced.
        if let Err(why) = check_alter(&alter, &topic) {
            return Ticket::ready(Err(why.into()));
        }
        directories = alter.partitions.unwrap_or(topic.partitions);
        if directories > topic.partitions {
            let made = make_partitions(&*shared.fs, uuid, topic.partitions..directories)
                .and_then(|()| sync_directory(&*shared.fs, "sync:alter-dir", &names::topic_dir(uuid)));
            let made = match made {
                // Deleted meanwhile, and its directory with it: the plan refuses.
                Err(Unmade::Failed(e)) if e.kind() == io::ErrorKind::NotFound && find().is_none() => Ok(()),
                made => made,
            };
            if let Err(refused) = settle(shared, uuid, made) {
                return Ticket::ready(Err(refused));
            }
        }
    }
    shared.submit(AlterTopic { uuid, alter, directories })
}

/// What a request answers whose directories could not be made; after anything but a full disk the log stops.
fn settle(shared: &Shared, topic: Uuid, made: Result<(), Unmade>) -> Result<(), WriteError> {
    match made {
        Ok(()) => {}
        Err(Unmade::Full) => return Err(WriteError::DiskFull { file: names::topic_dir(topic), needed: 0 }),
        Err(Unmade::Failed(e)) => shared.poison("making a topic's directories", &e),
    }
    Ok(())
}

/// Why a topic has no directories.
enum Unmade {
    /// There is no space for them; what was made is removed at the next open.
    Full,
    Failed(io::Error),
}

fn make_directory(fs: &dyn Fs, path: &str) -> Result<(), Unmade> {
    fs.create_dir(path).map_err(|e| match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Unmade::Full,
        _ => Unmade::Failed(e),
    })
}

/// A directory that is there already was made for a change that was refused, or that is on its way.
fn make_partitions(fs: &dyn Fs, topic: Uuid, partitions: std::ops::Range<u32>) -> Result<(), Unmade> {
    for partition in partitions {
        match make_directory(fs, &names::partition_dir(TopicPartition { topic, partition })) {
            Err(Unmade::Failed(e)) if e.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
    }
    Ok(())
}

/// A sync that failed is never repeated, not even for want of space: the log stops.
fn sync_directory(fs: &dyn Fs, site: &'static str, path: &str) -> Result<(), Unmade> {
    fault::synced(site, || fs.sync_dir(path)).map_err(Unmade::Failed)
}

pub(crate) fn read(
    shared: &Shared,
    tp: TopicPartition,
    from: Position,
    bytes_max: usize,
    isolation: Isolation,
) -> Result<ReadBatches, ReadError> {
    let (segment, offsets, until, mut aborted, closed) = {
        let state = shared.released.read();
        let p = state.partition(tp).ok_or(ReadError::UnknownPartition(tp))?;
        let offsets = p.offsets();
        if !(p.log_start..=p.log_end).contains(&from.offset) {
            return Err(ReadError::OutOfRange {
                partition: tp,
                offset: from.offset,
                log_start: offsets.log_start,
                high_watermark: offsets.high_watermark,
            });
        }
        if !p.holds(from) {
            return Err(ReadError::PositionLost { partition: tp, position: from });
        }
        let until = match isolation {
            Isolation::ReadUncommitted => offsets.high_watermark,
            Isolation::ReadCommitted if fault::active("lso-by-sequence") => {
                let core = shared.core.lock();
                let stable = core.seq.partition(tp).map_or(offsets.high_watermark, Partition::last_stable);
                stable.min(offsets.high_watermark)
            }
            Isolation::ReadCommitted => offsets.last_stable,
        };
        let at = p.segments.partition_point(|s| s.end <= from.offset);
        let segment = p.segments.get(at).filter(|_| from.offset < until).copied();
        let closed: Vec<Segment> = match isolation {
            Isolation::ReadCommitted => {
                p.segments.iter().skip(at).filter(|s| s.aborted > 0).copied().collect()
            }
            Isolation::ReadUncommitted => Vec::new(),
        };
        let aborted = if isolation == Isolation::ReadCommitted { p.aborted.clone() } else { Vec::new() };
        (segment, offsets, until, aborted, closed)
    };
    let nothing = ReadBatches { batches: Bytes::new(), aborted: Vec::new(), next: from, offsets };
    let Some(segment) = segment else { return Ok(nothing) };
    let failed = |e: FileError| unreadable(shared, tp, e);
    let id_of = |s: &Segment| SegmentId { tp, base: s.base, revision: s.revision };
    let wanted = Wanted { from: from.offset, until, bytes_max };
    let (batches, next, leader_epoch) =
        shared.segments.read(id_of(&segment), &segment, wanted).map_err(failed)?;
    if batches.is_empty() {
        return Ok(nothing);
    }
    for s in closed {
        let ranges = shared.segments.aborted(id_of(&s), s.aborted).map_err(failed)?;
        aborted.extend(ranges.iter().copied());
    }
    let first = i64::from_be_bytes(batches[..8].try_into().expect("whole batches"));
    aborted.retain(|r| r.first < next && r.last >= first);
    aborted.sort_unstable_by_key(|r| r.first);
    Ok(ReadBatches { batches, aborted, next: Position { leader_epoch, offset: next }, offsets })
}

pub(crate) fn position_at(
    shared: &Shared,
    tp: TopicPartition,
    timestamp: i64,
) -> Result<Option<Position>, ReadError> {
    let (segments, log_start) = {
        let state = shared.released.read();
        let p = state.partition(tp).ok_or(ReadError::UnknownPartition(tp))?;
        (p.segments.clone(), p.log_start)
    };
    for s in segments.iter().filter(|s| s.end > log_start) {
        let id = SegmentId { tp, base: s.base, revision: s.revision };
        let found = shared.segments.find_time(id, s, timestamp);
        let found = found.map_err(|e| unreadable(shared, tp, e))?;
        if let Some(offset) = found.filter(|offset| *offset >= log_start) {
            let state = shared.released.read();
            let p = state.partition(tp).ok_or(ReadError::UnknownPartition(tp))?;
            return Ok(Some(Position { leader_epoch: p.epoch_before(offset), offset }));
        }
    }
    Ok(None)
}

fn unreadable(shared: &Shared, tp: TopicPartition, error: FileError) -> ReadError {
    match error {
        // The topic was deleted meanwhile, and its files with it.
        _ if shared.released.read().partition(tp).is_none() => ReadError::UnknownPartition(tp),
        FileError::Corrupt(corruption) => ReadError::Corrupt { partition: tp, corruption },
        FileError::Io { file, source } => ReadError::Io { file, source },
    }
}

/// The threads of a log: each steps its machine and sleeps while there is nothing to do.
fn spawn(machine: Machine) -> Result<Vec<JoinHandle<()>>, OpenError> {
    let Machine { shared, mut writer, mut checkpointer } = machine;
    let (for_writer, for_segments, for_checkpoint) = (shared.clone(), shared.clone(), shared);
    let named = |name: &str| std::thread::Builder::new().name(format!("tidemill-{name}"));
    let failed = |source| OpenError::Io { doing: "starting a thread".into(), source };
    let mut threads = Vec::new();
    threads.push(
        named("journal")
            .spawn(move || {
                let shared = for_writer;
                let _guard = StopOnPanic(&shared);
                let mut seal = Seal::No;
                while running(&shared) {
                    if writer.step(&shared, seal) == Step::Worked {
                        seal = Seal::No;
                        continue;
                    }
                    let mut core = shared.core.lock();
                    if core.stopped.is_none() && core.queue.is_empty() {
                        let idle = shared.writer_wake.wait_for(&mut core, IDLE).timed_out();
                        seal = if idle { Seal::IfIdle } else { Seal::No };
                    } else if core.stopped.is_none() {
                        // No free file: the checkpoint that makes one wakes this thread.
                        shared.writer_wake.wait_for(&mut core, IDLE);
                    }
                }
            })
            .map_err(failed)?,
    );
    threads.push(
        named("segments")
            .spawn(move || {
                let shared = for_segments;
                let _guard = StopOnPanic(&shared);
                while running(&shared) {
                    if segment_writer::step(&shared, usize::MAX) == Step::Idle {
                        let mut core = shared.core.lock();
                        if core.stopped.is_none() && core.segment_queue.is_empty() {
                            shared.segments_wake.wait_for(&mut core, Duration::from_secs(1));
                        }
                    }
                }
            })
            .map_err(failed)?,
    );
    threads.push(
        named("checkpoint")
            .spawn(move || {
                let shared = for_checkpoint;
                let _guard = StopOnPanic(&shared);
                while running(&shared) {
                    if checkpointer.step(&shared) == Step::Idle {
                        shared.expire_transactions();
                        shared.expire_producers();
                        let mut core = shared.core.lock();
                        if core.stopped.is_none() && !core.want_checkpoint {
                            shared.checkpoint_wake.wait_for(&mut core, TICK);
                        }
                    }
                }
            })
            .map_err(failed)?,
    );
    Ok(threads)
}

fn running(shared: &Shared) -> bool {
    shared.core.lock().stopped.is_none()
}

/// A thread that panics takes the log with it: whoever waits is told.
struct StopOnPanic<'a>(&'a Shared);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.core.lock().stop("a thread of the log panicked".into());
            self.0.wake_all();
        }
    }
}
