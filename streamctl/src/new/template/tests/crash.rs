// The job with a virtual clock and a log in memory: what it counts, and that no crash changes it.

use __crate__::__Job__;
use tidemill::args::JobArgs as _;
use tidemill::testing::{DriveError, TestDriver};

/// The job with its defaults: windows of 10 s, lines at most 2 s out of order.
fn driver() -> tidemill::prelude::Result<TestDriver<__Job__>> {
    let no_arguments: [&str; 0] = [];
    let job = __Job__::parse(no_arguments).expect("every argument has a default");
    TestDriver::new(&job)
}

/// Two partitions, two commits, one line out of order, one late, one that is none; then the end of the input.
fn script(driver: &mut TestDriver<__Job__>) -> Result<(), DriveError> {
    driver.send(0, "1000 apple").send(1, "2000 pear").send(0, "what is this?").send(1, "9000 apple");
    driver.commit()?;
    // 9900 comes behind 11500 of its partition, which is within the 2 s; 3000 behind 14000 is not.
    driver.send(0, "11500 pear").send(0, "9900 apple").send(1, "14000 pear").send(0, "13000 apple");
    driver.commit()?;
    driver.send(1, "3000 pear");
    driver.until_end()?;
    Ok(())
}

#[test]
fn counts_each_name_per_window() -> Result<(), DriveError> {
    let mut driver = driver()?;
    script(&mut driver)?;
    let mut counts: Vec<String> = driver.outputs().into_iter().map(|row| row.value).collect();
    counts.sort();
    assert_eq!(
        counts,
        [
            "1970-01-01T00:00:00.000Z apple 3",
            "1970-01-01T00:00:00.000Z pear 1",
            "1970-01-01T00:00:10.000Z apple 1",
            "1970-01-01T00:00:10.000Z pear 2",
        ]
    );
    let late: Vec<String> = driver.late().into_iter().map(|row| row.value).collect();
    assert_eq!(late, ["3000 pear"]);
    let dead = driver.dead_letters();
    assert_eq!(dead.len(), 1);
    assert_eq!(dead[0].value, "what is this?");
    assert_eq!(dead[0].headers[0].0, "reason");
    Ok(())
}

/// Runs the script once for every step of every commit, with a crash just before it.
#[test]
fn a_crash_at_any_step_changes_nothing() -> Result<(), DriveError> {
    let crashes = TestDriver::crash_at_every_step(driver, script)?;
    assert!(crashes >= 20, "only {crashes} crashes: the script commits too little");
    Ok(())
}
