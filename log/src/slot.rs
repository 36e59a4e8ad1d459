//! Checkpoint slots and the `format` file: from where the journal is folded.
//!
//! ```text
//! slot   0 magic "TMC1"     8 directory id (16)   32 incarnation      48 synced_through (LSN)   64 C: crc
//!        4 crc32c of 8..     24 sequence           36 layout of State  56 C: LSN                 68 length of State
//!        72 State (postcard), which holds N and the aging clock
//! format a text of five lines; the last is the crc32c of the others
//! ```
//!
//! Two slots are written in turn, each in place and synced before the other one is touched, so one of them is whole
//! whatever happens. Integers are little-endian.

use crate::error::{Corruption, OpenError};
use crate::fs::{File, Fs, OpenHow};
use crate::journal::End;
use crate::names;
use crate::state::State;
use std::io::{self, IoSlice};
use std::sync::Arc;
use uuid::Uuid;

pub(crate) const MAGIC: [u8; 4] = *b"TMC1";
pub(crate) const HEAD: usize = 72;
/// Version of State's encoding.
pub(crate) const STATE_LAYOUT: u32 = 1;
/// Version of a data directory.
pub(crate) const LAYOUT: u32 = 1;

/// What a slot says besides State.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotHead {
    pub sequence: u64,
    pub incarnation: u32,
    /// The journal is synced at least to here.
    pub synced_through: u64,
    /// The end of the last round wholly in State.
    pub c: End,
}

/// A slot that was read back whole.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub head: SlotHead,
    pub state: State,
}

pub(crate) fn encode(directory: u128, head: &SlotHead, state: &State) -> Vec<u8> {
    let mut out = vec![0; HEAD];
    out[0..4].copy_from_slice(&MAGIC);
    out[8..24].copy_from_slice(&directory.to_le_bytes());
    out[24..32].copy_from_slice(&head.sequence.to_le_bytes());
    out[32..36].copy_from_slice(&head.incarnation.to_le_bytes());
    out[36..40].copy_from_slice(&STATE_LAYOUT.to_le_bytes());
    out[48..56].copy_from_slice(&head.synced_through.to_le_bytes());
    out[56..64].copy_from_slice(&head.c.lsn.to_le_bytes());
    out[64..68].copy_from_slice(&head.c.crc.to_le_bytes());
    let mut out = postcard::to_extend(state, out).expect("State's types encode");
    let length = u32::try_from(out.len() - HEAD).expect("State is far below 4 GiB");
    out[68..72].copy_from_slice(&length.to_le_bytes());
    let crc = crc32c::crc32c(&out[8..]);
    out[4..8].copy_from_slice(&crc.to_le_bytes());
    out
}

/// `None` for whatever is not a whole slot of this directory.
fn decode(directory: u128, bytes: &[u8]) -> Option<Slot> {
    let head = bytes.first_chunk::<HEAD>()?;
    let u32_at = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("4 bytes"));
    let u64_at = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
    let length = usize::try_from(u32_at(68)).ok()?;
    let found = u128::from_le_bytes(head[8..24].try_into().expect("16 bytes"));
    let whole = bytes.get(..HEAD.checked_add(length)?)?;
    if head[0..4] != MAGIC || found != directory || u32_at(36) != STATE_LAYOUT {
        return None;
    }
    if crc32c::crc32c(&whole[8..]) != u32_at(4) {
        return None;
    }
    let head = SlotHead {
        sequence: u64_at(24),
        incarnation: u32_at(32),
        synced_through: u64_at(48),
        c: End { lsn: u64_at(56), crc: u32_at(64) },
    };
    Some(Slot { head, state: postcard::from_bytes(&whole[HEAD..]).ok()? })
}

/// Reads one slot; `None` where there is no whole one.
pub(crate) fn read(fs: &dyn Fs, directory: u128, name: &str) -> io::Result<Option<Slot>> {
    let file = match fs.open(name, OpenHow::Read) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    // After a failed sync the page cache may show a slot that the medium never got; only a hint, so it may fail.
    let _ = file.drop_cache();
    let bytes = read_all(&*file)?;
    Ok(decode(directory, &bytes))
}

fn read_all(file: &dyn File) -> io::Result<Vec<u8>> {
    let len = usize::try_from(file.len()?).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Opens a file for writing, creating it where it is missing.
pub(crate) fn open_or_create(fs: &dyn Fs, name: &str) -> io::Result<Arc<dyn File>> {
    match fs.open(name, OpenHow::Write) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => fs.open(name, OpenHow::CreateNew),
        other => other,
    }
}

/// Makes room for a State twice as large as this one.
pub(crate) fn reserve(file: &dyn File, bytes: usize) -> io::Result<()> {
    file.reserve(0, (bytes as u64 * 2).next_multiple_of(64 << 10))
}

/// Overwrites a slot and makes room for its next, larger State. The caller syncs it.
pub(crate) fn write(file: &dyn File, bytes: &[u8]) -> io::Result<()> {
    match reserve(file, bytes.len()) {
        // Without more room the write itself may still succeed, over the bytes of older slots.
        Err(e) if matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {}
        other => other?,
    }
    file.write_at(&[IoSlice::new(bytes)], 0)
}

/// What never changes about a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    pub directory: Uuid,
    pub journal_file_bytes: u64,
}

impl Format {
    pub(crate) fn encode(&self) -> String {
        let body = format!(
            "tidemill data directory\nlayout {LAYOUT}\nid {}\njournal-file-bytes {}\n",
            self.directory, self.journal_file_bytes
        );
        format!("{body}crc {:08x}\n", crc32c::crc32c(body.as_bytes()))
    }

    pub(crate) fn decode(text: &str) -> Result<Self, OpenError> {
        let damaged = |expected: &str, found: &str| {
            OpenError::Corrupt(Corruption {
                file: names::FORMAT.into(),
                position: 0,
                expected: expected.into(),
                found: found.into(),
            })
        };
        let lines: Vec<&str> = text.lines().collect();
        let value = |i: usize, key: &str| lines.get(i).and_then(|l| l.strip_prefix(key)).map(str::trim);
        if lines.first() != Some(&"tidemill data directory") {
            return Err(damaged("`tidemill data directory`", lines.first().unwrap_or(&"nothing")));
        }
        let Some(layout) = value(1, "layout ").and_then(|v| v.parse::<u32>().ok()) else {
            return Err(damaged("a layout", lines.get(1).unwrap_or(&"nothing")));
        };
        if layout > LAYOUT {
            return Err(OpenError::NewerLayout { found: layout, known: LAYOUT });
        }
        let body = text.rfind("crc ").map_or(text, |at| &text[..at]);
        let crc = format!("{:08x}", crc32c::crc32c(body.as_bytes()));
        if value(4, "crc ") != Some(&crc) {
            return Err(damaged(&format!("crc {crc}"), lines.get(4).unwrap_or(&"nothing")));
        }
        let id = value(2, "id ").and_then(|v| v.parse().ok());
        let bytes = value(3, "journal-file-bytes ").and_then(|v| v.parse().ok());
        match (id, bytes) {
            (Some(directory), Some(journal_file_bytes)) => Ok(Self { directory, journal_file_bytes }),
            _ => Err(damaged("an id and a journal file size", text)),
        }
    }

    /// The directory's format; `None` where there is none.
    pub(crate) fn read(fs: &dyn Fs) -> Result<Option<Self>, OpenError> {
        let io_err = |source| OpenError::Io { doing: "reading `format`".into(), source };
        let file = match fs.open(names::FORMAT, OpenHow::Read) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io_err(e)),
        };
        let bytes = read_all(&*file).map_err(io_err)?;
        Self::decode(&String::from_utf8_lossy(&bytes)).map(Some)
    }
}
