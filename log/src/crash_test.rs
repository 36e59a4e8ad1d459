//! The log on a disk that loses what was not synced, crashed before every kind of call, recovery included.
//!
//! The twin of the executable model of the log: clients, writer, segment writer and checkpointer take turns at random,
//! one step each; before a disk call a copy of the disk may crash, be recovered, checked, and go on from there.
//!
//! What is checked (the names are what a violation begins with):
//!
//! * `prefix`: recovered State is the fold of a prefix of the sequenced entries that holds every released one, and
//!   every byte it names is served as it was written;
//! * `seen`: what a read-committed reader saw is committed afterwards; one (leader epoch, offset) never names two
//!   records; a commit holds all its acked batches, and no batch is there twice;
//! * `clean`: no crash is called corruption;
//! * `rot`: one damaged byte below D, below a checkpointed length or in a slot is noticed, or harmless; nothing is
//!   changed before it is noticed;
//! * `idempotent`: opening again finds the same State;
//! * `progress`: whatever is queued is released at last, with the smallest journal too.

use crate::Clock;
use crate::batch::{BatchBuilder, BatchHeader, BatchOptions, OpenBatch, ProducerStamp, RecordParts};
use crate::config::{Config, Create};
use crate::core::Shared;
use crate::entry::{Change, Entry};
use crate::error::{OpenError, ReadError, WriteError};
#[cfg(feature = "faults")]
use crate::fault;
use crate::fs::Fs;
use crate::fs::sim::{Call, Crash, Failure, SimFs};
use crate::journal::Geometry;
use crate::live::{alter_topic, create_topic, position_at, read};
use crate::names::{self, Kind};
use crate::open::{Machine, open};
use crate::plan::{AppendBatch, DeleteTopic};
use crate::recovery::{Decision, decide};
use crate::segment_writer;
use crate::slot::{self, Format};
use crate::state::State;
use crate::ticket::Ticket;
use crate::types::*;
use crate::writer::{Seal, Step};
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use uuid::Uuid;

const PAGES: u64 = 8;
const QUEUE: usize = 5;
/// Records have times below this.
const TIMES: usize = 60;

struct Violation(String);

fn violation(what: impl Into<String>) -> ! {
    resume_unwind(Box::new(Violation(what.into())))
}

macro_rules! must {
    ($holds:expr, $($what:tt)*) => { if !$holds { violation(format!($($what)*)) } };
}

#[derive(Default)]
struct ManualClock(AtomicU64);

impl Clock for ManualClock {
    fn wall_ms(&self) -> i64 {
        1_700_000_000_000 + i64::try_from(self.0.load(Ordering::Relaxed)).unwrap()
    }

    fn monotonic(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// What the world outside knows.
#[derive(Clone, Default)]
struct Ghost {
    /// Every sequenced entry of this history, with State after it.
    hist: Vec<(Arc<Entry>, Arc<State>)>,
    /// Entries that were released.
    must: u64,
    /// Transactions read as committed.
    seen: BTreeSet<Producer>,
    /// What each position ever named, by the crc of its batch.
    places: HashMap<(TopicPartition, i32, i64), u32>,
    clients: Vec<Client>,
    trace: Vec<String>,
}

#[derive(Clone)]
struct Client {
    name: Option<String>,
    local: bool,
    producer: Option<Producer>,
    sequences: BTreeMap<TopicPartition, i32>,
    /// Batches of the open transaction, or all of a plain producer: the entry that holds each.
    sent: Vec<(u64, TopicPartition, Bytes)>,
    /// Batches whose fate a crash left open: sent again before anything else.
    doubt: Vec<(TopicPartition, Bytes)>,
}

impl Client {
    fn forget(&mut self, producer: Option<Producer>) {
        self.producer = producer;
        self.sequences.clear();
        self.sent.clear();
        self.doubt.clear();
    }
}

impl Ghost {
    fn say(&mut self, what: String) {
        self.trace.push(what);
    }

    fn fork(&self, how: Crash) -> Self {
        let mut g = self.clone();
        g.say(format!("CRASH {how:?}"));
        g.clients.retain(|c| !c.local);
        for c in &mut g.clients {
            let lost = c.sent.iter().filter(|(n, ..)| *n > g.must).map(|(_, tp, b)| (*tp, b.clone()));
            c.doubt = lost.chain(c.doubt.drain(..)).collect();
            c.sent.retain(|(n, ..)| *n <= g.must);
        }
        g
    }

    fn state(&self, n: u64) -> Arc<State> {
        match n {
            0 => Arc::new(State::default()),
            n => self.hist[n as usize - 1].1.clone(),
        }
    }

    /// Takes over what was sequenced since.
    fn capture(&mut self, shared: &Shared) {
        let core = shared.core.lock();
        for e in core.unreleased().filter(|e| e.n > self.hist.len() as u64).cloned().collect::<Vec<_>>() {
            let mut state = (*self.state(e.n - 1)).clone();
            state.apply(&e.entry).expect("it was applied when it was sequenced");
            for (tp, b) in &e.entry.batches {
                let f = b.facts();
                let crc = crc32c::crc32c_append(crc32c::crc32c(&b.head), &b.rest);
                for offset in f.base_offset..f.next_offset() {
                    let known = *self.places.entry((*tp, f.leader_epoch, offset)).or_insert(crc);
                    must!(known == crc, "seen: {tp} {}/{offset} names two records", f.leader_epoch);
                }
            }
            self.trace.push(format!("sequence {} {:?} {:?}", e.n, e.entry.change, e.entry.batches));
            self.hist.push((Arc::new(e.entry.clone()), Arc::new(state)));
        }
        must!(self.hist.len() as u64 == core.seq.n, "prefix: entry {} was not seen", core.seq.n);
        self.must = core.released_n;
    }

    fn kept(&mut self, d: &Decision) {
        let n = d.state.n;
        must!(n <= self.hist.len() as u64, "prefix: {n} entries kept, {} sequenced", self.hist.len());
        must!(n >= self.must, "prefix: acked entry {} lost, kept through {n}", self.must);
        must!(d.state == *self.state(n), "prefix: State is not the fold of the first {n} entries");
        self.hist.truncate(n as usize);
        self.say(format!("recovered slot {} C {} end {} N {n}", d.newest, d.slot.head.c.lsn, d.end.lsn));
    }

    /// How each (id, epoch) with a transaction ended, in the first `n` entries.
    fn outcomes(&self, n: u64) -> BTreeMap<Producer, Outcome> {
        let mut out = BTreeMap::new();
        for i in 0..n {
            let (id, outcome) = match &self.hist[i as usize].0.change {
                Change::End { transactional_id, outcome, .. } => (transactional_id, *outcome),
                Change::Init { transactional_id: Some(id), .. } => (id, Outcome::Aborted),
                _ => continue,
            };
            if let Some(o) = self.state(i).owners.get(id)
                && o.txn.is_some()
            {
                // The first outcome counts: a second one for the same pair is a broken rule, and shows.
                out.entry(o.producer).or_insert(outcome);
            }
        }
        out
    }

    /// The bytes of a partition in the first `n` entries, batch by batch.
    fn batches(&self, tp: TopicPartition, n: u64) -> Vec<Bytes> {
        let entries = self.hist[..n as usize].iter().flat_map(|(e, _)| &e.batches);
        let bytes = entries.filter(|(at, _)| *at == tp).map(|(_, b)| {
            let mut whole = BytesMut::from(&b.head[..]);
            whole.extend_from_slice(&b.rest);
            whole.freeze()
        });
        bytes.collect()
    }
}

/// Batches, and aborted ranges.
type Served = (Vec<(BatchHeader, Bytes)>, BTreeSet<AbortedRange>);

/// Reads a partition as a client does. `None` where it is damaged.
fn read_all(shared: &Shared, tp: TopicPartition, isolation: Isolation, bytes_max: usize) -> Option<Served> {
    let (mut batches, mut aborted, mut at) = (Vec::new(), BTreeSet::new(), Position::START);
    loop {
        let got = match read(shared, tp, at, bytes_max, isolation) {
            Ok(got) => got,
            Err(ReadError::Corrupt { .. }) => return None,
            Err(e) => violation(format!("prefix: reading {tp}: {e}")),
        };
        if got.batches.is_empty() {
            return Some((batches, aborted));
        }
        at = got.next;
        aborted.extend(got.aborted);
        let mut rest = got.batches;
        while !rest.is_empty() {
            let header =
                BatchHeader::parse(&rest).unwrap_or_else(|e| violation(format!("prefix: served {e}")));
            batches.push((header, rest.split_to(header.size)));
        }
    }
}

/// The offset of the first record that is not older.
fn first_at(batches: &[Bytes], timestamp: i64) -> Option<i64> {
    let opened = batches.iter().map(|b| OpenBatch::open(b, 1 << 20).expect("it was built"));
    let records = opened.filter(|b| !b.header().is_control()).flat_map(|b| b.records());
    records.map(|r| r.expect("it was built")).find(|r| r.timestamp >= timestamp).map(|r| r.offset)
}

/// Damage that the reads of a whole log met.
fn check_reads(shared: &Shared, ghost: &mut Ghost, bytes_max: usize) -> usize {
    let n = shared.core.lock().released_n;
    let released = ghost.state(n);
    must!(*shared.released.read() == *released, "prefix: released State is not the fold of {n} entries");
    let outcomes = ghost.outcomes(n);
    let mut damaged = 0;
    for (tp, p) in released.partitions() {
        let expected = ghost.batches(tp, n);
        let unique: BTreeSet<&[u8]> = expected.iter().map(|b| &b[crate::batch::UNCOVERED_BYTES..]).collect();
        must!(unique.len() == expected.len(), "seen: a batch is twice in {tp}");
        let Some((got, _)) = read_all(shared, tp, Isolation::ReadUncommitted, bytes_max) else {
            damaged += 1;
            continue;
        };
        let got: Vec<Bytes> = got.into_iter().map(|(_, b)| b).collect();
        must!(
            got == expected,
            "prefix: {tp} serves {} batches, {} were written, or others",
            got.len(),
            expected.len()
        );
        let wanted = (n as usize * 7 % TIMES) as i64;
        match position_at(shared, tp, wanted) {
            Ok(found) => {
                let (found, first) = (found.map(|p| p.offset), first_at(&expected, wanted));
                must!(found == first, "prefix: {tp} finds {found:?} for time {wanted}, not {first:?}");
            }
            Err(ReadError::Corrupt { .. }) => damaged += 1,
            Err(e) => violation(format!("prefix: looking for a time in {tp}: {e}")),
        }
        let Some((got, aborted)) = read_all(shared, tp, Isolation::ReadCommitted, bytes_max) else {
            damaged += 1;
            continue;
        };
        let hidden = |h: &BatchHeader| {
            let inside = |r: &AbortedRange| {
                r.producer_id == h.producer_id && (r.first..=r.last).contains(&h.base_offset)
            };
            h.is_transactional() && aborted.iter().any(inside)
        };
        let visible = got.into_iter().filter(|(h, _)| !h.is_control() && !hidden(h)).map(|(h, b)| {
            if h.is_transactional() {
                let producer = Producer { id: h.producer_id, epoch: h.producer_epoch };
                let outcome = outcomes.get(&producer);
                must!(
                    outcome == Some(&Outcome::Committed),
                    "seen: a record of {producer:?}, which ended {outcome:?}"
                );
                ghost.seen.insert(producer);
            }
            b
        });
        let visible: Vec<Bytes> = visible.collect();
        let stable = p.last_stable();
        let expected: Vec<Bytes> = expected
            .into_iter()
            .filter(|b| {
                let h = BatchHeader::parse(b).unwrap();
                let producer = Producer { id: h.producer_id, epoch: h.producer_epoch };
                let counts = !h.is_transactional() || outcomes.get(&producer) == Some(&Outcome::Committed);
                !h.is_control() && h.base_offset < stable && counts
            })
            .collect();
        must!(
            visible == expected,
            "seen: {tp} shows {} committed batches of {}",
            visible.len(),
            expected.len()
        );
    }
    damaged
}

#[derive(Clone, Copy)]
enum Depth {
    /// Before every call, three deep.
    Exhaustive,
    Sampled,
}

struct Explorer {
    rng: Mutex<ChaCha8Rng>,
    how_deep: Depth,
    files_max: usize,
    clock: Arc<ManualClock>,
    counts: Mutex<Counts>,
    trace: Mutex<Vec<String>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    states: u64,
    opens: u64,
    flips: u64,
    steps: u64,
}

impl Explorer {
    fn chance(&self, p: f64) -> bool {
        self.rng.lock().random_bool(p)
    }

    fn below(&self, n: usize) -> usize {
        self.rng.lock().random_range(0..n)
    }

    fn config(&self) -> Config {
        Config {
            create: Create::IfMissing,
            clock: self.clock.clone(),
            seed: Some(7),
            journal_file_bytes: PAGES * 4096,
            journal_files_max: self.files_max,
            last_epoch: Some(2),
            open_files_max: 6,
            ..Config::default()
        }
    }

    fn hook(self: &Arc<Self>, disk: &SimFs, ghost: &Arc<Mutex<Ghost>>, depth: u32) {
        let (x, g) = (self.clone(), ghost.clone());
        disk.set_hook(move |disk, op| {
            let hows: Vec<Crash> = match (x.how_deep, depth) {
                (Depth::Exhaustive, 1) => vec![Crash::Kill, Crash::None, Crash::All, Crash::Any, Crash::Any],
                (Depth::Exhaustive, 2) => vec![Crash::Kill, Crash::Any],
                (Depth::Exhaustive, 3) if x.chance(0.02) => vec![Crash::Any],
                // Slots are written seldom, and what is wrong with them shows only in a crash of a recovery.
                (Depth::Sampled, 1..=4)
                    if x.chance(
                        [0.5, 0.06, 0.04, 0.02][depth as usize - 1]
                            * if op.path.starts_with("checkpoint") {
                                4.0_f64.min(2.0 * f64::from(depth))
                            } else {
                                1.0
                            },
                    ) =>
                {
                    let all = [Crash::Kill, Crash::None, Crash::All, Crash::Any, Crash::Any, Crash::Any];
                    vec![all[x.below(all.len())]]
                }
                _ => return,
            };
            for how in hows {
                let copy = disk.crash(how, &mut *x.rng.lock());
                let mut fork = g.lock().fork(how);
                fork.say(format!("  before {:?} {}", op.call, op.path));
                x.examine(copy, fork, depth);
            }
        });
    }

    fn examine(self: &Arc<Self>, disk: SimFs, mut ghost: Ghost, depth: u32) {
        self.counts.lock().states += 1;
        let kept = std::mem::replace(&mut *self.trace.lock(), ghost.trace.clone());
        if self.chance(0.1) {
            self.rot(&disk, &ghost);
        }
        let fs: Arc<dyn Fs> = Arc::new(disk.clone());
        match Format::read(&*fs) {
            Ok(None) => must!(ghost.hist.is_empty(), "prefix: the directory is gone"),
            Ok(Some(format)) => match decide(&fs, format, 6) {
                Err(e) => violation(format!("clean: a crash is called {e}")),
                Ok(d) if d.damage.is_some() => {
                    violation(format!("clean: a crash is called corruption: {}", d.damage.unwrap()))
                }
                Ok(d) => ghost.kept(&d),
            },
            Err(e) => violation(format!("clean: a crash is called {e}")),
        }
        *self.trace.lock() = ghost.trace.clone();
        let ghost = Arc::new(Mutex::new(ghost));
        self.hook(&disk, &ghost, depth + 1);
        let mut machine = match open(fs.clone(), self.config()) {
            Ok(machine) => machine,
            Err(e) => violation(format!("clean: {e:?}")),
        };
        self.run_in(&mut machine, &ghost);
        disk.clear_hook();
        self.counts.lock().opens += 1;
        let mut g = ghost.lock();
        must!(check_reads(&machine.shared, &mut g, 150) == 0, "clean: a crash damaged a segment");
        let outcomes = g.outcomes(g.hist.len() as u64);
        let gone = g.seen.iter().find(|p| outcomes.get(p) != Some(&Outcome::Committed));
        must!(gone.is_none(), "seen: {gone:?} was read as committed and is not");
        *self.trace.lock() = g.trace.clone();
        drop(g);
        if self.chance(0.2) {
            let format = Format::read(&*fs).unwrap().unwrap();
            let again = decide(&fs, format, 6).unwrap_or_else(|e| violation(format!("idempotent: {e}")));
            must!(again.damage.is_none(), "idempotent: {:?}", again.damage);
            must!(
                again.state == *machine.shared.released.read(),
                "idempotent: opening again gives another State"
            );
        }
        if matches!(self.how_deep, Depth::Sampled) && self.chance(0.15) {
            let steps = 5 + self.below(55);
            self.live(&mut machine, &disk, &ghost, steps, depth + 1);
        }
        *self.trace.lock() = kept;
    }

    /// Runs what the open queued until it is released.
    fn run_in(self: &Arc<Self>, machine: &mut Machine, ghost: &Arc<Mutex<Ghost>>) {
        must!(machine.shared.damage.is_none(), "clean: opened as damaged");
        ghost.lock().capture(&machine.shared);
        drain(machine, |shared| ghost.lock().capture(shared));
        self.no_stop(machine);
    }

    fn no_stop(&self, machine: &Machine) {
        let stopped = machine.shared.core.lock().stopped.clone();
        must!(stopped.is_none(), "clean: stopped: {stopped:?}");
    }

    fn step(&self, machine: &mut Machine, who: usize) -> Step {
        match who {
            1 => {
                let seal = if self.chance(0.3) { Seal::IfIdle } else { Seal::No };
                machine.writer.step(&machine.shared, seal)
            }
            2 => segment_writer::step(&machine.shared, 1 + self.below(3)),
            _ => machine.checkpointer.step(&machine.shared),
        }
    }

    fn live(
        self: &Arc<Self>,
        machine: &mut Machine,
        disk: &SimFs,
        ghost: &Arc<Mutex<Ghost>>,
        steps: usize,
        depth: u32,
    ) {
        self.hook(disk, ghost, depth);
        let speeds = [[4, 4, 4, 2], [8, 2, 2, 1], [6, 6, 1, 1], [3, 3, 3, 6]][self.below(4)];
        for _ in 0..steps {
            self.counts.lock().steps += 1;
            let mut pick = self.below(speeds.iter().sum());
            let who = speeds.iter().position(|s| match pick.checked_sub(*s) {
                Some(rest) => {
                    pick = rest;
                    false
                }
                None => true,
            });
            match who.expect("below the sum") {
                0 => self.client(&machine.shared, ghost),
                who => {
                    self.step(machine, who);
                }
            }
            self.no_stop(machine);
            ghost.lock().capture(&machine.shared);
            if self.chance(0.03) {
                self.progress(machine, ghost);
            }
            *self.trace.lock() = ghost.lock().trace.clone();
        }
        self.progress(machine, ghost);
        disk.clear_hook();
        must!(check_reads(&machine.shared, &mut ghost.lock(), 1000) == 0, "clean: a segment is damaged");
    }

    /// A fair schedule releases everything queued, and then takes another request.
    fn progress(&self, machine: &mut Machine, ghost: &Arc<Mutex<Ghost>>) {
        let mut idle = 0;
        for turn in 0.. {
            must!(
                turn < 20_000,
                "progress: busy for ever, {} queued",
                machine.shared.core.lock().queue.len()
            );
            if idle == 30 {
                break;
            }
            let steps = [1, 2, 3].map(|who| self.step(machine, who));
            ghost.lock().capture(&machine.shared);
            idle = if steps == [Step::Idle; 3] { idle + 1 } else { 0 };
        }
        self.no_stop(machine);
        let core = machine.shared.core.lock();
        must!(
            core.released_n == core.seq.n && core.is_quiet(),
            "progress: deadlock, {} queued",
            core.queue.len()
        );
    }

    fn partitions(&self, s: &State) -> Vec<TopicPartition> {
        s.partitions().map(|(tp, _)| tp).collect()
    }

    fn client(&self, shared: &Arc<Shared>, ghost: &Arc<Mutex<Ghost>>) {
        let (s, full) = {
            let core = shared.core.lock();
            (core.seq.clone(), core.queue.len() >= QUEUE || core.has_backlog())
        };
        let acts = [
            "topic",
            "plain",
            "plain",
            "plain",
            "txn",
            "txn",
            "txn",
            "txn",
            "end",
            "end",
            "offsets",
            "commit",
            "new",
            "init",
            "delete",
            "alter",
            "read",
            "read",
            "checkpoint",
            "timeout",
        ];
        let act = acts[self.below(acts.len())];
        if full && !matches!(act, "read" | "checkpoint") {
            return;
        }
        let tps = self.partitions(&s);
        match act {
            "topic" if s.topics.len() < 3 => {
                let uuid = Uuid::from_u128(self.rng.lock().random());
                // Few names, so that a deleted one is soon used again.
                let name = format!("t{}", uuid.as_u128() % 4);
                let topic =
                    NewTopic { segment_bytes_max: 500, ..NewTopic::new(name, 1 + self.below(2) as u32) };
                drop(create_topic(shared, topic, uuid));
            }
            "delete" if s.topics.len() > 1 && self.chance(0.5) => {
                let uuid = *s.topics.keys().nth(self.below(s.topics.len())).expect("below its length");
                drop(shared.submit(DeleteTopic { uuid, if_used: IfUsed::Delete }));
                for c in &mut ghost.lock().clients {
                    c.sent.retain(|(_, tp, _)| tp.topic != uuid);
                    c.doubt.retain(|(tp, _)| tp.topic != uuid);
                }
            }
            "alter" if !s.topics.is_empty() => {
                let (uuid, topic) =
                    s.topics.iter().nth(self.below(s.topics.len())).expect("below its length");
                let partitions = topic.partitions.len() as u32 + self.below(2) as u32;
                let alter = TopicChange {
                    partitions: (partitions <= 3).then_some(partitions),
                    segment_bytes_max: self.chance(0.5).then(|| 400 + 100 * self.below(3) as u64),
                    cleanup: None,
                };
                drop(alter_topic(shared, *uuid, alter));
            }
            "commit" if !tps.is_empty() => {
                let offsets = self.some_offsets(&s, &tps);
                drop(shared.submit(CommitOffsets { group: "g".into(), offsets, guard: None }));
            }
            "read" => {
                check_reads(shared, &mut ghost.lock(), 200);
            }
            "checkpoint" => shared.core.lock().want_checkpoint = true,
            "timeout" if self.chance(0.3) => {
                self.clock.0.fetch_add(10_000, Ordering::Relaxed);
                shared.expire_transactions();
            }
            "new" => {
                let mut g = ghost.lock();
                if g.clients.len() < 4 {
                    let name = [None, Some("a"), Some("b"), Some("c")][self.below(4)].map(str::to_owned);
                    let local = name.is_some() && self.chance(0.3);
                    let (sequences, sent, doubt) = Default::default();
                    g.clients.push(Client { name, local, producer: None, sequences, sent, doubt });
                }
            }
            "plain" | "txn" | "end" | "offsets" | "init" => {
                let (i, mut c) = {
                    let g = ghost.lock();
                    let i = self.below(g.clients.len().max(1));
                    match g.clients.get(i) {
                        Some(c) if c.name.is_some() == (act != "plain") || act == "init" => (i, c.clone()),
                        _ => return,
                    }
                };
                let hist = ghost.lock().hist.clone();
                self.act_of(&mut c, act, shared, &s, &tps, &hist);
                ghost.lock().clients[i] = c;
            }
            _ => {}
        }
    }

    fn some_offsets(&self, s: &State, tps: &[TopicPartition]) -> Vec<OffsetCommit> {
        let partition = tps[self.below(tps.len())];
        let p = s.partition(partition).expect("it is one of them");
        let offset = self.rng.lock().random_range(0..=p.log_end);
        let position = Position { leader_epoch: p.epoch_before(offset), offset };
        vec![OffsetCommit { partition, position, metadata: Bytes::from_static(b"m") }]
    }

    fn act_of(
        &self,
        c: &mut Client,
        act: &str,
        shared: &Arc<Shared>,
        s: &State,
        tps: &[TopicPartition],
        hist: &[(Arc<Entry>, Arc<State>)],
    ) {
        let Some(producer) = c.producer.filter(|_| act != "init") else {
            let init = InitProducer {
                transactional_id: c.name.clone(),
                local: c.local,
                timeout_ms: 5_000,
                carried: c.producer.filter(|_| c.name.is_none() || self.chance(0.5)),
            };
            let ticket = shared.submit(init);
            // As if it waited for the answer: what it will be is in the sequenced State.
            match ticket.try_take() {
                Some(Err(_)) => c.forget(None),
                _ => {
                    let after = shared.core.lock().seq.clone();
                    let given = match &c.name {
                        Some(name) => after.owners.get(name).map(|o| o.producer),
                        None if after.n > s.n => match &after.producers.last_key_value() {
                            _ if c.producer.is_some_and(|p| {
                                after.producers.get(&p.id).is_some_and(|q| q.n == after.n)
                            }) =>
                            {
                                let id = c.producer.expect("checked").id;
                                Some(Producer { id, epoch: after.producers[&id].epoch })
                            }
                            Some((id, p)) => Some(Producer { id: **id, epoch: p.epoch }),
                            None => None,
                        },
                        None => None,
                    };
                    c.forget(given);
                }
            }
            return;
        };
        let fenced = |t: Option<Result<(), WriteError>>| match t {
            Some(Err(WriteError::Fenced { .. } | WriteError::Refused(_))) => true,
            Some(Err(e)) => violation(format!("clean: refused with {e}")),
            _ => false,
        };
        if let Some((tp, batch)) = c.doubt.first().cloned() {
            // Is it there already? The log knows: a repeat is answered from the first append.
            c.doubt.remove(0);
            let ticket =
                shared.submit(AppendBatch { to: tp, batch: batch.clone(), connection: Connection::LOCAL });
            let n = shared.core.lock().seq.n;
            if fenced(ticket.try_take().map(|r| r.map(|_| ()))) {
                c.forget(None);
            } else if n > s.n {
                c.sent.push((n, tp, batch));
            } else if let Some(at) = hist.iter().rposition(|(e, _)| {
                e.batches.iter().any(|(on, b)| *on == tp && b.rest == batch[crate::batch::UNCOVERED_BYTES..])
            }) {
                c.sent.push((at as u64 + 1, tp, batch));
            } else {
                c.forget(None);
            }
            return;
        }
        match act {
            "plain" | "txn" if !tps.is_empty() => {
                let tp = tps[self.below(tps.len())];
                let sequence = c.sequences.get(&tp).copied().unwrap_or(0);
                let records = 1 + self.below(3);
                let mut b =
                    BatchBuilder::new(BatchOptions { transactional: c.name.is_some(), ..Default::default() });
                for _ in 0..records {
                    let id: u64 = self.rng.lock().random();
                    let value = format!("{id:x}").repeat(1 + self.below(6));
                    let _ = b.push(RecordParts {
                        timestamp: self.below(TIMES) as i64,
                        key: None,
                        value: Some(value.as_bytes()),
                        headers: &[],
                    });
                }
                let batch = b.build(ProducerStamp { id: producer.id, epoch: producer.epoch, sequence });
                let ask = AppendBatch { to: tp, batch: batch.clone(), connection: Connection::LOCAL };
                let ticket = shared.submit(ask);
                let n = shared.core.lock().seq.n;
                if fenced(ticket.try_take().map(|r| r.map(|_| ()))) || n == s.n {
                    c.forget(None);
                } else {
                    c.sequences.insert(tp, sequence + records as i32);
                    c.sent.push((n, tp, batch));
                }
            }
            "offsets" if !tps.is_empty() => {
                let offsets = self.some_offsets(s, tps);
                let (group, connection) = ("g".into(), Connection::LOCAL);
                let ticket = shared.submit(AddOffsets { producer, group, offsets, guard: None, connection });
                if fenced(ticket.try_take()) {
                    c.forget(None);
                }
            }
            "end" => {
                let outcome = if self.chance(0.7) { Outcome::Committed } else { Outcome::Aborted };
                let transactional_id = c.name.clone().expect("a transactional client");
                let end = EndTxn {
                    transactional_id: transactional_id.clone(),
                    producer,
                    outcome,
                    connection: Connection::LOCAL,
                };
                let ticket: Ticket<Ended> = shared.submit(end);
                let answer = ticket.try_take();
                if fenced(answer.as_ref().map(|r| r.as_ref().map(|_| ()).map_err(Clone::clone))) {
                    c.forget(None);
                    return;
                }
                let after = shared.core.lock().seq.clone();
                let ended = after
                    .owners
                    .get(&transactional_id)
                    .and_then(|o| o.last)
                    .filter(|l| l.producer == producer);
                if let Some(ended) = ended.filter(|e| e.outcome == Outcome::Committed) {
                    for (n, tp, b) in &c.sent {
                        let entry = &hist.get(*n as usize - 1).map(|(e, _)| &**e);
                        let there = entry.is_some_and(|e| {
                            e.batches
                                .iter()
                                .any(|(on, s)| on == tp && s.rest == b[crate::batch::UNCOVERED_BYTES..])
                        });
                        must!(there, "seen: a commit of {producer:?} misses its acked entry {n}");
                        let aborted = after.partition(*tp).is_some_and(|p| {
                            p.aborted.iter().any(|r| {
                                r.producer_id == producer.id
                                    && r.first <= s_offset(entry, tp)
                                    && s_offset(entry, tp) <= r.last
                            })
                        });
                        must!(
                            !aborted,
                            "seen: a commit of {producer:?} misses its entry {n}, which was aborted"
                        );
                    }
                    c.forget(Some(ended.next));
                } else {
                    c.forget(ended.map(|e| e.next));
                }
            }
            _ => {}
        }
    }

    /// One damaged byte: below D in the journal, below a checkpointed length in a segment, or in a slot.
    fn rot(self: &Arc<Self>, disk: &SimFs, ghost: &Ghost) {
        let fs: Arc<dyn Fs> = Arc::new(disk.crash(Crash::Kill, &mut *self.rng.lock()));
        let Ok(Some(format)) = Format::read(&*fs) else { return };
        let Ok(d) = decide(&fs, format, 6) else { return }; // examine() reports it
        if d.damage.is_some() {
            return;
        }
        let geometry = Geometry { file_bytes: format.journal_file_bytes };
        let synced = d.scan.synced_through.max(d.slot.head.synced_through);
        let undamaged = d.state.clone();
        let mut targets: Vec<(String, u64, u64)> = Vec::new();
        for lsn in d.rounds.iter().filter(|lsn| **lsn < synced) {
            let round = d.scan.round_at(*lsn).unwrap().expect("it was folded");
            let bytes = crate::journal::ROUND_HEAD as u64
                + round
                    .entries
                    .iter()
                    .map(|e| {
                        e.encode_head().len() as u64 + e.batches.iter().map(|(_, b)| b.len()).sum::<u64>()
                    })
                    .sum::<u64>();
            targets.push((names::journal_file(geometry.file(*lsn)), geometry.at(*lsn), bytes));
        }
        for (id, s) in d.slot.state.segments().filter(|(_, s)| s.bytes > 0) {
            // The bytes that only the sidecar covers are hit as often as all others together.
            targets.push((names::segment_file(id, Kind::Log), s.last_at, 21));
            targets.push((names::segment_file(id, Kind::Log), 0, 21));
            targets.push((names::segment_file(id, Kind::Log), 0, s.bytes));
        }
        for name in names::SLOTS {
            targets.push((
                name.to_owned(),
                0,
                fs.open(name, crate::fs::OpenHow::Read).unwrap().len().unwrap(),
            ));
        }
        let both =
            names::SLOTS.iter().all(|n| slot::read(&*fs, format.directory.as_u128(), n).unwrap().is_some());
        for k in 0..4 {
            let slots = targets.len() - names::SLOTS.len()..;
            let targets = if k == 0 { &targets[slots] } else { &targets[..] };
            let (path, from, bytes) = targets.choose(&mut *self.rng.lock()).expect("slots at least").clone();
            let at = from + self.below(bytes as usize) as u64;
            self.counts.lock().flips += 1;
            let bad = disk.crash(Crash::Kill, &mut *self.rng.lock());
            let Some(old) = bad.peek(&path).unwrap().get(at as usize).copied() else { continue };
            bad.rot(&path, at, &[old ^ (1 << self.below(8))]);
            let mut g = ghost.clone();
            g.say(format!("ROT {path} {at}"));
            *self.trace.lock() = g.trace.clone();
            let bad_fs: Arc<dyn Fs> = Arc::new(bad.clone());
            let (is_slot, is_journal) =
                (names::SLOTS.contains(&path.as_str()), path.starts_with(names::JOURNAL));
            let decided = decide(&bad_fs, format, 6);
            let damaged = !matches!(&decided, Ok(d) if d.damage.is_none());
            if damaged {
                must!(bad.ops() == 0, "rot: the directory was changed before the decision");
                if is_slot {
                    must!(!both, "rot: the other slot does not open");
                }
                // It opens read-only, changes nothing, and serves nothing wrong.
                match open(bad_fs, self.config()) {
                    Ok(machine) => {
                        must!(bad.ops() == 0, "rot: a damaged directory was changed");
                        g.hist.truncate(machine.shared.released.read().n as usize);
                        check_reads(&machine.shared, &mut g, 150);
                        let refused = machine
                            .shared
                            .submit(DeleteTopic { uuid: Uuid::nil(), if_used: IfUsed::Delete })
                            .try_take();
                        must!(matches!(refused, Some(Err(WriteError::Damaged(_)))), "rot: writes are taken");
                    }
                    Err(OpenError::Corrupt(_)) => {}
                    Err(e) => violation(format!("rot: {e:?}")),
                }
                continue;
            }
            must!(!is_journal, "rot: a bad byte below D={synced} was not noticed");
            let d = decided.unwrap_or_else(|e| violation(format!("rot: {e}")));
            if is_slot {
                must!(
                    d.state == undamaged,
                    "rot: the other slot leads to entry {}, this one to {}",
                    d.state.n,
                    undamaged.n
                );
                must!(d.state.n >= ghost.must, "rot: the other slot loses entry {}", ghost.must);
            }
            g.kept(&d);
            let mut machine = match open(bad_fs, self.config()) {
                Ok(machine) => machine,
                Err(e) => violation(format!("rot: {e:?}")),
            };
            g.capture(&machine.shared);
            drain(&mut machine, |shared| g.capture(shared));
            check_reads(&machine.shared, &mut g, 150);
        }
        *self.trace.lock() = ghost.trace.clone();
    }

    fn run(self: &Arc<Self>, steps: usize) {
        let disk = SimFs::new();
        disk.tear_sectors();
        let ghost = Arc::new(Mutex::new(Ghost::default()));
        self.hook(&disk, &ghost, 1);
        let mut machine =
            open(Arc::new(disk.clone()), self.config()).unwrap_or_else(|e| violation(format!("{e:?}")));
        self.run_in(&mut machine, &ghost);
        self.live(&mut machine, &disk, &ghost, steps, 1);
    }
}

/// [`Machine::drain`], with a look at the log after each step.
fn drain(machine: &mut Machine, mut look: impl FnMut(&Shared)) {
    for turn in 0.. {
        must!(turn < 20_000, "progress: the open is busy for ever");
        look(&machine.shared);
        let writer = machine.writer.step(&machine.shared, Seal::No);
        look(&machine.shared);
        let segments = segment_writer::step(&machine.shared, usize::MAX);
        look(&machine.shared);
        let checkpoint = machine.checkpointer.step(&machine.shared);
        let core = machine.shared.core.lock();
        if core.released_n == core.seq.n && core.is_quiet() || core.stopped.is_some() {
            break;
        }
        must!(
            [writer, segments, checkpoint] != [Step::Idle; 3],
            "progress: the open does not get to its end"
        );
    }
    look(&machine.shared);
}

fn s_offset(entry: &Option<&Entry>, tp: &TopicPartition) -> i64 {
    let batch = entry.and_then(|e| e.batches.iter().find(|(on, _)| on == tp));
    batch.map_or(-1, |(_, b)| b.facts().base_offset)
}

fn explorer(seed: u64, how_deep: Depth) -> Explorer {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Explorer {
        files_max: [3, 3, 4, 5][rng.random_range(0..4)],
        rng: Mutex::new(rng),
        how_deep,
        clock: Arc::default(),
        counts: Mutex::default(),
        trace: Mutex::default(),
    }
}

/// Runs one seed; what was violated, with the trace that led there.
fn run_seed(seed: u64, how_deep: Depth, steps: usize) -> (Option<(String, Vec<String>)>, Counts) {
    let x = Arc::new(explorer(seed, how_deep));
    let failed = catch_unwind(AssertUnwindSafe(|| x.run(steps))).err().map(|cause| {
        let what = match cause.downcast::<Violation>() {
            Ok(v) => v.0,
            Err(other) => match other.downcast::<String>() {
                Ok(s) => format!("panic: {s}"),
                Err(_) => "panic".into(),
            },
        };
        (what, x.trace.lock().clone())
    });
    let counts = *x.counts.lock();
    (failed, counts)
}

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|v| v.parse().ok())
}

/// `CRASH_FROM`, `CRASH_SEEDS`, `CRASH_STEPS` choose another range.
#[test]
fn no_crash_loses_or_invents_anything() {
    let (from, seeds) = (env("CRASH_FROM").unwrap_or(0), env("CRASH_SEEDS").unwrap_or(12));
    let steps = env("CRASH_STEPS").unwrap_or(120) as usize;
    let mut total = Counts::default();
    for seed in from..from + seeds {
        let (failed, counts) = run_seed(seed, Depth::Sampled, steps);
        if let Some((what, trace)) = failed {
            let shortest = (1..steps).find_map(|s| run_seed(seed, Depth::Sampled, s).0);
            let (what, trace) = shortest.unwrap_or((what, trace));
            panic!("seed {seed}: {what}\n{}", trace.join("\n"));
        }
        total.states += counts.states;
        total.opens += counts.opens;
        total.flips += counts.flips;
        total.steps += counts.steps;
    }
    assert!(total.opens >= seeds, "{total:?}");
    if env("CRASH_SEEDS").is_some() {
        let dir = std::env::var("CRASH_REPORT").unwrap_or_else(|_| "/dev/null".into());
        std::fs::write(dir, format!("{total:?}\n")).expect("the report is written");
    }
}

#[test]
fn every_call_of_a_short_scenario_may_be_the_last() {
    for seed in 0..env("CRASH_SHORT").unwrap_or(2) {
        let (failed, _) = run_seed(seed, Depth::Exhaustive, 25);
        if let Some((what, trace)) = failed {
            panic!("seed {seed}: {what}\n{}", trace.join("\n"));
        }
    }
}

/// A process is killed right before it syncs a slot, and while the next open writes the other one the power goes. The
/// random histories meet this once in some hundred seeds; what it needs is a slot of more than a sector.
fn power_goes_while_open_writes_a_slot() -> Result<(), String> {
    let x = Arc::new(explorer(0, Depth::Sampled));
    let disk = SimFs::new();
    disk.tear_sectors();
    let mut machine = open(Arc::new(disk.clone()), x.config()).map_err(|e| e.to_string())?;
    for number in 0..20 {
        drop(create_topic(
            &machine.shared,
            NewTopic::new(format!("topic-{number}"), 1),
            Uuid::from_u128(number),
        ));
        assert!(machine.drain());
    }
    let killed: Arc<Mutex<Option<SimFs>>> = Arc::default();
    disk.set_hook({
        let (killed, x) = (killed.clone(), x.clone());
        move |disk, op| {
            if op.call == Call::Sync && op.path.starts_with("checkpoint") {
                killed.lock().get_or_insert_with(|| disk.crash(Crash::Kill, &mut *x.rng.lock()));
            }
        }
    });
    machine.shared.core.lock().want_checkpoint = true;
    while killed.lock().is_none() {
        assert_ne!(machine.checkpointer.step(&machine.shared), Step::Idle, "the checkpoint was asked for");
    }
    disk.clear_hook();
    let killed = killed.lock().take().expect("a slot was about to be synced");
    let acked = machine.shared.core.lock().released_n;
    let found: Arc<Mutex<Result<(), String>>> = Arc::new(Mutex::new(Ok(())));
    killed.set_hook({
        let (found, x) = (found.clone(), x.clone());
        move |disk, op| {
            if op.call != Call::Sync || !op.path.starts_with("checkpoint") {
                return;
            }
            for _ in 0..100 {
                let after: Arc<dyn Fs> = Arc::new(disk.crash(Crash::Any, &mut *x.rng.lock()));
                let format = Format::read(&*after).ok().flatten().expect("it was synced long ago");
                let broken = match decide(&after, format, 6) {
                    Ok(d) if d.damage.is_none() && d.state.n >= acked => continue,
                    Ok(d) => format!("{} of {acked} entries, damage {:?}", d.state.n, d.damage),
                    Err(e) => e.to_string(),
                };
                *found.lock() = Err(broken);
            }
        }
    });
    open(Arc::new(killed), x.config()).map_err(|e| e.to_string())?;
    found.lock().clone()
}

#[test]
fn power_may_go_while_open_writes_a_slot() {
    assert_eq!(power_goes_while_open_writes_a_slot(), Ok(()));
}

/// The journal's sync fails, then the power goes. True if an entry was acked that is not there.
fn a_failed_sync_loses_an_acked_entry() -> bool {
    let x = Arc::new(explorer(0, Depth::Sampled));
    let disk = SimFs::new();
    let mut machine = open(Arc::new(disk.clone()), x.config()).unwrap_or_else(|e| panic!("{e}"));
    assert!(machine.drain());
    let failed = std::sync::atomic::AtomicBool::new(false);
    disk.set_fault(move |op| {
        let now = op.call == Call::Sync && op.path.starts_with(names::JOURNAL);
        (now && !failed.swap(true, Ordering::Relaxed)).then_some(Failure::Errno(5))
    });
    let ticket = create_topic(&machine.shared, NewTopic::new("t", 1), Uuid::from_u128(1));
    machine.drain();
    let acked = matches!(ticket.try_take(), Some(Ok(_)));
    assert!(acked || machine.shared.core.lock().stopped.is_some(), "neither acked nor stopped");
    let after: Arc<dyn Fs> = Arc::new(disk.crash(Crash::None, &mut *x.rng.lock()));
    let format = Format::read(&*after).ok().flatten().expect("it was synced long ago");
    let there =
        decide(&after, format, 6).is_ok_and(|d| d.damage.is_none() && d.state.topic_named("t").is_some());
    acked && !there
}

#[test]
fn a_failed_sync_of_the_journal_acks_nothing() {
    assert!(!a_failed_sync_loses_an_acked_entry());
}

#[cfg(feature = "faults")]
mod broken {
    use super::*;

    /// Found by a test of their own: see there.
    const DIRECTED: &[&str] = &["sync:open-slot"];

    /// Each broken rule and each missing sync, with the first seed that notices it. A change of the scenario moves
    /// them: the test then looks among the first 60. `CRASH_SEEDS` (how many), `CRASH_FAULT` (only this one) and
    /// `CRASH_REPORT` (a file) list them.
    ///
    /// Of the model's breaks, the compaction one is not here (there is none yet), and `no-admission` is none: a
    /// checkpoint copies the released State, so it never waits for what is queued.
    const CAUGHT: &[(&str, u64)] = &[
        ("ack-before-sync", 0),
        ("recycle-newer-only", 5),
        ("unlink-one-slot", 3),
        ("slot-through-c", 1),
        ("cut-before-decision", 0),
        ("both-slots-at-once", 10),
        ("stale-accepted", 0),
        ("link-unchecked", 0),
        ("d-ignored", 0),
        ("incarnation-kept", 0),
        ("lso-by-sequence", 0),
        ("no-epoch-bump", 0),
        ("lso-off-by-one", 0),
        ("sync:journal", 0),
        ("sync:journal-dir", 0),
        ("sync:segment", 1),
        ("sync:sidecar", 1),
        ("sync:segment-dir", 0),
        ("sync:slot", 0),
        ("sync:topics-dir", 0),
        ("sync:topic-dir", 0),
        ("sync:alter-dir", 0),
        ("sync:open-names", 0),
        ("sync:open-journal", 4),
        ("sync:open-segments", 0),
        ("sync:open-dirs", 0),
        ("sync:open-other-slot", 2),
        ("sync:open-this-slot", 4),
        ("sync:create-format", 0),
        ("sync:create-mark", 0),
        ("sync:create-slots", 0),
        ("sync:create-names", 0),
    ];

    /// Finds the first seed that notices a fault.
    fn caught(name: &'static str, from: u64, seeds: u64) -> Option<(u64, String)> {
        fault::set(Some(name));
        let found =
            (from..from + seeds).find_map(|seed| Some((seed, run_seed(seed, Depth::Sampled, 120).0?.0)));
        fault::set(None);
        found
    }

    #[test]
    fn each_broken_rule_and_each_missing_sync_is_noticed() {
        let (mut report, mut missed) = (String::new(), Vec::new());
        let only = std::env::var("CRASH_FAULT").ok();
        let wanted = |name: &str| only.as_ref().is_none_or(|only| only == name);
        for (name, _) in fault::BREAKS.iter().chain(fault::SYNCS).filter(|(name, _)| wanted(name)) {
            if DIRECTED.contains(name) && only.is_none() {
                continue;
            }
            let known = CAUGHT.iter().find(|(n, _)| n == name);
            let found = match (env("CRASH_SEEDS"), known) {
                (Some(seeds), _) => caught(name, 0, seeds),
                (None, Some((_, seed))) => caught(name, *seed, 1).or_else(|| caught(name, 0, 60)),
                (None, None) => None,
            };
            match found {
                Some((seed, what)) => report += &format!("{name:24} seed {seed}: {what}\n"),
                None => missed.push(*name),
            }
            if let Ok(path) = std::env::var("CRASH_REPORT") {
                std::fs::write(path, format!("{report}not noticed: {missed:?}\n")).expect("it is written");
            }
        }
        assert!(missed.is_empty(), "not noticed: {missed:?}\nnoticed:\n{report}");
    }

    #[test]
    fn each_directed_test_notices_its_broken_rule() {
        fault::set(Some("sync:open-slot"));
        let found = power_goes_while_open_writes_a_slot();
        fault::set(Some("sync-retried"));
        let lost = a_failed_sync_loses_an_acked_entry();
        fault::set(None);
        assert!(found.is_err(), "sync:open-slot is not noticed");
        assert!(lost, "sync-retried is not noticed");
    }

    /// Power goes right after the creation, and the disk is full by the time of the next open.
    fn opens_when_full() -> bool {
        let x = Arc::new(explorer(0, Depth::Sampled));
        let disk = SimFs::new();
        drop(open(Arc::new(disk.clone()), x.config()).unwrap_or_else(|e| panic!("{e}")));
        let used: u64 = disk.files().iter().map(|(_, len)| len.next_multiple_of(4096)).sum();
        let after = disk.crash(Crash::None, &mut *x.rng.lock());
        let there: u64 = after.files().iter().map(|(_, len)| len.next_multiple_of(4096)).sum();
        let reserved = 2 * (64 << 10);
        after.limit_space(used.min(there) + reserved);
        match open(Arc::new(after), x.config()) {
            Ok(mut machine) => machine.drain() && machine.shared.core.lock().stopped.is_none(),
            Err(_) => false,
        }
    }

    #[test]
    fn a_full_disk_misses_what_creation_did_not_sync() {
        assert!(opens_when_full());
        for (name, _) in fault::SYNCS_FOR_SPACE {
            fault::set(Some(name));
            let opens = opens_when_full();
            fault::set(None);
            assert!(!opens, "{name} is not noticed");
        }
    }
}
