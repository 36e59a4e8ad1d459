//! Opening a directory: create or recover it, then run it until everything that the open itself wrote is durable.

use crate::checkpoint::{Checkpointer, slots_at};
use crate::config::{Config, Create};
use crate::core::{Core, JournalState, MARKER_ROOM, Shared};
use crate::entry::{Change, Entry};
use crate::error::OpenError;
use crate::fs::{Fs, OpenHow};
use crate::journal::{End, Geometry, PAGE};
use crate::names;
use crate::notify::Notify;
use crate::plan::{Context, LAST_EPOCH, Pins, Plan, Request, aborts_at_open};
use crate::probe::Moment;
use crate::recovery::{self, Decision, io_error};
use crate::segment::Segments;
use crate::slot::{self, Format, SlotHead};
use crate::state::{SegmentId, State};
use crate::writer::{Seal, Step, Writer};
use crate::{fault, segment_writer};
use parking_lot::{Condvar, Mutex, RwLock};
use rand::{RngExt, SeedableRng};
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use uuid::Uuid;

/// The aging clock advances at most this much at an open, so that one bad reading expires nothing.
const AGING_AT_OPEN_MS: i64 = 24 * 60 * 60 * 1000;

/// The log without threads: three state machines and what they share. Threads, or a test, step them.
pub(crate) struct Machine {
    pub shared: Arc<Shared>,
    pub writer: Writer,
    pub checkpointer: Checkpointer,
}

/// Opens a directory. What recovery kept is durable; the entries of the open itself are queued.
pub(crate) fn open(fs: Arc<dyn Fs>, config: Config) -> Result<Machine, OpenError> {
    let format = match Format::read(&*fs)? {
        Some(format) => format,
        None => create(&*fs, &config)?,
    };
    let decision = recovery::decide(&fs, format, config.open_files_max)?;
    config.probe.at(Moment::Decided);
    start(fs, config, decision)
}

/// Makes a new directory. `format.new` says that nothing in it counts yet; its rename to `format` makes it one.
fn create(fs: &dyn Fs, config: &Config) -> Result<Format, OpenError> {
    let doing = || io_error("creating the data directory");
    let names_here = fs.list("").map_err(doing())?;
    let has = |name: &str| names_here.iter().any(|n| n == name);
    if !has(names::FORMAT_NEW)
        && (has(names::JOURNAL) || has(names::TOPICS) || names::SLOTS.iter().any(|s| has(s)))
    {
        return Err(OpenError::Corrupt(crate::error::Corruption {
            file: names::FORMAT.into(),
            position: 0,
            expected: "the format of the data directory".into(),
            found: "no file, but a journal, topics or checkpoints".into(),
        }));
    }
    if config.create == Create::Never {
        return Err(OpenError::Missing);
    }
    create_files(fs, config).map_err(doing())
}

fn create_files(fs: &dyn Fs, config: &Config) -> io::Result<Format> {
    let directory = match config.seed {
        Some(seed) => Uuid::from_u128(rand_chacha::ChaCha8Rng::seed_from_u64(seed).random()),
        None => Uuid::new_v4(),
    };
    let journal_file_bytes = config.journal_file_bytes.next_multiple_of(PAGE).max(4 * PAGE);
    let format = Format { directory, journal_file_bytes };
    let text = format.encode();
    let file = slot::open_or_create(fs, names::FORMAT_NEW)?;
    file.set_len(0)?;
    file.write_at(&[IoSlice::new(text.as_bytes())], 0)?;
    fault::synced("sync:create-format", || file.sync())?;
    fault::synced("sync:create-mark", || fs.sync_dir(""))?;
    for dir in [names::JOURNAL, names::TOPICS] {
        match fs.create_dir(dir) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
    }
    for name in fs.list(names::JOURNAL)? {
        fs.unlink(&format!("{}/{name}", names::JOURNAL))?;
    }
    for number in [1, 2] {
        let file = fs.open(&names::journal_file(number), OpenHow::CreateNew)?;
        file.zero_fill(journal_file_bytes)?;
        // No entry relies on these two syncs, but an open on a disk that is full by then does.
        fault::synced("sync:create-journal", || file.sync())?;
    }
    fault::synced("sync:create-journal-dir", || fs.sync_dir(names::JOURNAL))?;
    let end = End { lsn: journal_file_bytes, crc: 0 };
    for (name, sequence) in names::SLOTS.iter().zip(1..) {
        let file = slot::open_or_create(fs, name)?;
        file.set_len(0)?;
        slot::reserve(&*file, 1)?;
        let head = SlotHead { sequence, incarnation: 0, synced_through: end.lsn, c: end };
        slot::write(&*file, &slot::encode(directory.as_u128(), &head, &State::default()))?;
        fault::synced("sync:create-slots", || file.sync())?;
    }
    fault::synced("sync:create-names", || fs.sync_dir(""))?;
    fs.rename(names::FORMAT_NEW, names::FORMAT)?;
    // Recovery, which comes next, syncs this name before anything relies on it.
    Ok(format)
}

/// Carries a decision out and puts together what runs from then on.
fn start(fs: Arc<dyn Fs>, config: Config, decision: Decision) -> Result<Machine, OpenError> {
    let geometry = Geometry { file_bytes: decision.format.journal_file_bytes };
    let raise = u32::from(!fault::active("incarnation-kept"));
    let incarnation = decision.slot.head.incarnation + raise;
    let slots = match &decision.damage {
        None => decision.carry_out(&*fs, &config.probe)?,
        Some(damage) => {
            tracing::error!(%damage, "the directory is damaged and opens read-only; `streamctl log dump FILE` shows what of the file is whole");
            [decision.slot.head; 2]
        }
    };
    let now = config.clock.monotonic();
    let wall_ms = config.clock.wall_ms();
    let state = decision.state;
    let (wall_then, clock_then) = state.opened;
    let since = (wall_ms.saturating_sub(wall_then)).saturating_sub(state.clock - clock_then);
    let clock = state.clock + if state.n == 0 { 0 } else { since.clamp(0, AGING_AT_OPEN_MS) };
    let context = Context {
        clock,
        leader_epoch: i32::try_from(incarnation).expect("opened fewer than 2^31 times"),
        entry_bytes_max: geometry.file_bytes - PAGE,
        last_epoch: config.last_epoch.unwrap_or(LAST_EPOCH),
        wall_ms,
        pins: Pins::default(),
    };
    let files = decision.scan.files.keys().copied().collect();
    let mut journal = JournalState::new(geometry, decision.end, state.n, files, slots_at(slots, state.n));
    if decision.damage.is_none() {
        for (number, f) in decision.scan.files.iter().filter(|(_, f)| f.bytes < geometry.file_bytes) {
            // A crash left this one half made; what is used later must be filled.
            match f.file.zero_fill(geometry.file_bytes).and_then(|()| f.file.sync()) {
                Err(e) if e.kind() == io::ErrorKind::StorageFull => {
                    tracing::warn!(number, "no space to fill this journal file; going on without it");
                    journal.free.remove(number);
                }
                other => other.map_err(io_error(format!("filling {}", names::journal_file(*number))))?,
            }
        }
    }
    if decision.damage.is_none() {
        reserve_markers(&decision.segments, &state);
    }
    let shared = Arc::new(Shared {
        core: Mutex::new(Core::new(state.clone(), context, journal, now)),
        released: RwLock::new(state),
        segments: decision.segments,
        fs,
        config,
        directory: decision.format.directory,
        incarnation,
        writer_wake: Condvar::new(),
        segments_wake: Condvar::new(),
        checkpoint_wake: Condvar::new(),
        notify: Notify::default(),
        syncs: AtomicU64::new(0),
        damage: decision.damage,
    });
    if shared.damage.is_none() {
        drop(shared.submit(Opened { incarnation, wall_ms }));
        let aborts = aborts_at_open(&shared.released.read());
        for abort in aborts {
            tracing::debug!(abort.transactional_id, "aborting a transaction that can not go on");
            drop(shared.submit(abort));
        }
    }
    Ok(Machine { shared, writer: Writer::new(), checkpointer: Checkpointer::new() })
}

/// Reserves space again for the markers of open transactions: a crash may have taken back what was reserved.
fn reserve_markers(segments: &Segments, state: &State) {
    for (tp, p) in state.partitions().filter(|(_, p)| !p.open.is_empty()) {
        let Some(s) = p.segments.last() else { continue };
        let id = SegmentId { tp, base: s.base, revision: s.revision };
        let need = s.bytes + p.open.len() as u64 * MARKER_ROOM;
        if let Err(error) = segments.reserve(id, s.bytes, need) {
            tracing::warn!(%tp, %error, "no space reserved for the end of open transactions; free some");
        }
    }
}

/// Notes in the journal that the directory was opened, and when.
struct Opened {
    incarnation: u32,
    wall_ms: i64,
}

impl Request for Opened {
    type Answer = ();

    fn plan(&self, _: &State, with: &mut Context) -> Plan<()> {
        let change = Change::Open { incarnation: self.incarnation, wall_ms: self.wall_ms };
        Plan::Entry { entry: Entry { clock: with.clock, change, batches: Vec::new() }, answer: () }
    }
}

impl Machine {
    /// Steps everything until nothing is queued and everything sequenced is released, or the log stopped.
    /// False if nothing moves any more before that.
    pub(crate) fn drain(&mut self) -> bool {
        loop {
            if self.shared.damage.is_some() || self.is_drained() {
                return true;
            }
            let steps = [
                self.writer.step(&self.shared, Seal::No),
                segment_writer::step(&self.shared, usize::MAX),
                self.checkpointer.step(&self.shared),
            ];
            if steps == [Step::Idle; 3] {
                return self.is_drained();
            }
        }
    }

    fn is_drained(&self) -> bool {
        let core = self.shared.core.lock();
        core.stopped.is_some() || core.released_n == core.seq.n && core.is_quiet()
    }
}
