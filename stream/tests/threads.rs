//! The threads runtime over a log in memory: same output as a sequential recount for any number of tasks and
//! partitions, across stops, aborts, unknown outcomes, lost connections and machine crashes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tidemill_stream::engine::poison::PoisonPolicy;
use tidemill_stream::engine::{CommitPolicy, Counters, Mode};
use tidemill_stream::io::{
    CommittedOffset, Fetched, Input, Log, LogError, NewTopic, PartitionEnds, Position, TopicId, TopicInfo,
    Transactions,
};
use tidemill_stream::names::Identity;
use tidemill_stream::runtime::{Monitor, RunConfig, RunError, RunReport, run};
use tidemill_stream::state::{MemoryState, StateBackend};
use tidemill_stream::testing::{EndFate, MemoryLog};
use tidemill_stream::{
    EventTime, Flow, Job, Malformed, OutRecord, Plan, Result, Text, Tumbling, decode_with, shard_of, topic,
};

const WINDOW: i64 = 50;
const BOUND: i64 = 30;

/// Lines `time key`.
struct Counts;

impl Job for Counts {
    const NAME: &'static str = "counts";
    fn build(&self, flow: &Flow) -> Result<()> {
        let line = decode_with(|record| {
            let text = std::str::from_utf8(record.value().unwrap_or_default()).unwrap_or_default();
            let (t, key) = text.split_once(' ').ok_or_else(|| Malformed::new("no space"))?;
            Ok((t.parse::<i64>().map_err(|e| Malformed::new(e.to_string()))?, key.to_owned()))
        });
        flow.source(topic("in"), line)
            .dead_letter_to(topic("dead"))
            .event_time(|(t, _)| *t, EventTime::out_of_order(Duration::from_millis(BOUND as u64)))
            .key_by(|(_, key)| key.clone())
            .window(Tumbling::of(Duration::from_millis(WINDOW as u64)))
            .count("per-key")
            .late_to(topic("late"))
            .map(|w| format!("{} {} {}", w.end.millis(), w.key, w.value))
            .to(topic("out"), Text);
        Ok(())
    }
}

/// What a sequential reader of every partition expects.
#[derive(Default, Debug, PartialEq)]
struct Expected {
    counts: BTreeMap<(i64, String), u64>,
    late: BTreeMap<Vec<u8>, u64>,
    dead: u64,
}

fn recount(lines: &[Vec<String>]) -> Expected {
    let mut expected = Expected::default();
    for partition in lines {
        let mut watermark = i64::MIN;
        for line in partition {
            let Some((t, key)) = line.split_once(' ') else {
                expected.dead += 1;
                continue;
            };
            let t: i64 = t.parse().unwrap();
            let end = t - t.rem_euclid(WINDOW) + WINDOW;
            if end - 1 <= watermark {
                *expected.late.entry(line.clone().into_bytes()).or_default() += 1;
            } else {
                *expected.counts.entry((end, key.to_owned())).or_default() += 1;
            }
            watermark = watermark.max(t - BOUND - 1);
        }
    }
    expected
}

fn found(log: &MemoryLog) -> Expected {
    let mut found = Expected { dead: log.records("dead").len() as u64, ..Expected::default() };
    for (_, _, record) in log.records("out") {
        let text = String::from_utf8(record.value.unwrap().to_vec()).unwrap();
        let mut parts = text.split(' ');
        let mut next = || parts.next().unwrap();
        let (end, key, count) = (next().parse().unwrap(), next().to_owned(), next().parse().unwrap());
        assert_eq!(found.counts.insert((end, key), count), None, "a second row: {text}");
    }
    for (_, _, record) in log.records("late") {
        *found.late.entry(record.value.unwrap().to_vec()).or_default() += 1;
    }
    found
}

/// Lines with disorder, some beyond the bound, some malformed.
fn lines(partitions: usize, each: usize, keys: u64, seed: u64) -> Vec<Vec<String>> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = move |n: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % n
    };
    let mut all = Vec::new();
    for _ in 0..partitions {
        let mut t = 0;
        let mut rows = Vec::new();
        for _ in 0..each {
            t += random(3) as i64;
            let back = match random(20) {
                0 => random(3 * BOUND as u64) as i64,
                1..6 => random(BOUND as u64) as i64,
                _ => 0,
            };
            let bad = random(200) == 0;
            rows.push(if bad { "bad".to_owned() } else { format!("{} k{}", t - back, random(keys)) });
        }
        all.push(rows);
    }
    all
}

fn fill(log: &MemoryLog, lines: &[Vec<String>]) {
    let new = NewTopic {
        name: "in".to_owned(),
        partitions: lines.len() as u32,
        cleanup: tidemill_stream::io::Cleanup::Delete,
    };
    log.create_topic(&new).unwrap();
    append(log, lines);
}

fn append(log: &MemoryLog, lines: &[Vec<String>]) {
    for (partition, rows) in lines.iter().enumerate() {
        for row in rows {
            let value = Some(Bytes::from(row.clone().into_bytes()));
            let record = OutRecord { timestamp: 0, key: None, value, headers: Vec::new() };
            log.append("in", partition as u32, record);
        }
    }
}

fn config(tasks: usize, mode: Mode) -> RunConfig {
    RunConfig {
        identity: Identity::new("counts").unwrap(),
        mode,
        tasks,
        overlay_bytes_max: 1 << 20,
        policy: CommitPolicy { interval: 5, ..CommitPolicy::default() },
        poison: PoisonPolicy::default(),
    }
}

fn go(
    log: &dyn Log,
    state: &Arc<MemoryState>,
    config: &RunConfig,
    monitor: &Monitor,
) -> Result<RunReport, RunError> {
    let plan = Plan::of(&Counts).unwrap();
    let backend: Arc<dyn StateBackend> = Arc::clone(state) as _;
    run(&plan, config, log, &backend, monitor)
}

#[test]
fn any_number_of_tasks_and_partitions_counts_the_same() {
    for partitions in [1, 4] {
        let lines = lines(partitions, 20_000, 50, partitions as u64);
        let expected = recount(&lines);
        assert!(expected.dead > 0 && !expected.late.is_empty());
        for tasks in [1, 2, 3] {
            let log = MemoryLog::default();
            fill(&log, &lines);
            let report = go(&log, &Arc::default(), &config(tasks, Mode::UntilEnd), &Monitor::new()).unwrap();
            assert_eq!(found(&log), expected, "{partitions} partitions, {tasks} tasks");
            assert_eq!(report.counters.rows_in, partitions as u64 * 20_000);
            assert!(!report.summary.closed_early.is_empty(), "the last windows close before their time");
            assert!(report.restarts == 0 && !report.stopped);
        }
    }
}

#[test]
fn a_second_run_finds_nothing_and_a_third_counts_what_is_new() {
    let log = MemoryLog::default();
    let state = Arc::default();
    let first = vec![vec!["10 a".to_owned(), "70 a".to_owned()]];
    fill(&log, &first);
    let run = |tasks| go(&log, &state, &config(tasks, Mode::UntilEnd), &Monitor::new()).unwrap();
    assert!(!run(2).found_nothing());
    let again = run(1);
    assert!(again.found_nothing());
    assert_eq!(log.records("out").len(), 2);
    // 60 and 99 are of a window the first run closed; 120 is new.
    append(&log, &[vec!["60 a".to_owned(), "120 b".to_owned(), "99 c".to_owned()]]);
    assert_eq!(run(3).counters.rows_in, 3);
    let late: Vec<_> = log.records("late").into_iter().map(|(_, _, r)| r.value.unwrap()).collect();
    assert_eq!(late, [Bytes::from_static(b"60 a"), Bytes::from_static(b"99 c")]);
    let rows = found(&log).counts;
    assert_eq!(
        rows.keys().map(|(end, key)| (*end, key.as_str())).collect::<Vec<_>>(),
        [(50, "a"), (100, "a"), (150, "b")]
    );
}

/// Runs without an end until it has committed something, then stops it.
fn until_a_commit(
    log: &MemoryLog,
    state: &Arc<MemoryState>,
    tasks: usize,
    stop: impl Fn(&Monitor),
) -> Result<RunReport, RunError> {
    let (monitor, config) = (Monitor::new(), config(tasks, Mode::Unbounded));
    std::thread::scope(|scope| {
        let running = scope.spawn(|| go(log, state, &config, &monitor));
        let committed = monitor.wait_until(Duration::from_secs(20), |p| p.commits > 0);
        stop(&monitor);
        let ended = running.join().unwrap();
        assert!(committed, "no commit in 20 s: {ended:?}");
        ended
    })
}

/// What was committed before is told from the moment a run runs, and not only after its own first commit.
#[test]
fn a_run_that_starts_again_tells_what_is_committed() {
    let (log, state) = (MemoryLog::default(), Arc::<MemoryState>::default());
    fill(&log, &[vec!["10 a".to_owned(), "70 a".to_owned()], vec!["20 b".to_owned()]]);
    let first = Monitor::new();
    go(&log, &state, &config(2, Mode::UntilEnd), &first).unwrap();
    assert!(first.progress().began.is_empty(), "nothing was committed before: {:?}", first.progress());
    // There is nothing new to commit.
    let (monitor, config) = (Monitor::new(), config(2, Mode::Unbounded));
    let told = std::thread::scope(|scope| {
        let running = scope.spawn(|| go(&log, &state, &config, &monitor));
        let runs = monitor.wait_until(Duration::from_secs(20), |p| p.running);
        let told = monitor.progress();
        monitor.stop();
        running.join().unwrap().unwrap();
        assert!(runs, "it does not run after 20 s: {told:?}");
        told
    });
    assert_eq!(told.began, told.committed);
    assert_eq!(told.committed.into_iter().collect::<Vec<_>>(), [(0, 2), (1, 1)]);
}

/// The lines in `n` portions, by partition.
fn portions(lines: &[Vec<String>], n: usize) -> Vec<Vec<Vec<String>>> {
    let of = |rows: &Vec<String>, i: usize| rows[rows.len() * i / n..rows.len() * (i + 1) / n].to_vec();
    (0..n).map(|i| lines.iter().map(|rows| of(rows, i)).collect()).collect()
}

#[test]
fn stops_and_crashes_lose_and_repeat_nothing() {
    let lines = lines(4, 30_000, 40, 7);
    let log = MemoryLog::default();
    let state = Arc::<MemoryState>::default();
    fill(&log, &[vec![], vec![], vec![], vec![]]);
    let mut stopped = 0;
    for (round, portion) in portions(&lines, 6).iter().enumerate() {
        append(&log, portion);
        let stop = |monitor: &Monitor| if round % 2 == 0 { monitor.stop() } else { monitor.stop_at_once() };
        match until_a_commit(&log, &state, 1 + round % 3, stop) {
            Ok(report) => {
                assert!(report.stopped);
                stopped += 1;
            }
            Err(RunError::StoppedAtOnce) => state.crash(),
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(stopped, 3);
    go(&log, &state, &config(2, Mode::UntilEnd), &Monitor::new()).unwrap();
    assert_eq!(found(&log), recount(&lines));
}

#[test]
fn aborted_and_unknown_ends_start_again_from_the_last_commit() {
    let lines = lines(2, 20_000, 30, 3);
    let log = MemoryLog::default();
    fill(&log, &[vec![], vec![]]);
    let fates = [EndFate::Abort, EndFate::AbortUnknown, EndFate::CommitUnknown, EndFate::Abort];
    for (fate, portion) in fates.into_iter().zip(portions(&lines, 4)) {
        append(&log, &portion);
        log.next_end(fate);
        let report = until_a_commit(&log, &Arc::default(), 2, Monitor::stop).unwrap();
        assert_eq!(report.restarts > 0, fate != EndFate::CommitUnknown, "{fate:?}");
    }
    go(&log, &Arc::default(), &config(3, Mode::UntilEnd), &Monitor::new()).unwrap();
    assert_eq!(found(&log), recount(&lines));
}

/// A log whose calls fail for a while.
struct Flaky {
    log: MemoryLog,
    /// Calls of `input` that still fail.
    failing: AtomicU32,
    /// Starts that find no log.
    away: AtomicU32,
    /// Reads from changelogs that still give nothing.
    silent: AtomicU32,
    fenced: AtomicBool,
}

impl Flaky {
    fn new(log: &MemoryLog, failing: u32, silent: u32) -> Self {
        let (failing, silent) = (failing.into(), silent.into());
        Self { log: log.clone(), failing, silent, away: 0.into(), fenced: AtomicBool::new(false) }
    }
}

fn one_less(n: &AtomicU32) -> bool {
    n.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok()
}

fn lost() -> LogError {
    LogError::Unreachable { source: "the connection is gone".into() }
}

impl Log for Flaky {
    fn topic(&self, name: &str) -> Result<Option<TopicInfo>, LogError> {
        self.log.topic(name)
    }
    fn create_topic(&self, new: &NewTopic) -> Result<TopicInfo, LogError> {
        self.log.create_topic(new)
    }
    fn ends(&self, topic: &TopicId, partition: u32) -> Result<PartitionEnds, LogError> {
        self.log.ends(topic, partition)
    }
    fn holds(&self, topic: &TopicId, partition: u32, position: Position) -> Result<bool, LogError> {
        self.log.holds(topic, partition, position)
    }
    fn read(&self, topic: &TopicId, p: u32, from: Position, bytes: usize) -> Result<Fetched, LogError> {
        let mut fetched = self.log.read(topic, p, from, bytes)?;
        if topic.name.contains("changelog") && fetched.next.offset > from.offset && one_less(&self.silent) {
            (fetched.next, fetched.batches) = (from, Vec::new());
        }
        Ok(fetched)
    }
    fn input(&self, topic: &TopicId, partitions: &[(u32, Position)]) -> Result<Box<dyn Input>, LogError> {
        if one_less(&self.away) {
            return Err(lost());
        }
        let fails = one_less(&self.failing);
        let input = self.log.input(topic, partitions)?;
        Ok(Box::new(FlakyInput { input, polls: if fails { 2 } else { u32::MAX } }))
    }
    fn fence(&self, identity: &str) -> Result<Box<dyn Transactions>, LogError> {
        if self.fenced.load(Ordering::SeqCst) {
            return Err(LogError::Fenced { identity: identity.to_owned() });
        }
        self.log.fence(identity)
    }
    fn committed(&self, group: &str) -> Result<Vec<CommittedOffset>, LogError> {
        self.log.committed(group)
    }
}

struct FlakyInput {
    input: Box<dyn Input>,
    polls: u32,
}

impl Input for FlakyInput {
    fn poll(&mut self, wait: Duration, bytes_max: usize) -> Result<Vec<Fetched>, LogError> {
        self.polls = self.polls.checked_sub(1).ok_or_else(lost)?;
        self.input.poll(wait, bytes_max.min(20_000))
    }
    fn pause(&mut self, partition: u32, fetching: tidemill_stream::io::Fetching) {
        self.input.pause(partition, fetching);
    }
}

#[test]
fn a_lost_log_is_returned_to_and_a_dead_one_is_given_up() {
    let lines = lines(2, 20_000, 30, 5);
    let log = MemoryLog::default();
    fill(&log, &lines);
    let flaky = Flaky::new(&log, 3, 0);
    let report = go(&flaky, &Arc::default(), &config(2, Mode::UntilEnd), &Monitor::new()).unwrap();
    assert_eq!(report.restarts, 3);
    assert_eq!(found(&log), recount(&lines));

    append(&log, &[vec!["900000 z".to_owned()], vec!["900000 y".to_owned()]]);
    flaky.fenced.store(true, Ordering::SeqCst);
    let error = go(&flaky, &Arc::default(), &config(2, Mode::UntilEnd), &Monitor::new()).unwrap_err();
    assert_eq!(error.to_string(), "fenced: another process now runs as `counts`");
}

/// Ctrl-C while the log's owner leaves: the run has its commit all the same, from whoever owns the log next.
#[test]
fn a_stop_waits_for_a_log_that_is_away() {
    let log = MemoryLog::default();
    fill(&log, &lines(2, 1_000, 30, 8));
    let flaky = Flaky { away: 2.into(), ..Flaky::new(&log, 0, 0) };
    let monitor = Monitor::new();
    monitor.stop();
    let report = go(&flaky, &Arc::default(), &config(2, Mode::Unbounded), &monitor).unwrap();
    assert_eq!((report.restarts, report.stopped), (2, true));
    // Asked twice it waits for nobody.
    let flaky = Flaky { away: 9.into(), ..Flaky::new(&log, 0, 0) };
    let monitor = Monitor::new();
    monitor.stop();
    monitor.stop();
    let error = go(&flaky, &Arc::default(), &config(2, Mode::Unbounded), &monitor).unwrap_err();
    assert_eq!((error.to_string(), flaky.away.into_inner()), (RunError::Log(lost()).to_string(), 8));
}

/// A start that takes a read without records for the end of a changelog counts on with a part of its state.
#[test]
fn a_changelog_that_gives_nothing_is_asked_again() {
    let lines = lines(2, 20_000, 30, 6);
    let log = MemoryLog::default();
    fill(&log, &[vec![], vec![]]);
    let [first, second] = portions(&lines, 2).try_into().unwrap();
    append(&log, &first);
    until_a_commit(&log, &Arc::default(), 2, Monitor::stop).unwrap();
    append(&log, &second);
    let flaky = Flaky::new(&log, 0, 3);
    let report = go(&flaky, &Arc::default(), &config(2, Mode::UntilEnd), &Monitor::new()).unwrap();
    assert_eq!((report.restarts, found(&log)), (3, recount(&lines)));
}

struct Upper;
impl Job for Upper {
    const NAME: &'static str = "upper";
    fn build(&self, flow: &Flow) -> Result<()> {
        flow.source(topic("in"), Text).map(|line: String| line.to_uppercase()).to(topic("out"), Text);
        Ok(())
    }
}

/// Without a keyed step there is no store to bring up to date, and a run ends all the same.
#[test]
fn a_job_without_a_keyed_step_ends_and_stops() {
    let log = MemoryLog::default();
    fill(&log, &[vec!["1 a".to_owned(), "2 b".to_owned()], vec!["3 c".to_owned()]]);
    let backend: Arc<dyn StateBackend> = Arc::<MemoryState>::default();
    let plan = Plan::of(&Upper).unwrap();
    for (mode, rows) in [(Mode::UntilEnd, 3), (Mode::Unbounded, 4)] {
        let (monitor, config) = (Monitor::new(), config(2, mode));
        let (tell, told) = std::sync::mpsc::channel();
        let ended = std::thread::scope(|scope| {
            scope.spawn(|| tell.send(run(&plan, &config, &log, &backend, &monitor)).unwrap());
            if mode == Mode::Unbounded {
                monitor.wait_until(Duration::from_secs(20), |p| p.commits > 0);
                monitor.stop();
            }
            let ended = told.recv_timeout(Duration::from_secs(20));
            monitor.stop_at_once();
            ended.unwrap_or_else(|_| panic!("{mode:?}: it does not end: {:?}", monitor.progress())).unwrap()
        });
        assert_eq!((ended.stopped, log.records("out").len()), (mode == Mode::Unbounded, rows));
        append(&log, &[vec!["4 d".to_owned()]]);
    }
}

#[test]
fn a_missing_input_is_named_with_the_command_that_makes_it() {
    let log = MemoryLog::default();
    let error = go(&log, &Arc::default(), &config(1, Mode::UntilEnd), &Monitor::new()).unwrap_err();
    let all: BTreeSet<_> = error.chain().into_iter().collect();
    assert!(all.iter().any(|t| t.contains("streamctl topic create in")), "{all:?}");
}

/// Each of two tasks reads, in one batch, far more messages for the other than a queue holds: both queues are full, both
/// senders wait, and neither stops the other.
#[test]
fn opposing_full_queues_cannot_stop_each_other() {
    // Rows of partition p, which task p reads, belong to the shards of the other task.
    let theirs = |p: usize| {
        let keys = (0..).map(|k| format!("k{k}"));
        let keys = keys.filter(move |key| shard_of(key.as_bytes(), 64).task(2) != p);
        keys.take(20_000).map(|key| format!("1 {key}")).collect::<Vec<_>>()
    };
    let lines = vec![theirs(0), theirs(1)];
    let log = MemoryLog::default();
    fill(&log, &lines);
    // A little memory makes a small local table, and that makes many messages of one batch.
    let config = RunConfig { overlay_bytes_max: 32 << 10, ..config(2, Mode::UntilEnd) };
    let report = go(&log, &Arc::default(), &config, &Monitor::new()).unwrap();
    assert_eq!(found(&log), recount(&lines));
    // A batch is some 300 messages, which leave at once; a queue holds 64.
    assert!(report.counters.waited > 0, "{:?}", report.counters);
}

/// Less memory than the cells of one window: cells leave the overlay, come back and go on counting.
///
/// What is evicted when depends on how fast commits, reader and tasks are, so the input waits for it: the keys of a
/// window that stays open are sent again only once some of them were evicted, and must then be read back.
#[test]
fn a_small_overlay_evicts_and_reads_back() {
    let (log, state) = (MemoryLog::default(), Arc::<MemoryState>::default());
    let every_key = || (0..3_000).map(|k| format!("1 k{k}")).collect::<Vec<_>>();
    let mut lines = vec![every_key(), every_key()];
    fill(&log, &lines);
    let small = |mode| RunConfig { overlay_bytes_max: 16 << 10, ..config(2, mode) };
    let (monitor, config) = (Monitor::new(), small(Mode::Unbounded));
    let report = std::thread::scope(|scope| {
        let running = scope.spawn(|| go(&log, &state, &config, &monitor));
        let mut counters = monitor.progress().counters;
        let mut wait = |met: fn(&Counters) -> bool| {
            let met = monitor.wait_until(Duration::from_secs(60), |p| met(&p.counters));
            counters = monitor.progress().counters;
            met
        };
        let mut met = wait(|c| c.evicted > 0);
        // Window, bound and time are those of before, so nothing has closed meanwhile.
        let again = [every_key(), every_key()];
        append(&log, &again);
        met &= wait(|c| c.store_hits > 0);
        // Then windows open and close under the same small memory, with rows out of order and late.
        let more = self::lines(2, 20_000, 3_000, 11);
        append(&log, &more);
        for (all, more) in lines.iter_mut().zip(again.into_iter().zip(more)) {
            all.extend(more.0.into_iter().chain(more.1));
        }
        monitor.stop();
        let ended = running.join().unwrap();
        assert!(met, "nothing evicted, or nothing read back, in a minute: {counters:?}, {ended:?}");
        ended.unwrap()
    });
    assert!(report.stopped, "{report:?}");
    go(&log, &state, &small(Mode::UntilEnd), &Monitor::new()).unwrap();
    assert_eq!(found(&log), recount(&lines));
}
