//! Files of a data directory as text, for people: what each holds, and where it is damaged.
//!
//! ```text
//!   file ──by its name──▶ segment | sidecar | journal | checkpoint | format ──▶ lines, damage among them, and a count
//! ```
//!
//! Reads bytes, not State: it works on a copy, beside a running owner, and on a directory that does not open.
//!
//! Invariants
//! * Nothing is changed, and no bytes make it panic.
//! * Damage is a line (where, what was expected, what was found), and reading goes on behind it wherever a later place
//!   can be recognised by its own checksum.
//! * A whole file is read into memory: segments and journal files have a few hundred megabytes at most.
//!
//! The checks of sidecars and heads are seeded with the file's place, `topics/<uuid>/<partition>/<base>`. Of a file
//! that was moved elsewhere they cannot be verified, and the dump says so.
//!
//! Left out: changing anything (salvage), and finding the topic's name, which only State knows.

mod journal;
mod segment;
mod sidecar;
mod slot;

use crate::names::Kind;
use crate::state::SegmentId;
use crate::types::TopicPartition;
use bytes::Bytes;
use std::fmt;
use std::io::{self, Write};
use std::path::Path;

/// What a dump shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DumpOptions {
    /// Whether the records of batches are listed.
    pub records: Records,
    /// Bytes shown of a key or value.
    pub value_bytes_max: usize,
}

/// Whether records are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Records {
    /// Each on a line of its own.
    Shown,
    /// Batches only.
    Hidden,
}

/// Why a file cannot be dumped at all.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The name says nothing about what is in it.
    #[error(
        "the name {name:?} is none of <offset>.log .headcrc .index .txnindex, <number>.wal, checkpoint.a, checkpoint.b, format"
    )]
    UnknownKind {
        /// The file's name.
        name: String,
    },
    /// It cannot be read.
    #[error("cannot read the file: {0}")]
    Read(io::Error),
    /// The text cannot be written.
    #[error(transparent)]
    Write(io::Error),
}

/// Writes a file of a data directory as text. Returns how many damaged places it has.
///
/// # Errors
///
/// If the file is of no known kind, cannot be read, or the text cannot be written. Damage is not an error.
pub fn dump(path: &Path, options: &DumpOptions, to: &mut dyn Write) -> Result<u64, DumpError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let kind = FileKind::of(&name).ok_or(DumpError::UnknownKind { name })?;
    let bytes = Bytes::from(std::fs::read(path).map_err(DumpError::Read)?);
    let mut out = Out { to, damaged: 0 };
    let done = match kind {
        FileKind::Segment { base, revision, kind } => {
            let place = Place { id: place(path, base, revision), base };
            match kind {
                Kind::Log => {
                    let heads = std::fs::read(path.with_extension("headcrc")).ok();
                    segment::dump(&bytes, place, heads.as_deref(), options, &mut out)
                }
                kind => sidecar::dump(&bytes, place, kind, &mut out),
            }
        }
        FileKind::Journal { number } => journal::dump(&bytes, number, options, &mut out),
        FileKind::Slot => slot::dump(&bytes, &mut out),
        FileKind::Format => slot::dump_format(&bytes, &mut out),
    };
    done.map_err(DumpError::Write)?;
    Ok(out.damaged)
}

enum FileKind {
    Segment { base: i64, revision: u32, kind: Kind },
    Journal { number: u64 },
    Slot,
    Format,
}

impl FileKind {
    fn of(name: &str) -> Option<Self> {
        if crate::names::SLOTS.contains(&name) {
            return Some(Self::Slot);
        }
        if name == crate::names::FORMAT {
            return Some(Self::Format);
        }
        if let Some(number) = crate::names::journal_number(name) {
            return Some(Self::Journal { number });
        }
        let (stem, suffix) = name.rsplit_once('.')?;
        let kind = Kind::ALL.into_iter().find(|kind| kind.suffix() == suffix)?;
        let (base, revision) = match stem.split_once('.') {
            Some((base, revision)) => (base, revision.parse().ok()?),
            None => (stem, 0),
        };
        let base = base.parse().ok().filter(|_| base.bytes().all(|b| b.is_ascii_digit()))?;
        Some(Self::Segment { base, revision, kind })
    }
}

/// Which segment a file is, as far as its path tells.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// What seeds the checks of its sidecars; none where the file does not lie in a data directory.
    id: Option<SegmentId>,
    base: i64,
}

fn place(path: &Path, base: i64, revision: u32) -> Option<SegmentId> {
    let path = std::path::absolute(path).ok()?;
    let partition_dir = path.parent()?;
    let partition = partition_dir.file_name()?.to_str()?.parse().ok()?;
    let topic = partition_dir.parent()?.file_name()?.to_str()?.parse().ok()?;
    Some(SegmentId { tp: TopicPartition { topic, partition }, base, revision })
}

/// Where lines go, and the count of damaged places.
struct Out<'a> {
    to: &'a mut dyn Write,
    damaged: u64,
}

impl Out<'_> {
    fn line(&mut self, text: fmt::Arguments<'_>) -> io::Result<()> {
        self.to.write_fmt(text)?;
        self.to.write_all(b"\n")
    }

    fn damage(&mut self, at: u64, expected: impl fmt::Display, found: impl fmt::Display) -> io::Result<()> {
        self.damaged += 1;
        self.line(format_args!("@{at} DAMAGED: expected {expected}, found {found}"))
    }
}

/// A moment in UTC; the bare number where the calendar does not reach.
struct Time(i64);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_millisecond(self.0) {
            Ok(at) => write!(f, "{at:.3}"),
            Err(_) => write!(f, "{} ms", self.0),
        }
    }
}

/// Bytes as quoted text where they are UTF-8, in hex where not; cut after so many.
struct Shown<'a>(Option<&'a [u8]>, usize);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(Some(all), most) = *self else { return f.write_str("null") };
        match std::str::from_utf8(all) {
            Ok(text) => {
                let mut end = most.min(text.len());
                while !text.is_char_boundary(end) {
                    end -= 1;
                }
                write!(f, "{:?}", &text[..end])?;
                rest(f, all.len() - end)
            }
            Err(_) => {
                let end = most.min(all.len());
                f.write_str("0x")?;
                all[..end].iter().try_for_each(|b| write!(f, "{b:02x}"))?;
                rest(f, all.len() - end)
            }
        }
    }
}

fn rest(f: &mut fmt::Formatter<'_>, bytes: usize) -> fmt::Result {
    if bytes == 0 { Ok(()) } else { write!(f, " and {bytes} more bytes") }
}

fn plural(count: u64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}
