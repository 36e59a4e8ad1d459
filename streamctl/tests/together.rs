//! Several commands on one data directory: a producer, a job and a reader in processes of their own, whoever owns it.

mod common;

use std::time::Instant;

use common::{DEADLINE, Process, World, settings};
use xtask::recount::Recount;

const KEY: [&str; 2] = ["--key-regex", "^([^ ]+)"];

/// Feeds `text` to a producer in pieces. Once windows close (the bound keeps the first ones open), each piece waits for a
/// row to come out: the producer, the run and the reader are all busy at the same time.
fn feed(produce: &mut Process, text: &[u8], reader: &mut Process) {
    for (number, piece) in text.chunks(text.len() / 20 + 1).enumerate() {
        produce.feed(piece);
        if number >= 10 {
            reader.next_line();
        }
    }
}

/// What was closed when the run was stopped is exact; continued to the end, everything is.
fn closed_is_exact_then_all(world: &World, text: &[u8]) {
    let mut closed = world.counted();
    let mut recount = Recount::of(settings(4), text);
    assert!(closed.rows.len() > 1000, "only {} rows were closed", closed.rows.len());
    let last = closed.rows.keys().map(|(start, _)| start.clone()).max().expect("rows");
    let all = std::mem::take(&mut recount.counts);
    recount.counts =
        all.into_iter().filter(|((start, _), _)| xtask::recount::utc_text(*start) <= last).collect();
    closed.late.clone_from(&recount.late);
    closed.dead.clone_from(&recount.dead);
    let differences = closed.differences(&recount, 5000);
    assert!(differences.is_empty(), "of the closed windows: {differences:#?}");
    world.ok(&["run", "ip-count", "--until-end", "--set", "idle_after=1h"]);
    world.assert_exact(text, settings(4));
}

#[test]
fn a_run_that_owns_is_fed_and_read_by_others() {
    let world = World::new();
    let text = world.generate(200_000, 31, &["--addresses", "1000"]);
    world.ok(&["topic", "create", "access-log"]);
    let mut run = world.start(&["run", "ip-count", "--set", "idle_after=1h", "--status-lines"]);
    run.prints("started");
    let mut reader = world.start(&["consume", "ip-counts"]);
    let mut produce = world.start(&["produce", "access-log", KEY[0], KEY[1]]);
    feed(&mut produce, &text, &mut reader);
    produce.end_input();
    produce.says("200000 lines appended");
    run.interrupted();
    reader.interrupted();
    closed_is_exact_then_all(&world, &text);
}

#[test]
fn a_producer_that_was_there_first_owns() {
    let world = World::new();
    let text = world.generate(200_000, 32, &["--addresses", "1000"]);
    let mut produce = world.start(&["produce", "access-log", "--create", KEY[0], KEY[1]]);
    produce.feed(&text[..1 << 20]);
    world.ok(&["topic", "describe", "access-log"]);
    let mut run = world.start(&["run", "ip-count", "--set", "idle_after=1h", "--status-lines"]);
    run.prints("started");
    let mut reader = world.start(&["consume", "ip-counts"]);
    feed(&mut produce, &text[1 << 20..], &mut reader);
    produce.end_input();
    produce.says("200000 lines appended");
    run.interrupted();
    reader.interrupted();
    closed_is_exact_then_all(&world, &text);
}

/// The owner dies by SIGKILL while a producer, a job and a reader go through it. One of them takes over.
#[test]
fn the_owner_is_killed_in_the_middle() {
    let world = World::new();
    let text = world.generate(200_000, 33, &["--addresses", "1000"]);
    world.ok(&["topic", "create", "access-log"]);
    world.ok(&["topic", "create", "other"]);
    let mut owner = world.start(&["consume", "other"]);
    owner.says("waits");
    let mut run = world.start(&["run", "ip-count", "--set", "idle_after=1h", "--status-lines"]);
    run.prints("started");
    let mut reader = world.start(&["consume", "ip-counts"]);
    let mut produce = world.start(&["produce", "access-log", KEY[0], KEY[1]]);
    let half = text.len() / 2;
    feed(&mut produce, &text[..half], &mut reader);
    owner.kill();
    feed(&mut produce, &text[half..], &mut reader);
    produce.end_input();
    produce.says("200000 lines appended");
    run.interrupted();
    reader.interrupted();
    closed_is_exact_then_all(&world, &text);
}

/// `consume` follows what another process appends, and says once that it waits.
#[test]
fn a_reader_follows() {
    let world = World::new();
    world.ok(&["topic", "create", "t", "--partitions", "1"]);
    let mut reader = world.start(&["consume", "t"]);
    reader.says("waits");
    let started = Instant::now();
    let mut produce = world.start(&["produce", "t"]);
    for line in ["one", "two", "three"] {
        produce.feed(format!("{line}\n").as_bytes());
        assert_eq!(reader.next_line(), line);
    }
    assert!(started.elapsed() < DEADLINE);
    let (_, stderr) = reader.interrupted();
    assert_eq!(stderr.iter().filter(|line| line.contains("waits")).count(), 1, "{stderr:#?}");
    produce.end_input();
    produce.says("3 lines appended");
}
