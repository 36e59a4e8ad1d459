//! Reading the journal back: every round that is whole and at its own place, and how far it was synced.
//!
//! Reads only. Damage is not judged here: a page that begins no round is just that.

use super::round::{Claim, Round, claim, decode};
use super::{Geometry, PAGE, ROUND_HEAD};
use crate::fault;
use crate::fs::{File, Fs, OpenHow};
use crate::names;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

/// Bytes read at once while looking for rounds.
const CHUNK: u64 = 1 << 20;

/// The journal's files, and where rounds may begin in them.
pub(crate) struct Scan {
    directory: u128,
    geometry: Geometry,
    pub files: BTreeMap<u64, JournalFile>,
    /// The highest `synced_through` that a whole round at or above the scan's start names.
    pub synced_through: u64,
}

pub(crate) struct JournalFile {
    pub file: Arc<dyn File>,
    pub bytes: u64,
}

/// Finds the journal's files and looks at every page from `from` on.
pub(crate) fn scan(fs: &dyn Fs, directory: u128, geometry: Geometry, from: u64) -> io::Result<Scan> {
    let mut files = BTreeMap::new();
    for name in fs.list(names::JOURNAL)? {
        if let Some(number) = names::journal_number(&name) {
            let file = fs.open(&names::journal_file(number), OpenHow::Write)?;
            let bytes = file.len()?;
            files.insert(number, JournalFile { file, bytes });
        }
    }
    let mut scan = Scan { directory, geometry, files, synced_through: 0 };
    let mut highest = 0;
    for (&number, f) in &scan.files {
        let start = from.saturating_sub(geometry.lsn(number, 0)).min(geometry.file_bytes);
        let mut at = start - start % PAGE;
        while at < f.bytes.min(geometry.file_bytes) {
            let chunk = read_up_to(&*f.file, at, CHUNK.min(geometry.file_bytes - at))?;
            if chunk.is_empty() {
                break;
            }
            for page in 0..(chunk.len() as u64).div_ceil(PAGE) {
                let here = at + page * PAGE;
                let bytes = &chunk[usize::try_from(page * PAGE).expect("in a chunk")..];
                let Some(c) = claim(bytes, directory, geometry.file_bytes - here) else { continue };
                // A live round names a higher point than those before it, or is not worth reading whole.
                if c.head.synced_through <= highest && !fault::active("stale-accepted") {
                    continue;
                }
                if c.head.lsn == geometry.lsn(number, here) && scan.whole(&c, f, here)?.is_some() {
                    highest = highest.max(c.head.synced_through);
                }
            }
            at += (chunk.len() as u64).next_multiple_of(PAGE);
        }
    }
    scan.synced_through = highest;
    Ok(scan)
}

fn read_up_to(file: &dyn File, at: u64, len: u64) -> io::Result<Bytes> {
    let mut buf = vec![0; usize::try_from(len).expect("a part of a journal file")];
    let mut have = 0;
    while have < buf.len() {
        match file.read_at(&mut buf[have..], at + have as u64)? {
            0 => break,
            n => have += n,
        }
    }
    buf.truncate(have);
    Ok(buf.into())
}

impl Scan {
    fn whole(&self, c: &Claim, f: &JournalFile, at: u64) -> io::Result<Option<Round>> {
        Ok(decode(c, &read_up_to(&*f.file, at, c.length)?))
    }

    /// The round at this LSN, if there is a whole one that belongs there.
    pub(crate) fn round_at(&self, lsn: u64) -> io::Result<Option<Round>> {
        let (number, at) = (self.geometry.file(lsn), self.geometry.at(lsn));
        let Some(f) = self.files.get(&number) else { return Ok(None) };
        let head = read_up_to(&*f.file, at, ROUND_HEAD as u64)?;
        let Some(mut c) = claim(&head, self.directory, self.geometry.file_bytes - at) else {
            return Ok(None);
        };
        if c.head.lsn != lsn {
            if !fault::active("stale-accepted") {
                return Ok(None);
            }
            c.head.lsn = lsn;
        }
        self.whole(&c, f, at)
    }

    /// The first rounds of the files after this LSN.
    pub(crate) fn first_rounds_after(&self, lsn: u64) -> impl Iterator<Item = io::Result<Option<Round>>> {
        let starts = self.files.keys().map(|number| self.geometry.lsn(*number, 0));
        starts.filter(move |start| *start > lsn).map(|start| self.round_at(start))
    }
}
