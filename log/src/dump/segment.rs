//! A segment: its batches, their records, and what their checksums say.

use super::{DumpOptions, Out, Place, Records, Shown, Time, plural};
use crate::batch::{BatchError, BatchHeader, Compression, HEADER_BYTES, Marker, OpenBatch, verify};
use crate::entry::HEAD;
use crate::segment::sidecars::{self, HEADCRC, Seed};
use bytes::Bytes;
use std::fmt;
use std::io;

/// A batch may open to this much.
const OPEN_BYTES_MAX: usize = 64 << 20;
/// Bytes that a search for the next whole batch checks before it gives up: damage that looks like headers everywhere
/// would otherwise take for ever.
const SEARCH_BYTES_MAX: u64 = 4 << 30;

/// What the sidecar says about the first bytes of a batch.
enum Head {
    Good,
    /// The value of the intact entry, and the one the batch gives.
    Differs(u32, u32),
    /// There is no intact entry: it is rebuilt from the segment.
    Unknown(&'static str),
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Good => f.write_str("head ok"),
            Self::Differs(..) => f.write_str("head DAMAGED"),
            Self::Unknown(why) => write!(f, "head not checked ({why})"),
        }
    }
}

pub(super) fn dump(
    bytes: &Bytes,
    place: Place,
    heads: Option<&[u8]>,
    options: &DumpOptions,
    out: &mut Out<'_>,
) -> io::Result<()> {
    let (len, before) = (bytes.len(), out.damaged);
    match place.id {
        Some(id) => {
            let revision =
                if id.revision == 0 { String::new() } else { format!(", revision {}", id.revision) };
            out.line(format_args!(
                "segment of partition {}, base offset {}{revision}, {len} bytes",
                id.tp, id.base
            ))?;
        }
        None => out.line(format_args!("segment, base offset {}, {len} bytes", place.base))?,
    }
    // A compacted segment has gaps between its batches.
    let gaps = place.id.is_some_and(|id| id.revision > 0);
    let (mut at, mut ordinal, mut next) = (0, Some(0), place.base);
    let (mut batches, mut records) = (0, 0);
    while at < len {
        let parsed = BatchHeader::parse(&bytes[at..]);
        let header = match parsed {
            Ok(header) if header.size <= len - at => header,
            failed => {
                let found = failed.map_or_else(
                    |e| e.to_string(),
                    |h| BatchError::Truncated { need: h.size, have: len - at }.to_string(),
                );
                out.damage(at as u64, "a batch", found)?;
                at = search(bytes, at, next, out)?;
                ordinal = None;
                continue;
            }
        };
        let batch = bytes.slice(at..at + header.size);
        let head = check_head(place, heads, ordinal, at, &batch);
        let verified = verify(&batch);
        // A batch whose crc is wrong and behind which no batch begins has no length to believe either.
        if verified.is_err() && !begins_one(bytes, at + header.size, &header) {
            out.damage(at as u64, "a batch with the crc it names", said(&verified))?;
            at = search(bytes, at, next, out)?;
            ordinal = None;
            continue;
        }
        batches += 1;
        print_batch(at, &header, &verified, &head, out)?;
        if let Head::Differs(expected, found) = head {
            out.damage(
                at as u64,
                format_args!("a head with crc {expected:#010x}"),
                format_args!("one with {found:#010x}"),
            )?;
        }
        let fits = if gaps { header.base_offset >= next } else { header.base_offset == next };
        if !fits && ordinal.is_some() {
            out.damage(at as u64, format_args!("offset {next}"), header.base_offset)?;
        }
        match &verified {
            Ok(_) => records += print_records(at, &batch, header, options, out)?,
            Err(error) => out.damage(at as u64, "the batch as it was written", error)?,
        }
        next = header.next_offset();
        at += header.size;
        ordinal = ordinal.map(|o: u32| o.saturating_add(1));
    }
    out.line(format_args!(
        "{} with {}, next offset {next}; {}",
        plural(batches, "batch", "batches"),
        plural(records, "record", "records"),
        match out.damaged - before {
            0 => "no damage".to_owned(),
            n => plural(n, "damaged place", "damaged places"),
        }
    ))
}

fn said(verified: &Result<BatchHeader, BatchError>) -> String {
    verified.as_ref().map_or_else(ToString::to_string, |_| "a whole batch".to_owned())
}

/// Whether the file ends at `at`, or a header stands there that may follow this one.
fn begins_one(bytes: &Bytes, at: usize, before: &BatchHeader) -> bool {
    at == bytes.len()
        || BatchHeader::parse(&bytes[at..]).is_ok_and(|next| next.base_offset >= before.base_offset)
}

/// The place of the next batch whose crc is right, or the end.
fn search(bytes: &Bytes, from: usize, next: i64, out: &mut Out<'_>) -> io::Result<usize> {
    let mut checked = 0;
    for at in from + 1..bytes.len().saturating_sub(HEADER_BYTES - 1) {
        // Its magic, before anything dearer.
        if bytes[at + 16] != 2 {
            continue;
        }
        let Ok(header) = BatchHeader::parse(&bytes[at..]) else { continue };
        if header.size > bytes.len() - at || header.base_offset < next {
            continue;
        }
        checked += header.size as u64;
        if checked > SEARCH_BYTES_MAX {
            break;
        }
        if verify(&bytes[at..at + header.size]).is_ok() {
            out.line(format_args!(
                "@{from} {} skipped up to the next whole batch",
                plural((at - from) as u64, "byte", "bytes")
            ))?;
            return Ok(at);
        }
    }
    let skipped = plural((bytes.len() - from) as u64, "byte", "bytes");
    out.line(format_args!("@{from} {skipped} skipped: no whole batch follows"))?;
    Ok(bytes.len())
}

fn check_head(place: Place, heads: Option<&[u8]>, ordinal: Option<u32>, at: usize, batch: &[u8]) -> Head {
    let Some(id) = place.id else { return Head::Unknown("the file lies outside its data directory") };
    let Some(heads) = heads else { return Head::Unknown("there is no .headcrc beside it") };
    let Some(ordinal) = ordinal else { return Head::Unknown("its number is not known behind damage") };
    let Some(entry) = heads.chunks_exact(HEADCRC).nth(ordinal as usize) else {
        return Head::Unknown("its .headcrc entry is not written yet");
    };
    let seed = Seed::of(id);
    let (Some(expected), Some(head)) =
        (sidecars::decode_head(seed, ordinal, entry), batch.first_chunk::<HEAD>())
    else {
        return Head::Unknown("its .headcrc entry is damaged and will be rebuilt");
    };
    let found = seed.head(ordinal, at as u64, head);
    if found == expected { Head::Good } else { Head::Differs(expected, found) }
}

fn print_batch(
    at: usize,
    header: &BatchHeader,
    verified: &Result<BatchHeader, BatchError>,
    head: &Head,
    out: &mut Out<'_>,
) -> io::Result<()> {
    let mut attributes = Vec::new();
    if header.is_control() {
        attributes.push("control");
    }
    if header.is_transactional() {
        attributes.push("transactional");
    }
    if header.is_append_time() {
        attributes.push("append time");
    }
    attributes.push(match header.compression {
        Compression::None => "uncompressed",
        Compression::Gzip => "gzip",
        Compression::Snappy => "snappy",
        Compression::Lz4 => "lz4",
    });
    let offsets = match header.last_offset_delta {
        0 => format!("offset {}", header.base_offset),
        _ => format!("offsets {}..={}", header.base_offset, header.last_offset()),
    };
    let producer = match header.producer_id {
        -1 => "no producer".to_owned(),
        id if header.base_sequence < 0 => format!("producer {id} epoch {}", header.producer_epoch),
        id => format!("producer {id} epoch {} sequence {}", header.producer_epoch, header.base_sequence),
    };
    let crc = if verified.is_ok() { "crc ok" } else { "crc DAMAGED" };
    out.line(format_args!(
        "@{at} batch {offsets}, {}, {} bytes, {}, {producer}, leader epoch {}, {} to {}, {crc}, {head}",
        plural(u64::try_from(header.record_count).unwrap_or(0), "record", "records"),
        header.size,
        attributes.join(" "),
        header.leader_epoch,
        Time(header.base_timestamp),
        Time(header.max_timestamp),
    ))
}

fn print_records(
    at: usize,
    batch: &Bytes,
    header: BatchHeader,
    options: &DumpOptions,
    out: &mut Out<'_>,
) -> io::Result<u64> {
    let open = match OpenBatch::open_verified(batch, header, OPEN_BYTES_MAX) {
        Ok(open) => open,
        Err(error) => return out.damage(at as u64, "records that can be opened", error).map(|()| 0),
    };
    let mut count = 0;
    for record in &open {
        let record = match record {
            Ok(record) => record,
            Err(error) => return out.damage(at as u64, "whole records", error).map(|()| count),
        };
        if header.is_control() {
            let marker = match record.key.and_then(Marker::from_key) {
                Some(Marker::Commit) => "commit marker".to_owned(),
                Some(Marker::Abort) => "abort marker".to_owned(),
                None => format!("control record with key {}", Shown(record.key, options.value_bytes_max)),
            };
            out.line(format_args!("    {:>10}  {}  {marker}", record.offset, Time(record.timestamp)))?;
            continue;
        }
        count += 1;
        if options.records == Records::Hidden {
            continue;
        }
        let most = options.value_bytes_max;
        let headers: Vec<_> =
            record.headers.iter().map(|h| format!("{}={}", h.name(), Shown(h.value, most))).collect();
        let headers =
            if headers.is_empty() { String::new() } else { format!("  headers {}", headers.join(" ")) };
        out.line(format_args!(
            "    {:>10}  {}  key {}  value {}{headers}",
            record.offset,
            Time(record.timestamp),
            Shown(record.key, most),
            Shown(record.value, most)
        ))?;
    }
    Ok(count)
}
