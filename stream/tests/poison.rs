//! Input that makes the job's own code panic: a record goes to the dead letters after its tries and everything else is
//! exact; without dead letters, and in the keyed step, the job stops and says what to look at.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tidemill_stream::engine::poison::{MemoryBook, PoisonPolicy, Tried, TryBook};
use tidemill_stream::engine::{CommitPolicy, Mode};
use tidemill_stream::io::{Cleanup, Log, NewTopic};
use tidemill_stream::names::Identity;
use tidemill_stream::runtime::{Monitor, RunConfig, RunError, RunReport, run};
use tidemill_stream::state::{MemoryState, StateBackend};
use tidemill_stream::testing::{DriveError, MemoryLog, TestDriver};
use tidemill_stream::{
    EventTime, Flow, Header, Job, Key, Malformed, NotAKey, OutRecord, Plan, Result, Text, Timestamp,
    Tumbling, decode_with, topic,
};

/// Where the job panics, and how often it may before it stops doing so.
#[derive(Clone)]
struct Counts {
    dead_letters: bool,
    /// Panics left; a record with key `poison` takes one.
    record: Arc<AtomicU32>,
    fold: &'static str,
    result: &'static str,
}

impl Counts {
    fn panics(times: u32) -> Self {
        Self { dead_letters: true, record: Arc::new(AtomicU32::new(times)), fold: "", result: "" }
    }
}

/// Lines `time key`; windows of 50 ms, 30 ms out of order.
impl Job for Counts {
    const NAME: &'static str = "counts";
    fn build(&self, flow: &Flow) -> Result<()> {
        let line = decode_with(|record| {
            let text = std::str::from_utf8(record.value().unwrap_or_default()).unwrap_or_default();
            let (t, key) = text.split_once(' ').ok_or_else(|| Malformed::new("no space"))?;
            Ok((t.parse::<i64>().map_err(|e| Malformed::new(e.to_string()))?, key.to_owned()))
        });
        let Self { record, fold, result, .. } = self.clone();
        let source = flow.source(topic("in"), line);
        let source = if self.dead_letters { source.dead_letter_to(topic("dead")) } else { source };
        source
            .event_time(|(t, _)| *t, EventTime::out_of_order(Duration::from_millis(30)))
            .map(move |(t, key)| {
                let left = |left: u32| left.checked_sub(1);
                if key.starts_with("poison")
                    && record.fetch_update(Ordering::SeqCst, Ordering::SeqCst, left).is_ok()
                {
                    panic!("the job's closure cannot stand `{key}`");
                }
                (t, key)
            })
            .key_by(|(_, key)| key.clone())
            .window(Tumbling::of(Duration::from_millis(50)))
            .fold("per-key", 0u64, move |n, (_, key)| {
                assert!(key != fold, "the fold cannot stand it");
                *n += 1;
            })
            .late_to(topic("late"))
            .map(move |w| {
                assert!(w.key != result, "nobody can stand this result");
                format!("{} {} {}", w.end.millis(), w.key, w.value)
            })
            .to(topic("out"), Text);
        Ok(())
    }
}

const FOREVER: u32 = u32::MAX;

fn append(log: &MemoryLog, partition: u32, line: &str) {
    let key = Some(Bytes::from_static(b"k"));
    let headers = vec![Header { name: Bytes::from_static(b"h"), value: Some(Bytes::from_static(b"v")) }];
    let value = Some(Bytes::from(line.to_owned()));
    log.append("in", partition, OutRecord { timestamp: 7, key, value, headers });
}

fn log(lines: &[Vec<String>]) -> MemoryLog {
    let (log, partitions) = (MemoryLog::default(), lines.len() as u32);
    log.create_topic(&NewTopic { name: "in".into(), partitions, cleanup: Cleanup::Delete }).unwrap();
    for (partition, rows) in lines.iter().enumerate() {
        rows.iter().for_each(|line| append(&log, partition as u32, line));
    }
    log
}

/// Four partitions of rows whose times rise; `poison` where it is told.
fn lines(poison: &[(usize, usize)]) -> Vec<Vec<String>> {
    let row = |p: usize, i: usize| match poison.contains(&(p, i)) {
        // Far ahead: as a buried record it moves no time, so nothing becomes late by it.
        true => "900000 poison".to_owned(),
        false => format!("{} k{}", i / 2, (i * 7 + p) % 40),
    };
    (0..4).map(|p| (0..5_000).map(|i| row(p, i)).collect()).collect()
}

/// Window end and key to count, of rows that are no poison.
fn recount(lines: &[Vec<String>]) -> BTreeMap<(i64, String), u64> {
    let mut counts = BTreeMap::new();
    for line in lines.iter().flatten().filter(|line| !line.contains("poison")) {
        let (t, key) = line.split_once(' ').unwrap();
        let end = t.parse::<i64>().unwrap() / 50 * 50 + 50;
        *counts.entry((end, key.to_owned())).or_default() += 1;
    }
    counts
}

fn found(log: &MemoryLog) -> BTreeMap<(i64, String), u64> {
    let mut found = BTreeMap::new();
    for (_, _, record) in log.records("out") {
        let text = String::from_utf8(record.value.unwrap().to_vec()).unwrap();
        let mut parts = text.split(' ');
        let mut next = || parts.next().unwrap();
        let key = (next().parse().unwrap(), next().to_owned());
        assert_eq!(found.insert(key, next().parse().unwrap()), None, "a second row: {text}");
    }
    found
}

struct Run {
    poison: PoisonPolicy,
    book: Arc<MemoryBook>,
    state: Arc<MemoryState>,
}

impl Run {
    fn new() -> Self {
        let book = Arc::new(MemoryBook::default());
        let poison = PoisonPolicy { book: Arc::clone(&book) as _, ..PoisonPolicy::default() };
        Self { poison, book, state: Arc::default() }
    }

    fn go(&self, job: &Counts, log: &MemoryLog) -> Result<RunReport, RunError> {
        self.go_with(&Plan::of(job).unwrap(), 1 << 20, log)
    }

    fn go_with(&self, plan: &Plan, overlay_bytes_max: usize, log: &MemoryLog) -> Result<RunReport, RunError> {
        let config = RunConfig {
            identity: Identity::new("counts").unwrap(),
            mode: Mode::UntilEnd,
            tasks: 2,
            overlay_bytes_max,
            policy: CommitPolicy { interval: 5, ..CommitPolicy::default() },
            poison: self.poison.clone(),
        };
        let backend: Arc<dyn StateBackend> = Arc::clone(&self.state) as _;
        run(plan, &config, log, &backend, &Monitor::new())
    }
}

#[test]
fn poison_among_many_goes_to_the_dead_letters_and_everything_else_is_exact() {
    // Two in one batch, one alone at the end of another partition.
    let poison = [(1, 2_000), (1, 2_001), (3, 4_999)];
    let lines = lines(&poison);
    let (log, run) = (log(&lines), Run::new());
    let report = run.go(&Counts::panics(FOREVER), &log).unwrap();
    assert_eq!(found(&log), recount(&lines));
    assert!(log.records("late").is_empty());
    let letters = log.records("dead");
    let places: Vec<_> = letters.iter().map(|(partition, _, _)| *partition).collect();
    assert_eq!(places, [1, 1, 3]);
    for (_, _, letter) in letters {
        let text = |bytes: &Bytes| String::from_utf8(bytes.to_vec()).unwrap();
        let headers: Vec<_> =
            letter.headers.iter().map(|h| (text(&h.name), text(h.value.as_ref().unwrap()))).collect();
        let headers: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let reason = "the job panics: the job's closure cannot stand `poison`";
        assert_eq!(headers, [("h", "v"), ("reason", reason), ("tries", "3")]);
        let (key, value) = (letter.key.as_deref(), letter.value.as_deref());
        assert_eq!((letter.timestamp, key, value), (7, Some(&b"k"[..]), Some(&b"900000 poison"[..])));
    }
    // The panic in the batch is a try, and each try is a restart.
    assert_eq!(report.restarts, 9);
    assert_eq!(run.book.load().unwrap(), [], "what is committed is forgotten");
}

#[test]
fn a_panic_that_passes_leaves_nothing_behind() {
    let lines = lines(&[(2, 100)]);
    let (log, run) = (log(&lines), Run::new());
    let report = run.go(&Counts::panics(2), &log).unwrap();
    let mut expected = recount(&lines);
    expected.insert((900_050, "poison".to_owned()), 1);
    // The row is in time and moves time on: what comes behind it in its partition is late.
    let late = log.records("late").len();
    let counted: u64 = found(&log).values().sum();
    assert_eq!((counted + late as u64, found(&log)[&(900_050, "poison".to_owned())]), (20_000, 1));
    assert_eq!((report.restarts, log.records("dead").len()), (2, 0));
    assert_eq!(run.book.load().unwrap(), []);
}

#[test]
fn tries_are_remembered_from_run_to_run() {
    let lines = lines(&[(0, 77)]);
    let (log, run) = (log(&lines), Run::new());
    let topic = log.topic("in").unwrap().unwrap().id.uuid;
    let tried = |tries| Tried { topic, partition: 0, offset: 77, tries, error: "boom".to_owned() };
    // An earlier process was killed after its second try. Another topic's record of that place is another record.
    let foreign = Tried { topic: Default::default(), tries: 9, ..tried(9) };
    run.book.save(&[foreign, tried(2)]).unwrap();
    let report = run.go(&Counts::panics(FOREVER), &log).unwrap();
    assert_eq!((report.restarts, log.records("dead").len()), (1, 1));
    assert_eq!(found(&log), recount(&lines));

    // The count is saved before the restart, so that a kill after it changes nothing.
    #[derive(Debug)]
    struct Unwritable;
    impl TryBook for Unwritable {
        fn load(&self) -> std::io::Result<Vec<Tried>> {
            Ok(Vec::new())
        }
        fn save(&self, _: &[Tried]) -> std::io::Result<()> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
    }
    append(&log, 0, "901000 poison");
    let mut run = run;
    run.poison.book = Arc::new(Unwritable);
    let error = run.go(&Counts::panics(FOREVER), &log).unwrap_err();
    assert!(matches!(error, RunError::Tries { .. }), "{error}");
    assert!(error.to_string().contains("cannot stand `poison`"), "the panic is lost: {error}");
}

#[test]
fn without_dead_letters_the_job_stops_with_partition_offset_and_remedy() {
    let (log, run) = (log(&lines(&[(2, 1_234)])), Run::new());
    let job = Counts { dead_letters: false, ..Counts::panics(FOREVER) };
    for _ in 0..2 {
        let error = run.go(&job, &log).unwrap_err();
        let said = error.chain().join(": ");
        assert_eq!(
            said,
            "task 0 of source `in` stopped: the job panics at the record at offset 1234 of partition 2: the job's \
             closure cannot stand `poison`; send such records to a topic with `.dead_letter_to(..)`, or mend the job"
        );
        // The record is tried anew by whoever starts the job again.
        assert_eq!(run.book.load().unwrap(), []);
    }
    assert_eq!(FOREVER - job.record.load(Ordering::SeqCst), 6, "three tries each");
    run.go(&Counts { dead_letters: false, ..Counts::panics(0) }, &log).unwrap();
}

#[test]
fn a_panic_in_the_keyed_step_stops_the_job_and_names_step_key_and_window() {
    let lines = lines(&[]);
    let broken = [Counts { fold: "k7", ..Counts::panics(0) }, Counts { result: "k7", ..Counts::panics(0) }];
    for (job, message) in broken.into_iter().zip(["the fold cannot stand it", "nobody can stand this result"])
    {
        let (log, run) = (log(&lines), Run::new());
        let error = run.go(&job, &log).unwrap_err();
        let RunError::Step { source, .. } = &error else { panic!("{error}") };
        let said = source.to_string();
        let place = format!(
            "step `per-key` panics at key `k7` in the window from {} to {}: {message}",
            Timestamp(0),
            Timestamp(50)
        );
        assert!(said.starts_with(&place), "{said}");
        assert!(log.records("dead").is_empty());
        assert_eq!(found(&log).keys().filter(|(_, key)| key == "k7").count(), 0);
    }
}

/// A key whose encoding panics for some values. Rows wait to be sent on together, so it panics long after its record.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Spiteful(String);

impl Key for Spiteful {
    fn encode(&self, to: &mut Vec<u8>) {
        assert!(!self.0.starts_with("poison"), "no bytes for `{}`", self.0);
        self.0.encode(to);
    }
    fn decode(from: &[u8]) -> Result<Self, NotAKey> {
        String::decode(from).map(Self)
    }
}

struct BySpite;
impl Job for BySpite {
    const NAME: &'static str = "counts";
    fn build(&self, flow: &Flow) -> tidemill_stream::Result<()> {
        let line = decode_with(|record| {
            let text = std::str::from_utf8(record.value().unwrap_or_default()).unwrap_or_default();
            let (t, key) = text.split_once(' ').ok_or_else(|| Malformed::new("no space"))?;
            Ok((t.parse::<i64>().map_err(|e| Malformed::new(e.to_string()))?, key.to_owned()))
        });
        flow.source(topic("in"), line)
            .dead_letter_to(topic("dead"))
            .event_time(|(t, _)| *t, EventTime::out_of_order(Duration::from_millis(30)))
            .key_by(|(_, key)| Spiteful(key.clone()))
            .window(Tumbling::of(Duration::from_millis(50)))
            .count("per-key")
            .drop_late()
            .map(|w| format!("{} {} {}", w.end.millis(), w.key.0, w.value))
            .to(topic("out"), Text);
        Ok(())
    }
}

/// Whoever fills the table of rows that wait is innocent: only the records with such keys are buried, and the error is told
/// in short.
#[test]
fn a_key_without_bytes_buries_its_own_record() {
    let mut lines = lines(&[]);
    // Far apart, so that each is found anew; the last quotes a long key.
    lines[0][5] = "2 poison".to_owned();
    lines[1][4_000] = "2000 poison".to_owned();
    lines[1][4_001] = format!("2000 poison{}", "x".repeat(100_000));
    let (log, run) = (log(&lines), Run::new());
    // A small table is flushed in the middle of a batch.
    run.go_with(&Plan::of(&BySpite).unwrap(), 64 << 10, &log).unwrap();
    assert_eq!(found(&log), recount(&lines));
    let letters = log.records("dead");
    let values: Vec<_> = letters.iter().map(|(p, _, r)| (*p, r.value.clone().unwrap().len())).collect();
    assert_eq!(values, [(0, 8), (1, 11), (1, 100_011)]);
    for (_, _, letter) in letters {
        let reason = letter.headers.iter().find(|h| h.name == "reason").unwrap().value.clone().unwrap();
        assert!(
            reason.starts_with(b"the job panics: no bytes for `poison") && reason.len() < 1_200,
            "{reason:?}"
        );
    }
}

#[test]
fn the_test_driver_tries_again_too_and_a_crash_changes_nothing() -> Result<(), DriveError> {
    type Driver = TestDriver<Counts>;
    let script = |driver: &mut Driver| -> Result<(), DriveError> {
        driver.send(0, "1 a").send(0, "2 poison").send(0, "3 a").send(1, "4 b");
        driver.commit()?;
        driver.send(1, "90 b").send(0, "95 a").send(1, "96 poison");
        driver.commit()?;
        driver.until_end().map(|_| ())
    };
    let make = || Driver::new(&Counts::panics(FOREVER));
    let crashes = Driver::crash_at_every_step(make, script)?;
    assert!(crashes >= 14, "{crashes}");
    let mut undisturbed = make()?;
    script(&mut undisturbed)?;
    let values =
        |rows: Vec<tidemill_stream::testing::Row>| rows.into_iter().map(|r| r.value).collect::<Vec<_>>();
    let mut outputs = values(undisturbed.outputs());
    outputs.sort();
    assert_eq!(outputs, ["100 a 1", "100 b 1", "50 a 2", "50 b 1"]);
    assert_eq!(values(undisturbed.dead_letters()), ["2 poison", "96 poison"]);
    assert_eq!(undisturbed.panics(), 6);

    let mut broken = Driver::new(&Counts { fold: "a", ..Counts::panics(0) })?;
    broken.send(0, "1 a");
    let said = broken.commit().unwrap_err().to_string();
    assert!(said.contains("`per-key`") && said.contains("`a`"), "{said}");
    Ok(())
}
