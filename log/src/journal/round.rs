//! A round: what one write carries, checksummed as a unit.
//!
//! ```text
//!   0 magic "TMR1"            16 directory id (16)       48 end of the round before: LSN, crc
//!   4 crc32c of 8..length     32 LSN of this round       60 length (all of it, without the padding)
//!   8 synced_through (LSN)    40 first entry number      64 count of entries
//!                                                        68 incarnation            72 entries ... zeros to 4096
//! ```
//!
//! Integers are little-endian. A sealed round has no entries. `first` is then the number the next entry will have.

use super::{End, PAGE};
use crate::entry::Entry;
use bytes::Bytes;
use std::io::IoSlice;

pub(crate) const ROUND_HEAD: usize = 72;
const MAGIC: [u8; 4] = *b"TMR1";

/// What a round says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RoundHead {
    pub directory: u128,
    pub incarnation: u32,
    pub lsn: u64,
    pub first: u64,
    pub count: u32,
    pub previous: End,
    pub synced_through: u64,
}

/// A round that was read back whole.
#[derive(Clone, Debug)]
pub(crate) struct Round {
    pub head: RoundHead,
    pub end: End,
    pub entries: Vec<Entry>,
}

/// Bytes that a round with this many bytes of entries takes.
pub(crate) fn round_bytes(entries: u64) -> u64 {
    (ROUND_HEAD as u64 + entries).next_multiple_of(PAGE)
}

/// The head of a round over these parts, and its crc.
pub(crate) fn encode(head: &RoundHead, parts: &[IoSlice<'_>]) -> ([u8; ROUND_HEAD], u32) {
    let body: usize = parts.iter().map(|p| p.len()).sum();
    let length = u32::try_from(ROUND_HEAD + body).expect("a round fits a journal file");
    let mut out = [0; ROUND_HEAD];
    out[0..4].copy_from_slice(&MAGIC);
    out[8..16].copy_from_slice(&head.synced_through.to_le_bytes());
    out[16..32].copy_from_slice(&head.directory.to_le_bytes());
    out[32..40].copy_from_slice(&head.lsn.to_le_bytes());
    out[40..48].copy_from_slice(&head.first.to_le_bytes());
    out[48..56].copy_from_slice(&head.previous.lsn.to_le_bytes());
    out[56..60].copy_from_slice(&head.previous.crc.to_le_bytes());
    out[60..64].copy_from_slice(&length.to_le_bytes());
    out[64..68].copy_from_slice(&head.count.to_le_bytes());
    out[68..72].copy_from_slice(&head.incarnation.to_le_bytes());
    let crc = parts.iter().fold(crc32c::crc32c(&out[8..]), |crc, part| crc32c::crc32c_append(crc, part));
    out[4..8].copy_from_slice(&crc.to_le_bytes());
    (out, crc)
}

/// What the bytes at a page say they are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim {
    pub head: RoundHead,
    pub crc: u32,
    pub length: u64,
}

/// Reads a round's head without believing it: only the magic, the directory and a possible length are checked.
pub(super) fn claim(bytes: &[u8], directory: u128, room: u64) -> Option<Claim> {
    claim_any(bytes, room).filter(|claim| claim.head.directory == directory)
}

/// The same, of any directory.
pub(crate) fn claim_any(bytes: &[u8], room: u64) -> Option<Claim> {
    let head = bytes.first_chunk::<ROUND_HEAD>()?;
    let u32_at = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("4 bytes"));
    let u64_at = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
    let found = u128::from_le_bytes(head[16..32].try_into().expect("16 bytes"));
    let length = u64::from(u32_at(60));
    if head[0..4] != MAGIC || length < ROUND_HEAD as u64 || length > room {
        return None;
    }
    let head = RoundHead {
        directory: found,
        incarnation: u32_at(68),
        lsn: u64_at(32),
        first: u64_at(40),
        count: u32_at(64),
        previous: End { lsn: u64_at(48), crc: u32_at(56) },
        synced_through: u64_at(8),
    };
    Some(Claim { head, crc: u32_at(4), length })
}

/// The round that a claim names, if its bytes have the crc it names. `bytes` begin with it and hold all of it.
pub(crate) fn decode(claim: &Claim, bytes: &Bytes) -> Option<Round> {
    let length = usize::try_from(claim.length).ok()?;
    if bytes.len() < length || crc32c::crc32c(&bytes[8..length]) != claim.crc {
        return None;
    }
    let mut body = bytes.slice(ROUND_HEAD..length);
    let mut entries = Vec::new();
    for _ in 0..claim.head.count {
        entries.push(Entry::decode(&mut body)?);
    }
    let end = End { lsn: claim.head.lsn + claim.length.next_multiple_of(PAGE), crc: claim.crc };
    body.is_empty().then_some(Round { head: claim.head, end, entries })
}
