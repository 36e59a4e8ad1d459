//! Dumps of every kind of file: of a sound directory, of damaged copies, and of bytes that are nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rand::{RngExt as _, SeedableRng as _};
use tidemill_log::batch::{BatchBuilder, BatchOptions, Compression, ProducerStamp, RecordParts};
use tidemill_log::dump::{DumpError, DumpOptions, Records, dump};
use tidemill_log::fs::RealFs;
use tidemill_log::*;

const SOON: Duration = Duration::from_secs(20);
const OPTIONS: DumpOptions = DumpOptions { records: Records::Shown, value_bytes_max: 40 };

fn text(path: &Path) -> (String, u64) {
    let mut out = Vec::new();
    let damaged = dump(path, &OPTIONS, &mut out).unwrap();
    (String::from_utf8(out).unwrap(), damaged)
}

/// A directory with a closed and an open segment, transactions of both kinds, offsets; closed, so all of it is written.
fn directory(dir: &Path) {
    let config = Config { create: Create::IfMissing, journal_file_bytes: 64 << 10, ..Config::default() };
    let log = Log::open(Arc::new(RealFs::new(dir).unwrap()), config).unwrap();
    let topic =
        log.create_topic(NewTopic { segment_bytes_max: 6_000, ..NewTopic::new("t", 1) }).wait(SOON).unwrap();
    let tp = TopicPartition { topic: topic.uuid, partition: 0 };
    for round in 0..6i64 {
        let init = InitProducer {
            transactional_id: Some("job".into()),
            local: false,
            timeout_ms: 60_000,
            carried: None,
        };
        let producer = log.init_producer(init).wait(SOON).unwrap();
        for sequence in 0..4 {
            let compression = if sequence == 2 { Compression::Lz4 } else { Compression::None };
            let options = BatchOptions { transactional: true, compression, ..BatchOptions::default() };
            let mut builder = BatchBuilder::new(options);
            let value = format!("round {round} {}", "x".repeat(300));
            let headers = [("reason", Some(&b"no date"[..]))];
            let record = RecordParts {
                timestamp: 1_431_857_100_000 + round,
                key: Some(b"k"),
                value: Some(value.as_bytes()),
                headers: &headers,
            };
            assert!(builder.push(record));
            let batch = builder.build(ProducerStamp { id: producer.id, epoch: producer.epoch, sequence });
            log.append(tp, batch, Connection::LOCAL).wait(SOON).unwrap();
        }
        let offsets = vec![OffsetCommit {
            partition: tp,
            position: Position::unchecked(round),
            metadata: Bytes::from_static(b"m"),
        }];
        let add =
            AddOffsets { producer, group: "job".into(), offsets, guard: None, connection: Connection::LOCAL };
        log.add_offsets(add).wait(SOON).unwrap();
        let outcome = if round % 2 == 0 { Outcome::Committed } else { Outcome::Aborted };
        let end = EndTxn { transactional_id: "job".into(), producer, outcome, connection: Connection::LOCAL };
        log.end_transaction(end).wait(SOON).unwrap();
    }
    log.close(SOON).unwrap();
}

fn files(dir: &Path, suffix: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, suffix));
        } else if path.to_string_lossy().ends_with(suffix) && std::fs::metadata(&path).unwrap().len() > 0 {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn every_kind_of_file_is_told() {
    let dir = tempfile::tempdir().unwrap();
    directory(dir.path());
    let segments = files(dir.path(), ".log");
    assert!(segments.len() > 1, "a segment was closed: {segments:?}");
    let (all, damaged) =
        segments.iter().map(|path| text(path)).fold((String::new(), 0), |(all, n), (t, d)| (all + &t, n + d));
    assert_eq!(damaged, 0, "{all}");
    for part in [
        "commit marker",
        "abort marker",
        "transactional lz4",
        "crc ok, head ok",
        "key \"k\"  value \"round 0 xxx",
        "headers reason=\"no date\"",
        "2015-05-17T10:05:00.000Z",
        "more bytes",
        "no damage",
    ] {
        assert!(all.contains(part), "{part}: {all}");
    }
    for (suffix, part) in [
        (".headcrc", "crc of its first 21 bytes"),
        (".index", "in batch"),
        (".txnindex", "aborted offsets"),
        (".wal", "commit the transaction of \"job\""),
        ("checkpoint.a", "topic \"t\""),
        ("format", "layout 1"),
    ] {
        let found = files(dir.path(), suffix);
        assert!(!found.is_empty(), "{suffix}");
        let told: Vec<_> = found.iter().map(|path| text(path)).collect();
        assert!(told.iter().any(|(text, _)| text.contains(part)), "{suffix}: {told:#?}");
        assert!(told.iter().all(|(text, damaged)| *damaged == 0 && text.contains("no damage")), "{told:#?}");
    }
}

/// Behind a damaged batch the later ones are read, whatever was damaged: its records, its length, its magic.
#[test]
fn damage_is_placed_and_reading_goes_on_behind_it() {
    let dir = tempfile::tempdir().unwrap();
    directory(dir.path());
    let path = files(dir.path(), ".log").remove(0);
    let good = std::fs::read(&path).unwrap();
    let count = |text: &str| {
        text.lines().filter(|line| line.contains("] batch") || line.contains(" batch offset")).count()
    };
    let whole = count(&text(&path).0);
    let second = 12 + i32::from_be_bytes(good[8..12].try_into().unwrap()) as usize;
    for at in [0, 7, 8, 10, 11, 16, 17, 21, 30, 57, 70, 200, second + 9, second + 16, second + 100] {
        let mut bad = good.clone();
        bad[at] ^= 0x41;
        std::fs::write(&path, &bad).unwrap();
        let (told, damaged) = text(&path);
        assert!(damaged > 0, "byte {at} was flipped: {told}");
        let place = format!("@{} DAMAGED: expected", if at < second { 0 } else { second });
        assert!(told.contains(&place), "byte {at}: {told}");
        assert!(count(&told) + 1 >= whole, "byte {at}: the batches behind it are read: {told}");
    }
    // A copy elsewhere: what its place seeds cannot be checked.
    let copy = dir.path().join("00000000000000000000.log");
    std::fs::write(&copy, &good).unwrap();
    let (told, damaged) = text(&copy);
    assert!(damaged == 0 && told.contains("head not checked (the file lies outside"), "{told}");
}

#[test]
fn a_torn_round_is_named_and_the_slot_too() {
    let dir = tempfile::tempdir().unwrap();
    directory(dir.path());
    let path = files(dir.path(), ".wal").remove(0);
    let mut bytes = std::fs::read(&path).unwrap();
    let (told, _) = text(&path);
    let at: usize = told
        .lines()
        .filter_map(|l| l.strip_prefix('@'))
        .nth(1)
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    bytes[at + 100] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let (told, damaged) = text(&path);
    assert!(damaged > 0 && told.contains(&format!("@{at} DAMAGED: expected a round of")), "{told}");
    assert!(told.lines().filter(|line| line.starts_with('@')).count() > 3, "later rounds are read: {told}");

    let path = dir.path().join("checkpoint.a");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[80] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let (told, damaged) = text(&path);
    assert!(damaged > 0 && told.contains("the other slot is used"), "{told}");
}

/// Flips and cuts of real files, and noise under every name: text comes out, nothing panics.
#[test]
fn no_bytes_make_a_dump_panic() {
    let dir = tempfile::tempdir().unwrap();
    directory(dir.path());
    let mut rng = rand::rngs::SmallRng::seed_from_u64(5);
    for suffix in [".log", ".headcrc", ".index", ".txnindex", ".wal", "checkpoint.a", "format"] {
        let path = files(dir.path(), suffix).remove(0);
        let good = std::fs::read(&path).unwrap();
        // Beyond this a journal file is zeros.
        let busy = good.iter().rposition(|b| *b != 0).unwrap() + 1;
        for round in 0..120 {
            let mut bad = good.clone();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..busy);
                bad[at] = rng.random();
            }
            if round % 3 == 0 {
                bad.truncate(rng.random_range(0..busy));
            }
            if round % 10 == 9 {
                rng.fill(&mut bad[..]);
            }
            std::fs::write(&path, bad).unwrap();
            text(&path);
        }
        std::fs::write(&path, good).unwrap();
    }
}

#[test]
fn a_name_that_tells_nothing_is_refused() {
    let mut out = Vec::new();
    for name in ["notes.txt", "1x.log", "x.wal", "0.wal", "sock", ".log"] {
        let error = dump(Path::new(name), &OPTIONS, &mut out).unwrap_err();
        assert!(matches!(error, DumpError::UnknownKind { .. }), "{name}: {error}");
    }
    let error = dump(Path::new("/not/there/00000000000000000000.log"), &OPTIONS, &mut out).unwrap_err();
    assert!(error.to_string().contains("No such file"), "{error}");
}
