//! What the log does when its files fail it: every call fails once, disks fill, sectors tear, bits rot.
//!
//! One property throughout (`common::check`): what was acked is there, at its offset, once; transactions are whole;
//! nothing is served that was not sent. I/O errors never look like damage, and damage is named, never served.

#![allow(clippy::print_stderr, reason = "how much a sweep covered")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Client, DEADLINE, Found, Ghost, PARTITIONS, SharedGhost, Stop, check, check_open, open};
use parking_lot::Mutex;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tidemill_log::fs::Fs;
use tidemill_log::fs::sim::{Call, Crash, Failure, SECTOR_BYTES, SimFs};
use tidemill_log::{Isolation, Outcome, Position, ReadError};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// Every n-th case where a test is not asked for all of them (`TIDEMILL_SWEEP=all`).
fn stride(sampled: usize) -> usize {
    if std::env::var_os("TIDEMILL_SWEEP").is_some_and(|v| v == "all") { 1 } else { sampled }
}

/// Runs the scenario on an empty disk, as far as it goes.
fn run(fs: &SimFs) -> (Ghost, Option<Stop>) {
    let ghost = SharedGhost::default();
    let stop = match open(fs) {
        Ok(log) => Client::new(&log, &ghost).scenario().err(),
        Err(_) => Some(Stop),
    };
    let ghost = ghost.lock().clone();
    (ghost, stop)
}

/// The scenario undisturbed; its threads have ended.
fn undisturbed() -> (SimFs, Ghost) {
    let fs = SimFs::new();
    let (ghost, stop) = run(&fs);
    assert_eq!(stop, None);
    (fs, ghost)
}

/// After any crash the directory opens, keeps its promises, and takes more.
fn assert_recovers(fs: &SimFs, ghost: &Ghost, what: &str) {
    for (how, seed) in [(Crash::Kill, 0), (Crash::None, 0), (Crash::All, 0), (Crash::Any, 1), (Crash::Any, 2)]
    {
        let after = fs.crash(how, &mut rng(seed));
        match check(&after, ghost) {
            Ok(Found::Intact) => {}
            other => panic!("{what}, crash {how:?} {seed}: {other:?}"),
        }
        if how == Crash::Any {
            continue;
        }
        let ghost = Arc::new(Mutex::new(ghost.clone()));
        let log = open(&after).unwrap_or_else(|e| panic!("{what}, {how:?}: opened once, then {e}"));
        let mut client = Client::new(&log, &ghost);
        client.topics().and_then(|()| client.plain(3)).unwrap_or_else(|e| panic!("{what}, {how:?}: {e:?}"));
        drop(log);
        let found = check(&after.crash(Crash::None, &mut rng(0)), &ghost.lock());
        assert_eq!(found, Ok(Found::Intact), "{what}, {how:?}, after more");
    }
}

#[test]
fn undisturbed_it_is_all_there() {
    let (fs, ghost) = undisturbed();
    assert!(ghost.sent.iter().all(|s| s.offset.is_some()));
    assert_recovers(&fs, &ghost, "undisturbed");
}

fn fail_each_call(failure: Failure, only: impl Fn(Call) -> bool + Send + Sync + Copy + 'static, step: usize) {
    let (fs, _) = undisturbed();
    let (mut failed_runs, mut stopped_runs) = (0, 0);
    for k in (0..fs.ops() + 8).step_by(step) {
        let fs = SimFs::new();
        let retried = Arc::new(AtomicBool::new(false));
        let failed: Arc<Mutex<Option<(Call, String)>>> = Arc::default();
        fs.set_fault({
            let (retried, failed) = (retried.clone(), failed.clone());
            move |op| {
                let mut failed = failed.lock();
                if let Some((call, path)) = &*failed {
                    let same =
                        matches!(call, Call::Sync | Call::SyncDir) && (op.call, op.path) == (*call, path);
                    retried.fetch_or(same, Ordering::Relaxed);
                    return None;
                }
                if op.call.counts() && op.number >= k && only(op.call) {
                    *failed = Some((op.call, op.path.to_owned()));
                    return Some(failure);
                }
                None
            }
        });
        let (ghost, stop) = run(&fs);
        let Some((call, path)) = failed.lock().clone() else { break };
        failed_runs += 1;
        stopped_runs += usize::from(stop.is_some());
        let what = format!("{failure:?} at call {k}, {call:?} {path}");
        if matches!(call, Call::Sync | Call::SyncDir) {
            assert!(!retried.load(Ordering::Relaxed), "{what}: a failed sync was repeated");
        }
        assert_recovers(&fs, &ghost, &what);
    }
    assert!(failed_runs > 5, "{failed_runs} runs met the failure");
    eprintln!("{failure:?}: {failed_runs} runs, {stopped_runs} stopped");
}

/// A directory left by a kill in the middle: a checkpoint, rounds above it, an open transaction.
fn killed() -> (SimFs, Ghost) {
    let fs = SimFs::new();
    let ghost = SharedGhost::default();
    let log = open(&fs).unwrap();
    let mut client = Client::new(&log, &ghost);
    client.scenario().unwrap();
    client.transaction_left_open().unwrap();
    let killed = fs.crash(Crash::Kill, &mut rng(0));
    let ghost = ghost.lock().clone();
    (killed, ghost)
}

#[test]
fn an_error_at_each_call_of_recovery() {
    let (killed, ghost) = killed();
    let undisturbed = killed.crash(Crash::Kill, &mut rng(0));
    drop(open(&undisturbed).unwrap());
    let calls = undisturbed.ops();
    assert!(calls > 10);
    for failure in [Failure::Errno(EIO), Failure::Errno(ENOSPC), Failure::Short { bytes: 700, errno: EIO }] {
        for k in (0..calls).step_by(stride(2)) {
            let fs = killed.crash(Crash::Kill, &mut rng(0));
            fs.fail_op(k, failure);
            // It may also open: a file that cannot be removed is no reason not to.
            drop(open(&fs));
            fs.clear_fault();
            assert_recovers(&fs, &ghost, &format!("{failure:?} at call {k} of recovery"));
        }
    }
}

#[test]
fn an_error_at_each_sync_stops_the_log_and_loses_nothing() {
    fail_each_call(Failure::Errno(EIO), |call| matches!(call, Call::Sync | Call::SyncDir), 1);
}

#[test]
fn an_error_at_each_call() {
    fail_each_call(Failure::Errno(EIO), |_| true, stride(3));
}

#[test]
fn no_space_at_each_call() {
    fail_each_call(Failure::Errno(ENOSPC), |_| true, stride(3));
}

#[test]
fn short_writes_at_each_write() {
    let writes = |call| matches!(call, Call::Write | Call::ZeroFill);
    fail_each_call(Failure::Short { bytes: 100, errno: ENOSPC }, writes, stride(4));
    fail_each_call(Failure::Short { bytes: 4096 + 512, errno: EIO }, writes, stride(4));
}

#[test]
fn a_disk_that_fills_refuses_and_keeps() {
    let (fs, _) = undisturbed();
    let full: u64 = fs.files().iter().map(|(_, len)| len.next_multiple_of(4096)).sum();
    for bytes in (full / 2..full * 2).step_by(4096 * stride(5)) {
        let fs = SimFs::new();
        fs.limit_space(bytes);
        let (ghost, _) = run(&fs);
        for how in [Crash::Kill, Crash::None, Crash::Any] {
            let after = fs.crash(how, &mut rng(bytes));
            let what = format!("{bytes} bytes of space, crash {how:?}");
            match check(&after, &ghost) {
                Ok(Found::Intact) => {}
                // A directory that could not be made whole has acked nothing.
                Err(e) if ghost.sent.is_empty() && e.starts_with("open: ") => {}
                other => panic!("{what}: {other:?}"),
            }
            after.limit_space(full * 4);
            assert_eq!(check(&after, &ghost), Ok(Found::Intact), "{what}, then given space");
        }
    }
}

#[test]
fn failed_reads_are_errors_of_that_read_only() {
    let (fs, ghost) = undisturbed();
    let log = open(&fs).unwrap();
    let ghost_now = Arc::new(Mutex::new(ghost.clone()));
    let tp = Client::new(&log, &ghost_now).partition(0).unwrap();
    fs.set_fault(|op| (op.call == Call::Read).then_some(Failure::Errno(EIO)));
    let from = Position::unchecked(0);
    match log.read(tp, from, 1 << 20, Isolation::ReadUncommitted) {
        Err(ReadError::Io { .. }) => {}
        other => panic!("{other:?}"),
    }
    fs.clear_fault();
    assert_eq!(check_open(&log, &ghost), Ok(Found::Intact));
    drop(log);
    fs.set_fault(|op| (op.call == Call::Read).then_some(Failure::Errno(EIO)));
    assert!(open(&fs).is_err(), "an error is not an empty directory");
    fs.clear_fault();
    assert_eq!(check(&fs, &ghost), Ok(Found::Intact));
}

/// A closed directory, so that recovery rewrites nothing from the journal.
fn closed() -> (SimFs, Ghost) {
    let fs = SimFs::new();
    let ghost = SharedGhost::default();
    let log = open(&fs).unwrap();
    Client::new(&log, &ghost).scenario().unwrap();
    log.close(DEADLINE).unwrap();
    drop(log);
    let ghost = ghost.lock().clone();
    (fs.crash(Crash::None, &mut rng(0)), ghost)
}

#[test]
fn a_damaged_segment_fails_its_partition_and_no_other() {
    let (fs, ghost) = closed();
    let log = open(&fs).unwrap();
    let ghost_now = Arc::new(Mutex::new(ghost));
    let tps: Vec<_> =
        (0..PARTITIONS.len()).map(|i| Client::new(&log, &ghost_now).partition(i).unwrap()).collect();
    drop(log);
    let first = format!("topics/{}/{}/{:020}.log", tps[0].topic, tps[0].partition, 0);
    let middle = fs.files().iter().find(|(path, _)| *path == first).expect("the first segment").1 / 2;
    let byte = fs.peek(&first).unwrap()[middle as usize];
    fs.rot(&first, middle, &[byte ^ 4]);
    let log = open(&fs).unwrap();
    assert_eq!(log.status().damage, None, "found by the fetch, not by the open");
    let from = Position::unchecked(0);
    match log.read(tps[0], from, 1 << 20, Isolation::ReadUncommitted) {
        Err(ReadError::Corrupt { partition, corruption }) => {
            assert_eq!((partition, corruption.file), (tps[0], first))
        }
        // Whole batches before the damage may be served first.
        Ok(got) => {
            let error = log.read(tps[0], got.next, 1 << 20, Isolation::ReadUncommitted).unwrap_err();
            assert!(error.to_string().contains(&first), "{error}");
        }
        Err(other) => panic!("{other}"),
    }
    for tp in &tps[1..] {
        assert!(!log.read(*tp, from, 1 << 20, Isolation::ReadCommitted).unwrap().batches.is_empty());
    }
    let mut client = Client::new(&log, &ghost_now);
    client.plain(6).expect("appends go on, to the damaged partition too");
    let end = log.offsets(tps[0]).unwrap().end;
    let last = Position { offset: end.offset - 1, ..end };
    assert!(!log.read(tps[0], last, 1 << 20, Isolation::ReadUncommitted).unwrap().batches.is_empty());
}

/// Flips one bit of each sampled place of each file and holds what is served against what was acked.
fn flip_bits(fs: &SimFs, ghost: &Ghost, seed: u64, per_file: usize) -> (usize, usize) {
    let mut rng = rng(seed);
    let (mut intact, mut named) = (0, 0);
    for (path, len) in fs.files() {
        let bytes = fs.peek(&path).unwrap();
        // The end of a journal file is zeros; what was written is at its front.
        let used = bytes.iter().rposition(|&b| b != 0).map_or(0, |i| i as u64 + 1).min(len);
        if used == 0 {
            continue;
        }
        // Every byte, or the heads of the file and of its pages, and some more.
        let sampled: Vec<u64> = (0..per_file).map(|_| rng.random_range(0..used)).collect();
        let heads = (0..used).filter(|at| at % 4096 < 64).step_by(5);
        let places: Vec<u64> =
            if stride(2) == 1 { (0..used).collect() } else { heads.chain(sampled).collect() };
        for at in places {
            let bad = fs.crash(Crash::Kill, &mut rng);
            bad.rot(&path, at, &[bytes[at as usize] ^ 1 << rng.random_range(0..8)]);
            match check(&bad, ghost) {
                Ok(Found::Intact) => intact += 1,
                Ok(Found::Named(_)) => named += 1,
                Err(e) => panic!("a flipped bit of {path} at {at}: {e}"),
            }
        }
    }
    (intact, named)
}

#[test]
fn flipped_bits_of_a_closed_directory_are_survived_or_named() {
    let (fs, ghost) = closed();
    let (intact, named) = flip_bits(&fs, &ghost, 1, 40);
    eprintln!("{intact} survived, {named} named");
    assert!(intact > 20 && named > 20, "{intact} survived, {named} named");
}

#[test]
fn flipped_bits_of_a_killed_directory_are_survived_or_named() {
    let fs = SimFs::new();
    let ghost = SharedGhost::default();
    let log = open(&fs).unwrap();
    Client::new(&log, &ghost).scenario().unwrap();
    // Wait for the seal: without it, rot in the very last round looks like a tail.
    let until = std::time::Instant::now() + DEADLINE;
    let mut released = log.released();
    while !log.status().sealed {
        assert!(std::time::Instant::now() < until, "never sealed");
        released.wait(std::time::Duration::from_millis(20));
    }
    let killed = fs.crash(Crash::None, &mut rng(0));
    drop(log);
    let ghost = ghost.lock().clone();
    assert_eq!(check(&killed.crash(Crash::Kill, &mut rng(0)), &ghost), Ok(Found::Intact));
    let (intact, named) = flip_bits(&killed, &ghost, 2, 40);
    eprintln!("{intact} survived, {named} named");
    assert!(intact > 20 && named > 20, "{intact} survived, {named} named");
}

#[test]
fn a_torn_tail_at_every_sector_is_a_tail() {
    // At every sync of a journal file: what was written since, with each prefix of its sectors, and without each one.
    type Tail = (SimFs, Ghost, String);
    let tails: Arc<Mutex<Vec<Tail>>> = Arc::default();
    let ghost = SharedGhost::default();
    let fs = SimFs::new();
    let log = open(&fs).unwrap();
    fs.set_hook({
        let (tails, ghost) = (tails.clone(), ghost.clone());
        move |fs, op| {
            if op.call == Call::Sync && op.path.starts_with("journal/") {
                let snapshot = fs.crash(Crash::Kill, &mut rng(0));
                tails.lock().push((snapshot, ghost.lock().clone(), op.path.to_owned()));
            }
        }
    });
    let mut client = Client::new(&log, &ghost);
    client.topics().unwrap();
    client.plain(6).unwrap();
    client.transaction(Outcome::Committed).unwrap();
    fs.clear_hook();
    drop(log);
    let mut torn = 0;
    for (snapshot, ghost, path) in tails.lock().iter() {
        let new = snapshot.peek(path).unwrap();
        let old = snapshot.crash(Crash::None, &mut rng(0)).peek(path).unwrap();
        let changed: Vec<usize> = (0..new.len() / SECTOR_BYTES)
            .filter(|i| new[i * SECTOR_BYTES..][..SECTOR_BYTES] != old[i * SECTOR_BYTES..][..SECTOR_BYTES])
            .collect();
        for cut in 0..changed.len() {
            for lost in [&changed[cut..], &changed[cut..=cut]] {
                let bad = snapshot.crash(Crash::All, &mut rng(0));
                for i in lost {
                    bad.rot(path, (i * SECTOR_BYTES) as u64, &old[i * SECTOR_BYTES..][..SECTOR_BYTES]);
                }
                let found = check(&bad, ghost);
                assert_eq!(found, Ok(Found::Intact), "{path} without sectors {lost:?} of {changed:?}");
                torn += 1;
            }
        }
    }
    assert!(torn > 30, "{torn} torn tails");
}

/// From each call on the disk takes nothing more. What was reserved must do: the directory opens, and keeps its promises.
#[test]
fn a_disk_that_is_full_from_each_call_on_still_opens() {
    const SPACE: u64 = 1 << 30;
    let (fs, _) = undisturbed();
    let mut opened = 0;
    for k in (0..fs.ops()).step_by(stride(3)) {
        let fs = SimFs::new();
        fs.limit_space(SPACE);
        fs.set_hook(move |fs, op| {
            if op.number == k {
                let used = SPACE - fs.free_bytes().unwrap();
                fs.limit_space(used);
            }
        });
        let (ghost, _) = run(&fs);
        fs.clear_hook();
        for how in [Crash::Kill, Crash::None, Crash::Any, Crash::Any] {
            let after = fs.crash(how, &mut rng(k));
            let what = format!("full from call {k} on, crash {how:?}");
            match check(&after, &ghost) {
                Ok(Found::Intact) => opened += 1,
                // A directory that could not be made whole has acked nothing.
                Err(e) if ghost.sent.is_empty() && e.starts_with("open: ") => {}
                other => panic!("{what}: {other:?}"),
            }
        }
    }
    assert!(opened > 100, "{opened} opened");
}
