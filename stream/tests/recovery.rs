//! Start, fact by fact: which positions hold, what is replayed, rebuilt, refused and fenced.

use std::time::Duration;

use tidemill_stream::engine::recovery::{self, Setup, Started};
use tidemill_stream::engine::{Layout, Mode};
use tidemill_stream::io::{
    Cleanup, End, Ended, Log, LogError, NewTopic, OffsetCommit, Position, TopicId, Transactions,
};
use tidemill_stream::names::{Identity, PartitionMark};
use tidemill_stream::state::MemoryState;
use tidemill_stream::testing::MemoryLog;
use tidemill_stream::*;

struct Count;
impl Job for Count {
    const NAME: &'static str = "count";
    fn build(&self, flow: &Flow) -> Result<()> {
        flow.source(topic("in"), Text)
            .event_time(|line| line.len() as i64, EventTime::out_of_order(Duration::ZERO))
            .key_by(|line| line.clone())
            .window(Tumbling::of(Duration::from_millis(10)))
            .count("n")
            .drop_late()
            .map(|w| w.value)
            .to(topic("out"), Text);
        Ok(())
    }
}

const SHARDS: u16 = 2;

fn setup() -> Setup {
    let plan = Plan::of(&Count).unwrap();
    let layout = Layout { shards: SHARDS, ..Layout::new(&plan, 1, 1 << 20) };
    Setup { plan, identity: Identity::new("count").unwrap(), layout, mode: Mode::UntilEnd }
}

fn log() -> MemoryLog {
    let log = MemoryLog::default();
    log.create_topic(&NewTopic { name: "in".into(), partitions: 3, cleanup: Cleanup::Delete }).unwrap();
    log
}

fn start(log: &MemoryLog, state: &MemoryState) -> Started {
    recovery::start(&setup(), log, state).unwrap()
}

/// `window end | key -> count` for shard 0, as a task encodes it.
fn cell(end: i64, key: &str, count: u8) -> (Vec<u8>, Vec<u8>) {
    let mut bytes = (end.cast_unsigned() ^ (1 << 63)).to_be_bytes().to_vec();
    bytes.extend_from_slice(key.as_bytes());
    (bytes, vec![1, count])
}

/// Commits cells and, where given, marks of shard 0.
fn commit(
    started: &mut Started,
    cells: &[(Vec<u8>, Vec<u8>)],
    closed: Option<i64>,
) -> Vec<(TopicId, u32, Position)> {
    let changelogs = started.start.changelogs.clone().unwrap();
    let parts = |(key, value): &(Vec<u8>, Vec<u8>)| OutRecord {
        timestamp: 0,
        key: Some(key.clone().into()),
        value: Some(value.clone().into()),
        headers: Vec::new(),
    };
    let records: Vec<_> = cells.iter().map(parts).collect();
    let transactions = &mut started.transactions;
    transactions.send(&changelogs.windows, 0, &mut records.iter().map(OutRecord::parts)).unwrap();
    if let Some(closed) = closed {
        let mut value = vec![1];
        value.extend_from_slice(&closed.to_be_bytes());
        value.extend_from_slice(&closed.to_be_bytes());
        let marks = parts(&(vec![0, 0, b'm', 0, 1], value));
        transactions.send(&changelogs.keyed, 0, &mut [marks.parts()].into_iter()).unwrap();
    }
    match transactions.end(End::Commit).unwrap() {
        Ended::Committed(positions) => positions,
        other => panic!("{other:?}"),
    }
}

fn cells(state: &MemoryState) -> Vec<(Vec<u8>, Vec<u8>)> {
    state.dump().into_iter().filter(|(k, _)| k[..2] == [0, 1]).map(|(k, v)| (k[4..].to_vec(), v)).collect()
}

#[test]
fn a_changelog_is_replayed_from_the_stored_position_and_only_once() {
    let (log, state) = (log(), MemoryState::default());
    commit(&mut start(&log, &state), &[cell(10, "a", 1), cell(20, "b", 2)], None);
    let mut second = start(&log, &state);
    assert_eq!((second.start.replayed, cells(&state)), (2, vec![cell(10, "a", 1), cell(20, "b", 2)]));
    commit(&mut second, &[cell(10, "a", 5)], None);
    assert_eq!(start(&log, &state).start.replayed, 1);
    assert_eq!(cells(&state), [cell(10, "a", 5), cell(20, "b", 2)]);
    assert_eq!(start(&log, &state).start.replayed, 0);
}

#[test]
fn replayed_twice_is_replayed_once() {
    let (log, state) = (log(), MemoryState::default());
    commit(&mut start(&log, &state), &[cell(10, "a", 1), cell(10, "a", 2)], Some(5));
    start(&log, &state);
    let once = state.dump();
    // The machine lost power in the middle of it: everything is replayed again, over what is there.
    state.crash();
    start(&log, &state);
    assert_eq!(state.dump(), once);
}

#[test]
fn cells_of_closed_windows_are_not_replayed() {
    let (log, state) = (log(), MemoryState::default());
    commit(&mut start(&log, &state), &[cell(10, "a", 1), cell(20, "a", 2)], Some(10));
    let third = start(&log, &state).start;
    assert_eq!((third.marks.closed, third.marks.fired, cells(&state)), (10, 10, vec![cell(20, "a", 2)]));
}

#[test]
fn a_position_that_does_not_hold_empties_the_shard() {
    let (lost, state) = (log(), MemoryState::default());
    commit(&mut start(&lost, &state), &[cell(10, "a", 1), cell(10, "b", 1)], None);
    start(&lost, &state);
    // The log was restored from an older copy: it has the topics, and less in them.
    let restored = log();
    commit(&mut start(&restored, &MemoryState::default()), &[cell(10, "a", 1)], None);
    let found = start(&restored, &state).start;
    assert_eq!((found.rebuilt, found.replayed, cells(&state)), (1, 1, vec![cell(10, "a", 1)]));
}

#[test]
fn a_store_that_no_position_speaks_for_is_emptied() {
    let (log, state) = (log(), MemoryState::default());
    commit(&mut start(&log, &state), &[cell(10, "a", 1)], None);
    start(&log, &state);
    // The topics were deleted and made again: nothing in the store is of these.
    log.delete_topic("count-n-changelog");
    log.delete_topic("count-keyed-changelog");
    let found = start(&log, &state).start;
    assert_eq!((found.replayed, cells(&state).len()), (0, 0));
}

#[test]
fn a_window_changelog_that_starts_later_is_replayed_from_its_start() {
    let (log, state) = (log(), MemoryState::default());
    commit(&mut start(&log, &state), &[cell(10, "a", 1)], None);
    let mut second = start(&log, &state);
    commit(&mut second, &[cell(20, "b", 2), cell(30, "c", 3)], Some(20));
    log.trim("count-n-changelog", 0, 3);
    let third = start(&log, &state).start;
    assert_eq!((third.rebuilt, third.replayed), (0, 2), "one cell and one record of marks");
    let open: Vec<_> = cells(&state).into_iter().filter(|(k, _)| *k > cell(20, "zz", 0).0).collect();
    assert_eq!(open, [cell(30, "c", 3)]);
}

#[test]
fn a_keyed_changelog_that_starts_later_empties_the_shard() {
    let (log, state) = (log(), MemoryState::default());
    commit(&mut start(&log, &state), &[cell(30, "a", 1)], Some(10));
    let mut second = start(&log, &state);
    commit(&mut second, &[cell(30, "b", 1)], Some(20));
    commit(&mut second, &[], Some(25));
    // Compaction leaves the newest marks only; the store knows the first ones.
    log.trim("count-keyed-changelog", 0, 4);
    let third = start(&log, &state).start;
    assert_eq!((third.rebuilt, third.marks.closed), (1, 25));
    assert_eq!(cells(&state), [cell(30, "a", 1), cell(30, "b", 1)]);
}

#[test]
fn an_older_process_is_fenced_and_its_transaction_is_lost() {
    let (log, state) = (log(), MemoryState::default());
    let mut older = start(&log, &state);
    let input = older.start.input.id.clone();
    let position = Position { leader_epoch: 0, offset: 0 };
    let metadata = PartitionMark { watermark: 7, floor: 5 }.encode();
    let offset = OffsetCommit { topic: input, partition: 1, position, metadata };
    older.transactions.offsets("count", &[offset]).unwrap();
    let mut newer = start(&log, &state);
    assert_eq!(newer.start.partitions[1].watermark, None);
    let fenced = |t: &mut Box<dyn Transactions>| matches!(t.end(End::Commit), Err(LogError::Fenced { .. }));
    assert!(fenced(&mut older.transactions) && !fenced(&mut newer.transactions));
}

#[test]
fn offsets_bring_back_time_and_a_new_partition_none() {
    let (log, state) = (log(), MemoryState::default());
    let mut first = start(&log, &state);
    let topic = first.start.input.id.clone();
    let commits: Vec<_> = [(0, 7, 5), (2, 9, 6)]
        .map(|(partition, watermark, floor)| OffsetCommit {
            topic: topic.clone(),
            partition,
            position: Position::default(),
            metadata: PartitionMark { watermark, floor }.encode(),
        })
        .into();
    first.transactions.offsets("count", &commits).unwrap();
    first.transactions.end(End::Commit).unwrap();
    let second = start(&log, &state).start;
    let watermarks: Vec<_> = second.partitions.iter().map(|p| p.watermark).collect();
    assert_eq!((watermarks, second.floor), (vec![Some(7), None, Some(9)], 6));
    assert_eq!(
        second.place().partitions(),
        [Some(7), Some(6), Some(9)],
        "the new one takes part at the floor"
    );
}

#[test]
fn what_cannot_start_says_why() {
    let state = MemoryState::default();
    let refused =
        |log: &MemoryLog| recovery::start(&setup(), log, &state).map(|_| ()).unwrap_err().to_string();
    let missing = refused(&MemoryLog::default());
    assert!(missing.contains("`in`") && missing.contains("streamctl topic create"), "{missing}");
    let other = log();
    other
        .create_topic(&NewTopic {
            name: "count-n-changelog".into(),
            partitions: 3,
            cleanup: Cleanup::Compact,
        })
        .unwrap();
    assert!(refused(&other).contains("3 partitions"), "{}", refused(&other));
    let strange = log();
    let mut started = start(&strange, &state);
    commit(&mut started, &[(b"short".to_vec(), vec![1, 1])], None);
    assert!(refused(&strange).contains("does not write"), "{}", refused(&strange));
    let newer = log();
    let mut started = start(&newer, &MemoryState::default());
    commit(&mut started, &[(cell(10, "a", 1).0, vec![9, 1])], None);
    assert!(refused(&newer).contains("codec version 9"), "{}", refused(&newer));
}
