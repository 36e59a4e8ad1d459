//! The test driver with a user's job: crashes at every step, idleness, other numbers of tasks, small memory.

use std::time::Duration;

use tidemill_stream::engine::CommitStep;
use tidemill_stream::testing::{DriveError, EndFate, TestDriver};
use tidemill_stream::{
    EventTime, Flow, Job, Json, PlanError, Result, StartError, Text, Timestamp, Tumbling, topic,
};

/// `[time, address]` rows, 10 ms windows, 3 ms out of order, idle after 50 ms.
struct Visits {
    window: u64,
}

impl Job for Visits {
    const NAME: &'static str = "visits";
    fn build(&self, flow: &Flow) -> Result<()> {
        let millis = Duration::from_millis;
        flow.source(topic("visits"), Json::<(i64, String)>::new())
            .dead_letter_to(topic("dead"))
            .event_time(|row| row.0, EventTime::out_of_order(millis(3)).idle_after(millis(50)))
            .key_by(|row| row.1.clone())
            .window(Tumbling::of(millis(self.window)))
            .count("per-address")
            .late_to(topic("late"))
            .map(|w| format!("{}..{} {}", w.start.millis(), w.end.millis(), w.value))
            .to(topic("counts"), Text);
        Ok(())
    }
}

type Driver = TestDriver<Visits>;

fn driver() -> Result<Driver> {
    Driver::new(&Visits { window: 10 })
}

fn row(t: i64, key: &str) -> String {
    format!("[{t},\"{key}\"]")
}

fn results(driver: &Driver) -> Vec<(String, String)> {
    let row = |r: tidemill_stream::testing::Row| (r.key.unwrap_or_default(), r.value);
    let mut rows: Vec<_> = driver.outputs().into_iter().map(row).collect();
    rows.sort();
    rows
}

fn script(driver: &mut Driver) -> Result<(), DriveError> {
    driver.send(0, row(1, "a")).send(1, row(2, "a")).send(0, "?").send(1, row(4, "b"));
    driver.commit()?;
    driver.send(0, row(9, "b")).send(0, row(16, "a")).send(1, row(12, "c"));
    driver.commit()?;
    driver.send(0, row(8, "a")).send(1, row(17, "b")).send(0, row(31, "a"));
    driver.commit()?;
    driver.send(1, row(30, "a")).send(1, row(2, "late"));
    driver.until_end()?;
    // Closed at the end, so late now; a newer window is counted by the next run.
    driver.send(0, row(38, "x")).send(1, row(55, "a"));
    driver.until_end()?;
    Ok(())
}

#[test]
fn a_crash_at_any_step_changes_nothing() -> Result<(), DriveError> {
    for tasks in [1, 2, 3] {
        let crashes = Driver::crash_at_every_step(|| Ok(driver()?.tasks(tasks)), script)?;
        // Seven steps or more, in each of five commits.
        assert!(crashes >= 35, "{crashes}");
    }
    for seed in 0..2 {
        Driver::crash_at_every_step(|| Ok(driver()?.seed(seed)), script)?;
    }
    let mut undisturbed = driver()?;
    script(&mut undisturbed)?;
    let expected = [
        ("a", "0..10 2"),
        ("a", "10..20 1"),
        ("a", "30..40 2"),
        ("a", "50..60 1"),
        ("b", "0..10 2"),
        ("b", "10..20 1"),
        ("c", "10..20 1"),
    ];
    assert_eq!(results(&undisturbed), expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
    let late: Vec<_> = undisturbed.late().into_iter().map(|r| (r.partition, r.value)).collect();
    assert_eq!(late, [(0, row(8, "a")), (0, row(38, "x")), (1, row(2, "late"))]);
    let dead = undisturbed.dead_letters();
    assert_eq!((dead.len(), dead[0].value.as_str(), dead[0].headers[0].0.as_str()), (1, "?", "reason"));
    Ok(())
}

#[test]
fn a_crash_while_a_partition_idles_changes_nothing() -> Result<(), DriveError> {
    let script = |driver: &mut Driver| {
        driver.send(0, row(5, "a")).send(1, row(5, "b"));
        driver.commit()?;
        driver.idle(1)?;
        // Partition 1 holds nothing back: the window closes.
        driver.send(0, row(20, "a"));
        driver.commit()?;
        // It returns only after idling again, and joins at the floor: 16, so that 7 is late.
        driver.idle(1)?;
        driver.send(1, row(7, "b")).send(1, row(18, "b"));
        driver.commit()?;
        driver.until_end().map(|_| ())
    };
    Driver::crash_at_every_step(driver, script)?;
    let mut undisturbed = driver()?;
    script(&mut undisturbed)?;
    assert_eq!(undisturbed.late().len(), 1);
    let expected = [("a", "0..10 1"), ("a", "20..30 1"), ("b", "0..10 1"), ("b", "10..20 1")];
    assert_eq!(results(&undisturbed), expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
    Ok(())
}

#[test]
fn time_stands_still_for_a_quiet_partition_until_it_is_idle() -> Result<(), DriveError> {
    let mut driver = driver()?;
    driver.send(0, row(5, "a")).send(1, row(5, "b")).send(0, row(30, "a"));
    driver.commit()?;
    driver.advance(Duration::from_millis(49))?;
    driver.commit()?;
    assert!(results(&driver).is_empty());
    driver.advance(Duration::from_millis(1))?;
    driver.commit()?;
    // Both are idle: time stands at the highest value published, which was partition 1's own before it left last.
    let before = results(&driver);
    driver.send(0, row(31, "a"));
    driver.commit()?;
    assert_eq!(results(&driver).len(), 2, "{before:?}");
    Ok(())
}

#[test]
fn another_number_of_tasks_changes_nothing() -> Result<(), DriveError> {
    let mut undisturbed = driver()?;
    script(&mut undisturbed)?;
    let mut driver = driver()?.tasks(1);
    driver.send(0, row(1, "a")).send(1, row(2, "a")).send(0, "?").send(1, row(4, "b"));
    driver.restart_with(3)?;
    driver.send(0, row(9, "b")).send(0, row(16, "a")).send(1, row(12, "c"));
    driver.commit()?;
    driver.lose_store()?;
    driver.send(0, row(8, "a")).send(1, row(17, "b")).send(0, row(31, "a"));
    driver.restart_with(2)?;
    driver.send(1, row(30, "a")).send(1, row(2, "late"));
    driver.until_end()?;
    driver.send(0, row(38, "x")).send(1, row(55, "a"));
    driver.until_end()?;
    assert_eq!(results(&driver), results(&undisturbed));
    assert_eq!(driver.late(), undisturbed.late());
    assert!(driver.replayed() > 0);
    Ok(())
}

#[test]
fn an_abort_kills_the_next_epoch_with_it_and_a_lost_answer_is_asked_for() -> Result<(), DriveError> {
    let mut undisturbed = driver()?;
    script(&mut undisturbed)?;
    for fate in [EndFate::Abort, EndFate::AbortUnknown, EndFate::CommitUnknown] {
        let mut driver = driver()?;
        driver.send(0, row(1, "a")).send(1, row(2, "a")).send(0, "?").send(1, row(4, "b"));
        driver.next_end(fate);
        driver.commit()?;
        driver.send(0, row(9, "b")).send(0, row(16, "a")).send(1, row(12, "c"));
        driver.next_end(fate);
        driver.commit()?;
        driver.send(0, row(8, "a")).send(1, row(17, "b")).send(0, row(31, "a"));
        driver.commit()?;
        driver.send(1, row(30, "a")).send(1, row(2, "late"));
        driver.until_end()?;
        driver.send(0, row(38, "x")).send(1, row(55, "a"));
        driver.until_end()?;
        assert_eq!(results(&driver), results(&undisturbed), "{fate:?}");
    }
    Ok(())
}

#[test]
fn state_beyond_the_memory_is_read_back_and_increased() -> Result<(), DriveError> {
    let mut driver = driver()?.state_memory(4096);
    for _ in 0..5 {
        for key in 0..500 {
            driver.send(key % 2, row(5, &format!("a rather long key, number {key}")));
        }
        driver.commit()?;
    }
    assert_eq!(driver.state::<u64>().len(), 500);
    driver.until_end()?;
    let results = results(&driver);
    assert_eq!(results.len(), 500);
    assert!(results.iter().all(|(_, v)| v == "0..10 5"), "{results:?}");
    let counters = driver.counters();
    assert!(counters.evicted > 0 && counters.store_hits > 0, "{counters:?}");
    Ok(())
}

#[test]
fn a_step_that_is_not_crashed_at_is_replayed_from_the_changelog() -> Result<(), DriveError> {
    let mut driver = driver()?;
    driver.send(0, row(5, "a"));
    driver.crash_at(CommitStep::Write);
    driver.commit()?;
    assert_eq!((driver.crashes(), driver.replayed()), (1, 1));
    assert_eq!(driver.state::<u64>()[&(Timestamp(10), "a".to_owned())], 1);
    Ok(())
}

#[test]
fn other_arguments_are_refused_before_anything_is_processed() -> Result<(), DriveError> {
    let mut first = driver()?;
    first.send(0, row(5, "a"));
    first.commit()?;
    let mut second = first.with_job(&Visits { window: 20 })?;
    let refused = second.commit().unwrap_err();
    let DriveError::Process(tidemill_stream::testing::ProcessError::Start(StartError::Mismatch(mismatch))) =
        refused
    else {
        panic!("{refused}");
    };
    assert_eq!((mismatch.committed.as_str(), mismatch.now.as_str()), ("10ms", "20ms"));
    assert!(mismatch.to_string().contains("--name"));
    let mut renamed = second.named("visits-20")?;
    renamed.until_end()?;
    assert_eq!(results(&renamed), [("a".to_owned(), "0..20 1".to_owned())]);
    Ok(())
}

#[test]
fn a_pipeline_that_cannot_run_is_refused_with_the_step_and_the_remedy() {
    struct Broken(fn(&Flow));
    impl Job for Broken {
        const NAME: &'static str = "broken";
        fn build(&self, flow: &Flow) -> Result<()> {
            (self.0)(flow);
            Ok(())
        }
    }
    let refused = |build| tidemill_stream::Plan::of(&Broken(build)).map(|_| ()).unwrap_err();
    let second = Duration::from_secs(1);
    let no_sink = refused(|flow| drop(flow.source(topic("a"), Text).map(|s| s.len())));
    assert!(matches!(&no_sink, PlanError::NoSink { step } if step == "`map`"), "{no_sink}");
    assert!(matches!(refused(|_| ()), PlanError::NoSource));
    let untimed = refused(|flow| {
        flow.source(topic("a"), Text)
            .key_by(String::clone)
            .window(Tumbling::of(Duration::from_secs(1)))
            .count("c")
            .drop_late()
            .map(|w| w.value)
            .to(topic("b"), Text);
    });
    assert!(untimed.to_string().contains("`c`") && untimed.to_string().contains("event_time"), "{untimed}");
    let _ = second;
    let twice = refused(|flow| flow.source(topic("a"), Text).to(topic("a"), Text));
    assert!(matches!(twice, PlanError::TopicUsedTwice { .. }), "{twice}");
}
