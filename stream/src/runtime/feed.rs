//! The feeder's thread: takes what the log's reader fetched and puts it into the tasks' inboxes.
//!
//! A partition whose task has [`FED_BYTES_MAX`] waiting is paused, and so is one that a run until the end has read to
//! its captured end. What is in an inbox is invisible until it is processed.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Clock;
use super::wiring::{Fed, Wiring};
use crate::engine::Start;
use crate::io::{Fetched, Fetching, Input, LogError};
use crate::record::RecordBatch;

/// Bytes of one partition that may wait for its task.
const FED_BYTES_MAX: usize = 2 << 20;

/// Longest wait for the log: how soon the feeder notices that everything ends.
const POLL_WAIT: Duration = Duration::from_millis(50);

/// Most bytes of one poll.
const POLL_BYTES: usize = 4 << 20;

struct Partition {
    next: i64,
    end: i64,
    paused: bool,
}

/// Feeds until everything ends.
pub(super) fn run(
    start: &Start,
    mut input: Box<dyn Input>,
    wiring: &Arc<Wiring>,
    parker: &crossbeam_utils::sync::Parker,
    clock: Clock,
) -> Result<(), LogError> {
    let mut partitions: HashMap<u32, Partition> = HashMap::new();
    for p in &start.partitions {
        let end = p.end.unwrap_or(i64::MAX);
        partitions.insert(p.partition, Partition { next: p.position.offset, end, paused: false });
    }
    let tasks = wiring.ports.len();
    while !wiring.is_down() {
        let mut fetching = 0;
        for (number, partition) in &mut partitions {
            let full = wiring.fed_bytes[*number as usize].load(Ordering::Relaxed) > FED_BYTES_MAX;
            let pause = full || partition.next >= partition.end;
            if pause != partition.paused {
                partition.paused = pause;
                input.pause(*number, if pause { Fetching::Paused } else { Fetching::On });
            }
            fetching += usize::from(!pause);
        }
        if fetching == 0 {
            // Tasks wake the feeder when they took something.
            parker.park_timeout(POLL_WAIT);
            continue;
        }
        for fetched in input.poll(POLL_WAIT, POLL_BYTES)? {
            let number = fetched.partition;
            let Some(partition) = partitions.get_mut(&number) else { continue };
            let bytes: usize = fetched.batches.iter().map(RecordBatch::bytes).sum();
            let mut fed = match fetched {
                Fetched { batches, next, caught_up, .. }
                    if batches.is_empty() && next.offset <= partition.next =>
                {
                    Fed::Nothing { partition: number, caught_up, now: clock.now() }
                }
                fetched => {
                    partition.next = fetched.next.offset;
                    Fed::Fetched(fetched)
                }
            };
            wiring.fed_bytes[number as usize].fetch_add(bytes, Ordering::Relaxed);
            let port = &wiring.ports[number as usize % tasks];
            let mut inbox = port.inbox.lock();
            if let Some((_, queue)) = inbox.parts.iter_mut().find(|(p, _)| *p == number) {
                // Of a row of vain waits the task needs the first and the last; the last replaces those between, and is
                // no idleness if one of them was none.
                let repeat = |f: &Fed| matches!(f, Fed::Nothing { .. });
                if queue.len() >= 2
                    && queue.iter().rev().take(2).all(repeat)
                    && let Fed::Nothing { caught_up, .. } = &mut fed
                    && let Some(Fed::Nothing { caught_up: between, .. }) = queue.pop_back()
                {
                    *caught_up &= between;
                }
                queue.push_back(fed);
            }
            drop(inbox);
            port.waker.unpark();
        }
    }
    Ok(())
}
