//! The three guarantees against each other: undisturbed they are equal; under crashes exactly once changes nothing, at
//! least once only repeats output, at most once only loses input. Each of the two is seen to happen.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use tidemill_stream::engine::poison::PoisonPolicy;
use tidemill_stream::engine::{CommitPolicy, Mode};
use tidemill_stream::io::{
    Cleanup, CommittedOffset, Fetched, Fetching, Input, Log, LogError, NewTopic, PartitionEnds, Position,
    TopicId, TopicInfo, Transactions,
};
use tidemill_stream::names::Identity;
use tidemill_stream::runtime::{Monitor, RunConfig, RunError, RunReport, run};
use tidemill_stream::state::{MemoryState, StateBackend};
use tidemill_stream::testing::{DriveError, EndFate, MemoryLog, TestDriver};
use tidemill_stream::{
    EventTime, Flow, Guarantee, Job, Malformed, OutRecord, Plan, Result, Text, Tumbling, decode_with, topic,
};

/// Long enough for a machine that does ten other things.
const DEADLINE: Duration = Duration::from_secs(60);

/// Lets a closure wait for the test. Open unless told otherwise.
#[derive(Default)]
struct Gate {
    state: Mutex<(u32, Option<u32>)>,
    changed: Condvar,
}

impl Gate {
    fn closed() -> Arc<Self> {
        Arc::new(Self { state: Mutex::new((0, Some(0))), changed: Condvar::new() })
    }

    /// Waits until one more may pass than passed before.
    fn pass(&self) {
        let mut state = self.state.lock();
        state.0 += 1;
        self.changed.notify_all();
        let mine = state.0;
        self.changed.wait_while(&mut state, |(_, may)| may.is_some_and(|may| may < mine));
    }

    fn let_through(&self, many: Option<u32>) {
        self.state.lock().1 = many;
        self.changed.notify_all();
    }

    fn wait_for(&self, arrivals: u32) -> bool {
        let mut state = self.state.lock();
        let wait = self.changed.wait_while_for(&mut state, |(came, _)| *came < arrivals, DEADLINE);
        !wait.timed_out()
    }
}

/// Lines `time key`; windows of 50 ms, 30 ms out of order. Rows of key `gate` wait at the gate.
struct Counts(Guarantee, Arc<Gate>);

impl Job for Counts {
    const NAME: &'static str = "counts";
    fn build(&self, flow: &Flow) -> Result<()> {
        let line = decode_with(|record| {
            let text = std::str::from_utf8(record.value().unwrap_or_default()).unwrap_or_default();
            let (t, key) = text.split_once(' ').ok_or_else(|| Malformed::new("no space"))?;
            Ok((t.parse::<i64>().map_err(|e| Malformed::new(e.to_string()))?, key.to_owned()))
        });
        let gate = Arc::clone(&self.1);
        flow.guarantee(self.0);
        flow.source(topic("in"), line)
            .dead_letter_to(topic("dead"))
            .event_time(|(t, _)| *t, EventTime::out_of_order(Duration::from_millis(30)))
            .filter(move |(_, key)| {
                if key == "gate" {
                    gate.pass();
                }
                true
            })
            .key_by(|(_, key)| key.clone())
            .window(Tumbling::of(Duration::from_millis(50)))
            .count("per-key")
            .late_to(topic("late"))
            .map(|w| format!("{} {} {}", w.end.millis(), w.key, w.value))
            .to(topic("out"), Text);
        Ok(())
    }
}

fn counts(guarantee: Guarantee) -> Counts {
    Counts(guarantee, Arc::default())
}

/// What came out: the counts of every window and key, in any order; rows beside them.
#[derive(Clone, Debug, Default, PartialEq)]
struct Found {
    rows: BTreeMap<(i64, String), Vec<u64>>,
    beside: usize,
}

impl Found {
    fn of(rows: impl Iterator<Item = String>, beside: usize) -> Self {
        let mut found = Self { rows: BTreeMap::new(), beside };
        for text in rows {
            let mut parts = text.split(' ');
            let mut next = || parts.next().unwrap();
            let key = (next().parse().unwrap(), next().to_owned());
            found.rows.entry(key).or_default().push(next().parse().unwrap());
        }
        found.rows.values_mut().for_each(|counts| counts.sort_unstable());
        found
    }

    /// What `guarantee` allows a disturbed run to be, where `self` is the undisturbed one; true if it differs.
    fn allows(&self, guarantee: Guarantee, disturbed: &Self) -> bool {
        match guarantee {
            Guarantee::ExactlyOnce => assert_eq!(disturbed, self),
            Guarantee::AtLeastOnce => {
                let keys = |f: &Self| f.rows.keys().cloned().collect::<Vec<_>>();
                assert_eq!(keys(disturbed), keys(self), "a window is lost, or made up");
                for (key, counts) in &disturbed.rows {
                    assert!(counts.iter().all(|n| *n == self.rows[key][0]), "{key:?}: {counts:?}");
                }
                assert!(disturbed.beside >= self.beside);
            }
            Guarantee::AtMostOnce => {
                for (key, counts) in &disturbed.rows {
                    let all = self.rows.get(key).unwrap_or_else(|| panic!("{key:?} is made up"));
                    assert!(counts.len() == 1 && counts[0] <= all[0], "{key:?}: {counts:?} of {all:?}");
                }
                assert!(disturbed.beside <= self.beside);
            }
        }
        disturbed != self
    }
}

type Driver = TestDriver<Counts>;

/// Rows in order, so that what is lost cannot make another row late or not late.
fn script(driver: &mut Driver) -> Result<(), DriveError> {
    let sends: [&[(u32, &str)]; 4] = [
        &[(0, "1 a"), (1, "2 a"), (0, "nonsense"), (1, "4 b")],
        &[(0, "60 b"), (0, "90 a"), (1, "70 c"), (1, "120 c")],
        &[(0, "135 a"), (1, "140 b"), (0, "170 a")],
        &[(0, "260 a"), (1, "255 a"), (1, "256 d")],
    ];
    for sent in sends {
        for (partition, line) in sent {
            driver.send(*partition, *line);
        }
        driver.commit()?;
    }
    driver.send(0, "300 a");
    driver.until_end()?;
    driver.send(0, "1000 x").send(1, "1001 a");
    driver.until_end()?;
    Ok(())
}

fn found_by(driver: &Driver) -> Found {
    let beside = driver.late().len() + driver.dead_letters().len();
    Found::of(driver.outputs().into_iter().map(|row| row.value), beside)
}

#[test]
fn a_crash_before_any_step_changes_nothing_only_repeats_or_only_loses() -> Result<(), DriveError> {
    let mut exact = None;
    for guarantee in Guarantee::ALL {
        let (mut crashes, mut differ) = (0, 0);
        for (tasks, seed) in [(1, None), (2, Some(1))] {
            let make = || {
                let driver = Driver::new(&counts(guarantee))?.tasks(tasks);
                Ok(match seed {
                    Some(seed) => driver.seed(seed),
                    None => driver,
                })
            };
            Driver::each_crash(make, script, |undisturbed, crashed, _| {
                let undisturbed = found_by(undisturbed);
                assert_eq!(exact.get_or_insert_with(|| undisturbed.clone()), &undisturbed, "{guarantee}");
                crashes += crashed.crashes();
                differ += usize::from(undisturbed.allows(guarantee, &found_by(crashed)));
                Ok(())
            })?;
        }
        assert!(crashes > 40, "{guarantee}: {crashes} crashes");
        assert_eq!(differ > 0, guarantee != Guarantee::ExactlyOnce, "{guarantee}: {differ} of {crashes}");
    }
    Ok(())
}

#[test]
fn an_aborted_epoch_repeats_its_output_at_least_once() -> Result<(), DriveError> {
    for guarantee in Guarantee::ALL {
        let run = |fate: EndFate| -> Result<Found, DriveError> {
            let mut driver = Driver::new(&counts(guarantee))?;
            driver.send(0, "1 a").send(1, "90 a").send(0, "95 a");
            driver.commit()?;
            // Closes the second window. (At most once, the aborted commit is the one that only takes offsets.)
            driver.send(1, "135 b").send(0, "136 b");
            driver.next_end(fate);
            driver.commit()?;
            driver.until_end()?;
            Ok(found_by(&driver))
        };
        let (undisturbed, aborted) = (run(EndFate::Commit)?, run(EndFate::Abort)?);
        let differs = undisturbed.allows(guarantee, &aborted);
        assert_eq!(differs, guarantee == Guarantee::AtLeastOnce, "{guarantee}: {aborted:?}");
    }
    Ok(())
}

#[test]
fn an_identity_keeps_its_guarantee() -> Result<(), DriveError> {
    let mut driver = Driver::new(&counts(Guarantee::AtMostOnce))?;
    driver.send(0, "1 a");
    driver.commit()?;
    let refused = driver.with_job(&counts(Guarantee::ExactlyOnce))?.commit().unwrap_err().to_string();
    for part in ["guarantee", "`at-most-once`", "`exactly-once`", "--name"] {
        assert!(refused.contains(part), "{part}: {refused}");
    }
    Ok(())
}

fn fill(log: &MemoryLog, lines: &[Vec<String>]) {
    let partitions = lines.len() as u32;
    log.create_topic(&NewTopic { name: "in".into(), partitions, cleanup: Cleanup::Delete }).unwrap();
    for (partition, rows) in lines.iter().enumerate() {
        append(log, partition as u32, rows);
    }
}

fn append(log: &MemoryLog, partition: u32, rows: &[String]) {
    for row in rows {
        let value = Some(Bytes::from(row.clone().into_bytes()));
        log.append("in", partition, OutRecord { timestamp: 0, key: None, value, headers: Vec::new() });
    }
}

fn found(log: &MemoryLog) -> Found {
    let beside = log.records("late").len() + log.records("dead").len();
    let text = |value: Option<Bytes>| String::from_utf8(value.unwrap().to_vec()).unwrap();
    Found::of(log.records("out").into_iter().map(|(_, _, record)| text(record.value)), beside)
}

fn go(
    job: &Counts,
    log: &dyn Log,
    state: &Arc<MemoryState>,
    (mode, interval): (Mode, i64),
    monitor: &Monitor,
) -> Result<RunReport, RunError> {
    let config = RunConfig {
        identity: Identity::new("counts").unwrap(),
        mode,
        tasks: 2,
        overlay_bytes_max: 1 << 20,
        policy: CommitPolicy { interval, ..CommitPolicy::default() },
        poison: PoisonPolicy::default(),
    };
    let backend: Arc<dyn StateBackend> = Arc::clone(state) as _;
    run(&Plan::of(job).unwrap(), &config, log, &backend, monitor)
}

/// Times rise, every tenth row is behind by less than the bound: none is ever late.
fn lines() -> Vec<Vec<String>> {
    let row = |p: i64, i: i64| format!("{} k{}", i * 2 - if i % 10 == 9 { 25 } else { 0 }, (i * 7 + p) % 40);
    (0..2).map(|p| (0..20_000).map(|i| row(p, i)).collect()).collect()
}

#[test]
fn undisturbed_runs_are_equal() {
    let found: Vec<_> = Guarantee::ALL
        .into_iter()
        .map(|guarantee| {
            let log = MemoryLog::default();
            fill(&log, &lines());
            let job = counts(guarantee);
            go(&job, &log, &Arc::default(), (Mode::UntilEnd, 5), &Monitor::new()).unwrap();
            found(&log)
        })
        .collect();
    assert!(found[0].rows.len() > 10_000 && found[0] == found[1] && found[0] == found[2]);
}

#[test]
fn threads_that_are_stopped_at_once_only_repeat_or_only_lose() {
    let undisturbed = {
        let log = MemoryLog::default();
        fill(&log, &lines());
        go(&counts(Guarantee::ExactlyOnce), &log, &Arc::default(), (Mode::UntilEnd, 5), &Monitor::new())
            .unwrap();
        found(&log)
    };
    for guarantee in Guarantee::ALL {
        let (log, state) = (MemoryLog::default(), Arc::<MemoryState>::default());
        fill(&log, &[Vec::new(), Vec::new()]);
        for round in 0..4 {
            for (partition, rows) in lines().into_iter().enumerate() {
                append(&log, partition as u32, &rows[round * 5_000..(round + 1) * 5_000]);
            }
            let (monitor, job) = (Monitor::new(), counts(guarantee));
            std::thread::scope(|scope| {
                let running = scope.spawn(|| go(&job, &log, &state, (Mode::Unbounded, 2), &monitor));
                let committed = monitor.wait_until(DEADLINE, |p| p.commits > 0);
                monitor.stop_at_once();
                let ended = running.join().unwrap();
                assert!(committed && matches!(ended, Err(RunError::StoppedAtOnce)), "{ended:?}");
            });
            state.crash();
        }
        go(&counts(guarantee), &log, &state, (Mode::UntilEnd, 5), &Monitor::new()).unwrap();
        undisturbed.allows(guarantee, &found(&log));
    }
}

/// The only commit of the run is aborted: everything was written, and is written again. Nothing is output before the end,
/// or a commit would follow that.
#[test]
fn at_least_once_repeats_what_an_aborted_transaction_wrote() {
    for guarantee in [Guarantee::ExactlyOnce, Guarantee::AtLeastOnce] {
        let log = MemoryLog::default();
        fill(&log, &[vec!["1 a".into(), "2 a".into()], vec!["60 b".into()]]);
        log.next_end(EndFate::Abort);
        let (job, state) = (counts(guarantee), Arc::default());
        let report = go(&job, &log, &state, (Mode::UntilEnd, i64::MAX), &Monitor::new()).unwrap();
        assert_eq!(report.restarts, 1);
        let times = if guarantee == Guarantee::AtLeastOnce { 2 } else { 1 };
        let rows = [((50, "a".to_owned()), vec![2; times]), ((100, "b".to_owned()), vec![1; times])];
        assert_eq!(found(&log), Found { rows: rows.into(), beside: 0 }, "{guarantee}");
    }
}

/// A log that tells how far its reader has handed records over.
struct Watched {
    log: MemoryLog,
    handed: Arc<(Mutex<i64>, Condvar)>,
}

struct WatchedInput {
    input: Box<dyn Input>,
    handed: Arc<(Mutex<i64>, Condvar)>,
    next: i64,
}

impl Input for WatchedInput {
    fn poll(&mut self, wait: Duration, bytes_max: usize) -> Result<Vec<Fetched>, LogError> {
        // Who polls again has passed on what it got before.
        *self.handed.0.lock() = self.next;
        self.handed.1.notify_all();
        let all = self.input.poll(wait, bytes_max)?;
        self.next = all.iter().map(|f| f.next.offset).fold(self.next, i64::max);
        Ok(all)
    }
    fn pause(&mut self, partition: u32, fetching: Fetching) {
        self.input.pause(partition, fetching);
    }
}

impl Log for Watched {
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
        self.log.read(topic, p, from, bytes)
    }
    fn input(&self, topic: &TopicId, partitions: &[(u32, Position)]) -> Result<Box<dyn Input>, LogError> {
        let input = self.log.input(topic, partitions)?;
        Ok(Box::new(WatchedInput { input, handed: Arc::clone(&self.handed), next: 0 }))
    }
    fn fence(&self, identity: &str) -> Result<Box<dyn Transactions>, LogError> {
        self.log.fence(identity)
    }
    fn committed(&self, group: &str) -> Result<Vec<CommittedOffset>, LogError> {
        self.log.committed(group)
    }
}

/// A barrier comes while two records are fetched and a third is being processed; the machine is lost while the two are.
/// At most once has committed their offsets, the others have not.
#[test]
fn at_most_once_loses_what_was_fetched_when_the_epoch_before_it_committed() {
    for guarantee in Guarantee::ALL {
        // The barrier may have missed the moment for which it was waited; then the next try meets it.
        let lost = (0..20).find_map(|_| lost_by_a_crash(guarantee));
        assert_eq!(lost, Some(guarantee == Guarantee::AtMostOnce), "{guarantee}");
    }
}

/// `None` if the barrier came too late.
fn lost_by_a_crash(guarantee: Guarantee) -> Option<bool> {
    let log = MemoryLog::default();
    fill(&log, &[vec!["1 gate".to_owned()]]);
    let watched = Watched { log: log.clone(), handed: Arc::default() };
    let (gate, state, monitor) = (Gate::closed(), Arc::default(), Monitor::new());
    let job = Counts(guarantee, Arc::clone(&gate));
    let met = std::thread::scope(|scope| {
        let running = scope.spawn(|| go(&job, &watched, &state, (Mode::Unbounded, 1), &monitor));
        let mut waits = gate.wait_for(1);
        append(&log, 0, &["1 b".to_owned(), "2 gate".to_owned()]);
        {
            let mut handed = watched.handed.0.lock();
            let wait = watched.handed.1.wait_while_for(&mut handed, |at| *at < 3, DEADLINE);
            waits &= !wait.timed_out();
        }
        waits &= monitor.wait_until(DEADLINE, |p| p.phase == "aligning");
        gate.let_through(Some(1));
        // Now the second batch is being processed, and its epoch cannot end.
        waits &= gate.wait_for(2);
        let met = monitor.wait_until(Duration::from_secs(5), |p| p.commits > 0);
        monitor.stop_at_once();
        gate.let_through(None);
        let ended = running.join().unwrap();
        assert!(waits && matches!(ended, Err(RunError::StoppedAtOnce)), "{ended:?}");
        met
    });
    state.crash();
    go(&counts(guarantee), &log, &state, (Mode::UntilEnd, 5), &Monitor::new()).unwrap();
    let rows = found(&log).rows;
    let all = BTreeMap::from([((50, "b".to_owned()), vec![1]), ((50, "gate".to_owned()), vec![2])]);
    let lost = BTreeMap::from([((50, "gate".to_owned()), vec![1])]);
    assert!(rows == all || rows == lost, "{rows:?}");
    met.then_some(rows == lost)
}
