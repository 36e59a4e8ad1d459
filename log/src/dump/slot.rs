//! A checkpoint slot, and the `format` file.

use super::{Out, Shown, plural};
use crate::slot::{HEAD, MAGIC, STATE_LAYOUT};
use crate::state::State;
use bytes::Bytes;
use std::io;

pub(super) fn dump(bytes: &Bytes, out: &mut Out<'_>) -> io::Result<()> {
    let Some(head) = bytes.first_chunk::<HEAD>() else {
        out.damage(0, format_args!("a head of {HEAD} bytes"), format_args!("{} bytes", bytes.len()))?;
        return Ok(());
    };
    let u32_at = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("4 bytes"));
    let u64_at = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
    if head[..4] != MAGIC {
        out.damage(0, Shown(Some(&MAGIC), 4), Shown(Some(&head[..4]), 4))?;
    }
    if u32_at(36) != STATE_LAYOUT {
        out.damage(36, format_args!("layout {STATE_LAYOUT} of State"), u32_at(36))?;
    }
    let length = u32_at(68) as usize;
    out.line(format_args!(
        "checkpoint slot, sequence {}, incarnation {}, journal synced through LSN {}, replay from LSN {} crc {:#010x}, State of {length} bytes",
        u64_at(24), u32_at(32), u64_at(48), u64_at(56), u32_at(64),
    ))?;
    let Some(whole) = HEAD.checked_add(length).and_then(|end| bytes.get(..end)) else {
        return out.damage(68, format_args!("a State within {} bytes", bytes.len()), length);
    };
    let crc = crc32c::crc32c(&whole[8..]);
    if crc != u32_at(4) {
        out.damage(
            4,
            format_args!("crc {:#010x}", u32_at(4)),
            format_args!("{crc:#010x}: the other slot is used"),
        )?;
    }
    match postcard::from_bytes::<State>(&whole[HEAD..]) {
        Ok(state) => print_state(&state, out)?,
        Err(error) => out.damage(HEAD as u64, "State", error)?,
    }
    let ending = match out.damaged {
        0 => "crc ok, no damage".to_owned(),
        n => plural(n, "damaged place", "damaged places"),
    };
    out.line(format_args!("{ending}"))
}

fn print_state(state: &State, out: &mut Out<'_>) -> io::Result<()> {
    out.line(format_args!(
        "State after entry {}, aging clock {} ms, next producer id {}",
        state.n, state.clock, state.next_producer
    ))?;
    for (uuid, topic) in &state.topics {
        out.line(format_args!(
            "  topic {:?} {uuid}, {}, segments up to {} bytes, cleanup {:?}",
            topic.name,
            plural(topic.partitions.len() as u64, "partition", "partitions"),
            topic.segment_bytes_max,
            topic.cleanup
        ))?;
        for (p, number) in topic.partitions.iter().zip(0u32..) {
            let bytes: u64 = p.segments.iter().fold(0, |sum, s| sum.saturating_add(s.bytes));
            let open = match p.open.len() {
                0 => String::new(),
                n => format!(", {}", plural(n as u64, "open transaction", "open transactions")),
            };
            out.line(format_args!(
                "    partition {number}: offsets {}..{}, {} with {bytes} bytes{open}",
                p.log_start,
                p.log_end,
                plural(p.segments.len() as u64, "segment", "segments")
            ))?;
        }
    }
    for (id, owner) in &state.owners {
        let open = match &owner.txn {
            Some(t) => format!(
                "a transaction is open with {}",
                plural(t.partitions.len() as u64, "partition", "partitions")
            ),
            None => "no transaction is open".to_owned(),
        };
        out.line(format_args!(
            "  transactional id {id:?}: producer {} epoch {}, {open}",
            owner.producer.id, owner.producer.epoch
        ))?;
    }
    out.line(format_args!("  {}", plural(state.producers.len() as u64, "producer", "producers")))?;
    for (group, offsets) in &state.groups {
        out.line(format_args!("  group {group:?}:"))?;
        for (partition, offset) in offsets {
            out.line(format_args!(
                "    {partition}: offset {} of leader epoch {}, {} of metadata",
                offset.position.offset,
                offset.position.leader_epoch,
                plural(offset.metadata.len() as u64, "byte", "bytes")
            ))?;
        }
    }
    Ok(())
}

pub(super) fn dump_format(bytes: &Bytes, out: &mut Out<'_>) -> io::Result<()> {
    let text = String::from_utf8_lossy(bytes);
    for line in text.lines().take(16) {
        out.line(format_args!("{}", line.escape_debug()))?;
    }
    match crate::slot::Format::decode(&text) {
        Ok(_) => out.line(format_args!("crc ok, no damage")),
        Err(crate::OpenError::Corrupt(c)) => out.damage(c.position, c.expected, c.found),
        Err(other) => out.damage(0, "a format this program knows", other),
    }
}
