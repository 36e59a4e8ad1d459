//! Batches that no honest client sends: the log refuses them or stores them, and goes on.

#![allow(dead_code)]
mod common;

use std::sync::Arc;

use bytes::Bytes;
use common::{DEADLINE, open};
use proptest::prelude::*;
use tidemill_log::batch::{BatchBuilder, BatchOptions, Batches, Compression, ProducerStamp, RecordParts};
use tidemill_log::fs::sim::SimFs;
use tidemill_log::{Connection, Isolation, Log, NewTopic, Position, TopicPartition, WriteError};

fn batch(compression: Compression) -> Vec<u8> {
    let mut builder = BatchBuilder::new(BatchOptions { compression, ..BatchOptions::default() });
    for _ in 0..3 {
        assert!(builder.push(RecordParts { timestamp: 1, value: Some(b"value"), ..RecordParts::default() }));
    }
    builder.build(ProducerStamp::NONE).to_vec()
}

fn mend(batch: &mut [u8]) {
    if batch.len() > 21 {
        let crc = crc32c::crc32c(&batch[21..]);
        batch[17..21].copy_from_slice(&crc.to_be_bytes());
    }
}

fn partition(log: &Log) -> TopicPartition {
    let topic = log.create_topic(NewTopic::new("t", 1)).wait(DEADLINE).unwrap();
    TopicPartition { topic: topic.uuid, partition: 0 }
}

/// The whole partition, by offsets, without opening the batches; how many there are.
fn walk(log: &Log, tp: TopicPartition) -> usize {
    let (mut from, mut batches) = (Position::unchecked(0), 0);
    loop {
        let got = log.read(tp, from, 1 << 20, Isolation::ReadCommitted).unwrap();
        if got.batches.is_empty() {
            assert_eq!(from.offset, got.offsets.high_watermark, "read to the end");
            return batches;
        }
        batches += Batches::new(got.batches).inspect(|b| assert!(b.is_ok())).count();
        from = got.next;
    }
}

#[test]
fn offsets_run_ahead_of_bytes() {
    let fs = SimFs::new();
    let log = open(&fs).unwrap();
    let tp = partition(&log);
    // Compressed, a batch can claim any number of records; these are 2^31 - 1 each, without 4 KiB between them.
    let mut batch = batch(Compression::Lz4);
    batch[23..27].copy_from_slice(&(i32::MAX - 1).to_be_bytes());
    batch[57..61].copy_from_slice(&i32::MAX.to_be_bytes());
    mend(&mut batch);
    let appends = 80;
    for i in 0..appends {
        let appended = log.append(tp, Bytes::from(batch.clone()), Connection::LOCAL).wait(DEADLINE).unwrap();
        assert_eq!(appended.base_offset, i * i64::from(i32::MAX));
    }
    assert_eq!(walk(&log, tp), appends as usize);
    drop(log);
    let log = open(&fs).unwrap();
    assert_eq!(walk(&log, tp), appends as usize);
}

#[test]
fn no_batch_stops_the_log() {
    let fs = SimFs::new();
    let log = open(&fs).unwrap();
    let tp = partition(&log);
    let accepted = std::cell::Cell::new(0);
    let codecs = [Compression::None, Compression::Gzip, Compression::Snappy, Compression::Lz4];
    let seeds: Vec<_> = codecs.into_iter().map(batch).collect();
    let change = (0..61usize, prop_oneof![any::<u8>(), Just(0), Just(0x7f), Just(0xff)]);
    let strategy =
        (prop::sample::select(seeds), prop::collection::vec(change, 1..4), 0..100usize, any::<bool>());
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(500));
    let result = runner.run(&strategy, |(mut batch, changes, cut, cuts)| {
        for (at, byte) in changes {
            batch[at] = byte;
        }
        if cuts {
            batch.truncate(cut);
        }
        mend(&mut batch);
        match log.append(tp, Bytes::from(batch), Connection::LOCAL).wait(DEADLINE) {
            Ok(_) => accepted.set(accepted.get() + 1),
            Err(WriteError::Refused(_) | WriteError::Fenced { .. }) => {}
            Err(other) => prop_assert!(false, "{other}"),
        }
        Ok(())
    });
    result.unwrap_or_else(|e| panic!("{e}"));
    assert!(accepted.get() > 10, "{} were harmless", accepted.get());
    assert_eq!(log.status().stopped, None);
    assert_eq!(walk(&log, tp), accepted.get());
    let rewritten = Arc::new(fs.crash(tidemill_log::fs::sim::Crash::Kill, &mut rand::rng()));
    assert_eq!(walk(&open(&rewritten).unwrap(), tp), accepted.get());
}
