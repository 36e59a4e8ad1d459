//! How fast is the log? Appends and reads batches of 110-byte lines and prints the rates, in durable mode.
//!
//!     cargo run --release -p tidemill-log --example append_rate -- DIR [MiB] [batch KiB] [appenders]
//!
//! The answer is checked: every record that was acked is read back, in order.

#![allow(clippy::print_stdout, reason = "it is a program")]

use std::sync::Arc;
use std::time::{Duration, Instant};
use tidemill_log::batch::{BatchBuilder, BatchHeader, BatchOptions, ProducerStamp, RecordParts};
use tidemill_log::fs::RealFs;
use tidemill_log::{
    Config, Connection, Create, InitProducer, Isolation, Log, NewTopic, Position, Producer, TopicPartition,
};

const DEADLINE: Duration = Duration::from_secs(120);
const LINE: &[u8] = &[b'x'; 110];

fn arg(n: usize, default: usize) -> usize {
    std::env::args().nth(n).and_then(|a| a.parse().ok()).unwrap_or(default)
}

fn main() {
    let dir = std::env::args().nth(1).expect("the directory to write to");
    let (mib, kib, appenders) = (arg(2, 512), arg(3, 64), arg(4, 8));
    std::fs::create_dir_all(&dir).expect("the directory is made");
    let fs = Arc::new(RealFs::new(&dir).expect("the directory opens"));
    let started = Instant::now();
    let log =
        Log::open(fs, Config { create: Create::IfMissing, ..Config::default() }).expect("the log opens");
    println!("open: {:?}", started.elapsed());
    let topic = log.create_topic(NewTopic::new(format!("t{}", log.status().sequenced), 4));
    let topic = topic.wait(DEADLINE).expect("the topic is created");
    let tps: Vec<TopicPartition> = topic.topic_partitions().collect();

    let each = mib * 1024 / kib / appenders;
    let (syncs, started) = (log.status().syncs, Instant::now());
    let mut waits: Vec<Duration> = std::thread::scope(|s| {
        let threads = (0..appenders).map(|t| {
            let (log, tp) = (&log, tps[t % tps.len()]);
            s.spawn(move || append(log, tp, each, kib << 10))
        });
        threads.collect::<Vec<_>>().into_iter().flat_map(|t| t.join().expect("it does not panic")).collect()
    });
    let took = started.elapsed();
    let bytes: i64 = tps.iter().map(|tp| log.offsets(*tp).expect("it exists").high_watermark * 118).sum();
    waits.sort_unstable();
    let at = |p: usize| waits[(waits.len() - 1) * p / 100];
    println!(
        "append: {:.0} MiB/s, {} acks, {} syncs, ack p50 {:?} p99 {:?} max {:?}",
        bytes as f64 / 1048576.0 / took.as_secs_f64(),
        waits.len(),
        log.status().syncs - syncs,
        at(50),
        at(99),
        at(100)
    );

    let (started, mut read) = (Instant::now(), 0);
    for tp in &tps {
        let mut from = Position::START;
        loop {
            let got = log.read(*tp, from, 1 << 20, Isolation::ReadCommitted).expect("it reads");
            if got.batches.is_empty() {
                break;
            }
            let first = BatchHeader::parse(&got.batches).expect("a batch");
            assert_eq!(first.base_offset, from.offset);
            read += got.batches.len();
            from = got.next;
        }
        assert_eq!(from.offset, log.offsets(*tp).expect("it exists").high_watermark);
    }
    println!("read: {:.0} MiB/s", read as f64 / 1048576.0 / started.elapsed().as_secs_f64());
    let started = Instant::now();
    log.close(DEADLINE).expect("it closes");
    println!("close: {:?}", started.elapsed());
}

fn append(log: &Log, tp: TopicPartition, count: usize, bytes: usize) -> Vec<Duration> {
    let init = InitProducer { transactional_id: None, local: true, timeout_ms: 60_000, carried: None };
    let Producer { id, epoch } = log.init_producer(init).wait(DEADLINE).expect("a producer id");
    let mut builder = BatchBuilder::new(BatchOptions { bytes_max: bytes, ..BatchOptions::default() });
    let (mut waits, mut sequence) = (Vec::new(), 0);
    for _ in 0..count {
        while builder.push(RecordParts { timestamp: 0, key: None, value: Some(LINE), headers: &[] }) {}
        let records = i32::try_from(builder.count()).expect("a batch is small");
        let batch = builder.build(ProducerStamp { id, epoch, sequence });
        sequence += records;
        let asked = Instant::now();
        log.append(tp, batch, Connection::LOCAL).wait(DEADLINE).expect("it is acked");
        waits.push(asked.elapsed());
    }
    waits
}
