//! What do the engine's machines alone cost per row, without log, threads and disk?
//!
//! Workload: `time,ip` rows in two partitions, 100,000 addresses, Zipf 0.9, 100 rows per millisecond of event time
//! jittered by half a second, 5 s windows (500,000 rows and about 75,000 groups each), out of order by 1 s, a commit
//! every 200,000 rows, two source tasks and two keyed tasks in turn on one core, state in memory. Seed 7. The answer is
//! checked: the counts sum to the rows.
//!
//! `cargo bench -p tidemill-stream --bench windowed_count [-- ROWS]`
#![allow(clippy::print_stdout, reason = "a bench prints its numbers")]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tidemill_stream::engine::recovery::{self, Setup};
use tidemill_stream::engine::{Event, KeyedTask, Last, Layout, Mode, SourceTask, TaskOutput};
use tidemill_stream::io::{Cleanup, Fetched, Log, NewTopic, Position};
use tidemill_stream::names::Identity;
use tidemill_stream::state::{MemoryState, StateBackend};
use tidemill_stream::testing::MemoryLog;
use tidemill_stream::*;

struct Count;

impl Job for Count {
    const NAME: &'static str = "count";
    fn build(&self, flow: &Flow) -> Result<()> {
        let read = |record: RecordRef<'_>| -> Result<(i64, IpAddr), Malformed> {
            let bad = || Malformed::new("not `time,ip`");
            let text = std::str::from_utf8(record.value().unwrap_or_default()).map_err(|_| bad())?;
            let (time, ip) = text.split_once(',').ok_or_else(bad)?;
            Ok((time.parse().map_err(|_| bad())?, ip.parse().map_err(|_| bad())?))
        };
        flow.source(topic("in"), decode_with(read))
            .event_time(|row| row.0, EventTime::out_of_order(Duration::from_secs(1)))
            .key_by(|row| row.1)
            .window(Tumbling::of(Duration::from_secs(5)))
            .count("per-ip")
            .drop_late()
            .map(|w| w.value)
            .to(topic("out"), Text);
        Ok(())
    }
}

/// Processor time of this thread: other work on the machine does not count.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux");
    Duration::from_nanos(stat.split(' ').next().and_then(|n| n.parse().ok()).expect("nanoseconds"))
}

fn batches(rows: usize) -> Vec<Vec<RecordBatch>> {
    const ADDRESSES: usize = 100_000;
    let mut rng = SmallRng::seed_from_u64(7);
    let mut sums = Vec::with_capacity(ADDRESSES);
    let mut sum = 0.0;
    for i in 1..=ADDRESSES {
        sum += (i as f64).powf(-0.9);
        sums.push(sum);
    }
    let mut partitions: Vec<Vec<RecordBatch>> = vec![Vec::new(), Vec::new()];
    let mut texts: [Vec<String>; 2] = [Vec::new(), Vec::new()];
    let mut offsets = [0i64; 2];
    for i in 0..rows {
        let at = sums.partition_point(|s| *s < rng.random_range(0.0..sum)) as u32;
        let t = i as i64 / 100 + rng.random_range(0..500);
        texts[i % 2].push(format!(
            "{t},{}",
            Ipv4Addr::from(0x0a00_0000 + at.wrapping_mul(2_654_435_761) % (1 << 24))
        ));
        if texts[i % 2].len() == 2000 || i + 2 >= rows {
            let bytes = Bytes::from(texts[i % 2].concat());
            let (mut batch, mut from) = (RecordBatch::over(bytes.clone()), 0);
            for text in texts[i % 2].drain(..) {
                batch.push(offsets[i % 2], 0, None, Some(&bytes[from..from + text.len()]));
                from += text.len();
                offsets[i % 2] += 1;
            }
            partitions[i % 2].push(batch);
        }
    }
    partitions
}

fn main() {
    let rows = std::env::args().filter_map(|a| a.parse().ok()).next().unwrap_or(2_000_000);
    let partitions = batches(rows);
    let log = MemoryLog::default();
    log.create_topic(&NewTopic { name: "in".into(), partitions: 2, cleanup: Cleanup::Delete })
        .expect("in memory");
    let state = Arc::new(MemoryState::default());
    let plan = Plan::of(&Count).expect("the plan");
    let layout = Layout::new(&plan, 2, 256 << 20);
    let identity = Identity::new("count").expect("a name");
    let setup = Setup { plan, identity, layout, mode: Mode::Unbounded };
    let start = recovery::start(&setup, &log, &*state).expect("a start").start;
    let place = start.place();
    let mut sources: Vec<_> = (0..2).map(|i| SourceTask::new(&start, i, Arc::clone(&place))).collect();
    let backend = || Arc::clone(&state) as Arc<dyn StateBackend>;
    let mut keyed: Vec<_> = (0..2).map(|i| KeyedTask::new(&start, i, backend()).expect("a task")).collect();
    let mut outs: Vec<_> = (0..4).map(|_| TaskOutput::default()).collect();
    let (mut in_sources, mut in_keyed, mut since, mut counted, mut cells) =
        (Duration::ZERO, Duration::ZERO, 0, 0u64, 0);
    let mut next = [0i64; 2];
    let all = partitions[0].len().max(partitions[1].len());
    for i in 0..=all {
        for (p, source) in sources.iter_mut().enumerate() {
            let began = cpu();
            if let Some(batch) = partitions[p].get(i) {
                next[p] += batch.len() as i64;
                since += batch.len();
                let next = Position { leader_epoch: 0, offset: next[p] };
                let fetched =
                    Fetched { partition: p as u32, batches: vec![batch.clone()], next, caught_up: false };
                source.fetched(fetched, &mut outs[p]).expect("rows that can be read");
            }
            source.publish(&mut outs[p]).unwrap();
            if i == all {
                source.barrier(Last::End, &mut outs[p]).unwrap();
            }
            in_sources += cpu() - began;
        }
        if since >= 200_000 && i < all {
            since = 0;
            for (p, source) in sources.iter_mut().enumerate() {
                source.barrier(Last::No, &mut outs[p]).unwrap();
            }
        }
        let began = cpu();
        let (from, to) = outs.split_at_mut(2);
        for (sender, out) in from.iter_mut().enumerate() {
            for (receiver, message) in out.messages() {
                keyed[receiver].receive(sender, message, &mut to[receiver]).expect("rows on time");
            }
        }
        in_keyed += cpu() - began;
        for event in to.iter_mut().flat_map(TaskOutput::events) {
            match event {
                Event::Output { batches, .. } => {
                    for record in batches.iter().flat_map(|b| &b.records) {
                        let value = record.value.as_deref().unwrap_or_default();
                        counted += std::str::from_utf8(value).expect("text").parse::<u64>().expect("a count");
                    }
                }
                Event::Keyed(snapshot) => cells += snapshot.cells.iter().map(|c| c.len()).sum::<usize>(),
                _ => {}
            }
        }
    }
    let late: u64 = outs.iter().map(|o| o.counters().late).sum();
    let exchanged: u64 = outs.iter().map(|o| o.counters().exchanged).sum();
    assert_eq!(counted + late, rows as u64, "every row is counted or late");
    let per_row = |d: Duration| d.as_nanos() as f64 / rows as f64;
    println!("rows {rows}, exchanged {exchanged}, cells encoded {cells}, late {late}");
    println!("source tasks {:.0} ns/row, keyed tasks {:.0} ns/row", per_row(in_sources), per_row(in_keyed));
    println!("{:.2} M rows/s on one core", 1e3 / per_row(in_sources + in_keyed));
}
