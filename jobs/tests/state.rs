//! State of job `ip-count`: less memory than it needs, kills, recovery by position, and the store against its changelog.

#![allow(clippy::print_stdout, reason = "a child process tells its test how far it is")]

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{FROM, Rig, lines, settings};
use tidemill::adapters::{BrokerLog, RocksState, RunOptions, dump_state, state_dir};
use tidemill::args::ByteSize;
use tidemill::engine::CommitPolicy;
use tidemill::names::Identity;
use tidemill::runtime::Monitor;
use tidemill::stream::Shard;
use tidemill::stream::inspect::{self, InspectError, StoreView};
use xtask::recount::Recount;

const DIR: &str = "TIDEMILL_TEST_DIR";
const FLUSHES: &str = "TIDEMILL_TEST_FLUSHES";
const ROWS: &str = "TIDEMILL_TEST_ROWS";

/// Many small flushes, so that a short run has several.
fn eager() -> RunOptions {
    let policy =
        CommitPolicy { write_bytes_max: 64 << 10, flush_records_max: 20_000, ..CommitPolicy::default() };
    RunOptions {
        policy,
        tasks: Some(2),
        commit_interval: Duration::from_millis(20),
        // Little enough that the overlay asks for commits by itself, however slow the machine is.
        state_memory: ByteSize(3 << 20),
        ..RunOptions::default()
    }
}

/// Not a test by itself: the process that the others kill. Says `ready` once the store was flushed as often as asked and
/// a commit followed; where no flush is asked for, once it has committed and has output in its open transaction, or has
/// committed everything.
#[test]
fn child() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let number = |name| std::env::var(name).ok().map(|n| n.parse::<u64>().unwrap());
    let (flushes, rows) = (number(FLUSHES).unwrap(), number(ROWS));
    let rig = Rig::open(Path::new(&dir));
    let monitor = Monitor::new();
    let watched = monitor.clone();
    std::thread::spawn(move || {
        let mut commits_then = None;
        let ready = watched.wait_until(Duration::from_secs(60), |p| {
            if p.flushes >= flushes && commits_then.is_none() {
                commits_then = Some(p.commits);
            }
            // A fast machine has committed all of it before anybody looked: then it is killed idle.
            let all = rows.is_some_and(|rows| p.rows_committed >= rows);
            all || commits_then.is_some_and(|then| p.commits > then) && (flushes > 0 || p.open_rows > 0)
        });
        #[expect(clippy::print_stdout, reason = "the parent reads it")]
        {
            println!("{}", if ready { "ready" } else { "never" });
        }
    });
    rig.run(&eager(), &monitor).unwrap();
}

/// Starts the child and kills it (SIGKILL) as soon as it is ready.
fn run_and_kill(dir: &Path, flushes: u64, rows: Option<usize>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .envs(rows.map(|rows| (ROWS, rows.to_string())))
        .args(["--exact", "child", "--nocapture"])
        .env(DIR, dir)
        .env(FLUSHES, flushes.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let said = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let ready = said.into_iter().find(|line| line.ends_with("ready") || line.ends_with("never"));
    kill(&mut child);
    assert!(ready.as_deref().is_some_and(|line| line.ends_with("ready")), "{ready:?}");
}

fn kill(child: &mut Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn kills_at_any_moment_leave_the_counts_exact() {
    let text = lines(400_000, 3_000, 1_500, 21, FROM);
    let dir = tempfile::tempdir().unwrap();
    let lines: Vec<&str> = text.lines().collect();
    // Every round has input of its own, so none depends on how far the one before came until it was killed.
    for portion in lines.chunks(lines.len().div_ceil(3)) {
        let rig = Rig::open(dir.path());
        rig.produce("access-log", 4, &portion.join("\n"));
        rig.close();
        run_and_kill(dir.path(), 0, Some(portion.len()));
    }
    let rig = Rig::open(dir.path());
    rig.until_end(&eager());
    rig.check(&Recount::of(settings(4), text.as_bytes()));
    rig.close();
}

#[test]
fn a_kill_after_two_flushes_replays_some_and_not_all() {
    // Few lines per address and window: nearly every row changes a cell of its own.
    let text = lines(400_000, 60_000, 4_000, 22, FROM);
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::open(dir.path());
    rig.produce("access-log", 4, &text);
    rig.close();
    run_and_kill(dir.path(), 2, None);
    let rig = Rig::open(dir.path());
    let changelog =
        rig.read("ip-count-visits-per-ip-changelog").len() + rig.read("ip-count-keyed-changelog").len();
    let report = rig.until_end(&eager());
    assert!(report.replayed > 0, "nothing replayed of {changelog}");
    assert!(report.replayed < changelog as u64, "all {changelog} replayed");
    assert_eq!(report.rebuilt, 0);
    rig.check(&Recount::of(settings(4), text.as_bytes()));
    rig.close();
}

#[test]
fn a_mebibyte_of_state_memory_is_enough_for_any_window() {
    // 60,000 lines a window over 50,000 addresses in turn: every address is in every window, some twice.
    let mut text = String::new();
    for i in 0..240_000u64 {
        let (a, at) = (i % 50_000, (FROM + (i / 12_000) as i64) * 1_000);
        let time = xtask::recount::utc_text(at);
        let time = &time[11..19];
        text.push_str(&format!(
            "10.0.{}.{} - - [17/May/2015:{time} +0000] \"GET /{i}\" 200 1\n",
            a >> 8,
            a & 255
        ));
    }
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::open(dir.path());
    rig.produce("access-log", 4, &text);
    let report = rig.until_end(&RunOptions {
        state_memory: ByteSize(1 << 20),
        tasks: Some(2),
        ..RunOptions::default()
    });
    let counters = report.counters;
    assert!(counters.evicted > 0 && counters.store_hits > 0, "{counters:?}");
    let expected = Recount::of(settings(4), text.as_bytes());
    assert!(expected.counts.values().any(|n| *n > 1));
    rig.check(&expected);
    rig.close();
}

#[test]
fn the_store_is_the_fold_of_the_committed_changelog() {
    let text = lines(100_000, 5_000, 1_000, 23, FROM);
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::open(dir.path());
    rig.produce("access-log", 4, &text);
    let monitor = Monitor::new();
    let options = eager();
    std::thread::scope(|scope| {
        let running = scope.spawn(|| rig.run(&options, &monitor).unwrap());
        // All of it read and committed: the last windows stay open.
        let done = monitor.wait_until(Duration::from_secs(60), |p| p.rows_committed >= 100_000);
        monitor.stop();
        running.join().unwrap();
        assert!(done);
    });
    let mut closed = i64::MIN;
    let mut fold: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
    for (shard, key, value, _) in rig.read("ip-count-keyed-changelog") {
        // Marks of store 1: version, fired_through, closed_through.
        assert_eq!(key, [0, 0, b'm', 0, 1]);
        closed = closed.max(i64::from_be_bytes(value[9..17].try_into().unwrap()));
        let mark = [&[0, 0], &(shard as u16).to_be_bytes()[..], b"m", &[0, 1]].concat();
        fold.insert(mark, value);
    }
    for (shard, key, value, _) in rig.read("ip-count-visits-per-ip-changelog") {
        fold.insert([&[0, 1], &(shard as u16).to_be_bytes()[..], &key].concat(), value);
    }
    let window_end =
        |key: &[u8]| (u64::from_be_bytes(key[4..12].try_into().unwrap()) ^ (1 << 63)).cast_signed();
    fold.retain(|key, _| key[..2] == [0, 0] || window_end(key) > closed);
    assert!(
        closed > i64::MIN && fold.keys().any(|key| key[..2] == [0, 1]),
        "windows closed and windows open"
    );

    let identity = Identity::new("ip-count").unwrap();
    let mut stored: BTreeMap<_, _> =
        dump_state(&state_dir(dir.path(), &identity)).unwrap().into_iter().collect();
    let positions = stored.iter().filter(|(key, _)| key[..2] == [0, 0] && key[4] == b'p').count();
    assert!(positions > 0);
    stored.retain(|key, _| !(key[..2] == [0, 0] && key[4] == b'p'));
    assert_eq!(stored.len(), fold.len());
    assert!(stored == fold, "{:?}", stored.iter().zip(&fold).find(|(a, b)| a != b));

    // What is shown from outside is the same fold, and says that the store is at the end of it.
    let log = BrokerLog::new(rig.access.clone(), rig.runtime.handle().clone());
    let record = inspect::jobs(&log).unwrap().remove("ip-count").unwrap();
    let (name, store) = record.stores.iter().next().unwrap();
    let view = StoreView::open(&log, &identity, name, store).unwrap().unwrap();
    assert!(view.steady, "nothing commits");
    assert_eq!(view.marks.closed, closed);
    let mut shown = BTreeMap::new();
    for shard in (0..view.shards()).map(Shard) {
        view.each_cell::<InspectError>(shard, &mut |end, key, value| {
            assert_eq!(view.shard_of(key), shard);
            let end = (end.cast_unsigned() ^ (1 << 63)).to_be_bytes();
            let key = [&[0, 1], &shard.0.to_be_bytes()[..], &end, key].concat();
            shown.insert(key, value.to_vec());
            Ok(())
        })
        .unwrap();
    }
    fold.retain(|key, _| key[..2] == [0, 1]);
    assert!(shown == fold);
    let store = RocksState::read_only(&state_dir(dir.path(), &identity)).unwrap().unwrap();
    assert_eq!(view.behind(&store).unwrap(), 0);
    let ends: i64 = view.ends.iter().map(|end| end.last_stable).sum();
    let empty = tidemill::state::MemoryState::default();
    assert_eq!(
        view.behind(&empty).unwrap(),
        ends.unsigned_abs(),
        "a store without positions is behind all of it"
    );
    rig.close();
}
