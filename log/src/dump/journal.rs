//! A journal file: its rounds, the entries in them, and what of the file is not journal any more.

use super::{DumpOptions, Out, Records, Shown, Time, plural};
use crate::batch::{BatchHeader, HEADER_BYTES};
use crate::entry::{Change, Entry, StoredBatch};
use crate::journal::{Claim, End, PAGE, ROUND_HEAD, claim_any, decode};
use crate::types::{Outcome, Producer};
use bytes::Bytes;
use std::fmt::Write as _;
use std::io;

pub(super) fn dump(bytes: &Bytes, number: u64, options: &DumpOptions, out: &mut Out<'_>) -> io::Result<()> {
    let len = bytes.len() as u64;
    out.line(format_args!(
        "journal file {number}, {len} bytes; an LSN is file number times file size plus position"
    ))?;
    let (mut at, mut last): (u64, Option<End>) = (0, None);
    let (mut rounds, mut entries, mut stale) = (0, 0, 0u64);
    while at < len {
        let here = bytes.slice(usize::try_from(at).expect("a place in memory")..);
        let page = &here[..here.len().min(PAGE as usize)];
        let Some(claimed) = claim_any(&here, len - at) else {
            // Zeros follow the last round ever written here, older rounds and their insides the last one of this use.
            if last.is_none() && stale == 0 && at == 0 && page.iter().any(|b| *b != 0) {
                out.damage(at, "a round (TMR1)", Shown(page.get(..8), 8))?;
            }
            at += PAGE;
            continue;
        };
        // The size of the files is in `format`; of the file itself where it is whole.
        let own = number.checked_mul(len).and_then(|start| start.checked_add(at));
        if own != Some(claimed.head.lsn) || claimed.head.lsn > u64::MAX / 2 {
            stale += 1;
            at += claimed.length.next_multiple_of(PAGE).max(PAGE);
            continue;
        }
        match decode(&claimed, &here) {
            Some(round) => {
                rounds += 1;
                entries += round.entries.len() as u64;
                print_round(at, &claimed, last, out)?;
                for (entry, n) in round.entries.iter().zip(claimed.head.first..) {
                    print_entry(entry, n, options, out)?;
                }
                last = Some(round.end);
                at += claimed.length.next_multiple_of(PAGE);
            }
            None => {
                let length = usize::try_from(claimed.length).unwrap_or(usize::MAX).min(here.len());
                let crc = crc32c::crc32c(&here[8.min(length)..length]);
                out.damage(
                    at,
                    format_args!(
                        "a round of {} bytes with {} and crc {:#010x}",
                        claimed.length,
                        plural(claimed.head.count.into(), "entry", "entries"),
                        claimed.crc
                    ),
                    match crc == claimed.crc {
                        true => "entries that cannot be read".to_owned(),
                        false => {
                            format!("crc {crc:#010x} (damaged, or torn by a crash while it was written)")
                        }
                    },
                )?;
                // Its length is covered by that crc, so the next page may begin the next round.
                at += PAGE;
            }
        }
    }
    let stale = match stale {
        0 => String::new(),
        n => format!("; {} of the file's earlier use", plural(n, "stale round", "stale rounds")),
    };
    out.line(format_args!(
        "{} with {}{stale}; {}",
        plural(rounds, "round", "rounds"),
        plural(entries, "entry", "entries"),
        match out.damaged {
            0 => "no damage".to_owned(),
            n => plural(n, "damaged place", "damaged places"),
        }
    ))
}

fn print_round(at: u64, claimed: &Claim, last: Option<End>, out: &mut Out<'_>) -> io::Result<()> {
    let head = &claimed.head;
    let what = match head.count {
        0 => format!("seal, next entry {}", head.first),
        1 => format!("round with entry {}", head.first),
        n => format!("round with entries {}..={}", head.first, head.first.saturating_add(u64::from(n) - 1)),
    };
    out.line(format_args!(
        "@{at} {what}, LSN {}, {} bytes, incarnation {}, follows LSN {}, synced through {}, crc ok",
        head.lsn, claimed.length, head.incarnation, head.previous.lsn, head.synced_through
    ))?;
    match last {
        // At the start of an incarnation the end that is followed may lie before rounds that a crash left behind.
        Some(last) if last != head.previous && at > 0 => out.damage(
            at,
            format_args!("a round that follows LSN {} crc {:#010x}", last.lsn, last.crc),
            format_args!("one that follows LSN {} crc {:#010x}", head.previous.lsn, head.previous.crc),
        ),
        _ => Ok(()),
    }
}

fn print_entry(entry: &Entry, number: u64, options: &DumpOptions, out: &mut Out<'_>) -> io::Result<()> {
    out.line(format_args!("    entry {number} at {} ms: {}", entry.clock, change(&entry.change)))?;
    if options.records == Records::Hidden {
        return Ok(());
    }
    for (partition, batch) in &entry.batches {
        out.line(format_args!("        {partition} {}", batch_text(batch)))?;
    }
    Ok(())
}

fn batch_text(batch: &StoredBatch) -> String {
    let mut head = Vec::with_capacity(HEADER_BYTES);
    head.extend_from_slice(&batch.head);
    head.extend_from_slice(&batch.rest[..batch.rest.len().min(HEADER_BYTES - batch.head.len())]);
    match BatchHeader::parse(&head) {
        Ok(h) if h.is_control() => format!("marker at offset {}, {} bytes", h.base_offset, h.size),
        Ok(h) => format!("batch of offsets {}..={}, {} bytes", h.base_offset, h.last_offset(), h.size),
        Err(error) => format!("{} bytes that are no batch: {error}", batch.len()),
    }
}

fn producer(p: &Producer) -> String {
    format!("producer {} epoch {}", p.id, p.epoch)
}

fn change(change: &Change) -> String {
    match change {
        Change::Open { incarnation, wall_ms } => {
            format!("the directory was opened, incarnation {incarnation}, at {}", Time(*wall_ms))
        }
        Change::CreateTopic { uuid, name, partitions, segment_bytes_max, cleanup, .. } => format!(
            "create topic {name:?} {uuid}, {}, segments up to {segment_bytes_max} bytes, cleanup {cleanup:?}",
            plural((*partitions).into(), "partition", "partitions")
        ),
        Change::DeleteTopic { uuid } => format!("delete topic {uuid}"),
        Change::AlterTopic { uuid, partitions, segment_bytes_max, cleanup } => format!(
            "alter topic {uuid}: {}, segments up to {segment_bytes_max} bytes, cleanup {cleanup:?}",
            plural((*partitions).into(), "partition", "partitions")
        ),
        Change::Init { transactional_id, producer: p, replaces, .. } => {
            let mut text = format!("init {}", producer(p));
            if let Some(id) = transactional_id {
                let _ = write!(text, " for transactional id {id:?}");
            }
            if let Some(replaced) = replaces {
                let _ = write!(text, ", replaces producer {replaced}");
            }
            text
        }
        Change::Append => "append".to_owned(),
        Change::AddOffsets { transactional_id, group, offsets } => format!(
            "add {} of group {group:?} to the transaction of {transactional_id:?}",
            plural(offsets.len() as u64, "offset", "offsets")
        ),
        Change::CommitOffsets { group, offsets } => {
            format!("commit {} of group {group:?}", plural(offsets.len() as u64, "offset", "offsets"))
        }
        Change::End { transactional_id, outcome, next } => {
            let how = match outcome {
                Outcome::Committed => "commit",
                Outcome::Aborted => "abort",
            };
            format!("{how} the transaction of {transactional_id:?}; next is {}", producer(next))
        }
        Change::Expire { producers, transactional_ids } => format!(
            "forget {} and {}",
            plural(producers.len() as u64, "producer", "producers"),
            plural(transactional_ids.len() as u64, "transactional id", "transactional ids")
        ),
        // Kinds of later versions of this program.
        #[allow(
            unreachable_patterns,
            reason = "a new kind is shown by its name until it has a line of its own"
        )]
        other => format!("{other:?}"),
    }
}

const _: () = assert!(ROUND_HEAD < PAGE as usize);
