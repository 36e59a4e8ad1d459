//! Does building, verifying and reading batches leave a core free for the work on the records?
//!
//! Workload: lines of an access log, about 110 bytes, keyed by address, 16 KiB and 1 MiB batches, one thread, in
//! memory. Each pass is checked: the bytes that come out are those that went in. `cargo bench -p tidemill-log`; under
//! `cargo test` it runs one short pass.

#![allow(clippy::print_stdout, reason = "a benchmark prints its result")]

use std::hint::black_box;
use std::time::Instant;

use tidemill_log::batch::{
    BatchBuilder, BatchOptions, Compression, OpenBatch, ProducerStamp, RecordParts, verify,
};

fn main() {
    let long = std::env::args().any(|arg| arg == "--bench");
    let (records, passes) = if long { (1_000_000, 5) } else { (10_000, 1) };
    let lines: Vec<(String, String)> = (0..records)
        .map(|i: u64| {
            let r = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let ip = format!("{}.{}.{}.{}", r >> 56, (r >> 48) & 255, (r >> 40) & 15, i % 100);
            let line = format!(
                "{ip} - - [17/May/2015:10:05:{:02} +0000] \"GET /images/kibana-{}.png HTTP/1.1\" 200 {}",
                i % 60,
                r >> 52,
                r >> 45
            );
            (ip, line)
        })
        .collect();
    let bytes: usize = lines.iter().map(|(ip, line)| ip.len() + line.len()).sum();
    println!(
        "{records} records of {} bytes, best of {passes} passes, million records/s",
        bytes / records as usize
    );
    for compression in [Compression::None, Compression::Lz4] {
        for bytes_max in [16 << 10, 1 << 20] {
            let mut best = [f64::MAX; 4];
            for _ in 0..passes {
                let mut builder =
                    BatchBuilder::new(BatchOptions { compression, bytes_max, ..BatchOptions::default() });
                let mut batches = Vec::new();
                let times = [
                    time(|| {
                        for (ip, line) in &lines {
                            let record = RecordParts {
                                timestamp: 1_431_857_100_000,
                                key: Some(ip.as_bytes()),
                                value: Some(line.as_bytes()),
                                headers: &[],
                            };
                            if !builder.push(record) {
                                batches.push(builder.build(ProducerStamp::NONE));
                                assert!(builder.push(record));
                            }
                        }
                        batches.push(builder.build(ProducerStamp::NONE));
                    }),
                    time(|| {
                        for batch in &batches {
                            verify(black_box(batch)).expect("built above");
                        }
                    }),
                    time(|| {
                        let mut read = 0;
                        for batch in &batches {
                            for record in &OpenBatch::open(batch, 2 << 20).expect("built above") {
                                let record = record.expect("built above");
                                read +=
                                    record.key.map_or(0, <[u8]>::len) + record.value.map_or(0, <[u8]>::len);
                            }
                        }
                        assert_eq!(read, bytes);
                    }),
                    time(|| {
                        let mut read = 0;
                        for batch in &batches {
                            for record in OpenBatch::open(batch, 2 << 20).expect("built above").records() {
                                let record = black_box(record.expect("built above"));
                                read +=
                                    record.key.map_or(0, |k| k.len()) + record.value.map_or(0, |v| v.len());
                            }
                        }
                        assert_eq!(read, bytes);
                    }),
                ];
                for (best, time) in best.iter_mut().zip(times) {
                    *best = best.min(time);
                }
            }
            let [build, verify, borrow, own] = best.map(|seconds| records as f64 / seconds / 1e6);
            println!(
                "{compression:?} {:>4} KiB: build {build:.1}, verify {verify:.1}, open and read borrowed {borrow:.1}, owned {own:.1}",
                bytes_max >> 10
            );
        }
    }
}

fn time(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}
