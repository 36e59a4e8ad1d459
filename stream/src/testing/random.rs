//! Random small jobs against a sequential reference: the executable model of time, with the engine's own machines.
//!
//! A seed gives a job (window, bound, rows per partition, partitions that appear late, bounded runs followed by more
//! data) and a schedule (batch sizes, tasks, delivery order, idleness, crashes, aborts, lost answers, store writes,
//! flushes, evictions, trims). What was committed is compared with [`reference`], which reads every partition in order
//! and knows neither tasks, channels, epochs nor crashes; it is told the recorded decisions: joins and bounded ends.
//!
//! Held besides: no row that is not late meets a closed window, and all tasks snapshot at one value of time (the engine
//! says so itself); at most one result per window and key; no task keeps time back at the end; the store, once written
//! and flushed, holds what the committed changelog folds to.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};

use super::memory_log::{EndFate, MemoryLog};
use super::process::{Fate, Process, ProcessError};
use crate::codec::{Malformed, decode_with, state as codec};
use crate::dsl::{Flow, topic};
use crate::engine::poison::Triage;
use crate::engine::recovery::Setup;
use crate::engine::{CommitPolicy, CommitStep, Event, Layout, Mode};
use crate::error::Result as PlanResult;
use crate::io::{Cleanup, Log, NewTopic};
use crate::names::{Identity, PartitionMark};
use crate::plan::{Job, Plan};
use crate::record::{OutRecord, RecordRef};
use crate::state::{Marks, MemoryState, mark_of_changelog_key, window_and_key};
use crate::time::{END, EventTime, MIN, Tumbling, Window};

const SHARDS: u16 = 4;
/// Milliseconds after which a partition is idle here.
const IDLE: i64 = 10;

/// The engine broke a promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation(pub String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<ProcessError> for Violation {
    fn from(e: ProcessError) -> Self {
        Self(e.to_string())
    }
}

/// What a simulation went through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Input rows.
    pub rows: usize,
    /// Results.
    pub outputs: usize,
    /// Late rows.
    pub late: usize,
    /// Crashes.
    pub crashes: usize,
    /// Aborted epochs.
    pub aborts: usize,
    /// Ends of bounded runs.
    pub bounded_ends: usize,
    /// Joins above a partition's own value.
    pub joins: usize,
    /// Changelog records replayed.
    pub replayed: u64,
    /// Cells evicted.
    pub evicted: u64,
    /// Cells read back.
    pub store_hits: u64,
}

impl Tally {
    /// Adds another simulation's.
    pub fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.outputs += other.outputs;
        self.late += other.late;
        self.crashes += other.crashes;
        self.aborts += other.aborts;
        self.bounded_ends += other.bounded_ends;
        self.joins += other.joins;
        self.replayed += other.replayed;
        self.evicted += other.evicted;
        self.store_hits += other.store_hits;
    }
}

#[derive(Clone, Copy, Debug)]
struct Row {
    t: i64,
    key: u64,
}

/// The random input and plan. The schedule draws from another generator.
#[derive(Debug)]
struct RandomJob {
    size: i64,
    offset: i64,
    bound: i64,
    /// Groups in the local table; 0: off.
    combine: usize,
    rows: Vec<Vec<Row>>,
    idle: bool,
    /// Partitions at the job's first start.
    partitions: usize,
    /// True: a run until the end.
    runs: Vec<bool>,
    crashes: usize,
}

impl RandomJob {
    fn new(rng: &mut SmallRng) -> Self {
        let size = rng.random_range(2..=5);
        let parts = rng.random_range(1..=4);
        let keys = rng.random_range(1..=3);
        let rows = (0..parts).map(|_| {
            let mut t = rng.random_range(-12..=6);
            let rows = (0..rng.random_range(0..=9)).map(|_| {
                t += [0, 1, 1, 2, 3, 8].choose(rng).expect("not empty");
                let back = [0, 0, 1, 3, 6].choose(rng).expect("not empty");
                Row { t: t - back, key: rng.random_range(0..keys) }
            });
            rows.collect()
        });
        let rows = rows.collect();
        let decisions = rng.random_bool(0.7);
        let runs = if decisions { rng.random_range(1..=3) } else { 1 };
        Self {
            size,
            offset: rng.random_range(0..size),
            bound: rng.random_range(0..=3),
            combine: *[0, 0, 1, 2, 4].choose(rng).expect("not empty"),
            rows,
            idle: decisions && rng.random_bool(0.7),
            partitions: if decisions { rng.random_range(1..=parts) } else { parts },
            runs: (0..runs).map(|_| rng.random_bool(0.5)).collect(),
            crashes: *[0, 1, 2, 4].choose(rng).expect("not empty"),
        }
    }

    fn windows(&self) -> Tumbling {
        Tumbling { size: self.size, offset: self.offset }
    }
}

fn number(from: &[u8], at: usize) -> i64 {
    i64::from_be_bytes(from[at..at + 8].try_into().expect("8 bytes"))
}

fn read_row(record: RecordRef<'_>) -> Result<Row, Malformed> {
    let value = record.value().unwrap_or_default();
    Ok(Row { t: number(value, 0), key: number(value, 8).unsigned_abs() })
}

impl Job for RandomJob {
    const NAME: &'static str = "random";
    fn build(&self, flow: &Flow) -> PlanResult<()> {
        let millis = |n: i64| Duration::from_millis(n.unsigned_abs());
        let event_time = EventTime::out_of_order(millis(self.bound)).idle_after(millis(IDLE));
        flow.source(topic("in"), decode_with(read_row))
            .event_time(|row| row.t, event_time)
            .key_by(|row| row.key)
            .window(Tumbling::of(millis(self.size)).offset(millis(self.offset)))
            .count("counts")
            .late_to(topic("late"))
            .to(topic("out"), Columns);
        Ok(())
    }
}

/// Window end and count, big-endian.
struct Columns;

impl crate::codec::Encoder<Window<u64, u64>> for Columns {
    fn encode(&self, w: &Window<u64, u64>, to: &mut Vec<u8>) -> Result<(), Malformed> {
        to.extend_from_slice(&w.end.millis().to_be_bytes());
        to.extend_from_slice(&w.value.to_be_bytes());
        Ok(())
    }
}

/// What outlives a process: log, store, and the decisions recorded by commits.
struct World {
    job: RandomJob,
    plan: Plan,
    log: MemoryLog,
    state: Arc<MemoryState>,
    /// Rows that are in the log, by partition.
    visible: Vec<usize>,
    /// Partitions that exist.
    exists: usize,
    crashes: usize,
    joins: BTreeMap<(u32, i64), i64>,
    /// Offsets at the ends of bounded runs.
    ends: Vec<BTreeMap<u32, i64>>,
    reached: i64,
    now: i64,
    tally: Tally,
    trace: Option<Vec<String>>,
}

/// `(window end, key) -> count`.
type Counts = BTreeMap<(i64, u64), u64>;

impl World {
    fn new(seed: u64) -> Self {
        let job = RandomJob::new(&mut SmallRng::seed_from_u64(seed));
        let log = MemoryLog::default();
        let partitions = job.partitions as u32;
        let new = NewTopic { name: "in".to_owned(), partitions, cleanup: Cleanup::Delete };
        log.create_topic(&new).expect("a log in memory");
        let plan = Plan::of(&job).expect("the random job's plan");
        let rows = job.rows.iter().map(Vec::len).sum();
        Self {
            plan,
            log,
            state: Arc::default(),
            visible: vec![0; job.rows.len()],
            exists: job.partitions,
            crashes: job.crashes,
            joins: BTreeMap::new(),
            ends: Vec::new(),
            reached: MIN,
            now: 0,
            tally: Tally { rows, ..Tally::default() },
            trace: None,
            job,
        }
    }

    fn say(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(text());
        }
    }

    /// Appends rows until `upto` of the partition's are in the log.
    fn show(&mut self, p: usize, upto: usize) {
        while p < self.exists && self.visible[p] < upto.min(self.job.rows[p].len()) {
            let row = self.job.rows[p][self.visible[p]];
            let mut value = row.t.to_be_bytes().to_vec();
            value.extend_from_slice(&row.key.to_be_bytes());
            value.extend_from_slice(&(p as u64).to_be_bytes());
            value.extend_from_slice(&(self.visible[p] as u64).to_be_bytes());
            let record =
                OutRecord { timestamp: 0, key: None, value: Some(value.into()), headers: Vec::new() };
            self.log.append("in", p as u32, record);
            self.visible[p] += 1;
        }
    }

    fn appear(&mut self) {
        self.log.add_partition("in");
        self.exists += 1;
    }

    fn run(&mut self, rng: &mut SmallRng, bounded: bool) -> Result<How, Violation> {
        if rng.random_bool(0.2) {
            // The store's directory is lost, or its position does not hold.
            self.state.wipe();
        }
        let layout = Layout {
            sources: rng.random_range(1..=3),
            keyed: rng.random_range(1..=3),
            shards: SHARDS,
            combine_groups_max: self.job.combine,
            overlay_bytes_max: if rng.random_bool(0.3) { 100 } else { 1 << 20 },
        };
        let setup = Setup {
            plan: self.plan.clone(),
            identity: Identity::new("random").expect("a legal name"),
            layout,
            mode: if bounded { Mode::UntilEnd } else { Mode::Unbounded },
        };
        // Commits and store writes come from the schedule.
        let never = usize::MAX;
        let policy = CommitPolicy {
            interval: i64::MAX,
            write_bytes_max: never,
            flush_bytes_max: never,
            flush_records_max: never,
        };
        let mut triage = Triage::new(&self.plan, 1, Vec::new());
        let mut process = Process::start(&setup, policy, &self.log, &self.state, self.now, &mut triage)?;
        self.tally.replayed += process.start.replayed;
        let start = &process.start;
        self.say(|| {
            let Layout { sources, keyed, .. } = start.layout;
            format!(
                "-- start {:?}: {sources} source tasks, {keyed} keyed, floor {}, {:?}, {:?}, replayed {} rebuilt {}",
                start.mode, start.floor, start.marks, start.partitions, start.replayed, start.rebuilt
            )
        });
        let how = self.drive(&mut process, rng, bounded);
        let counters = process.counters();
        self.tally.evicted += counters.evicted;
        self.tally.store_hits += counters.store_hits;
        how
    }

    /// Carries out one action of the coordinator; follows what it commits.
    fn act(&mut self, process: &mut Process) -> Result<Option<How>, Violation> {
        Ok(match self.step(process)? {
            None | Some(Fate::Lives) => None,
            Some(Fate::Restart) => {
                self.tally.aborts += 1;
                Some(How::Again)
            }
            Some(Fate::Done(_)) => Some(How::Done),
        })
    }

    /// One action; notes what a commit records, whether the coordinator learns of it or not.
    fn step(&mut self, process: &mut Process) -> Result<Option<Fate>, Violation> {
        let commits = self.log.commits();
        let outlook = process.coordinator.outlook();
        let next = self.trace.is_some().then(|| process.describe_next());
        let fate = process.act()?;
        self.say(|| next.unwrap_or_default());
        if self.log.commits() > commits {
            for join in &outlook.joins {
                let value = self.joins.entry((join.partition, join.offset)).or_insert(MIN);
                *value = join.value.max(*value);
                self.tally.joins += 1;
            }
            if outlook.reached < END {
                self.reached = self.reached.max(outlook.reached);
            } else {
                let ends =
                    self.log.group("random").iter().map(|c| (c.partition, c.position.offset)).collect();
                self.ends.push(ends);
                self.tally.bounded_ends += 1;
            }
        }
        Ok(fate)
    }

    fn drive(&mut self, process: &mut Process, rng: &mut SmallRng, bounded: bool) -> Result<How, Violation> {
        process.begin()?;
        let mut stopping = false;
        for _ in 0..20_000 {
            self.now += 1;
            process.set_now(self.now);
            let sources = process.sources.len();
            let partition = |rng: &mut SmallRng, exists: usize| rng.random_range(0..exists) as u32;
            match rng.random_range(0..1000) {
                0..380 => {
                    process.deliver(rng.random_range(0..process.channels()))?;
                }
                380..540 if !stopping => {
                    let p = partition(rng, self.exists);
                    if process.read(p, rng.random_range(1..=4))? {
                        let task = &process.sources[process.source_of(p)];
                        let at = task.partitions().find(|x| x.0 == p).map(|x| x.1.offset);
                        let watermark = task.watermark(p);
                        self.say(|| format!("read p{p} to {at:?}, event-time watermark {watermark}"));
                    }
                }
                540..650 => {
                    let source = rng.random_range(0..sources);
                    process.publish(source)?;
                    self.say(|| format!("source task {source} publishes {}", process.place.floor()));
                }
                650..670 => {
                    if !bounded && self.all_read(process) {
                        stopping = true;
                        process.event(Event::Stop)?;
                    } else {
                        process.event(Event::Commit)?;
                    }
                }
                670..750 => {
                    let source = rng.random_range(0..sources);
                    if process.barrier(source)? {
                        self.say(|| format!("source task {source} barrier"));
                    }
                }
                750..860 => {
                    if process.next_step() == Some(CommitStep::End)
                        && self.crashes > 0
                        && rng.random_bool(0.3)
                    {
                        self.crashes -= 1;
                        let fates = [EndFate::Abort, EndFate::AbortUnknown, EndFate::CommitUnknown];
                        self.log.next_end(*fates.choose(rng).expect("not empty"));
                    }
                    if let Some(how) = self.act(process)? {
                        if how == How::Done && !bounded {
                            self.time_is_not_kept_back(process)?;
                        }
                        return Ok(how);
                    }
                }
                860..885 if self.job.idle && !bounded && !stopping => {
                    let p = partition(rng, self.exists);
                    process.nothing(p, true, self.now);
                    process.nothing(p, true, self.now + IDLE);
                    self.say(|| format!("partition {p} idle"));
                }
                885..920 if !stopping => {
                    let p = rng.random_range(0..self.job.rows.len());
                    if p >= self.exists && !bounded {
                        self.appear();
                        process.assign(self.exists as u32 - 1);
                    }
                    self.show(p, self.visible[p] + rng.random_range(1..=4));
                }
                920..960 => self.maintain(process, rng)?,
                960..975 if self.crashes > 0 => {
                    self.crashes -= 1;
                    self.crash(process, rng)?;
                    return Ok(How::Again);
                }
                _ => {}
            }
        }
        Err(Violation("the job does not end".to_owned()))
    }

    fn crash(&mut self, process: &mut Process, rng: &mut SmallRng) -> Result<(), Violation> {
        self.tally.crashes += 1;
        // The end of the transaction had been written, and nobody was told.
        if process.next_step() == Some(CommitStep::End) && rng.random_bool(0.5) {
            self.step(process)?;
        }
        self.say(|| "-- crash".to_owned());
        self.log.next_end(EndFate::Commit);
        self.state.crash();
        Ok(())
    }

    fn all_read(&self, process: &Process) -> bool {
        let positions = || process.sources.iter().flat_map(|s| s.partitions());
        let shown =
            self.job.rows.iter().zip(&self.visible).take(self.exists).all(|(rows, v)| *v == rows.len());
        shown && positions().all(|(p, at, _)| at.offset == self.visible[p as usize] as i64)
    }

    fn time_is_not_kept_back(&self, process: &Process) -> Result<(), Violation> {
        let (reached, value) = (process.keyed[0].reached(), process.place.job_value());
        // The last epoch was empty, or time is where it should be.
        if reached == value {
            Ok(())
        } else {
            Err(Violation(format!("time stays at {reached}, the job value is {value}")))
        }
    }

    fn maintain(&mut self, process: &mut Process, rng: &mut SmallRng) -> Result<(), Violation> {
        let what = rng.random_range(0..4);
        self.say(|| format!("maintain {what}"));
        match what {
            0 => process.event(Event::WriteNow)?,
            1 => process.event(Event::FlushNow)?,
            2 => process.evict(rng.random_range(0..process.keyed.len())),
            _ => {
                // The start of the window store's changelog moves up to the first record an open window needs.
                let closed = self.marks().closed;
                let mut first: BTreeMap<u32, i64> = BTreeMap::new();
                let mut last: BTreeMap<u32, i64> = BTreeMap::new();
                for (p, offset, record) in self.log.records("random-counts-changelog") {
                    last.insert(p, offset + 1);
                    let end = record.key.as_deref().and_then(window_and_key).map_or(MIN, |(end, _)| end);
                    if end > closed {
                        first.entry(p).or_insert(offset);
                    }
                }
                for (p, end) in last {
                    self.log.trim("random-counts-changelog", p, first.get(&p).copied().unwrap_or(end));
                }
            }
        }
        Ok(())
    }

    fn marks(&self) -> Marks {
        let mut marks = Marks::NONE;
        for (_, _, record) in self.log.records("random-keyed-changelog") {
            let (key, value) = (record.key.unwrap_or_default(), record.value.unwrap_or_default());
            if mark_of_changelog_key(&key).is_some() {
                marks.raise(Marks::decode(&value).expect("marks of the engine"));
            }
        }
        marks
    }

    /// The committed changelog's fold: what is open.
    fn open_state(&self) -> Counts {
        let closed = self.marks().closed;
        let mut open = Counts::new();
        for (_, _, record) in self.log.records("random-counts-changelog") {
            let (key, value) = (record.key.unwrap_or_default(), record.value.unwrap_or_default());
            let (end, key) = window_and_key(&key).expect("a cell's key");
            if end > closed {
                open.insert((end, number(key, 0).unsigned_abs()), codec::decode(&value).expect("a count"));
            }
        }
        open
    }

    fn stored_state(&self) -> Counts {
        let closed = self.marks().closed;
        let mut stored = Counts::new();
        for (key, value) in self.state.dump() {
            if key[..2] != [0, 0] {
                let (end, key) = window_and_key(&key[4..]).expect("a cell's key");
                if end > closed {
                    let count = codec::decode(&value).expect("a count");
                    stored.insert((end, number(key, 0).unsigned_abs()), count);
                }
            }
        }
        stored
    }

    fn check(&mut self) -> Result<(), Violation> {
        let mut outputs = Counts::new();
        for (_, _, record) in self.log.records("out") {
            let (key, value) = (record.key.unwrap_or_default(), record.value.unwrap_or_default());
            let (end, key) = (number(&value, 0), number(&key, 0).unsigned_abs());
            if record.timestamp != end - 1 {
                return Err(Violation(format!("result of {end} has time {}", record.timestamp)));
            }
            if outputs.insert((end, key), number(&value, 8).unsigned_abs()).is_some() {
                return Err(Violation(format!("second result for window {end} key {key}")));
            }
        }
        let mut late = BTreeMap::<(u64, u64), u64>::new();
        for (_, _, record) in self.log.records("late") {
            let value = record.value.unwrap_or_default();
            *late
                .entry((number(&value, 16).unsigned_abs(), number(&value, 24).unsigned_abs()))
                .or_default() += 1;
        }
        self.tally.outputs = outputs.len();
        self.tally.late = late.len();
        let (want_outputs, want_late, want_open) = reference(self);
        let open = self.open_state();
        differ("output", &outputs, &want_outputs)?;
        differ("late rows", &late, &want_late)?;
        differ("open state", &open, &want_open)?;
        differ("the store", &self.stored_state(), &open)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Again,
    Done,
}

fn differ<K: Ord + fmt::Debug, V: PartialEq + fmt::Debug>(
    what: &str,
    have: &BTreeMap<K, V>,
    want: &BTreeMap<K, V>,
) -> Result<(), Violation> {
    if have == want {
        return Ok(());
    }
    let only = |a: &BTreeMap<K, V>, b: &BTreeMap<K, V>| {
        let only = a.iter().filter(|(k, v)| b.get(k) != Some(v));
        only.map(|(k, v)| format!("{k:?}: {v:?}")).collect::<Vec<_>>().join(", ")
    };
    let (run, reference) = (only(have, want), only(want, have));
    Err(Violation(format!("{what}: only in the run [{run}], only in the reference [{reference}]")))
}

/// Every partition read in order: expected outputs, late rows (partition, row) and open state.
fn reference(world: &World) -> (Counts, BTreeMap<(u64, u64), u64>, Counts) {
    let (job, windows) = (&world.job, world.job.windows());
    let mut watermark = vec![MIN; job.rows.len()];
    let mut at = vec![0usize; job.rows.len()];
    let (mut outputs, mut late, mut open, mut closed) = (Counts::new(), BTreeMap::new(), Counts::new(), MIN);
    let committed = world.log.group("random");
    for c in &committed {
        assert!(PartitionMark::decode(&c.metadata).is_some(), "an offset without a mark");
    }
    let last = committed.into_iter().map(|c| (c.partition, c.position.offset)).collect();
    let mut segments: Vec<_> = world.ends.iter().map(|ends| (ends, END)).collect();
    segments.push((&last, world.reached));
    for (ends, reached) in segments {
        let mut counts = Counts::new();
        for (p, offset) in ends {
            let p = *p as usize;
            for i in at[p]..(*offset as usize) {
                let Row { t, key } = job.rows[p][i];
                let joined = world.joins.get(&(p as u32, i as i64)).copied().unwrap_or(MIN);
                watermark[p] = watermark[p].max(joined);
                let end = windows.end_of(t);
                if end - 1 <= watermark[p] || end <= closed {
                    late.insert((p as u64, i as u64), 1);
                } else {
                    *counts.entry((end, key)).or_default() += 1;
                }
                watermark[p] = watermark[p].max(t - job.bound - 1);
            }
            at[p] = *offset as usize;
        }
        for ((end, key), count) in counts {
            if end - 1 <= reached {
                outputs.insert((end, key), count);
            } else {
                open.insert((end, key), count);
            }
        }
        if reached == END {
            closed = outputs.keys().map(|(end, _)| *end).fold(closed, i64::max);
        }
    }
    (outputs, late, open)
}

/// Runs one random job to its end and compares.
///
/// # Errors
///
/// The first broken promise.
pub fn simulate(seed: u64) -> Result<Tally, Violation> {
    let mut world = World::new(seed);
    world.simulate(seed)?;
    Ok(world.tally)
}

/// The same, with what happened in words.
pub fn trace(seed: u64) -> (Result<Tally, Violation>, Vec<String>) {
    let mut world = World::new(seed);
    world.trace = Some(vec![format!("{:?}", world.job)]);
    let result = world.simulate(seed);
    (result.map(|()| world.tally), world.trace.unwrap_or_default())
}

impl World {
    fn simulate(&mut self, seed: u64) -> Result<(), Violation> {
        let mut rng = SmallRng::seed_from_u64(seed.wrapping_mul(7919).wrapping_add(1));
        let runs = self.job.runs.clone();
        for (i, bounded) in runs.iter().enumerate() {
            let last = i + 1 == runs.len();
            if last && (*bounded || rng.random_bool(0.5)) {
                while self.exists < self.job.rows.len() {
                    self.appear();
                }
            }
            for p in 0..self.job.rows.len() {
                let all = self.job.rows[p].len();
                let upto = if last { all } else { rng.random_range(self.visible[p]..=all) };
                self.show(p, upto);
            }
            while self.run(&mut rng, *bounded)? == How::Again {
                for p in 0..self.job.rows.len() {
                    let more = if rng.random_bool(0.3) { 2 } else { 0 };
                    self.show(p, self.visible[p] + more);
                }
            }
        }
        self.check()
    }
}
