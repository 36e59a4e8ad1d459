//! Recovery: observed facts to one decision, and nothing is changed before it.
//!
//! ```text
//!  read:   newest whole slot ─▶ boundaries of its segments ─▶ rounds from C on, folded in memory
//!  decide: D = highest synced_through of any whole round or slot
//!            folded end < D, an entry State cannot take, a short segment ─▶ corruption: read-only, nothing cut
//!            otherwise ─▶ what lies above the folded end is the torn tail of a crash
//!  do:     sync the slot started from and the rounds folded
//!          ─▶ redo the entries' batches, cut, sync ─▶ write the other slot, sync ─▶ this slot, sync
//!          ─▶ remove files that State does not name
//! ```
//!
//! Why in this order: after a process kill, what was read may be in the page cache only, and a power cut during
//! recovery must not take away what an earlier step built on. The rules are those of the model that the crash test
//! follows; each step that syncs has a name, and the test shows that none can be left out.

use crate::entry::{Entry, StoredBatch};
use crate::error::{Corruption, OpenError};
use crate::fault;
use crate::fs::Fs;
use crate::journal::{End, Geometry, Round, Scan, scan};
use crate::names::{self, Kind};
use crate::probe::{Moment, Probe};
use crate::segment::{FileError, Run, Segments};
use crate::slot::{self, Format, Slot, SlotHead};
use crate::state::{Effects, SegmentId, State};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

/// What was observed, and that it is consistent.
pub(crate) struct Decision {
    pub format: Format,
    /// The slot the fold starts from, and its place.
    pub slot: Slot,
    pub newest: usize,
    pub scan: Scan,
    /// LSNs of the rounds folded. They are read again to be redone, so that the journal need not fit memory.
    pub rounds: Vec<u64>,
    /// What the entries above the slot's N do to files, in order.
    pub effects: Vec<Effects>,
    pub end: End,
    pub state: State,
    pub segments: Segments,
    /// Found damage: then `state` is the slot's, and nothing may be changed.
    pub damage: Option<Corruption>,
}

/// An I/O error while recovering.
pub(crate) fn io_error(doing: impl Into<String>) -> impl FnOnce(io::Error) -> OpenError {
    let doing = doing.into();
    move |source| OpenError::Io { doing, source }
}

fn damage(
    file: impl Into<String>,
    position: u64,
    expected: impl Into<String>,
    found: impl Into<String>,
) -> Corruption {
    Corruption { file: file.into(), position, expected: expected.into(), found: found.into() }
}

/// Reads everything that decides what is kept. Changes nothing.
pub(crate) fn decide(fs: &Arc<dyn Fs>, format: Format, open_files_max: usize) -> Result<Decision, OpenError> {
    let directory = format.directory.as_u128();
    let geometry = Geometry { file_bytes: format.journal_file_bytes };
    let mut slots = Vec::new();
    for (i, name) in names::SLOTS.iter().enumerate() {
        if let Some(s) = slot::read(&**fs, directory, name).map_err(io_error(format!("reading {name}")))? {
            slots.push((i, s));
        }
    }
    let slots_synced = slots.iter().map(|(_, s)| s.head.synced_through).max().unwrap_or(0);
    let Some((newest, base)) = slots.into_iter().max_by_key(|(_, s)| s.head.sequence) else {
        let found = "none in `checkpoint.a`, none in `checkpoint.b`";
        return Err(OpenError::Corrupt(damage(
            names::SLOTS[0],
            0,
            "a whole checkpoint in one of two slots",
            found,
        )));
    };
    if fault::active("cut-before-decision") {
        cut_too_early(&**fs, &base.state).map_err(io_error("cutting segments"))?;
    }
    let segments = Segments::new(fs.clone(), open_files_max);
    let from = base.head.c;
    let found = scan(&**fs, directory, geometry, from.lsn).map_err(io_error("reading the journal"))?;
    let mut d = Decision {
        format,
        newest,
        end: from,
        state: base.state.clone(),
        slot: base,
        scan: found,
        rounds: Vec::new(),
        effects: Vec::new(),
        segments,
        damage: None,
    };
    let synced = slots_synced.max(d.scan.synced_through);
    match d.fold(geometry, synced)? {
        None => {}
        Some(corruption) => {
            d.state = d.slot.state.clone();
            d.damage = Some(corruption);
        }
    }
    Ok(d)
}

/// A seeded bug: the bytes above the checkpoint may be the only good copy of what a damaged journal held.
fn cut_too_early(fs: &dyn Fs, state: &State) -> io::Result<()> {
    for (id, s) in state.segments() {
        let file = fs.open(&names::segment_file(id, Kind::Log), crate::fs::OpenHow::Write)?;
        if file.len()? > s.bytes {
            file.set_len(s.bytes)?;
        }
    }
    Ok(())
}

impl Decision {
    fn fold(&mut self, geometry: Geometry, synced: u64) -> Result<Option<Corruption>, OpenError> {
        let checked = self.slot.state.segments().try_for_each(|(id, s)| self.segments.check_boundary(id, s));
        match checked.and_then(|()| self.segments.load(&self.slot.state)) {
            Err(FileError::Corrupt(corruption)) => return Ok(Some(corruption)),
            Err(FileError::Io { file, source }) => {
                return Err(OpenError::Io { doing: format!("reading {file}"), source });
            }
            Ok(()) => {}
        }
        while let Some(round) = self.next_round().map_err(io_error("reading the journal"))? {
            let file = names::journal_file(geometry.file(round.head.lsn));
            let at = geometry.at(round.head.lsn);
            for (entry, n) in round.entries.into_iter().zip(round.head.first..) {
                if n <= self.state.n {
                    continue;
                }
                if n != self.state.n + 1 {
                    let expected = format!("entry {}", self.state.n + 1);
                    return Ok(Some(damage(file, at, expected, format!("entry {n}"))));
                }
                match self.state.apply(&entry) {
                    Ok(effects) => self.effects.push(effects),
                    Err(e) => return Ok(Some(damage(file, at, e.expected, e.found))),
                }
            }
            self.rounds.push(round.head.lsn);
            self.end = round.end;
        }
        if synced > self.end.lsn && !fault::active("d-ignored") {
            let (file, at) = (names::journal_file(geometry.file(self.end.lsn)), geometry.at(self.end.lsn));
            let expected = format!("a whole round: the journal was synced through LSN {synced}");
            return Ok(Some(damage(file, at, expected, "none that follows the one before")));
        }
        Ok(None)
    }

    /// The round that follows the folded ones: right behind them, or at the start of a later file.
    fn next_round(&self) -> io::Result<Option<Round>> {
        let end = self.end;
        let stale = fault::active("stale-accepted");
        let loose = stale || fault::active("link-unchecked");
        let links =
            |r: &Round| r.head.previous == end || loose && (r.head.first == self.state.n + 1 || stale);
        if let Some(round) = self.scan.round_at(end.lsn)?.filter(links) {
            return Ok(Some(round));
        }
        for round in self.scan.first_rounds_after(end.lsn) {
            if let Some(round) = round?.filter(links) {
                return Ok(Some(round));
            }
        }
        Ok(None)
    }

    /// Makes what was decided so: after this a crash finds the same State again.
    pub(crate) fn carry_out(&self, fs: &dyn Fs, probe: &Probe) -> Result<[SlotHead; 2], OpenError> {
        self.sync_what_was_read(fs)?;
        self.redo(fs).map_err(io_error("rewriting segments from the journal"))?;
        probe.at(Moment::Redone);
        let slots = self.write_slots(fs, probe)?;
        probe.at(Moment::BothSlots);
        self.remove_unnamed(fs).map_err(io_error("removing files that are not named"))?;
        Ok(slots)
    }

    /// What was read may be in the page cache only. The slots written below, at the kept end, stand for the replayed
    /// rounds; but a crash between the two slots leaves the old one beside the new one, and should the new one rot
    /// then, the old one leads to the same State only through rounds that are there.
    fn sync_what_was_read(&self, fs: &dyn Fs) -> Result<(), OpenError> {
        fault::synced("sync:open-names", || fs.sync_dir(""))
            .map_err(io_error("syncing the data directory"))?;
        let name = names::SLOTS[self.newest];
        fault::synced("sync:open-slot", || slot::open_or_create(fs, name)?.sync())
            .map_err(io_error(format!("syncing {name}")))?;
        let geometry = Geometry { file_bytes: self.format.journal_file_bytes };
        let replayed: BTreeSet<u64> = self.rounds.iter().map(|lsn| geometry.file(*lsn)).collect();
        for number in replayed {
            let file = &self.scan.files[&number].file;
            fault::synced("sync:open-journal", || file.sync())
                .map_err(io_error(format!("syncing {}", names::journal_file(number))))?;
        }
        Ok(())
    }

    /// Writes the batches of the replayed entries where State placed them, and cuts what a crash left behind them.
    fn redo(&self, fs: &dyn Fs) -> io::Result<()> {
        let named: BTreeSet<SegmentId> = self.state.segments().map(|(id, _)| id).collect();
        let mut effects = self.effects.iter();
        for lsn in &self.rounds {
            let round = self
                .scan
                .round_at(*lsn)?
                .ok_or_else(|| io::Error::other("a round changed while it was redone"))?;
            for (entry, n) in round.entries.iter().zip(round.head.first..) {
                if n > self.slot.state.n {
                    let effects = effects.next().expect("one per entry folded");
                    write_entry(&self.segments, entry, effects, |id| named.contains(&id))?;
                }
            }
        }
        self.segments.flush_sidecars()?;
        for (tp, p) in self.state.partitions() {
            if let Some(s) = p.segments.last() {
                self.segments.cut(SegmentId { tp, base: s.base, revision: s.revision }, s)?;
            }
        }
        // A job's changelogs alone are some two hundred files: one by one they would take most of the open.
        let dirty = self.segments.files.dirty();
        for keys in dirty.chunks(fs.syncs_at_once().max(1)) {
            if fault::active("sync:open-segments") {
                keys.iter().for_each(|key| self.segments.files.forget(*key));
            } else {
                self.segments.files.sync_all(keys)?;
            }
        }
        // A file that the redo found there may have a name that was never synced.
        let touched = self.effects.iter().flat_map(|e| e.places.iter().map(|p| p.segment.tp));
        let dirs: BTreeSet<String> = touched
            .filter(|tp| self.state.partition(*tp).is_some())
            .map(names::partition_dir)
            .chain(self.segments.files.dirty_dirs())
            .collect();
        for dir in dirs {
            if fault::active("sync:open-dirs") {
                self.segments.files.forget_dir(&dir);
            } else {
                self.segments.files.sync_dir(&dir)?;
            }
        }
        Ok(())
    }

    fn write_slots(&self, fs: &dyn Fs, probe: &Probe) -> Result<[SlotHead; 2], OpenError> {
        let directory = self.format.directory.as_u128();
        let raise = u32::from(!fault::active("incarnation-kept"));
        let head = |k: u64| SlotHead {
            sequence: self.slot.head.sequence + 1 + k,
            incarnation: self.slot.head.incarnation + raise,
            synced_through: self.end.lsn,
            c: self.end,
        };
        let mut files = Vec::new();
        let sites = ["sync:open-other-slot", "sync:open-this-slot"];
        for (k, (i, site)) in [1 - self.newest, self.newest].into_iter().zip(sites).enumerate() {
            let name = names::SLOTS[i];
            let doing = || io_error(format!("writing {name}"));
            let file = slot::open_or_create(fs, name).map_err(doing())?;
            let bytes = slot::encode(directory, &head(k as u64), &self.state);
            slot::write(&*file, &bytes).map_err(doing())?;
            if !fault::active("both-slots-at-once") {
                fault::synced(site, || file.sync()).map_err(doing())?;
            }
            if k == 0 {
                probe.at(Moment::OtherSlot);
            }
            files.push(file);
        }
        if fault::active("both-slots-at-once") {
            for file in files {
                file.sync().map_err(io_error("syncing a slot"))?;
            }
        }
        let mut out = [head(0); 2];
        out[self.newest] = head(1);
        Ok(out)
    }

    /// Removes what crashes left: segments of entries that were not kept, directories of topics that do not exist.
    fn remove_unnamed(&self, fs: &dyn Fs) -> io::Result<()> {
        let mut named: BTreeSet<String> = BTreeSet::new();
        let mut dirs: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (uuid, topic) in &self.state.topics {
            let partitions = (0..topic.partitions.len()).map(|p| p.to_string()).collect();
            dirs.insert(uuid.to_string(), partitions);
        }
        for (id, s) in self.state.segments() {
            let kinds = Kind::ALL.iter().filter(|k| **k != Kind::TxnIndex || s.aborted > 0);
            named.extend(kinds.map(|kind| names::segment_file(id, *kind)));
        }
        for topic in fs.list(names::TOPICS)? {
            let topic_dir = format!("{}/{topic}", names::TOPICS);
            for partition in fs.list(&topic_dir)? {
                let dir = format!("{topic_dir}/{partition}");
                for file in fs.list(&dir)? {
                    let path = format!("{dir}/{file}");
                    if !named.contains(&path) {
                        tracing::info!(path, "removing a file that no entry names");
                        fs.unlink(&path)?;
                    }
                }
                if !dirs.get(&topic).is_some_and(|d| d.contains(&partition)) {
                    fs.remove_dir(&dir)?;
                }
            }
            if !dirs.contains_key(&topic) {
                fs.remove_dir(&topic_dir)?;
            }
        }
        Ok(())
    }
}

/// Writes one entry's batches to the segments that are still named, and closes those it closed.
pub(crate) fn write_entry(
    segments: &Segments,
    entry: &Entry,
    effects: &Effects,
    named: impl Fn(SegmentId) -> bool,
) -> io::Result<()> {
    for closed in effects.closed.iter().filter(|c| named(c.segment)) {
        segments.close(closed)?;
    }
    for (place, (_, batch)) in effects.places.iter().zip(&entry.batches) {
        if named(place.segment) {
            let batches: Vec<&StoredBatch> = vec![batch];
            segments.write(&Run { id: place.segment, at: place.at, ordinal: place.ordinal, batches })?;
        }
    }
    segments.forget(&effects.dropped);
    Ok(())
}
