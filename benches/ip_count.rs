//! How fast is the windowed count, exactly once, through the whole path: log, engine, RocksDB, transactions?
//!
//! Workload: `time,ip` rows in two partitions (lz4, 256 KiB batches), 100,000 addresses by a Zipf law of 0.9, event time
//! jittered by half a second, 5 s tumbling windows, out of order by 1 s, results as JSON keyed by address. Two
//! densities: `thin` has 100 rows per ms of event time (500,000 rows and about 75,000 groups a window, whose state
//! lives less than a commit), `dense` has 4,000 (20,000,000 rows a window: each spans several commits, so that state
//! goes through changelog and store). Seed 7.
//! Durability: every topic durable (acked after its sync), a commit every second, two tasks.
//! Beside it, in the same run: a bare loop that reads the same rows from a file, parses and counts them in a hash
//! table on one core.
//!
//! The rows are in the log before the measured process starts. *Whole process* is from its start to its exit, with
//! start, recovery and closing; *steady* is between its first commit and its last but one, by committed rows. Answer:
//! every group of the committed output is compared with a recount made while the rows were generated.
//!
//! `cargo bench -p tidemill-benches --bench ip_count [-- full [thin | dense] | ROWS]`: 5,000,000 rows each, or in `full`
//! mode 80 s worth of rows at the speed that a first run of 40,000,000 shows.
#![allow(clippy::print_stdout, reason = "a bench prints its numbers")]
#![allow(missing_docs, reason = "a program")]

use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hashbrown::HashMap;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use serde::{Deserialize, Serialize};
use tidemill::adapters::RunOptions;
use tidemill::engine::Mode;
use tidemill::runtime::Monitor;
use tidemill_benches::{Cost, Spread, machine, scratch};
use tidemill_broker::batch::{Compression, RecordParts};
use tidemill_broker::{
    Broker as _, Consumer, ConsumerOptions, Data, Event, Intent, NewTopic, Position, Producer,
    ProducerOptions, for_each_record,
};

/// The measured job, in its own module because the prelude's `Result` is the plan's.
mod job {
    use super::{Count, Deserialize, Duration, IpAddr, Serialize};
    use tidemill::prelude::*;

    #[derive(JobArgs)]
    pub(super) struct IpCount {
        /// Topic to read.
        #[arg(default = "rows")]
        input: String,
        /// Topic to write.
        #[arg(default = "counts")]
        output: String,
    }

    /// One row of input.
    #[derive(Clone, Copy)]
    pub(super) struct Row {
        pub(super) at: i64,
        pub(super) ip: IpAddr,
    }

    /// `time,ip`. The same code serves the bare loop.
    pub(super) fn parse(line: &[u8]) -> Option<Row> {
        let comma = line.iter().position(|b| *b == b',')?;
        let mut at = 0i64;
        for b in &line[..comma] {
            let digit = b.wrapping_sub(b'0');
            if digit > 9 {
                return None;
            }
            at = at.checked_mul(10)?.checked_add(i64::from(digit))?;
        }
        Some(Row { at, ip: IpAddr::decode(&line[comma + 1..]).ok()? })
    }

    #[derive(Serialize, Deserialize)]
    pub(super) struct Counted {
        pub(super) end: i64,
        pub(super) ip: IpAddr,
        pub(super) count: u64,
    }

    impl Job for IpCount {
        const NAME: &'static str = "bench-ip-count";
        fn build(&self, flow: &Flow) -> Result<()> {
            let read = |record: RecordRef<'_>| {
                parse(record.value().unwrap_or_default()).ok_or_else(|| Malformed::new("not `time,ip`"))
            };
            flow.source(topic(&self.input), decode_with(read))
                .event_time(|row: &Row| Timestamp(row.at), EventTime::out_of_order(Duration::from_secs(1)))
                .key_by(|row| row.ip)
                .window(Tumbling::of(Duration::from_millis(super::WINDOW_MS.unsigned_abs())))
                .count("per-ip")
                .drop_late()
                .map(|w| Counted { end: w.end.0, ip: w.key, count: w.value })
                .to(topic(&self.output), Json::<Counted>::new());
            Ok(())
        }
    }

    pub(super) fn spec() -> JobSpec {
        JobSpec::of::<IpCount>("the windowed count")
    }

    /// A count in a bare loop's table.
    pub(super) fn add(counts: &mut Count, row: Row) {
        let end = row.at - row.at.rem_euclid(super::WINDOW_MS) + super::WINDOW_MS;
        *counts.entry((end, row.ip)).or_insert(0) += 1;
    }
}

const WINDOW_MS: i64 = 5_000;
const ADDRESSES: usize = 100_000;
const PARTITIONS: u32 = 2;
/// Rows of a short run, and of the bare loop's file.
const SHORT: u64 = 5_000_000;
/// What a full run is to last.
const FULL_S: f64 = 80.0;

type Count = HashMap<(i64, IpAddr), u64, foldhash::fast::FixedState>;

/// What the measured process says.
#[derive(Serialize, Deserialize)]
struct Measured {
    rows: u64,
    commits: u64,
    steady_rows: u64,
    steady_s: f64,
    steady_cpu_s: f64,
    start_s: f64,
    run_s: f64,
    stall: Spread,
    commit: Spread,
    changelog_records: u64,
    exchanged: u64,
    output: u64,
    cost: Cost,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["measured", dir] => measured(Path::new(dir)),
        ["bare", file] => bare(Path::new(file)),
        ["full"] => bench(None, None),
        ["full", density] => bench(None, Some(density)),
        [] => bench(Some(SHORT), None),
        [rows] => bench(Some(rows.parse().context("give `full` or a number of rows")?), None),
        _ => bail!("give `full`, `full thin`, `full dense`, or a number of rows"),
    }
}

fn bench(rows: Option<u64>, only: Option<&str>) -> Result<()> {
    println!("{}", machine());
    let (loop_rate, loop_cpu) = bare_rate(rows.unwrap_or(SHORT).min(SHORT))?;
    for (name, per_ms) in [("thin", 100), ("dense", 4_000)] {
        if only.is_some_and(|only| only != name) {
            continue;
        }
        let rows = match rows {
            Some(rows) => rows,
            None => {
                let (first, _) = one(8 * SHORT, per_ms)?;
                (first.rows as f64 / first.run_s * FULL_S) as u64
            }
        };
        let (m, whole) = one(rows, per_ms)?;
        let whole_s = whole.as_secs_f64();
        let (steady, all) = (m.steady_rows as f64 / m.steady_s, rows as f64 / whole_s);
        println!("{name}: {rows} rows at {per_ms} per ms; every committed group equals the recount");
        println!(
            "  steady state   {:.2} M rows/s over {:.1} s and {} commits = {:.1} % of the bare loop; {:.0} ns of processor a row, {:.2} times the loop's",
            steady / 1e6,
            m.steady_s,
            m.commits,
            100.0 * steady / loop_rate,
            m.steady_cpu_s / m.steady_rows as f64 * 1e9,
            m.steady_cpu_s / m.steady_rows as f64 / loop_cpu,
        );
        println!(
            "  whole process  {:.2} M rows/s = {:.1} % of the bare loop; {whole_s:.2} s (start {:.2} s, run {:.2} s), {:.1} s of processor",
            all / 1e6,
            100.0 * all / loop_rate,
            m.start_s,
            m.run_s,
            m.cost.cpu_s,
        );
        println!("  load afterwards {}", machine());
        println!("  commit         stall {}; until committed {}", m.stall, m.commit);
        println!(
            "  moved          {} groups exchanged, {} changelog records, {} results; {:.0} MB written, {:.0} MB to disk; peak memory {:.0} MB",
            m.exchanged, m.changelog_records, m.output, m.cost.written_mb, m.cost.disk_mb, m.cost.peak_mb,
        );
    }
    Ok(())
}

/// Generates, measures and checks one run.
fn one(rows: u64, per_ms: u64) -> Result<(Measured, Duration)> {
    let dir = scratch()?;
    let runtime = tokio::runtime::Runtime::new()?;
    let expected = runtime.block_on(fill(dir.path(), rows, per_ms))?;
    let began = Instant::now();
    let said = child(&["measured", &dir.path().to_string_lossy()])?;
    let whole = began.elapsed();
    let measured: Measured = serde_json::from_str(&said)?;
    ensure!(measured.rows == rows, "the run read {} of {rows} rows", measured.rows);
    runtime.block_on(check(dir.path(), expected))?;
    Ok((measured, whole))
}

/// Runs this program again; what it printed.
fn child(args: &[&str]) -> Result<String> {
    let output = Command::new(std::env::current_exe()?).args(args).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "{args:?}: {}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// Rows by seed.
struct Rows {
    rng: SmallRng,
    sums: Vec<f64>,
    per_ms: u64,
    i: u64,
}

impl Rows {
    fn new(per_ms: u64) -> Self {
        let mut sum = 0.0;
        let sums = (1..=ADDRESSES).map(|i| {
            sum += (i as f64).powf(-0.9);
            sum
        });
        Self { sums: sums.collect(), rng: SmallRng::seed_from_u64(7), per_ms, i: 0 }
    }

    /// Event time and number of the address.
    fn next(&mut self) -> (i64, usize) {
        let drawn = self.rng.random_range(0.0..self.sums[ADDRESSES - 1]);
        let address = self.sums.partition_point(|s| *s < drawn);
        let at = (self.i / self.per_ms).cast_signed() + self.rng.random_range(0..500);
        self.i += 1;
        (at, address)
    }
}

/// The address of this number: spread over 10.0.0.0/8, so that neighbours share no prefix.
fn ip(address: usize) -> Ipv4Addr {
    Ipv4Addr::from(0x0a00_0000 + (address as u32).wrapping_mul(2_654_435_761) % (1 << 24))
}

/// Appends the rows and counts them by window and address number.
async fn fill(dir: &Path, rows: u64, per_ms: u64) -> Result<HashMap<i64, Vec<u32>>> {
    let access = Data::open(dir, Intent::Create).await?;
    let broker = access.broker();
    let topic = broker.create_topic(NewTopic::new("rows", PARTITIONS)).await?;
    let options = ProducerOptions { compression: Compression::Lz4, ..ProducerOptions::default() };
    let producer = Producer::open(broker, options).await?;
    let (mut counts, mut source, mut line) = (HashMap::<i64, Vec<u32>>::new(), Rows::new(per_ms), Vec::new());
    for i in 0..rows {
        let (at, address) = source.next();
        let end = at - at.rem_euclid(WINDOW_MS) + WINDOW_MS;
        counts.entry(end).or_insert_with(|| vec![0; ADDRESSES])[address] += 1;
        line.clear();
        write!(line, "{at},{}", ip(address))?;
        let record = RecordParts { timestamp: at, value: Some(&line), ..RecordParts::default() };
        let _ack = producer.send(&topic, Some((i % u64::from(PARTITIONS)) as u32), record).await?;
    }
    producer.close().await?;
    access.close().await;
    Ok(counts)
}

/// Compares the committed output with the recount.
async fn check(dir: &Path, mut expected: HashMap<i64, Vec<u32>>) -> Result<()> {
    let numbers: HashMap<IpAddr, usize> = (0..ADDRESSES).map(|i| (IpAddr::V4(ip(i)), i)).collect();
    ensure!(numbers.len() == ADDRESSES, "addresses are distinct");
    let access = Data::open(dir, Intent::Use).await?;
    let described = access.broker().describe("counts".to_owned()).await?;
    let positions = (0..described.topic.partitions).map(|p| (described.topic.partition(p), Position::START));
    let mut left = described.offsets.iter().filter(|o| o.last_stable > 0).count();
    let mut consumer = Consumer::start(access.broker(), positions.collect(), ConsumerOptions::default());
    while left > 0 {
        match consumer.next().await.context("the consumer ended")?? {
            Event::Batches(consumed) => {
                let mut wrong = None;
                for_each_record(&consumed.batches, consumed.from, |record| {
                    let Ok(row) = serde_json::from_slice::<job::Counted>(record.value.unwrap_or_default())
                    else {
                        wrong = Some("a result that cannot be read".to_owned());
                        return;
                    };
                    let place = numbers.get(&row.ip).and_then(|i| expected.get_mut(&row.end)?.get_mut(*i));
                    match place {
                        // Taken, so that a second result for the group is noticed.
                        Some(count) if u64::from(*count) == row.count && row.count > 0 => *count = 0,
                        other => {
                            wrong =
                                Some(format!("{} {}: {} instead of {other:?}", row.end, row.ip, row.count));
                        }
                    }
                })?;
                if let Some(wrong) = wrong {
                    bail!("the answer is wrong: {wrong}");
                }
                let end = described.offsets[consumed.partition.partition as usize].last_stable;
                left -= usize::from(consumed.next.offset >= end && consumed.from < end);
            }
            Event::CaughtUp => {}
            Event::Failed { error, .. } => return Err(error.into()),
        }
    }
    let missing: u64 = expected.values().flatten().map(|n| u64::from(*n)).sum();
    ensure!(missing == 0, "{missing} rows are in no result");
    drop(consumer);
    access.close().await;
    Ok(())
}

/// The measured process: owns the directory and runs the job to the end.
fn measured(dir: &Path) -> Result<()> {
    let began = Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let access = runtime.block_on(Data::open(dir, Intent::Use))?;
    let options = RunOptions {
        mode: Mode::UntilEnd,
        tasks: Some(2),
        commit_interval: Duration::from_secs(1),
        ..RunOptions::default()
    };
    let monitor = Monitor::new();
    let watched = monitor.clone();
    let watcher = std::thread::spawn(move || watch(&watched));
    let (handle, start) = (runtime.handle().clone(), began.elapsed());
    let report = tidemill::adapters::run(&job::spec(), &access, &options, &handle, &monitor)?;
    monitor.stop_at_once();
    let samples = watcher.join().map_err(|_| anyhow::anyhow!("the watcher panicked"))?;
    runtime.block_on(access.close());
    let steady = match &samples[..] {
        [first, .., last, _] => (last.rows - first.rows, last.at - first.at, last.cpu_s - first.cpu_s),
        // Too short a run has no steady state: all of it counts.
        _ => (report.counters.rows_in, report.took, Cost::so_far()?.cpu_s),
    };
    let said = Measured {
        rows: report.counters.rows_in,
        commits: report.summary.epochs,
        steady_rows: steady.0,
        steady_s: steady.1.as_secs_f64(),
        steady_cpu_s: steady.2,
        start_s: (start + report.recovery).as_secs_f64(),
        run_s: report.took.as_secs_f64(),
        stall: Spread::of(samples.iter().map(|s| s.aligned_in).collect()),
        commit: Spread::of(samples.iter().map(|s| s.committed_in).collect()),
        changelog_records: monitor.progress().changelog_records,
        exchanged: report.counters.exchanged,
        output: report.summary.committed_rows,
        cost: Cost::so_far()?,
    };
    println!("{}", serde_json::to_string(&said)?);
    Ok(())
}

/// One commit.
struct Sample {
    at: Duration,
    rows: u64,
    cpu_s: f64,
    aligned_in: Duration,
    committed_in: Duration,
}

fn watch(monitor: &Monitor) -> Vec<Sample> {
    let began = Instant::now();
    let mut samples = Vec::new();
    let mut commits = 0;
    while monitor.asked() == tidemill::runtime::Stop::No {
        if monitor.wait_until(Duration::from_millis(100), |p| p.commits > commits) {
            let p = monitor.progress();
            commits = p.commits;
            samples.push(Sample {
                at: began.elapsed(),
                rows: p.rows_committed,
                cpu_s: Cost::so_far().map_or(0.0, |c| c.cpu_s),
                aligned_in: p.aligned_in,
                committed_in: p.committed_in,
            });
        }
    }
    samples
}

/// A bare loop over a file of rows: rows per second, and processor seconds per row.
fn bare_rate(total: u64) -> Result<(f64, f64)> {
    let dir = scratch()?;
    let path = dir.path().join("rows");
    let (mut file, mut rows) = (BufWriter::new(std::fs::File::create(&path)?), Rows::new(100));
    for _ in 0..total {
        let (at, address) = rows.next();
        writeln!(file, "{at},{}", ip(address))?;
    }
    file.flush()?;
    drop(file);
    let said = child(&["bare", &path.to_string_lossy()])?;
    let (seconds, cpu): (f64, f64) = serde_json::from_str(&said)?;
    let (rate, cost) = (total as f64 / seconds, cpu / total as f64);
    // Where other work shares the machine, the processor time is what it would take alone.
    println!(
        "bare loop: {total} rows in {seconds:.2} s: {:.2} M rows/s on one core, {:.0} ns of processor a row",
        rate / 1e6,
        cost * 1e9
    );
    Ok((rate, cost))
}

fn bare(path: &Path) -> Result<()> {
    let began = Instant::now();
    let mut file = BufReader::with_capacity(1 << 20, std::fs::File::open(path)?);
    let (mut counts, mut line, mut rows) = (Count::default(), Vec::new(), 0u64);
    loop {
        line.clear();
        if file.read_until(b'\n', &mut line)? == 0 {
            break;
        }
        let row =
            job::parse(line.strip_suffix(b"\n").unwrap_or(&line)).context("a row that cannot be read")?;
        job::add(&mut counts, row);
        rows += 1;
    }
    ensure!(counts.values().sum::<u64>() == rows, "every row is counted");
    println!("{}", serde_json::to_string(&(began.elapsed().as_secs_f64(), Cost::so_far()?.cpu_s))?);
    Ok(())
}
