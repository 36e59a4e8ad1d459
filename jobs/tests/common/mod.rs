//! A data directory, the access-log lines in it, and what job `ip-count` made of them.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use tidemill::adapters::broker::batch::RecordParts;
use tidemill::adapters::broker::{
    Access, Broker, Consumer, ConsumerOptions, Data, Event, Intent, Isolation, NewTopic, Position, Producer,
    ProducerOptions,
};
use tidemill::adapters::{JobRunError, RunOptions, run};
use tidemill::engine::Mode;
use tidemill::runtime::{Monitor, RunReport};
use xtask::recount::{Recount, Settings};

/// A directory that this process owns (or whose owner it reaches).
pub struct Rig {
    pub runtime: tokio::runtime::Runtime,
    pub access: Access,
}

impl Rig {
    pub fn open(dir: &Path) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let access = runtime.block_on(Data::open(dir, Intent::Create)).unwrap();
        Self { runtime, access }
    }

    pub fn close(self) {
        self.runtime.block_on(self.access.close());
    }

    /// Appends lines, each keyed by its first word.
    pub fn produce(&self, topic: &str, partitions: u32, text: &str) {
        self.runtime.block_on(async {
            let new = NewTopic::new(topic, partitions).keep_existing();
            let topic = self.access.create_topic(new).await.unwrap();
            let producer = Producer::open(self.access.clone(), ProducerOptions::default()).await.unwrap();
            for line in text.lines() {
                let key = line.split(' ').next().unwrap_or_default().as_bytes();
                let record =
                    RecordParts { timestamp: 1, key: Some(key), value: Some(line.as_bytes()), headers: &[] };
                drop(producer.send(&topic, None, record).await.unwrap());
            }
            producer.close().await.unwrap();
        });
    }

    /// All committed records of a topic: partition, key, value, number of headers.
    pub fn read(&self, topic: &str) -> Vec<(u32, Vec<u8>, Vec<u8>, usize)> {
        self.runtime.block_on(async {
            let found = self.access.describe(topic.to_owned()).await.unwrap();
            let places = (0..found.topic.partitions).map(|p| (found.topic.partition(p), Position::START));
            let options = ConsumerOptions {
                wait: Duration::from_millis(50),
                isolation: Isolation::ReadCommitted,
                ..Default::default()
            };
            let mut consumer = Consumer::start(self.access.clone(), places.collect(), options);
            let mut records = Vec::new();
            while let Some(event) = consumer.next().await {
                match event.unwrap() {
                    Event::Batches(consumed) => {
                        tidemill::adapters::broker::for_each_record(&consumed.batches, consumed.from, |r| {
                            let bytes = |part: Option<&[u8]>| part.unwrap_or_default().to_vec();
                            let partition = consumed.partition.partition;
                            records.push((partition, bytes(r.key), bytes(r.value), r.headers.len()));
                        })
                        .unwrap();
                    }
                    Event::CaughtUp => break,
                    Event::Failed { error, .. } => panic!("{error}"),
                }
            }
            records
        })
    }

    pub fn run(&self, options: &RunOptions, monitor: &Monitor) -> Result<RunReport, JobRunError> {
        let job = tidemill_jobs::find("ip-count").unwrap();
        run(&job, &self.access, options, self.runtime.handle(), monitor)
    }

    /// Runs until the end and panics where that fails.
    pub fn until_end(&self, options: &RunOptions) -> RunReport {
        self.run(&RunOptions { mode: Mode::UntilEnd, ..options.clone() }, &Monitor::new()).unwrap()
    }

    /// Panics where output, late lines or dead letters differ from a recount.
    pub fn check(&self, expected: &Recount) {
        let mut counts = std::collections::BTreeMap::new();
        for (_, key, value, _) in self.read("ip-counts") {
            let row: serde_json::Value = serde_json::from_slice(&value).unwrap();
            let ip = row["ip"].as_str().unwrap().to_owned();
            assert_eq!(ip.as_bytes(), key);
            let start = row["window_start"].as_str().unwrap().to_owned();
            let count = row["count"].as_u64().unwrap();
            assert_eq!(
                counts.insert((start.clone(), ip.clone()), count),
                None,
                "a second row for {start} {ip}"
            );
        }
        let wanted = expected.counts.iter();
        let wanted: std::collections::BTreeMap<_, _> =
            wanted.map(|((at, ip), n)| ((xtask::recount::utc_text(*at), ip.to_string()), *n)).collect();
        assert_eq!(counts.len(), wanted.len());
        assert!(counts == wanted, "{:?}", counts.iter().zip(&wanted).find(|(a, b)| a != b));
        let lines = |topic: &str, headers: usize| {
            let mut lines: HashMap<Vec<u8>, u64> = HashMap::new();
            for (_, _, value, found) in self.read(topic) {
                assert_eq!(found, headers);
                *lines.entry(value).or_default() += 1;
            }
            lines
        };
        assert!(lines("ip-counts-late", 0) == expected.late, "late lines differ");
        assert!(lines("ip-count-dead-letter", 1) == expected.dead, "dead letters differ");
    }
}

/// Settings of a recount with the job's defaults.
pub fn settings(partitions: u32) -> Settings {
    Settings { partitions, window_ms: 5_000, bound_ms: 10_000 }
}

/// Seeded access-log lines: `rate` a second of event time over `addresses` addresses, out of order within the bound,
/// some beyond it, some that do not parse, IPv4 and IPv6, zone offsets.
pub fn lines(n: usize, addresses: u64, rate: u64, seed: u64, from: i64) -> String {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = move |n: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % n
    };
    let mut text = String::new();
    for i in 0..n as u64 {
        let a = random(addresses).min(random(addresses));
        let ip = match a % 5 {
            0 => format!("2001:db8::{:x}", a + 1),
            _ => format!("10.{}.{}.{}", a >> 16 & 255, a >> 8 & 255, a & 255),
        };
        if random(500) == 0 {
            writeln!(text, "{ip} - - [31/Feb/2015:10:05:03 +0000] \"GET / HTTP/1.1\" 200 {i}").unwrap();
            continue;
        }
        let back = match random(100) {
            0 => random(40),
            1..20 => random(9),
            _ => 0,
        };
        let at = from + (i / rate) as i64 - back as i64;
        let zone = [0, 2, -7][random(3) as usize];
        let local = xtask::recount::utc_text((at + zone * 3600) * 1000);
        let (date, time) = local.split_once('T').unwrap();
        let mut date = date.split('-');
        let (year, month, day) = (date.next().unwrap(), date.next().unwrap(), date.next().unwrap());
        let months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
        let month = months[month.parse::<usize>().unwrap() - 1];
        let time = &time[..8];
        writeln!(text, "{ip} - - [{day}/{month}/{year}:{time} {zone:+03}00] \"GET /{i} HTTP/1.1\" 200 {i}")
            .unwrap();
    }
    text
}

/// Seconds since 1970 at which the tests' event time begins.
pub const FROM: i64 = 1_431_857_100;
