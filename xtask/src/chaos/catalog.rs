//! Which topics a data directory holds and how long their files are, by its newest checkpoint slot.
//!
//! ```text
//! slot  0 "TMC1" │ 4 crc32c of 8.. │ 8 directory id │ 24 sequence u64 │ 36 layout u32 │ 68 length u32 │ 72 State (postcard)
//! State n, clock, incarnation, opened, next_producer, topics: map of uuid to
//!       name, segment_bytes_max, mode, cleanup, partitions: each log_start, log_end, segments, epochs, open, aborted
//! ```
//!
//! Read after a clean stop, when the newest slot is the whole truth and the journal adds nothing to it. Only the front
//! of State is read, with a reader of postcard's varints of its own: what follows the topics is not looked at.
//! The format is that of `docs/disk-format.md`.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

/// Version of State this reads.
const LAYOUT: u32 = 1;
const HEAD: usize = 72;

/// One topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    /// Its directory's name under `topics`.
    pub uuid: String,
    /// Its partitions, by number.
    pub partitions: Vec<Partition>,
}

/// One partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// First offset kept.
    pub log_start: i64,
    /// Offset behind the last record.
    pub log_end: i64,
    /// Its segments, oldest first.
    pub segments: Vec<Segment>,
    /// First offsets of transactions that are open.
    pub open: Vec<i64>,
}

/// One file of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Offset of its first record.
    pub base: i64,
    /// Number of its last rewrite.
    pub revision: u64,
    /// Offset behind its last record.
    pub end: i64,
    /// Its length.
    pub bytes: u64,
}

/// Topics by name, as the newest whole slot has them.
///
/// # Errors
///
/// If no slot is whole, or the newest one has a layout that is not known here.
pub fn read(data: &Path) -> Result<BTreeMap<String, Topic>> {
    let mut newest: Option<(u64, Vec<u8>)> = None;
    for name in ["checkpoint.a", "checkpoint.b"] {
        let path = data.join(name);
        let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if let Some((sequence, state)) = slot(&bytes)?
            && newest.as_ref().is_none_or(|(newest, _)| *newest < sequence)
        {
            newest = Some((sequence, state.to_vec()));
        }
    }
    let (_, state) = newest.with_context(|| format!("no whole checkpoint in {}", data.display()))?;
    topics(&state).context("the State of the newest checkpoint")
}

/// Sequence and State of a whole slot; none where it is not whole.
fn slot(bytes: &[u8]) -> Result<Option<(u64, &[u8])>> {
    let Some(head) = bytes.first_chunk::<HEAD>() else { return Ok(None) };
    let u32_at = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let length = u32_at(68) as usize;
    let Some(whole) = HEAD.checked_add(length).and_then(|end| bytes.get(..end)) else { return Ok(None) };
    if &head[..4] != b"TMC1" || crc32c::crc32c(&whole[8..]) != u32_at(4) {
        return Ok(None);
    }
    let layout = u32_at(36);
    ensure!(layout == LAYOUT, "State has layout {layout}; the verifier reads layout {LAYOUT}");
    let sequence = u64::from(u32_at(24)) | u64::from(u32_at(28)) << 32;
    Ok(Some((sequence, &whole[HEAD..])))
}

fn topics(state: &[u8]) -> Result<BTreeMap<String, Topic>> {
    let mut from = Postcard(state);
    from.unsigned()?; // n
    from.signed()?; // clock
    from.unsigned()?; // incarnation
    from.signed()?;
    from.signed()?; // opened
    from.signed()?; // next producer
    let mut topics = BTreeMap::new();
    for _ in 0..from.length()? {
        let uuid = from.bytes()?;
        ensure!(uuid.len() == 16, "a uuid of {} bytes", uuid.len());
        let uuid = dashed(uuid);
        let name = String::from_utf8(from.bytes()?.to_vec()).context("a topic's name")?;
        from.unsigned()?; // segment_bytes_max
        match from.unsigned()? {
            0 | 2 => {}
            1 => drop(from.unsigned()?), // the interval
            other => bail!("mode {other} of topic {name}"),
        }
        from.unsigned()?; // cleanup
        let partitions = (0..from.length()?).map(|_| partition(&mut from)).collect::<Result<_>>()?;
        ensure!(
            topics.insert(name.clone(), Topic { uuid, partitions }).is_none(),
            "two topics are called {name}"
        );
    }
    Ok(topics)
}

fn partition(from: &mut Postcard<'_>) -> Result<Partition> {
    let (log_start, log_end) = (from.signed()?, from.signed()?);
    let mut segments = Vec::new();
    for _ in 0..from.length()? {
        let (base, revision, end, bytes) =
            (from.signed()?, from.unsigned()?, from.signed()?, from.unsigned()?);
        from.unsigned()?; // batches
        from.unsigned()?; // where the last batch begins
        from.unsigned()?; // aborted ranges
        segments.push(Segment { base, revision, end, bytes });
    }
    for _ in 0..from.length()? {
        from.signed()?; // leader epoch
        from.signed()?; // its first offset
    }
    let mut open = Vec::new();
    for _ in 0..from.length()? {
        open.push(from.signed()?);
        from.signed()?; // producer id
    }
    for _ in 0..from.length()? {
        from.signed()?;
        from.signed()?;
        from.signed()?; // an aborted range
    }
    Ok(Partition { log_start, log_end, segments, open })
}

fn dashed(uuid: &[u8]) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

/// What is left of a postcard text: integers are LEB128, signed ones zigzag, sequences and bytes follow their length.
struct Postcard<'a>(&'a [u8]);

impl<'a> Postcard<'a> {
    fn unsigned(&mut self) -> Result<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let Some((byte, rest)) = self.0.split_first() else { bail!("ends within a number") };
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        bail!("a number of more than ten bytes")
    }

    fn signed(&mut self) -> Result<i64> {
        let zigzag = self.unsigned()?;
        Ok((zigzag >> 1) as i64 ^ -((zigzag & 1) as i64))
    }

    /// The length of a sequence; each element takes at least a byte.
    fn length(&mut self) -> Result<usize> {
        let length = self.unsigned()?;
        ensure!(length <= self.0.len() as u64, "{length} elements in {} bytes", self.0.len());
        Ok(length as usize)
    }

    fn bytes(&mut self) -> Result<&'a [u8]> {
        let length = self.length()?;
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::random::Random;

    /// State of one topic `ab` with one partition of one segment and one open transaction, by hand.
    fn state() -> Vec<u8> {
        let mut state = vec![5, 200, 1, 3, 0, 0, 2]; // n, clock 100, incarnation 3, opened, next producer 1
        state.push(1);
        state.push(16);
        state.extend(1..=16);
        state.extend([2, b'a', b'b', 0x80, 0x01, 0, 0]); // name, 128, durable, delete
        state.extend([1, 0, 20]); // one partition: 0 to 10
        state.extend([1, 0, 0, 20, 0xac, 0x02, 2, 90, 0]); // a segment of 300 bytes
        state.extend([1, 6, 0]); // leader epoch 3 from 0
        state.extend([1, 16, 2]); // open from 8, producer 1
        state.extend([0, 0, 0]); // no aborted ranges; the rest is not read
        state
    }

    fn slot_of(state: &[u8], sequence: u8) -> Vec<u8> {
        let mut slot = vec![0; HEAD];
        slot[..4].copy_from_slice(b"TMC1");
        slot[24] = sequence;
        slot[36] = 1;
        slot[68..72].copy_from_slice(&(state.len() as u32).to_le_bytes());
        slot.extend(state);
        let crc = crc32c::crc32c(&slot[8..]);
        slot[4..8].copy_from_slice(&crc.to_le_bytes());
        slot.extend(b"left over");
        slot
    }

    #[test]
    fn the_newest_whole_slot_counts() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        put("checkpoint.a", &slot_of(&state(), 4));
        let mut other = slot_of(b"nonsense", 5);
        other[75] ^= 1;
        put("checkpoint.b", &other);
        let topics = read(dir.path()).unwrap();
        let topic = &topics["ab"];
        assert_eq!(topic.uuid, "01020304-0506-0708-090a-0b0c0d0e0f10");
        let segment = Segment { base: 0, revision: 0, end: 10, bytes: 300 };
        let partition = Partition { log_start: 0, log_end: 10, segments: vec![segment], open: vec![8] };
        assert_eq!(topic.partitions, [partition]);
        put("checkpoint.a", b"");
        assert!(read(dir.path()).is_err());
    }

    #[test]
    fn hostile_states_are_errors() {
        let good = state();
        for cut in 0..good.len() - 2 {
            assert!(topics(&good[..cut]).is_err(), "cut at {cut}");
        }
        let mut random = Random::new(3);
        for _ in 0..20_000 {
            let mut bad = good.clone();
            for _ in 0..1 + random.below(5) {
                let at = random.below(bad.len() as u64) as usize;
                bad[at] = random.below(256) as u8;
            }
            let _ = topics(&bad);
        }
    }
}
