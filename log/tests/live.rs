//! The live log with its threads on a real directory: the whole path of append, transactions, offsets, reopen.

use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tidemill_log::batch::{BatchBuilder, BatchOptions, Batches, OpenBatch, ProducerStamp, RecordParts};
use tidemill_log::fs::RealFs;
use tidemill_log::*;

const SOON: Duration = Duration::from_secs(20);

fn open(dir: &std::path::Path) -> Log {
    let config = Config { create: Create::IfMissing, journal_file_bytes: 1 << 20, ..Config::default() };
    Log::open(Arc::new(RealFs::new(dir).unwrap()), config).unwrap()
}

fn batch(values: &[&str], producer: Producer, sequence: i32, transactional: bool) -> Bytes {
    let mut b = BatchBuilder::new(BatchOptions { transactional, ..BatchOptions::default() });
    for v in values {
        let pushed =
            b.push(RecordParts { timestamp: 1, key: Some(b"k"), value: Some(v.as_bytes()), headers: &[] });
        assert!(pushed);
    }
    b.build(ProducerStamp { id: producer.id, epoch: producer.epoch, sequence })
}

fn init(log: &Log, id: Option<&str>) -> Producer {
    let init = InitProducer {
        transactional_id: id.map(str::to_owned),
        local: false,
        timeout_ms: 60_000,
        carried: None,
    };
    log.init_producer(init).wait(SOON).unwrap()
}

fn append(log: &Log, tp: TopicPartition, b: &Bytes) -> Appended {
    log.append(tp, b.clone(), Connection::LOCAL).wait(SOON).unwrap()
}

/// The values a reader sees, control batches and aborted records left out.
fn values(log: &Log, tp: TopicPartition, isolation: Isolation) -> Vec<String> {
    let (mut out, mut at) = (Vec::new(), Position::START);
    loop {
        let got = log.read(tp, at, 100, isolation).unwrap();
        if got.batches.is_empty() {
            return out;
        }
        at = got.next;
        for b in Batches::new(got.batches) {
            let (_, b) = b.unwrap();
            let open = OpenBatch::open(&b, 1 << 20).unwrap();
            let h = open.header();
            let aborted = |r: &AbortedRange| {
                r.producer_id == h.producer_id && (r.first..=r.last).contains(&h.base_offset)
            };
            if h.is_control() || h.is_transactional() && got.aborted.iter().any(aborted) {
                continue;
            }
            out.extend(open.iter().map(|r| String::from_utf8(r.unwrap().value.unwrap().to_vec()).unwrap()));
        }
    }
}

fn end(log: &Log, id: &str, producer: Producer, outcome: Outcome) -> Result<Ended, WriteError> {
    let end = EndTxn { transactional_id: id.into(), producer, outcome, connection: Connection::LOCAL };
    log.end_transaction(end).wait(SOON)
}

#[test]
fn what_was_acked_is_there_after_a_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let topic = log
        .create_topic(NewTopic { segment_bytes_max: 300, ..NewTopic::new("lines", 2) })
        .wait(SOON)
        .unwrap();
    let tps: Vec<_> = topic.topic_partitions().collect();
    let p = init(&log, None);
    for i in 0..20 {
        let a = append(&log, tps[0], &batch(&[&format!("a{i}"), "x"], p, i * 2, false));
        assert_eq!((a.base_offset, a.duplicate), (i64::from(i) * 2, false));
    }
    let again = append(&log, tps[0], &batch(&["a19", "x"], p, 38, false));
    assert_eq!((again.base_offset, again.duplicate), (38, true));
    let gap = log.append(tps[0], batch(&["z"], p, 41, false), Connection::LOCAL).wait(SOON);
    assert!(
        matches!(gap, Err(WriteError::Refused(Refusal::OutOfOrder { expected: 40, found: 41, .. }))),
        "{gap:?}"
    );

    let t = init(&log, Some("t"));
    append(&log, tps[1], &batch(&["committed"], t, 0, true));
    let before = log.offsets(tps[1]).unwrap();
    assert_eq!((before.last_stable, before.high_watermark), (0, 1));
    let ended = end(&log, "t", t, Outcome::Committed).unwrap();
    assert_eq!(
        end(&log, "t", t, Outcome::Aborted).unwrap(),
        ended,
        "a retried end is told how the first ended"
    );
    append(&log, tps[1], &batch(&["aborted"], ended.next, 0, true));
    let offsets = vec![OffsetCommit {
        partition: tps[0],
        position: Position::unchecked(10),
        metadata: Bytes::from_static(b"m"),
    }];
    let add = |producer| AddOffsets {
        producer,
        group: "g".into(),
        offsets: offsets.clone(),
        guard: None,
        connection: Connection::LOCAL,
    };
    log.add_offsets(add(ended.next)).wait(SOON).unwrap();
    assert_eq!(log.group_offsets("g", None).pending, [tps[0]]);
    let ended = end(&log, "t", ended.next, Outcome::Aborted).unwrap();
    assert_eq!(log.group_offsets("g", None), GroupOffsets::default());
    append(&log, tps[1], &batch(&["last"], ended.next, 0, true));
    log.add_offsets(add(ended.next)).wait(SOON).unwrap();
    end(&log, "t", ended.next, Outcome::Committed).unwrap();

    let check = |log: &Log| {
        let all: Vec<String> = (0..20).flat_map(|i| [format!("a{i}"), "x".into()]).collect();
        assert_eq!(values(log, tps[0], Isolation::ReadCommitted), all);
        assert_eq!(values(log, tps[1], Isolation::ReadCommitted), ["committed", "last"]);
        assert_eq!(values(log, tps[1], Isolation::ReadUncommitted), ["committed", "aborted", "last"]);
        assert_eq!(log.group_offsets("g", None).committed, offsets);
    };
    check(&log);
    drop(log); // no checkpoint: everything is replayed
    let log = open(dir.path());
    assert_eq!(log.status().incarnation, 2);
    check(&log);
    log.close(SOON).unwrap();
    let log = open(dir.path());
    check(&log);
    let again = append(&log, tps[0], &batch(&["a19", "x"], p, 38, false));
    assert!(again.duplicate, "a repeat is known after a restart");
}

#[test]
fn a_new_client_fences_the_old_and_open_aborts_what_was_local() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let tp = log.create_topic(NewTopic::new("t", 1)).wait(SOON).unwrap().topic_partitions().next().unwrap();
    let old = init(&log, Some("id"));
    append(&log, tp, &batch(&["old"], old, 0, true));
    let new = init(&log, Some("id"));
    let refused = log.append(tp, batch(&["old"], old, 1, true), Connection::LOCAL).wait(SOON);
    assert_eq!(refused.unwrap_err(), WriteError::Fenced { current: Some(new) });
    assert!(matches!(end(&log, "id", old, Outcome::Committed), Err(WriteError::Fenced { .. })));
    let local =
        InitProducer { transactional_id: Some("l".into()), local: true, timeout_ms: 1000, carried: None };
    let local = log.init_producer(local).wait(SOON).unwrap();
    append(&log, tp, &batch(&["local"], local, 0, true));
    append(&log, tp, &batch(&["new"], new, 0, true));
    drop(log);
    let log = open(dir.path());
    assert_eq!(end(&log, "l", local, Outcome::Committed).unwrap().outcome, Outcome::Aborted);
    assert_eq!(end(&log, "id", new, Outcome::Committed).unwrap().outcome, Outcome::Committed);
    assert_eq!(values(&log, tp, Isolation::ReadCommitted), ["new"]);
}

#[test]
fn a_transaction_that_takes_too_long_is_aborted() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let tp = log.create_topic(NewTopic::new("t", 1)).wait(SOON).unwrap().topic_partitions().next().unwrap();
    let slow =
        InitProducer { transactional_id: Some("s".into()), local: false, timeout_ms: 20, carried: None };
    let slow = log.init_producer(slow).wait(SOON).unwrap();
    let mut released = log.released();
    append(&log, tp, &batch(&["slow"], slow, 0, true));
    while log.offsets(tp).unwrap().last_stable < 2 {
        assert!(released.wait(SOON));
    }
    assert_eq!(end(&log, "s", slow, Outcome::Committed).unwrap().outcome, Outcome::Aborted);
}

#[test]
fn many_appenders_share_syncs() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let topic = log.create_topic(NewTopic::new("t", 4)).wait(SOON).unwrap();
    let tps: Vec<_> = topic.topic_partitions().collect();
    let before = log.status().syncs;
    let (threads, each) = (64, 50);
    std::thread::scope(|s| {
        for t in 0..threads {
            let (log, tp) = (&log, tps[t % 4]);
            s.spawn(move || {
                let p = init(log, None);
                for i in 0..each {
                    append(log, tp, &batch(&["a line of an ordinary length"], p, i, false));
                }
            });
        }
    });
    let syncs = log.status().syncs - before;
    let acks = (threads * each as usize + threads) as u64;
    assert!(syncs * 8 <= acks, "{syncs} syncs for {acks} acks");
    assert_eq!(tps.iter().map(|tp| log.offsets(*tp).unwrap().high_watermark).sum::<i64>(), 64 * 50);
}
