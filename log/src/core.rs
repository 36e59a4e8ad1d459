//! The sequencer: one lock-step point that gives an entry its number, its offsets and its place in the queue.
//!
//! ```text
//!  request ─▶ backlog ─plan, admit, reserve─▶ queue ─round─▶ segment queue ─▶ released
//!             (no room)     seq State            writer        segments       released State, tickets
//! ```
//!
//! Everything here happens under one lock and is quick; files are written by the writer, the segment writer and the
//! checkpointer, which meet here.
//!
//! Invariants:
//!
//! * `released_n <= min(synced_n, segments_n) <= seq.n`; the released State is the fold of the first `released_n`.
//! * Everything queued fits the current journal file and the free ones (admission), so what is queued is written
//!   without waiting for a checkpoint. (A checkpoint copies the *released* State and so never waits for the queue.)
//! * Journal files are free only below both slots' C.
//! * After the log stopped nothing is sequenced, released or acknowledged.

use crate::config::Config;
use crate::entry::{Change, Entry};
use crate::error::{Refusal, WriteError};
use crate::fault;
use crate::fs::Fs;
use crate::journal::{End, Geometry, round_bytes};
use crate::notify::Notify;
use crate::plan::{AbortUnasked, Context, Expire, Plan, Request};
use crate::segment::Segments;
use crate::state::{Effects, SegmentId, State};
use crate::ticket::{Pending, Slot, Ticket};
use crate::types::TopicPartition;
use bytes::Bytes;
use parking_lot::{Condvar, Mutex, RwLock};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use uuid::Uuid;

/// Most bytes in the queue; what comes then waits in the backlog.
const QUEUE_BYTES_MAX: u64 = 64 << 20;
/// Bytes reserved per open transaction for its marker.
pub(crate) const MARKER_ROOM: u64 = 128;

/// How often idle producers are looked for.
const EXPIRE_EVERY: Duration = Duration::from_secs(600);

/// What the threads of a log share.
pub(crate) struct Shared {
    pub fs: Arc<dyn Fs>,
    pub config: Config,
    pub directory: Uuid,
    pub incarnation: u32,
    pub core: Mutex<Core>,
    pub released: RwLock<State>,
    pub segments: Segments,
    pub writer_wake: Condvar,
    pub segments_wake: Condvar,
    pub checkpoint_wake: Condvar,
    pub notify: Notify,
    pub syncs: AtomicU64,
    pub damage: Option<crate::error::Corruption>,
}

pub(crate) struct Core {
    pub seq: State,
    pub context: Context,
    pub queue: VecDeque<Arc<Sequenced>>,
    queue_bytes: u64,
    pub segment_queue: VecDeque<Arc<Sequenced>>,
    unreleased: VecDeque<Arc<Sequenced>>,
    waiting: BTreeMap<u64, Vec<Arc<dyn Pending>>>,
    backlog: VecDeque<Box<dyn Backlogged>>,
    pub journal: JournalState,
    pub synced_n: u64,
    pub segments_n: u64,
    pub released_n: u64,
    pub gone: VecDeque<Gone>,
    pub want_checkpoint: bool,
    pub closing: bool,
    pub stopped: Option<Arc<str>>,
    /// Monotonic time at which open transactions are aborted.
    timeouts: BTreeMap<String, Duration>,
    /// How far space is reserved in the last segments.
    reserved: HashMap<TopicPartition, (SegmentId, u64)>,
    /// Aging clock and monotonic time at open.
    opened: (i64, Duration),
    /// When to look for idle producers again.
    expire_next: Duration,
}

/// An entry with its number.
#[derive(Debug)]
pub(crate) struct Sequenced {
    pub n: u64,
    pub entry: Entry,
    pub head: Bytes,
    pub bytes: u64,
    pub effects: Effects,
}

/// Files that entry `n` made nameless.
#[derive(Debug)]
pub(crate) struct Gone {
    pub n: u64,
    pub segments: Vec<SegmentId>,
    pub topic: Option<(Uuid, u32)>,
}

/// Where the writer is, and which files it may take next.
pub(crate) struct JournalState {
    pub geometry: Geometry,
    /// The current file and the position in it.
    pub file: u64,
    pub at: u64,
    pub end: End,
    /// The number of the next file: above every file present.
    pub next_file: u64,
    pub files: BTreeSet<u64>,
    pub free: BTreeSet<u64>,
    /// Ends of the rounds written, each with the last entry up to it.
    pub rounds: VecDeque<(End, u64)>,
    /// The journal is synced through this LSN.
    pub synced: u64,
    /// A seal is the last round, written or about to be.
    pub sealed: bool,
    /// The last round that was synced is a seal.
    pub seal_synced: bool,
    /// What the queue leaves: free files, and bytes in the last file it reaches.
    room_files: usize,
    room_bytes: u64,
    /// No further file could be made.
    pub grown_out: bool,
    /// C and its entry number, of both slots.
    pub slots: [(u64, End, u64); 2],
}

impl JournalState {
    pub(crate) fn new(
        geometry: Geometry,
        end: End,
        n: u64,
        files: BTreeSet<u64>,
        slots: [(u64, End, u64); 2],
    ) -> Self {
        let next_file = files.last().map_or(1, |f| f + 1);
        // Files other than the one that holds the kept end hold no kept round: both slots are at the end.
        let kept = geometry.file_before(end.lsn);
        let free = files.iter().copied().filter(|f| *f != kept).collect();
        Self {
            geometry,
            file: kept,
            at: geometry.file_bytes,
            end,
            next_file,
            files,
            free,
            rounds: VecDeque::from([(end, n)]),
            synced: end.lsn,
            sealed: true,
            seal_synced: true,
            room_files: 0,
            room_bytes: 0,
            grown_out: false,
            slots,
        }
    }

    /// Does an entry of this weight fit behind everything queued?
    fn fits(&self, weight: u64) -> bool {
        weight <= self.room_bytes || self.room_files > 0
    }

    fn take_room(&mut self, weight: u64) {
        if weight > self.room_bytes {
            self.room_files = self.room_files.saturating_sub(1);
            self.room_bytes = self.geometry.file_bytes;
        }
        self.room_bytes -= weight.min(self.room_bytes);
    }

    /// LSN below which no slot needs the journal.
    fn past(&self) -> u64 {
        let [a, b] = self.slots.map(|(_, c, _)| c.lsn);
        if fault::active("recycle-newer-only") { a.max(b) } else { a.min(b) }
    }

    /// Entries through which both slots go, so that files they dropped may be unlinked.
    pub(crate) fn past_n(&self) -> u64 {
        let [a, b] = self.slots.map(|(_, _, n)| n);
        if fault::active("unlink-one-slot") { a.max(b) } else { a.min(b) }
    }

    /// Finds the files that both slots are past.
    pub(crate) fn find_free(&mut self) {
        let (past, kept) = (self.past(), self.geometry.file_before(self.end.lsn));
        for f in &self.files {
            if *f != self.file && *f != kept && self.geometry.lsn(f + 1, 0) <= past {
                self.free.insert(*f);
            }
        }
        let newest = self.slots.iter().map(|(_, c, _)| c.lsn).min().unwrap_or(0);
        while self.rounds.len() > 1 && self.rounds[1].0.lsn <= newest {
            self.rounds.pop_front();
        }
    }

    /// The end of the last round wholly up to entry `n`, and the entry it goes to.
    pub(crate) fn c_of(&self, n: u64) -> (End, u64) {
        let upto = self.rounds.iter().rev().find(|(_, last)| *last <= n);
        *upto.expect("the rounds since the older slot are known")
    }
}

/// A request that waits for room.
trait Backlogged: Send {
    /// True once it was sequenced or answered.
    fn attempt(&self, shared: &Shared, core: &mut Core) -> bool;
    fn fail(&self, error: WriteError);
}

struct Asked<R: Request> {
    request: R,
    slot: Arc<Slot<R::Answer>>,
}

impl<R: Request> Backlogged for Asked<R> {
    fn attempt(&self, shared: &Shared, core: &mut Core) -> bool {
        let (n, answer) = match self.request.plan(&core.seq, &mut core.context) {
            Plan::Rests { n, answer } => (n, Ok(answer)),
            Plan::Refused { n, error } => (n, Err(error)),
            Plan::Entry { entry, answer } => match core.admit(shared, entry) {
                Ok(n) => (n, Ok(answer)),
                Err(NotNow::NoRoom) => return false,
                Err(NotNow::Refused(error)) => (0, Err(error)),
            },
        };
        self.slot.decide(answer);
        core.wait_for(n, self.slot.clone());
        true
    }

    fn fail(&self, error: WriteError) {
        self.slot.fail(error);
    }
}

enum NotNow {
    NoRoom,
    Refused(WriteError),
}

impl Core {
    pub(crate) fn new(state: State, context: Context, journal: JournalState, now: Duration) -> Self {
        let n = state.n;
        let mut core = Self {
            opened: (context.clock, now),
            expire_next: now,
            seq: state,
            context,
            queue: VecDeque::new(),
            queue_bytes: 0,
            segment_queue: VecDeque::new(),
            unreleased: VecDeque::new(),
            waiting: BTreeMap::new(),
            backlog: VecDeque::new(),
            journal,
            synced_n: n,
            segments_n: n,
            released_n: n,
            gone: VecDeque::new(),
            want_checkpoint: false,
            closing: false,
            stopped: None,
            timeouts: BTreeMap::new(),
            reserved: HashMap::new(),
        };
        // Transactions that stay open get their whole timeout again.
        let again = !fault::active("no-timeout-after-open");
        for (id, owner) in core.seq.owners.iter().filter(|(_, o)| o.txn.is_some() && again) {
            core.timeouts.insert(id.clone(), now + Duration::from_millis(owner.timeout_ms.into()));
        }
        core.count_room();
        core
    }

    /// Recounts what the queue leaves of the journal, after the queue, the file or the free files changed.
    pub(crate) fn count_room(&mut self) {
        self.journal.room_files = self.journal.free.len();
        self.journal.room_bytes = self.journal.geometry.file_bytes.saturating_sub(self.journal.at);
        for e in &self.queue {
            self.journal.take_room(round_bytes(e.bytes));
        }
    }

    /// Should the journal get one more file?
    pub(crate) fn wants_file(&self, files_max: usize) -> bool {
        let j = &self.journal;
        j.room_files == 0 && j.files.len() < files_max && !j.grown_out
    }

    /// Is half of the journal's budget used?
    pub(crate) fn half_used(&self, files_max: usize) -> bool {
        let j = &self.journal;
        let budget = if j.grown_out { j.files.len() } else { files_max };
        (j.files.len() - j.free.len()) * 2 >= budget
    }

    /// Gives the entry its number, if there is room for it.
    fn admit(&mut self, shared: &Shared, entry: Entry) -> Result<u64, NotNow> {
        let head = entry.encode_head();
        let bytes = head.len() as u64 + entry.batches.iter().map(|(_, b)| b.len()).sum::<u64>();
        let weight = round_bytes(bytes);
        let bytes_max = self.journal.geometry.file_bytes;
        if weight > bytes_max {
            return Err(NotNow::Refused(Refusal::TooLarge { bytes, bytes_max }.into()));
        }
        if !self.journal.fits(weight) || self.queue_bytes > QUEUE_BYTES_MAX {
            return Err(NotNow::NoRoom);
        }
        if entry.change == Change::Append {
            self.reserve(shared, &entry).map_err(NotNow::Refused)?;
        }
        Ok(self.sequence(shared, entry, head, bytes))
    }

    /// Makes sure that the batch, and the markers of open transactions after it, have space in their segment.
    fn reserve(&mut self, shared: &Shared, entry: &Entry) -> Result<(), WriteError> {
        let (tp, batch) = &entry.batches[0];
        let place = self.seq.place(*tp, batch.len()).expect("planned");
        let open = self.seq.partition(*tp).expect("planned").open.len() as u64 + 1;
        let need = place.at + batch.len() + open * MARKER_ROOM;
        let have = match self.reserved.get(tp) {
            Some((id, have)) if *id == place.segment => *have,
            _ => place.at,
        };
        if need <= have {
            return Ok(());
        }
        // The append that begins a segment closes the one before: its aborted ranges are written then.
        let partition = self.seq.partition(*tp).expect("planned");
        let closes = partition.segments.last().filter(|_| place.rolls);
        let closes = closes.map(|s| SegmentId { tp: *tp, base: s.base, revision: s.revision });
        let ranges = match closes {
            Some(id) => shared.segments.reserve_aborted(id, partition.aborted.len()),
            None => Ok(()),
        };
        match ranges.and_then(|()| shared.segments.reserve(place.segment, have, need)) {
            Ok(end) => {
                self.reserved.insert(*tp, (place.segment, end));
                Ok(())
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                let file = crate::names::segment_file(place.segment, crate::names::Kind::Log);
                Err(WriteError::DiskFull { file, needed: need - have })
            }
            Err(e) => {
                let why: Arc<str> = format!("reserving space: {e}").into();
                self.stop(why.clone());
                Err(WriteError::Stopped(why))
            }
        }
    }

    fn sequence(&mut self, shared: &Shared, entry: Entry, head: Bytes, bytes: u64) -> u64 {
        let effects = self.seq.apply(&entry).unwrap_or_else(|e| panic!("planned {entry:?}, but State {e}"));
        let n = self.seq.n;
        self.watch_timeout(shared, &entry);
        if !effects.dropped.is_empty() || effects.dropped_topic.is_some() {
            self.gone.push_back(Gone { n, segments: effects.dropped.clone(), topic: effects.dropped_topic });
            self.reserved.retain(|tp, _| effects.dropped_topic.is_none_or(|(uuid, _)| uuid != tp.topic));
        }
        let sequenced = Arc::new(Sequenced { n, entry, head, bytes, effects });
        self.journal.take_room(round_bytes(bytes));
        self.queue_bytes += bytes;
        self.queue.push_back(sequenced.clone());
        self.unreleased.push_back(sequenced);
        n
    }

    fn watch_timeout(&mut self, shared: &Shared, entry: &Entry) {
        let id = match &entry.change {
            Change::End { transactional_id: id, .. } | Change::Init { transactional_id: Some(id), .. } => {
                self.timeouts.remove(id);
                return;
            }
            Change::AddOffsets { transactional_id, .. } => transactional_id.clone(),
            Change::Append => {
                let facts = entry.batches[0].1.facts();
                let producer = self.seq.producers.get(&facts.producer.id).filter(|_| facts.transactional);
                match producer.and_then(|p| p.transactional_id.clone()) {
                    Some(id) => id,
                    None => return,
                }
            }
            _ => return,
        };
        if let Some(owner) = self.seq.owners.get(&id) {
            let after = Duration::from_millis(owner.timeout_ms.into());
            self.timeouts.entry(id).or_insert_with(|| shared.config.clock.monotonic() + after);
        }
    }

    fn wait_for(&mut self, n: u64, pending: Arc<dyn Pending>) {
        if n <= self.released_n {
            pending.release();
        } else {
            self.waiting.entry(n).or_default().push(pending);
        }
    }

    /// Takes entries off the queue for one round of at most `room` bytes of entries; the writer has told them apart.
    pub(crate) fn take_queue(&mut self, room: u64) -> Vec<Arc<Sequenced>> {
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while let Some(e) = self.queue.front() {
            if !taken.is_empty() && bytes + e.bytes > crate::writer::ROUND_BYTES
                || round_bytes(bytes + e.bytes) > room
            {
                break;
            }
            bytes += e.bytes;
            taken.push(self.queue.pop_front().expect("it has a front"));
        }
        self.queue_bytes -= bytes;
        taken
    }

    /// Sequences what waited for room.
    pub(crate) fn drain_backlog(&mut self, shared: &Shared) {
        while let Some(front) = self.backlog.pop_front() {
            if !front.attempt(shared, self) {
                self.backlog.push_front(front);
                return;
            }
        }
    }

    /// Moves the released State to what is synced and in the segments. Returns the tickets to answer, after the
    /// lock is let go.
    #[must_use]
    pub(crate) fn release(&mut self, shared: &Shared) -> Vec<Arc<dyn Pending>> {
        let upto = self.synced_n.min(self.segments_n);
        if upto <= self.released_n || self.stopped.is_some() {
            return Vec::new();
        }
        let mut released = shared.released.write();
        while self.released_n < upto {
            let e = self.unreleased.pop_front().expect("every sequenced entry is here until its release");
            released.apply(&e.entry).expect("it was applied when it was sequenced");
            self.released_n = e.n;
        }
        drop(released);
        self.context.pins.prune(&self.seq);
        let later = self.waiting.split_off(&(upto + 1));
        std::mem::replace(&mut self.waiting, later).into_values().flatten().collect()
    }

    /// Nothing is acknowledged from now on.
    pub(crate) fn stop(&mut self, why: Arc<str>) {
        if self.stopped.is_none() {
            self.stopped = Some(why.clone());
        }
        let error = WriteError::Stopped(why);
        for pending in std::mem::take(&mut self.waiting).into_values().flatten() {
            pending.fail(error.clone());
        }
        for asked in self.backlog.drain(..) {
            asked.fail(error.clone());
        }
    }

    /// Entries sequenced and not released yet, in order.
    #[cfg(test)]
    pub(crate) fn unreleased(&self) -> impl Iterator<Item = &Arc<Sequenced>> {
        self.unreleased.iter()
    }

    #[cfg(test)]
    pub(crate) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Is there nothing that waits to be sequenced or written?
    pub(crate) fn is_quiet(&self) -> bool {
        self.queue.is_empty() && self.backlog.is_empty() && self.segment_queue.is_empty()
    }

    /// Lets the aging clock follow the monotonic one.
    fn tick(&mut self, shared: &Shared) -> Duration {
        let now = shared.config.clock.monotonic();
        let open_for = now.saturating_sub(self.opened.1);
        self.context.clock = self.opened.0 + i64::try_from(open_for.as_millis()).unwrap_or(i64::MAX / 2);
        self.context.wall_ms = shared.config.clock.wall_ms();
        now
    }
}

impl Shared {
    /// Asks for something; the answer comes when the entry it rests on is released.
    pub(crate) fn submit<R: Request + 'static>(&self, request: R) -> Ticket<R::Answer> {
        let (ticket, slot) = Ticket::new();
        if let Some(corruption) = &self.damage {
            slot.fail(WriteError::Damaged(corruption.clone()));
            return ticket;
        }
        let mut core = self.core.lock();
        if let Some(why) = &core.stopped {
            slot.fail(WriteError::Stopped(why.clone()));
            return ticket;
        }
        if core.closing {
            slot.fail(WriteError::Stopped("it is closing".into()));
            return ticket;
        }
        core.tick(self);
        let asked = Asked { request, slot };
        if core.backlog.is_empty() && asked.attempt(self, &mut core) {
            self.writer_wake.notify_one();
        } else if core.backlog.len() < self.config.backlog_max {
            core.backlog.push_back(Box::new(asked));
            self.checkpoint_wake.notify_one();
        } else {
            asked.fail(WriteError::Busy);
        }
        ticket
    }

    /// Forgets producers that were idle for long, once in a while.
    pub(crate) fn expire_producers(&self) {
        let idle = {
            let mut core = self.core.lock();
            let now = core.tick(self);
            if core.stopped.is_some() || now < core.expire_next {
                return;
            }
            core.expire_next = now + EXPIRE_EVERY;
            Expire::idle(&core.seq, core.context.clock)
        };
        if let Some(expire) = idle {
            tracing::info!(
                producers = expire.producers.len(),
                owners = expire.transactional_ids.len(),
                "expired"
            );
            drop(self.submit(expire));
        }
    }

    /// Aborts transactions whose time is over.
    pub(crate) fn expire_transactions(&self) {
        let due: Vec<String> = {
            let mut core = self.core.lock();
            let now = core.tick(self);
            let due: Vec<String> =
                core.timeouts.iter().filter(|(_, at)| **at <= now).map(|(id, _)| id.clone()).collect();
            for id in &due {
                core.timeouts.remove(id);
            }
            due
        };
        for transactional_id in due {
            tracing::debug!(transactional_id, "aborting a transaction that timed out");
            drop(self.submit(AbortUnasked { transactional_id }));
        }
    }

    /// An operation on files failed: the log refuses work until it is opened again, and says why.
    pub(crate) fn poison(&self, doing: &str, error: &io::Error) {
        tracing::error!(doing, %error, "the log stops; open the directory again");
        self.core.lock().stop(format!("{doing}: {error}").into());
        self.wake_all();
    }

    pub(crate) fn wake_all(&self) {
        self.writer_wake.notify_all();
        self.segments_wake.notify_all();
        self.checkpoint_wake.notify_all();
        self.notify.notify();
    }

    /// Answers the tickets of released entries and wakes whoever waits for a release.
    pub(crate) fn answer(&self, tickets: Vec<Arc<dyn Pending>>, released: bool) {
        for ticket in tickets {
            ticket.release();
        }
        if released {
            self.notify.notify();
        }
    }

    pub(crate) fn count_sync(&self) {
        self.syncs.fetch_add(1, Ordering::Relaxed);
    }
}
