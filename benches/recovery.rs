//! How long after a SIGKILL with 1 GB of state does a job commit its first new record?
//!
//! Workload: `time,ip` rows in two partitions (lz4), 38-byte IPv6 addresses drawn evenly from a fifth as many as there
//! are rows, 60 s tumbling windows, out of order by 30 min: about 30 windows are open at any time and nearly every row
//! is a cell of its own. 22,000,000 rows make 1 GB of live keys and values before the first kill; further rows move event
//! time on, so that windows close and state stays as large. Every thousandth line does not parse and goes to the dead
//! letters: an output record of every commit that waits for no window. Seed 7.
//! Durability: every topic durable (acked after its sync), a commit every 200 ms, two tasks, 256 MB of state memory, so
//! most of the state is in RocksDB only.
//! Measured: the job runs in a process of its own, which is killed in the middle of an epoch once most of the
//! changelog records that may wait for a flush (250,000) wait for it. Then it is started again; the clock runs from
//! before the start until a read-committed reader has a record that the new process committed. Kills alternate between
//! *warm* (the page cache as the dead process left it) and *cold* (every file of the data directory is synced and
//! dropped from the page cache by `posix_fadvise`; caches below this system are out of reach, the program's own pages
//! stay).
//! Answer: every group of every window that fired over all those lives equals a recount made while the rows were
//! generated, each exactly once, and so does every dead letter.
//!
//! `cargo bench -p tidemill-benches --bench recovery [-- ROWS [KILLS]]`: 22,000,000 rows before six kills.
#![allow(clippy::print_stdout, reason = "a bench prints its numbers")]
#![allow(missing_docs, reason = "a program")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hashbrown::HashMap;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use serde::{Deserialize, Serialize};
use tidemill::adapters::RunOptions;
use tidemill::engine::{CommitPolicy, Mode};
use tidemill::runtime::{Monitor, Progress};
use tidemill_benches::{directory_mb, evict, machine, read_mb, scratch};
use tidemill_broker::batch::{Compression, RecordParts};
use tidemill_broker::{
    Access, At, Broker as _, Consumer, ConsumerOptions, Data, Event, Intent, ListOffsets, ListedOffset,
    NewTopic, Position, Producer, ProducerOptions, TopicPartition, for_each_record,
};

/// The measured job, in its own module because the prelude's `Result` is the plan's.
mod job {
    use super::{Deserialize, Duration, IpAddr, Serialize};
    use tidemill::prelude::*;

    #[derive(JobArgs)]
    pub(super) struct Counts {
        /// Topic to read.
        #[arg(default = "rows")]
        input: String,
    }

    struct Row {
        at: i64,
        ip: IpAddr,
    }

    fn parse(line: &[u8]) -> Option<Row> {
        let comma = memchr::memchr(b',', line)?;
        let at = std::str::from_utf8(&line[..comma]).ok()?.parse().ok()?;
        Some(Row { at, ip: IpAddr::decode(&line[comma + 1..]).ok()? })
    }

    #[derive(Serialize, Deserialize)]
    pub(super) struct Counted {
        pub(super) end: i64,
        pub(super) ip: IpAddr,
        pub(super) count: u8,
    }

    impl Job for Counts {
        const NAME: &'static str = "bench-recovery";
        fn build(&self, flow: &Flow) -> Result<()> {
            let read = |record: RecordRef<'_>| {
                parse(record.value().unwrap_or_default()).ok_or_else(|| Malformed::new("not `time,ip`"))
            };
            let late = Duration::from_millis((super::SPAN_MS + super::SLACK_MS).unsigned_abs());
            flow.source(topic(&self.input), decode_with(read))
                .dead_letter_to(topic(super::DEAD))
                .event_time(|row: &Row| Timestamp(row.at), EventTime::out_of_order(late))
                .key_by(|row| row.ip)
                .window(Tumbling::of(Duration::from_millis(super::WINDOW_MS.unsigned_abs())))
                .count("per-ip")
                .drop_late()
                .map(|w| Counted { end: w.end.0, ip: w.key, count: w.value.try_into().unwrap_or(u8::MAX) })
                .to(topic(super::COUNTS), Json::<Counted>::new());
            Ok(())
        }
    }

    pub(super) fn spec() -> JobSpec {
        JobSpec::of::<Counts>("the windowed count")
    }
}

const WINDOW_MS: i64 = 60_000;
/// Event times of rows that follow each other differ by at most this.
const SPAN_MS: i64 = 30 * WINDOW_MS;
/// Keeps rows at the bound from being late.
const SLACK_MS: i64 = 1_000;
const PARTITIONS: u32 = 2;
const ROWS: u64 = 22_000_000;
const KILLS: u32 = 6;
/// One line in this many does not parse.
const PROBE: u64 = 1_000;
const COUNTS: &str = "counts";
const DEAD: &str = "dead";
/// How long a life may take to say what is waited for.
const PATIENCE: Duration = Duration::from_secs(900);

/// What the benchmark's process and the measured one agree on.
#[derive(Clone, Copy)]
struct Plan {
    /// Rows that build up state.
    before: u64,
    kills: u32,
}

impl Plan {
    /// Rows between two kills: the store is flushed several times in it, and a fast machine does not read all of it
    /// between two commits.
    fn cycle(self) -> u64 {
        (self.before / 20).max(1_000_000)
    }

    fn rows(self) -> u64 {
        self.before + self.cycle() * (u64::from(self.kills) + 3)
    }

    fn addresses(self) -> u64 {
        (self.before / 5).max(1)
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<u64>().context("give a number of rows, and one of kills");
    match args[..] {
        ["life", dir, ripe, total] => life(Path::new(dir), number(ripe)?, number(total)?),
        [] => bench(Plan { before: ROWS, kills: KILLS }),
        [rows] => bench(Plan { before: number(rows)?, kills: KILLS }),
        [rows, kills] => bench(Plan { before: number(rows)?, kills: u32::try_from(number(kills)?)? }),
        _ => bail!("give a number of rows, and one of kills"),
    }
}

// --- what the rows are ------------------------------------------------------------------------------------------

struct Rows {
    rng: SmallRng,
    plan: Plan,
    i: u64,
}

impl Rows {
    fn new(plan: Plan) -> Self {
        Self { rng: SmallRng::seed_from_u64(7), plan, i: 0 }
    }

    /// Event time and number of the address.
    fn next(&mut self) -> (i64, u32) {
        // Behind the rows that build up state, event time moves at the density they have.
        let moved = self.i.saturating_sub(self.plan.before) as f64 / self.plan.before as f64;
        let at = (moved * SPAN_MS as f64) as i64 + self.rng.random_range(0..SPAN_MS);
        self.i += 1;
        (at, self.rng.random_range(0..self.plan.addresses()) as u32)
    }
}

/// The address of this number: its number at the end, noise before it.
fn ip(address: u32) -> Ipv6Addr {
    let noise = u64::from(address).wrapping_mul(0x9e37_79b9_7f4a_7c15) | (1 << 63) | (1 << 47);
    Ipv6Addr::from((0x2001_0db8 << 96) | (u128::from(noise) << 32) | u128::from(address))
}

fn number(ip: IpAddr) -> Option<u32> {
    let IpAddr::V6(v6) = ip else { return None };
    let address = u128::from(v6) as u32;
    (self::ip(address) == v6).then_some(address)
}

/// Rows by window end and address, and the probes not yet seen.
struct Expected {
    counts: HashMap<i64, Vec<u8>>,
    probes: u64,
    /// Bytes of keys and values in the store's encoding, and how many, once state is built up.
    state: (u64, u64),
}

/// Appends the rows and counts them.
async fn fill(dir: &Path, plan: Plan) -> Result<Expected> {
    let access = Data::open(dir, Intent::Create).await?;
    let broker = access.broker();
    let topic = broker.create_topic(NewTopic::new("rows", PARTITIONS)).await?;
    let options = ProducerOptions { compression: Compression::Lz4, ..ProducerOptions::default() };
    let producer = Producer::open(broker, options).await?;
    let mut expected = Expected { counts: HashMap::new(), probes: 0, state: (0, 0) };
    let (mut rows, mut line) = (Rows::new(plan), Vec::new());
    for i in 0..plan.rows() {
        let (at, address) = rows.next();
        line.clear();
        if i % PROBE == PROBE - 1 {
            write!(line, "probe {}", expected.probes)?;
            expected.probes += 1;
        } else {
            let end = at - at.rem_euclid(WINDOW_MS) + WINDOW_MS;
            write!(line, "{at},{}", ip(address))?;
            let key = line.len() - line.iter().position(|b| *b == b',').unwrap_or(0) - 1;
            let counts = expected.counts.entry(end);
            let counts = counts.or_insert_with(|| vec![0; plan.addresses() as usize]);
            let count = &mut counts[address as usize];
            if *count == 0 && i < plan.before {
                // Store, shard, window end; codec version and count.
                expected.state.0 += 12 + key as u64 + 2;
                expected.state.1 += 1;
            }
            *count = count.checked_add(1).context("more than 255 rows of an address in a window")?;
        }
        let record = RecordParts { timestamp: at, value: Some(&line), ..RecordParts::default() };
        let _ack = producer.send(&topic, Some((i % u64::from(PARTITIONS)) as u32), record).await?;
    }
    producer.close().await?;
    access.close().await;
    Ok(expected)
}

// --- the benchmark's process ------------------------------------------------------------------------------------

/// What a life says, a line each.
#[derive(Serialize, Deserialize)]
enum Said {
    /// The log is open.
    Opened,
    /// The store stands at the last commit.
    Recovered { replayed: u64, rebuilt: u32 },
    /// The first commit of this life: so many rows, tasks held up for so long, and from barrier to commit.
    Committed { rows: u64, aligned_ms: u64, took_ms: u64 },
    /// A reader has a record that this life committed. So far it read this from the disk.
    Record { read_mb: f64 },
    /// It may be killed.
    Ripe { unflushed: u64, uncommitted: u64 },
    /// All rows are committed.
    Ended,
}

struct Life {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
    began: Instant,
}

impl Life {
    fn begin(dir: &Path, ripe: u64, total: u64) -> Result<Self> {
        let began = Instant::now();
        let mut child = Command::new(std::env::current_exe()?)
            .args(["life", &dir.to_string_lossy(), &ripe.to_string(), &total.to_string()])
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().context("its output is piped")?).lines();
        Ok(Self { child, lines, began })
    }

    fn next(&mut self) -> Result<Said> {
        let line = self.lines.next().context("the process ended before it said what was waited for")??;
        Ok(serde_json::from_str(&line)?)
    }

    /// What it says up to its first record, each with its time.
    fn first_record(&mut self) -> Result<First> {
        let mut first = First::default();
        loop {
            let said = self.next()?;
            let at = self.began.elapsed().as_secs_f64();
            match said {
                Said::Opened => first.opened = at,
                Said::Recovered { replayed, rebuilt } => {
                    (first.recovered, first.replayed, first.rebuilt) = (at, replayed, rebuilt);
                }
                Said::Committed { rows, aligned_ms, took_ms } => {
                    (first.committed, first.rows) = (at, rows);
                    (first.aligned_ms, first.took_ms) = (aligned_ms, took_ms);
                }
                Said::Record { read_mb } => (first.record, first.read_mb) = (at, read_mb),
                Said::Ripe { .. } | Said::Ended => bail!("it committed rows, and nobody saw a dead letter"),
            }
            // Either may be told first.
            if first.committed > 0.0 && first.record > 0.0 {
                return Ok(first);
            }
        }
    }

    /// Kills it in the middle of an epoch. Returns unflushed and uncommitted records as it saw them.
    fn kill(&mut self) -> Result<(u64, u64)> {
        loop {
            match self.next()? {
                Said::Ripe { unflushed, uncommitted } => {
                    self.child.kill()?;
                    self.child.wait()?;
                    return Ok((unflushed, uncommitted));
                }
                Said::Ended => bail!("it read all rows before it was to be killed"),
                _ => {}
            }
        }
    }

    fn end(mut self) -> Result<()> {
        while !matches!(self.next()?, Said::Ended) {}
        let status = self.child.wait()?;
        ensure!(status.success(), "the last life: {status}");
        Ok(())
    }
}

/// Seconds from the start of a process.
#[derive(Default)]
struct First {
    opened: f64,
    recovered: f64,
    committed: f64,
    rows: u64,
    aligned_ms: u64,
    took_ms: u64,
    record: f64,
    replayed: u64,
    rebuilt: u32,
    read_mb: f64,
}

fn bench(plan: Plan) -> Result<()> {
    println!("{}", machine());
    let dir = scratch()?;
    let began = Instant::now();
    let runtime = tokio::runtime::Runtime::new()?;
    let expected = runtime.block_on(fill(dir.path(), plan))?;
    let total = plan.rows();
    println!("{total} rows appended in {:.0} s", began.elapsed().as_secs_f64());
    let mut life = Life::begin(dir.path(), plan.before, total)?;
    let (mut unflushed, mut uncommitted) = life.kill()?;
    println!(
        "{} rows built up {} cells, {:.3} GB of keys and values, in {:.0} s",
        plan.before,
        expected.state.1,
        expected.state.0 as f64 / 1e9,
        life.began.elapsed().as_secs_f64()
    );
    let mut took = [Vec::new(), Vec::new()];
    for kill in 1..=plan.kills {
        let cold = kill % 2 == 0;
        let store = directory_mb(&dir.path().join("state"))?;
        if cold {
            evict(dir.path())?;
        }
        life = Life::begin(dir.path(), plan.before + plan.cycle() * u64::from(kill), total)?;
        let f = life.first_record()?;
        let name = if cold { "cold" } else { "warm" };
        println!(
            "  kill {kill} ({unflushed} records unflushed, {uncommitted} rows uncommitted; store {store:.0} MB on disk), {name}: first new record {:.2} s; \
             log open {:.2}, {} records replayed {:.2}, first commit {:.2} (its barrier {} ms before, {} of it held up, {} rows); {:.0} MB read from disk; {} shards rebuilt; {}",
            f.record,
            f.opened,
            f.replayed,
            f.recovered,
            f.committed,
            f.took_ms,
            f.aligned_ms,
            f.rows,
            f.read_mb,
            f.rebuilt,
            machine(),
        );
        took[usize::from(cold)].push(f.record);
        if kill < plan.kills {
            (unflushed, uncommitted) = life.kill()?;
        }
    }
    life.end()?;
    for (name, took) in ["warm", "cold"].iter().zip(&mut took) {
        took.sort_unstable_by(f64::total_cmp);
        if let (Some(first), Some(last)) = (took.first(), took.last()) {
            println!(
                "{name}: first new record after {:.2} s (median; {first:.2} to {last:.2})",
                took[took.len() / 2]
            );
        }
    }
    runtime.block_on(check(dir.path(), expected))
}

/// Compares everything the lives committed with the recount.
async fn check(dir: &Path, mut expected: Expected) -> Result<()> {
    let access = Data::open(dir, Intent::Use).await?;
    let (mut fired, mut groups) = (i64::MIN, 0u64);
    each_value(&access, COUNTS, |value| {
        let row: job::Counted = serde_json::from_slice(value)?;
        let place = number(row.ip).and_then(|n| expected.counts.get_mut(&row.end)?.get_mut(n as usize));
        match place {
            // Taken, so that a second result for the group is noticed.
            Some(count) if *count == row.count && row.count > 0 => *count = 0,
            other => bail!("{} {}: {} instead of {other:?}", row.end, row.ip, row.count),
        }
        (fired, groups) = (fired.max(row.end), groups + 1);
        Ok(())
    })
    .await?;
    let of_fired = expected.counts.iter().filter(|(end, _)| **end <= fired);
    let missing: u64 = of_fired.clone().flat_map(|(_, counts)| counts).map(|n| u64::from(*n)).sum();
    ensure!(missing == 0, "{missing} rows of windows that fired are in no result");
    let mut seen = vec![false; expected.probes as usize];
    each_value(&access, DEAD, |value| {
        let probe = value.strip_prefix(b"probe ").context("a dead letter that is no probe")?;
        let probe: usize = std::str::from_utf8(probe)?.parse()?;
        ensure!(!std::mem::replace(&mut seen[probe], true), "probe {probe} came twice");
        Ok(())
    })
    .await?;
    let lost = seen.iter().filter(|seen| !**seen).count();
    ensure!(lost == 0, "{lost} dead letters are missing");
    println!(
        "{groups} groups of {} windows and {} dead letters equal the recount, each once",
        of_fired.count(),
        seen.len()
    );
    access.close().await;
    Ok(())
}

/// Visits every committed record of a topic.
async fn each_value(access: &Access, topic: &str, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let described = access.broker().describe(topic.to_owned()).await?;
    let positions = (0..described.topic.partitions).map(|p| (described.topic.partition(p), Position::START));
    let mut left = described.offsets.iter().filter(|o| o.last_stable > 0).count();
    let mut consumer = Consumer::start(access.broker(), positions.collect(), ConsumerOptions::default());
    while left > 0 {
        match consumer.next().await.context("the consumer ended")?? {
            Event::Batches(consumed) => {
                let mut result = Ok(());
                for_each_record(&consumed.batches, consumed.from, |record| {
                    if result.is_ok() {
                        result = each(record.value.unwrap_or_default());
                    }
                })?;
                result.context("the answer is wrong")?;
                let end = described.offsets[consumed.partition.partition as usize].last_stable;
                left -= usize::from(consumed.next.offset >= end && consumed.from < end);
            }
            Event::CaughtUp => {}
            Event::Failed { error, .. } => return Err(error.into()),
        }
    }
    Ok(())
}

// --- the measured process ---------------------------------------------------------------------------------------

fn say(said: &Said) {
    // A reader that is gone has no use for it.
    let line = serde_json::to_string(said).unwrap_or_default();
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

/// Owns the directory and runs the job until it is killed or all rows are committed.
fn life(dir: &Path, ripe: u64, total: u64) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let access = runtime.block_on(Data::open(dir, Intent::Use))?;
    say(&Said::Opened);
    runtime.block_on(read_dead(&access))?;
    let options = RunOptions { mode: Mode::Unbounded, tasks: Some(2), ..RunOptions::default() };
    let monitor = Monitor::new();
    let watched = monitor.clone();
    let watcher = std::thread::spawn(move || watch(&watched, ripe, total));
    tidemill::adapters::run(&job::spec(), &access, &options, runtime.handle(), &monitor)?;
    monitor.stop_at_once();
    watcher.join().map_err(|_| anyhow::anyhow!("the watcher panicked"))?;
    runtime.block_on(access.close());
    say(&Said::Ended);
    Ok(())
}

/// Starts a reader of the dead letters that are committed from now on; it tells of the first. In the first life there
/// is no such topic yet.
async fn read_dead(access: &Access) -> Result<()> {
    let broker = access.broker();
    let Ok(dead) = broker.describe(DEAD.to_owned()).await else { return Ok(()) };
    let partitions: Vec<TopicPartition> =
        (0..dead.topic.partitions).map(|p| dead.topic.partition(p)).collect();
    let listed = broker.list_offsets(ListOffsets { partitions: partitions.clone(), at: At::Stable }).await?;
    let mut from = Vec::new();
    for (partition, listed) in partitions.into_iter().zip(listed.offsets) {
        let ListedOffset::Found(position) = listed else { bail!("{partition} has no offsets") };
        from.push((partition, position));
    }
    let mut consumer = Consumer::start(broker, from, ConsumerOptions::default());
    tokio::spawn(async move {
        while let Some(Ok(event)) = consumer.next().await {
            let Event::Batches(consumed) = event else { continue };
            let mut records = 0;
            let read = for_each_record(&consumed.batches, consumed.from, |_| records += 1);
            if read.is_ok() && records > 0 {
                say(&Said::Record { read_mb: read_mb().unwrap_or(f64::NAN) });
                return;
            }
        }
    });
    Ok(())
}

/// Tells how far the run is; stops it at the end.
fn watch(monitor: &Monitor, ripe: u64, total: u64) {
    let wait = Duration::from_millis(100);
    let deadline = Instant::now() + PATIENCE;
    let going = || monitor.asked() == tidemill::runtime::Stop::No;
    let done = |p: &Progress| p.committed.values().sum::<i64>().unsigned_abs();
    while going() && !monitor.wait_until(wait, |p| p.running) {}
    let p = monitor.progress();
    say(&Said::Recovered { replayed: p.replayed, rebuilt: p.rebuilt });
    let bound = CommitPolicy::default().flush_records_max as u64;
    let (mut commits, mut flushes, mut flushed, mut told) = (0, 0, 0, false);
    while going() {
        if !monitor.wait_until(wait, |p| p.commits > commits || p.flushes > flushes) {
            if Instant::now() > deadline {
                monitor.stop_at_once();
            }
            continue;
        }
        let p = monitor.progress();
        if commits == 0 && p.commits > 0 {
            say(&Said::Committed {
                rows: p.rows_committed,
                aligned_ms: p.aligned_in.as_millis() as u64,
                took_ms: p.committed_in.as_millis() as u64,
            });
        }
        if p.flushes > flushes {
            // What was committed while the flush ran is not in it: what is told below is the least.
            flushed = p.changelog_records;
        }
        (commits, flushes) = (p.commits, p.flushes);
        if done(&p) == total {
            monitor.stop();
            return;
        }
        let unflushed = p.changelog_records - flushed;
        // A short run never comes near the bound.
        let near = unflushed >= bound / 2 || total < 40 * bound;
        if !told && done(&p) >= ripe && near {
            let begun = |p: &Progress| p.counters.rows_in > p.rows_committed;
            if monitor.wait_until(wait, begun) {
                let uncommitted = p.counters.rows_in.saturating_sub(p.rows_committed);
                say(&Said::Ripe { unflushed, uncommitted });
                told = true;
            }
        }
    }
}
