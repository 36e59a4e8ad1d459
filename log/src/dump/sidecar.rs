//! The files beside a segment: one line an entry, each with its own check.

use super::{Out, Place, plural};
use crate::names::Kind;
use crate::segment::sidecars::{self, HEADCRC, INDEX, Seed, TXN};
use bytes::Bytes;
use std::io;

pub(super) fn dump(bytes: &Bytes, place: Place, kind: Kind, out: &mut Out<'_>) -> io::Result<()> {
    let (what, entry_bytes) = match kind {
        Kind::HeadCrc => ("batch head", HEADCRC),
        Kind::Index => ("index entry", INDEX),
        Kind::TxnIndex => ("aborted range", TXN),
        // A segment's own file is not dumped here.
        Kind::Log => return Ok(()),
    };
    let entries = bytes.len() / entry_bytes;
    out.line(format_args!(
        "{} of the segment with base offset {}: {} of {entry_bytes} bytes",
        kind.suffix(),
        place.base,
        plural(entries as u64, "entry", "entries"),
    ))?;
    let Some(id) = place.id else {
        out.line(format_args!(
            "checks are seeded with topics/<uuid>/<partition>/, where this file does not lie: they cannot be verified"
        ))?;
        return Ok(());
    };
    let seed = Seed::of(id);
    for (entry, number) in bytes.chunks_exact(entry_bytes).zip(0u32..) {
        let at = u64::from(number) * entry_bytes as u64;
        let shown = match kind {
            Kind::HeadCrc => sidecars::decode_head(seed, number, entry)
                .map(|value| format!("batch {number}: crc of its first 21 bytes {value:#010x}")),
            Kind::Index => sidecars::decode_index(seed, id.base, number, entry)
                .map(|e| format!("offset {} in batch {} at byte {}", e.offset, e.ordinal, e.at)),
            Kind::TxnIndex | Kind::Log => sidecars::decode_txn(seed, number, entry)
                .map(|r| format!("producer {} aborted offsets {}..={}", r.producer_id, r.first, r.last)),
        };
        match shown {
            Some(text) => out.line(format_args!("@{at} {text}, check ok"))?,
            None => {
                out.damage(at, format_args!("{what} {number} with the check of its place"), "another check")?
            }
        }
    }
    let whole = entries * entry_bytes;
    if whole < bytes.len() {
        out.damage(whole as u64, format_args!("{entry_bytes} bytes"), bytes.len() - whole)?;
    }
    let meaning = match kind {
        Kind::TxnIndex => "a damaged entry fails the partition",
        _ => "a damaged entry is rebuilt from the segment",
    };
    out.line(format_args!(
        "{}; {}",
        plural(entries as u64, "entry", "entries"),
        match out.damaged {
            0 => "no damage".to_owned(),
            n => format!("{}: {meaning}", plural(n, "damaged place", "damaged places")),
        }
    ))
}
