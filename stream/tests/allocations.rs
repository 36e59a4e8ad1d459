//! The hot path allocates at most once per hundred rows: a warm source task and the keyed tasks behind it.

use std::alloc::System;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tidemill_stream::engine::recovery::{self, Setup};
use tidemill_stream::engine::{KeyedTask, Layout, Mode, SourceTask, TaskOutput};
use tidemill_stream::io::{Cleanup, Fetched, Log, NewTopic, Position};
use tidemill_stream::names::Identity;
use tidemill_stream::state::{MemoryState, StateBackend};
use tidemill_stream::testing::MemoryLog;
use tidemill_stream::*;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

struct Count;
impl Job for Count {
    const NAME: &'static str = "count";
    fn build(&self, flow: &Flow) -> Result<()> {
        let read = |record: RecordRef<'_>| -> Result<(i64, IpAddr), Malformed> {
            let value = record.value().unwrap_or_default();
            let address: [u8; 4] = value.try_into().map_err(|_| Malformed::new("four bytes"))?;
            Ok((record.timestamp(), Ipv4Addr::from(address).into()))
        };
        flow.source(topic("in"), decode_with(read))
            .event_time(|row| row.0, EventTime::out_of_order(Duration::from_secs(1)))
            .filter(|row| !row.1.is_loopback())
            .map(|row| row)
            .key_by(|row| row.1)
            .window(Tumbling::of(Duration::from_secs(5)))
            .count("per-ip")
            .drop_late()
            .map(|w| w.value)
            .to(topic("out"), Text);
        Ok(())
    }
}

#[test]
fn a_warm_chain_allocates_at_most_once_per_hundred_rows() {
    const ROWS: usize = 5_000;
    let log = MemoryLog::default();
    log.create_topic(&NewTopic { name: "in".into(), partitions: 1, cleanup: Cleanup::Delete }).unwrap();
    let state = Arc::new(MemoryState::default());
    let plan = Plan::of(&Count).unwrap();
    let layout = Layout::new(&plan, 2, 64 << 20);
    let setup = Setup { plan, identity: Identity::new("count").unwrap(), layout, mode: Mode::Unbounded };
    let start = recovery::start(&setup, &log, &*state).unwrap().start;
    let mut source = SourceTask::new(&start, 0, start.place());
    let backend = || Arc::clone(&state) as Arc<dyn StateBackend>;
    let mut keyed: Vec<_> = (0..2).map(|i| KeyedTask::new(&start, i, backend()).unwrap()).collect();
    let mut outs: Vec<_> = (0..3).map(|_| TaskOutput::default()).collect();
    let buffers: Vec<Bytes> =
        (0..ROWS).map(|i| Bytes::from((i as u32 % 1_000).to_be_bytes().to_vec())).collect();
    let all = Bytes::from(buffers.concat());
    let fetched = |round: usize| {
        let mut batch = RecordBatch::over(all.clone());
        for i in 0..ROWS {
            let at = (round * ROWS + i) as i64;
            batch.push(at, at / 10, None, Some(&all[i * 4..i * 4 + 4]));
        }
        let next = Position { leader_epoch: 0, offset: ((round + 1) * ROWS) as i64 };
        Fetched { partition: 0, batches: vec![batch], next, caught_up: false }
    };
    let rounds: Vec<_> = (0..20).map(fetched).collect();
    let mut allocations = 0;
    for (round, fetched) in rounds.into_iter().enumerate() {
        let region = Region::new(ALLOCATOR);
        let (from, to) = outs.split_at_mut(1);
        source.fetched(fetched, &mut from[0]).unwrap();
        source.publish(&mut from[0]).unwrap();
        for (receiver, message) in from[0].messages() {
            keyed[receiver].receive(0, message, &mut to[receiver]).unwrap_or_default();
        }
        // The first rounds grow the buffers.
        if round >= 5 {
            allocations += region.change().allocations;
        }
    }
    let per_row = allocations as f64 / (15 * ROWS) as f64;
    assert!(per_row <= 0.01, "{per_row} allocations per row");
}
