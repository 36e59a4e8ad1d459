//! A job of a user's own that panics on one record among many, through broker, log, RocksDB and the file that counts.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::Rig;
use tidemill::adapters::{RunOptions, run};
use tidemill::engine::Mode;
use tidemill::prelude::*;
use tidemill::runtime::Monitor;

/// Counts per key; cannot stand one of them.
#[derive(JobArgs)]
struct Fragile {
    /// Topic to read: lines `KEY TIME`.
    #[arg(default = "numbers")]
    input: String,
}

fn parsed(line: &str) -> (String, i64) {
    let (key, time) = line.split_once(' ').expect("a line has a key and a time");
    (key.to_owned(), time.parse().expect("a time is a number"))
}

impl Job for Fragile {
    const NAME: &'static str = "fragile";
    fn build(&self, flow: &Flow) -> Result<()> {
        flow.source(topic(&self.input), Text)
            .dead_letter_to(topic("fragile-dead-letter"))
            // Of the poison there is no time: the closure panics.
            .event_time(|line| parsed(line).1, EventTime::out_of_order(Duration::from_secs(1)))
            .map(|line| parsed(&line))
            .key_by(|(key, _)| key.clone())
            .window(Tumbling::of(Duration::from_secs(1)))
            .count("per-key")
            .late_to(topic("fragile-late"))
            .map(|w| format!("{} {}", w.end.millis(), w.value))
            .to(topic("fragile-counts"), Text);
        Ok(())
    }
}

#[test]
fn one_poison_record_among_many() {
    const POISON: &str = "k7 eleven";
    let mut lines: Vec<String> = (0..50_000).map(|i| format!("k{} {}", i % 40, i / 10)).collect();
    lines.insert(31_007, POISON.to_owned());
    let mut expected = BTreeMap::<(String, i64), u64>::new();
    for (key, time) in lines.iter().filter(|line| *line != POISON).map(|line| parsed(line)) {
        *expected.entry((key, time / 1_000 * 1_000 + 1_000)).or_default() += 1;
    }

    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::open(dir.path());
    rig.produce("numbers", 4, &lines.join("\n"));
    let options = RunOptions { mode: Mode::UntilEnd, tasks: Some(2), ..RunOptions::default() };
    let job = JobSpec::of::<Fragile>("");
    let report = run(&job, &rig.access, &options, rig.runtime.handle(), &Monitor::new()).unwrap();
    assert_eq!(report.restarts, 3, "{report:?}");

    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let mut counted = BTreeMap::new();
    for (_, key, value, _) in rig.read("fragile-counts") {
        let (end, count) = parsed(&text(value));
        let before = counted.insert((text(key), end.parse::<i64>().unwrap()), count.unsigned_abs());
        assert_eq!(before, None);
    }
    assert_eq!(counted, expected);
    assert!(rig.read("fragile-late").is_empty());
    let dead: Vec<_> = rig.read("fragile-dead-letter");
    let dead: Vec<_> =
        dead.into_iter().map(|(_, key, value, headers)| (text(key), text(value), headers)).collect();
    assert_eq!(dead, [("k7".to_owned(), POISON.to_owned(), 2)], "reason and tries beside it");
    let book = std::fs::read_to_string(dir.path().join("state/fragile/panics.json")).unwrap();
    assert_eq!(book, r#"{"version":1,"tried":[]}"#, "what is committed is forgotten");
    rig.close();
}
