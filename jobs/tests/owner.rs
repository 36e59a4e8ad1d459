//! A job whose log lives in another process: it reads and commits through the socket, and outlives its owner.

#![allow(clippy::print_stdout, reason = "a child process tells its test how far it is")]

mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{FROM, Rig, lines, settings};
use tidemill::adapters::RunOptions;
use tidemill::adapters::broker::Place;
use tidemill::args::ByteSize;
use tidemill::engine::Mode;
use tidemill::runtime::Monitor;
use xtask::recount::Recount;

const DIR: &str = "TIDEMILL_TEST_OWNER_DIR";

/// Not a test by itself: the process that owns the directory and does nothing else until it is killed.
#[test]
fn owner() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let rig = Rig::open(Path::new(&dir));
    println!("{}", if rig.access.place() == Some(Place::Here) { "owns" } else { "does not own" });
    // Its standard input ends with the test that started it.
    let _ = std::io::stdin().lines().next();
}

#[test]
fn the_owner_of_the_log_is_killed_in_the_middle() {
    let text = lines(300_000, 60_000, 4_000, 31, FROM);
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::open(dir.path());
    rig.produce("access-log", 4, &text);
    rig.close();
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "owner", "--nocapture"])
        .env(DIR, dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let said = BufReader::new(owner.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(said.into_iter().any(|line| line.ends_with("owns")));
    let rig = Rig::open(dir.path());
    assert_eq!(rig.access.place(), Some(Place::Process(owner.id())));
    let monitor = Monitor::new();
    let options = RunOptions {
        mode: Mode::UntilEnd,
        tasks: Some(2),
        commit_interval: Duration::from_millis(20),
        // So little that the run commits often, and is not over at the kill.
        state_memory: ByteSize(3 << 20),
        ..RunOptions::default()
    };
    std::thread::scope(|scope| {
        let running = scope.spawn(|| rig.run(&options, &monitor));
        let committed = monitor.wait_until(Duration::from_secs(60), |p| p.commits > 0);
        owner.kill().unwrap();
        owner.wait().unwrap();
        let read: i64 = monitor.progress().committed.values().sum();
        assert!(read < 300_000, "the owner was killed before the run had read all");
        running.join().unwrap().unwrap();
        assert!(committed);
    });
    // Whether the run went back to a commit, or its producer just sent again, depends on what was in flight.
    assert_eq!(rig.access.place(), Some(Place::Here));
    rig.check(&Recount::of(settings(4), text.as_bytes()));
    rig.close();
}
