//! The writer: turns the queue into rounds, each written at once and synced once for everybody in it.
//!
//! ```text
//! Ready ──queue has entries──▶ lay out, write ──▶ Written ──sync──▶ Ready   (acks leave)
//!   │──first entry does not fit the file──▶ take a free file ──▶ Ready
//!   └──idle──▶ seal: an empty round that witnesses how far the journal is synced
//! ```

use crate::core::{Core, Sequenced, Shared};
use crate::fault;
use crate::fs::{File, OpenHow};
use crate::journal::{End, ROUND_HEAD, RoundHead, encode, round_bytes};
use crate::names;
use crate::probe::Moment;
use parking_lot::MutexGuard;
use std::io::{self, IoSlice};
use std::sync::Arc;

/// A round takes no further entry above this: a larger write gains nothing and delays every ack in it.
pub(crate) const ROUND_BYTES: u64 = 4 << 20;
/// Slices in one write: the limit of the system call.
const SLICES: usize = 1000;
static ZEROS: [u8; 4096] = [0; 4096];

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Worked,
    /// Nothing to do.
    Idle,
}

/// May a step seal the journal?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seal {
    No,
    /// The journal was idle for a while.
    IfIdle,
}

pub(crate) struct Writer {
    file: Option<Arc<dyn File>>,
    written: Option<(End, u64)>,
}

impl Writer {
    pub(crate) fn new() -> Self {
        Self { file: None, written: None }
    }

    pub(crate) fn step(&mut self, shared: &Shared, seal: Seal) -> Step {
        match self.try_step(shared, seal) {
            Ok(step) => step,
            Err(e) => {
                shared.poison("writing the journal", &e);
                Step::Idle
            }
        }
    }

    fn try_step(&mut self, shared: &Shared, seal: Seal) -> io::Result<Step> {
        if let Some((end, n)) = self.written.take() {
            self.sync(shared, end, n)?;
            return Ok(Step::Worked);
        }
        let mut core = shared.core.lock();
        if core.stopped.is_some() {
            return Ok(Step::Idle);
        }
        let file_bytes = core.journal.geometry.file_bytes;
        let room = file_bytes - core.journal.at;
        let Some(first) = core.queue.front() else {
            if seal == Seal::IfIdle && !core.journal.sealed && room > 0 {
                core.journal.sealed = true;
                self.write(shared, core, Vec::new())?;
                return Ok(Step::Worked);
            }
            return Ok(Step::Idle);
        };
        if round_bytes(first.bytes) > room {
            return self.next_file(shared, core);
        }
        let taken = core.take_queue(room);
        core.journal.sealed = false;
        self.write(shared, core, taken)?;
        Ok(Step::Worked)
    }

    /// Lays out a round, which gives the LSN, and writes it; the segment writer takes the same entries meanwhile.
    fn write(
        &mut self,
        shared: &Shared,
        mut core: MutexGuard<'_, Core>,
        taken: Vec<Arc<Sequenced>>,
    ) -> io::Result<()> {
        let j = &core.journal;
        let lsn = j.geometry.lsn(j.file, j.at);
        let (at, previous, synced_through) = (j.at, j.end, j.synced);
        let last_n = taken.last().map_or_else(|| j.rounds.back().expect("never empty").1, |e| e.n);
        let first = taken.first().map_or(last_n + 1, |e| e.n);
        let length = round_bytes(taken.iter().map(|e| e.bytes).sum());
        core.journal.at += length;
        core.segment_queue.extend(taken.iter().cloned());
        core.count_room();
        core.drain_backlog(shared);
        drop(core);
        shared.segments_wake.notify_one();
        let mut parts: Vec<IoSlice<'_>> = Vec::with_capacity(taken.len() * 3 + 2);
        for e in &taken {
            parts.push(IoSlice::new(&e.head));
            parts.extend(e.entry.batches.iter().flat_map(|(_, b)| b.slices()));
        }
        let head = RoundHead {
            directory: shared.directory.as_u128(),
            incarnation: shared.incarnation,
            lsn,
            first,
            count: u32::try_from(taken.len()).expect("a round holds fewer than 2^32 entries"),
            previous,
            synced_through,
        };
        let (head, crc) = encode(&head, &parts);
        let bytes = ROUND_HEAD + parts.iter().map(|p| p.len()).sum::<usize>();
        let padding = usize::try_from(length).expect("a round fits memory") - bytes;
        parts.insert(0, IoSlice::new(&head));
        parts.push(IoSlice::new(&ZEROS[..padding]));
        shared.config.probe.at(Moment::Round);
        let file = self.file.as_ref().expect("a file was taken before the first round");
        let mut to = at;
        for some in parts.chunks(SLICES) {
            file.write_at(some, to)?;
            to += some.iter().map(|p| p.len() as u64).sum::<u64>();
        }
        let end = End { lsn: lsn + length, crc };
        self.written = Some((end, last_n));
        let mut core = shared.core.lock();
        core.journal.end = end;
        core.journal.rounds.push_back((end, last_n));
        if fault::active("ack-before-sync") {
            core.synced_n = last_n;
            let tickets = core.release(shared);
            drop(core);
            shared.answer(tickets, true);
        }
        Ok(())
    }

    fn sync(&self, shared: &Shared, end: End, n: u64) -> io::Result<()> {
        shared.config.probe.at(Moment::Written);
        fault::synced("sync:journal", || self.file.as_ref().expect("a round was written to it").sync())?;
        shared.count_sync();
        shared.config.probe.at(Moment::Synced);
        let mut core = shared.core.lock();
        core.journal.synced = end.lsn;
        core.journal.seal_synced = core.journal.sealed;
        core.synced_n = n;
        let before = core.released_n;
        let tickets = core.release(shared);
        let released = core.released_n > before;
        drop(core);
        shared.answer(tickets, released);
        shared.config.probe.at(Moment::Acked);
        Ok(())
    }

    /// Takes a free file under a number above every other. Its name is durable before anything relies on it.
    fn next_file(&mut self, shared: &Shared, mut core: MutexGuard<'_, Core>) -> io::Result<Step> {
        let Some(free) = core.journal.free.pop_first() else {
            core.want_checkpoint = true;
            drop(core);
            shared.checkpoint_wake.notify_one();
            return Ok(Step::Idle);
        };
        let number = core.journal.next_file;
        core.journal.next_file += 1;
        core.journal.files.remove(&free);
        core.journal.files.insert(number);
        (core.journal.file, core.journal.at) = (number, 0);
        core.count_room();
        drop(core);
        let path = names::journal_file(number);
        shared.config.probe.at(Moment::Recycle);
        shared.fs.rename(&names::journal_file(free), &path)?;
        shared.config.probe.at(Moment::Recycled);
        fault::synced("sync:journal-dir", || shared.fs.sync_dir(names::JOURNAL))?;
        self.file = Some(shared.fs.open(&path, OpenHow::Write)?);
        shared.checkpoint_wake.notify_one();
        Ok(Step::Worked)
    }
}
