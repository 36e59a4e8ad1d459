//! The journal: where entries become durable, in one order for all partitions.
//!
//! ```text
//!  file 7                        file 9 (8 was recycled)
//!  ┌────────┬──────┬───────────┐ ┌──────┬─────────┬┄┄┄┄┄┄┄┄┄┄
//!  │ round  │round │ (no room) │ │round │ round   │ zeros, or stale rounds of its last use
//!  └────────┴──────┴───────────┘ └──────┴─────────┴┄┄┄┄┄┄┄┄┄┄
//!     ▲ each names the end (LSN, crc) of the round before it, across files too
//! ```
//!
//! A position is an LSN: file number times file size plus position in the file. Files are zero-filled once and
//! recycled by rename, always to a number above every other, so a stale round names another LSN than its own.

mod round;
mod scan;

pub(crate) use round::{Claim, ROUND_HEAD, Round, RoundHead, claim_any, decode, encode, round_bytes};
pub(crate) use scan::{Scan, scan};

/// Rounds begin and end at multiples of this: the page that a disk writes as a whole or not at all, at best.
pub(crate) const PAGE: u64 = 4096;

/// The end of a round: where the next one would begin, and the round's crc.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub(crate) struct End {
    pub lsn: u64,
    pub crc: u32,
}

/// Places of a journal whose files have this many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub file_bytes: u64,
}

impl Geometry {
    pub(crate) fn lsn(self, file: u64, at: u64) -> u64 {
        file * self.file_bytes + at
    }

    pub(crate) fn file(self, lsn: u64) -> u64 {
        lsn / self.file_bytes
    }

    pub(crate) fn at(self, lsn: u64) -> u64 {
        lsn % self.file_bytes
    }

    /// The file that holds the byte before this end.
    pub(crate) fn file_before(self, lsn: u64) -> u64 {
        lsn.saturating_sub(1) / self.file_bytes
    }
}
