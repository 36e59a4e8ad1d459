//! The segment writer: the same bytes that the journal takes, into the files that readers use.
//!
//! Consecutive batches of one segment go out in one write. What it wrote is not synced here: see the checkpointer.

use crate::core::{Sequenced, Shared};
use crate::probe::Moment;
use crate::segment::Run;
use crate::writer::Step;
use std::io;
use std::sync::Arc;

/// Most entries of one step: what a slow disk lets pile up must not delay the first of them for long.
const ENTRIES: usize = 256;

pub(crate) fn step(shared: &Shared, at_most: usize) -> Step {
    let taken: Vec<Arc<Sequenced>> = {
        let mut core = shared.core.lock();
        if core.stopped.is_some() || core.segment_queue.is_empty() {
            return Step::Idle;
        }
        let most = core.segment_queue.len().min(at_most).min(ENTRIES);
        core.segment_queue.drain(..most).collect()
    };
    if let Err(e) = write(shared, &taken) {
        shared.poison("writing segments", &e);
        return Step::Idle;
    }
    shared.config.probe.at(Moment::Segments);
    let mut core = shared.core.lock();
    core.segments_n = taken.last().expect("not empty").n;
    let before = core.released_n;
    let tickets = core.release(shared);
    let released = core.released_n > before;
    drop(core);
    shared.answer(tickets, released);
    Step::Worked
}

fn write(shared: &Shared, taken: &[Arc<Sequenced>]) -> io::Result<()> {
    let mut runs: Vec<Run<'_>> = Vec::new();
    for e in taken {
        if !e.effects.closed.is_empty() || !e.effects.dropped.is_empty() {
            // A segment closes only after everything before it was written to it.
            put(shared, &mut runs)?;
            e.effects.closed.iter().try_for_each(|closed| shared.segments.close(closed))?;
            shared.segments.forget(&e.effects.dropped);
        }
        for (place, (_, batch)) in e.effects.places.iter().zip(&e.entry.batches) {
            match runs.iter_mut().find(|r| r.id == place.segment) {
                Some(run) => run.batches.push(batch),
                None => runs.push(Run {
                    id: place.segment,
                    at: place.at,
                    ordinal: place.ordinal,
                    batches: vec![batch],
                }),
            }
        }
    }
    put(shared, &mut runs)
}

fn put(shared: &Shared, runs: &mut Vec<Run<'_>>) -> io::Result<()> {
    runs.drain(..).try_for_each(|run| shared.segments.write(&run))
}
