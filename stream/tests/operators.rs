//! Operators on their way from a source to its sinks, without and with windows.

use std::time::Duration;

use tidemill_stream::testing::{DriveError, Row, TestDriver};
use tidemill_stream::{EventTime, Flow, Job, OutRecord, Result, Text, Timestamp, Tumbling, topic};

const MS: fn(u64) -> Duration = Duration::from_millis;

fn values(rows: &[Row]) -> Vec<String> {
    let mut values: Vec<_> = rows.iter().map(|r| r.value.clone()).collect();
    values.sort();
    values
}

struct Stateless;
impl Job for Stateless {
    const NAME: &'static str = "stateless";
    fn build(&self, flow: &Flow) -> Result<()> {
        flow.source(topic("lines"), Text)
            .dead_letter_to(topic("dead"))
            .try_map(|line| line.parse::<i64>())
            .filter(|n| *n != 13)
            .flat_map(|n| vec![n; usize::try_from(n % 3).unwrap_or(0)])
            .map(|n| n * 10)
            .to(topic("numbers"), Text);
        Ok(())
    }
}

#[test]
fn a_job_without_a_window_keeps_partition_and_time_and_sends_errors_to_the_dead_letters()
-> Result<(), DriveError> {
    let script = |driver: &mut TestDriver<Stateless>| {
        for (partition, value) in [(0, "1"), (1, "2"), (0, "x"), (1, "13"), (0, "3")] {
            driver.send(partition, value);
        }
        driver.advance(MS(7))?;
        driver.send(1, "4");
        driver.commit()?;
        driver.until_end().map(|_| ())
    };
    let mut driver = TestDriver::new(&Stateless)?;
    script(&mut driver)?;
    let outputs = driver.outputs();
    assert_eq!(values(&outputs), ["10", "20", "20", "40"]);
    assert!(outputs.iter().all(|r| r.partition == u32::from(r.value != "10") && r.key.is_none()));
    assert!(outputs.iter().all(|r| r.timestamp == if r.value == "40" { 7 } else { 0 }));
    let dead = driver.dead_letters();
    assert_eq!((dead.len(), dead[0].partition, dead[0].value.as_str()), (1, 0, "x"));
    assert_eq!(dead[0].headers, [("reason".to_owned(), "invalid digit found in string".to_owned())]);
    assert!(TestDriver::crash_at_every_step(|| TestDriver::new(&Stateless), script)? > 0);
    Ok(())
}

struct Stops;
impl Job for Stops {
    const NAME: &'static str = "stops";
    fn build(&self, flow: &Flow) -> Result<()> {
        flow.source(topic("lines"), Text).try_map(|l| l.parse::<i64>()).to(topic("out"), Text);
        Ok(())
    }
}

#[test]
fn a_malformed_record_that_nobody_asked_for_stops_the_job_and_names_the_remedy() -> Result<(), DriveError> {
    let mut driver = TestDriver::new(&Stops)?;
    driver.send(1, "x");
    let error = driver.commit().unwrap_err().to_string();
    assert!(error.contains("offset 0 of partition 1") && error.contains("dead_letter_to"), "{error}");
    Ok(())
}

struct Rekeyed;
impl Job for Rekeyed {
    const NAME: &'static str = "rekeyed";
    fn build(&self, flow: &Flow) -> Result<()> {
        flow.source(topic("lines"), Text)
            .event_time(|l| l.len() as i64, EventTime::out_of_order(MS(0)))
            .key_by(|line| line.chars().next().map_or_else(String::new, String::from))
            .map(|line| line.to_uppercase())
            .to(topic("keyed"), Text);
        Ok(())
    }
}

#[test]
fn a_keyed_stream_writes_key_partition_and_event_time() -> Result<(), DriveError> {
    let mut driver = TestDriver::new(&Rekeyed)?.partitions(3);
    driver.send(0, "abc").send(1, "axy").send(2, "b");
    driver.commit()?;
    let rows = driver.outputs();
    assert_eq!(values(&rows), ["ABC", "AXY", "B"]);
    for row in rows {
        let key = row.key.unwrap_or_default();
        assert_eq!(key, row.value[..1].to_lowercase());
        assert_eq!(row.partition, tidemill_stream::partition_of(key.as_bytes(), 3));
        assert_eq!(row.timestamp, row.value.len() as i64);
    }
    Ok(())
}

/// The words of each line, by length, joined in the order of one partition.
struct Joined;
impl Job for Joined {
    const NAME: &'static str = "joined";
    fn build(&self, flow: &Flow) -> Result<()> {
        let words = |line: String| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        flow.source(topic("lines"), Text)
            .event_time(
                |l| Timestamp(l.split(' ').next().and_then(|t| t.parse().ok()).unwrap_or(0)),
                EventTime::out_of_order(MS(0)),
            )
            .flat_map(words)
            .key_by(|word| word.len() as u64)
            .window(Tumbling::of(MS(10)).offset(MS(3)))
            .fold("joined", String::new(), |all, word: String| all.push_str(&word))
            .late_to(topic("late"))
            .filter(|w| w.key != 4)
            .map(|w| format!("{}-{} {}", w.start.millis(), w.end.millis(), w.value))
            .to(topic("out"), Text);
        Ok(())
    }
}

#[test]
fn a_fold_takes_rows_of_a_partition_in_order_and_a_late_record_is_written_once() -> Result<(), DriveError> {
    let script = |driver: &mut TestDriver<Joined>| {
        driver.send(0, "5 ab").send(0, "6 cd efgh");
        driver.commit()?;
        driver.send(0, "12 ef").send(0, "13 gh");
        driver.commit()?;
        // Three rows of one record, all late.
        driver.send(0, "2 xx yy");
        driver.until_end().map(|_| ())
    };
    let make = || TestDriver::new(&Joined).map(|d| d.partitions(1));
    let mut driver = make()?;
    script(&mut driver)?;
    assert_eq!(values(&driver.outputs()), ["13-23 13gh", "3-13 56", "3-13 abcd12ef"]);
    assert_eq!(values(&driver.late()), ["2 xx yy"]);
    TestDriver::crash_at_every_step(make, script)?;
    Ok(())
}

#[test]
fn late_and_dead_records_keep_key_headers_and_timestamp() -> Result<(), DriveError> {
    let mut driver = TestDriver::new(&Stateless)?;
    let header = tidemill_stream::Header { name: "trace".into(), value: Some("7".into()) };
    let record = OutRecord {
        timestamp: 99,
        key: Some("k".into()),
        value: Some("not a number".into()),
        headers: vec![header],
    };
    driver.send_record(1, record);
    driver.commit()?;
    let dead = &driver.dead_letters()[0];
    assert_eq!((dead.partition, dead.timestamp, dead.key.as_deref()), (1, 99, Some("k")));
    let names: Vec<_> = dead.headers.iter().map(|h| h.0.as_str()).collect();
    assert_eq!(names, ["trace", "reason"]);
    Ok(())
}
