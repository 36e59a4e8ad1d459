//! Record batches (Kafka's format v2) as the verifier reads them: a second decoder, which shares no line with the log's.
//!
//! ```text
//!  0 base offset i64 │ 8 length i32 │ 12 leader epoch i32 │ 16 magic i8 = 2 │ 17 crc32c u32 of 21..
//! 21 attributes i16  │ 23 last offset delta i32 │ 27 base, 35 max timestamp i64 │ 43 producer id i64 │ 51 epoch i16
//! 53 base sequence i32 │ 57 count i32 │ 61 records: each length, attributes, deltas, key, value, headers (varints)
//! ```
//!
//! It is slow and plain on purpose: every record is copied out. Whatever the bytes are, the answer is a batch or an
//! error that says where; nothing is allocated for a length that no bytes back. Compression: none and lz4.
//!
//! Source: the message format in Kafka's documentation (`DefaultRecordBatch`, `DefaultRecord`, `EndTransactionMarker`).

use std::io::Read;

use anyhow::{Result, bail, ensure};

/// Where the records begin.
const HEADER: usize = 61;
/// A record has at least a length and six fields of one byte.
const RECORD_MIN: usize = 7;
/// The most a batch may unpack to.
const UNPACKED_MAX: u64 = 64 << 20;

/// A batch, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Offset of its first record.
    pub base_offset: i64,
    /// Offset behind its last record.
    pub next_offset: i64,
    /// Under which the log stored it.
    pub leader_epoch: i32,
    /// Producer id, epoch and first sequence number; -1 each where there is no producer.
    pub producer: (i64, i16, i32),
    /// Whether it belongs to a transaction.
    pub transactional: bool,
    /// Set for a control batch: how a transaction ended.
    pub marker: Option<Marker>,
    /// Its records; for a control batch none.
    pub records: Vec<Record>,
}

/// How a transaction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marker {
    /// Its records are to be ignored.
    Abort,
    /// Its records count.
    Commit,
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its place in the partition.
    pub offset: i64,
    /// Milliseconds since the epoch.
    pub timestamp: i64,
    /// The key.
    pub key: Option<Vec<u8>>,
    /// The value.
    pub value: Option<Vec<u8>>,
    /// Headers in order.
    pub headers: Vec<(Vec<u8>, Option<Vec<u8>>)>,
}

/// The batch at the front of `bytes`, and how many bytes it takes.
///
/// # Errors
///
/// If the bytes are not one whole batch with a right crc, right counts and nothing left over inside.
pub fn decode(bytes: &[u8]) -> Result<(Batch, usize)> {
    let mut head = Cursor(bytes);
    let base_offset = head.i64()?;
    let length = head.i32()?;
    ensure!(length as usize >= HEADER - 12 && length > 0, "length {length} is less than a header");
    let size = 12 + length as usize;
    ensure!(size <= bytes.len(), "the batch has {size} bytes, the file {} more", bytes.len());
    let leader_epoch = head.i32()?;
    let magic = head.i8()?;
    ensure!(magic == 2, "magic {magic}, expected 2");
    let crc = head.i32()? as u32;
    let found = crc32c::crc32c(&bytes[21..size]);
    ensure!(crc == found, "crc {crc:#x}, and the bytes have {found:#x}");
    let attributes = head.i16()?;
    let last_delta = head.i32()?;
    let base_timestamp = head.i64()?;
    let max_timestamp = head.i64()?;
    let producer = (head.i64()?, head.i16()?, head.i32()?);
    let count = head.i32()?;
    ensure!(count > 0 && last_delta == count - 1, "{count} records, and the last delta is {last_delta}");
    ensure!(base_offset >= 0, "base offset {base_offset}");
    let Some(next_offset) = base_offset.checked_add(i64::from(count)) else {
        bail!("base offset {base_offset} and {count} records")
    };
    let unpacked;
    let body = match attributes & 7 {
        0 => &bytes[HEADER..size],
        3 => {
            unpacked = unpack(&bytes[HEADER..size])?;
            &unpacked
        }
        other => bail!("codec {other} is not read here"),
    };
    ensure!(count as usize <= body.len() / RECORD_MIN, "{count} records in {} bytes", body.len());
    let mut records = Vec::with_capacity(count as usize);
    let mut body = Cursor(body);
    for i in 0..count {
        let length = body.varint()?;
        ensure!(length >= 0, "record {i} has length {length}");
        let mut inside = Cursor(body.take(length as usize)?);
        inside.i8()?;
        let timestamp = base_timestamp.wrapping_add(inside.varint()?);
        let delta = inside.varint()?;
        ensure!(delta == i64::from(i), "record {i} has offset delta {delta}");
        let (key, value) = (inside.blob()?, inside.blob()?);
        let headers = inside.varint()?;
        ensure!((0..=inside.0.len() as i64).contains(&headers), "record {i} has {headers} headers");
        let headers = (0..headers).map(|_| {
            let Some(name) = inside.blob()? else { bail!("record {i} has a header without a name") };
            Ok((name, inside.blob()?))
        });
        let headers = headers.collect::<Result<_>>()?;
        ensure!(inside.0.is_empty(), "record {i} ends {} bytes early", inside.0.len());
        records.push(Record { offset: base_offset + i64::from(i), timestamp, key, value, headers });
    }
    ensure!(body.0.is_empty(), "{} bytes follow the last record", body.0.len());
    let newest = records.iter().map(|record| record.timestamp).max();
    ensure!(newest == Some(max_timestamp), "max timestamp {max_timestamp}, and the newest is {newest:?}");
    let transactional = attributes & 0x10 != 0;
    let marker = if attributes & 0x20 == 0 { None } else { Some(marker(&records, transactional)?) };
    if marker.is_some() {
        records.clear();
    }
    let batch = Batch { base_offset, next_offset, leader_epoch, producer, transactional, marker, records };
    Ok((batch, size))
}

fn marker(records: &[Record], transactional: bool) -> Result<Marker> {
    let [Record { key: Some(key), .. }] = records else { bail!("a control batch without its one record") };
    ensure!(transactional, "a control batch outside of any transaction");
    match key.as_slice() {
        [0, 0, 0, 0] => Ok(Marker::Abort),
        [0, 0, 0, 1] => Ok(Marker::Commit),
        other => bail!("a control record of kind {other:?}"),
    }
}

fn unpack(packed: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let mut frames = lz4_flex::frame::FrameDecoder::new(packed).take(UNPACKED_MAX + 1);
    frames.read_to_end(&mut out)?;
    ensure!(out.len() as u64 <= UNPACKED_MAX, "unpacks to more than {UNPACKED_MAX} bytes");
    Ok(out)
}

/// What is left to read.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let Some((taken, rest)) = self.0.split_at_checked(n) else {
            bail!("{n} bytes are needed and {} are left", self.0.len())
        };
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn i8(&mut self) -> Result<i8> {
        Ok(i8::from_be_bytes(self.array()?))
    }

    fn i16(&mut self) -> Result<i16> {
        Ok(i16::from_be_bytes(self.array()?))
    }

    fn i32(&mut self) -> Result<i32> {
        Ok(i32::from_be_bytes(self.array()?))
    }

    fn i64(&mut self) -> Result<i64> {
        Ok(i64::from_be_bytes(self.array()?))
    }

    /// A zigzag varint of at most 64 bits.
    fn varint(&mut self) -> Result<i64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok((value >> 1) as i64 ^ -((value & 1) as i64));
            }
        }
        bail!("a varint of more than ten bytes")
    }

    /// Bytes behind their length; -1 is none.
    fn blob(&mut self) -> Result<Option<Vec<u8>>> {
        match self.varint()? {
            -1 => Ok(None),
            n if n >= 0 => Ok(Some(self.take(n as usize)?.to_vec())),
            n => bail!("a field of length {n}"),
        }
    }
}

/// An encoder for the tests of the verifier; as plain as the decoder.
#[cfg(test)]
pub(super) mod build {
    use std::io::Write;

    /// A record: key, value, timestamp.
    pub(crate) type Made = (Option<Vec<u8>>, Option<Vec<u8>>, i64);

    /// What a batch is made from.
    #[derive(Clone)]
    pub(crate) struct Build {
        pub(crate) base_offset: i64,
        pub(crate) leader_epoch: i32,
        pub(crate) producer: (i64, i16, i32),
        pub(crate) attributes: i16,
        pub(crate) records: Vec<Made>,
    }

    impl Build {
        pub(crate) fn new(base_offset: i64, values: &[&str]) -> Self {
            let record = |value: &&str| (None, Some(value.as_bytes().to_vec()), 5);
            Build {
                base_offset,
                leader_epoch: 1,
                producer: (-1, -1, -1),
                attributes: 0,
                records: values.iter().map(record).collect(),
            }
        }

        /// A marker that ends a transaction.
        pub(crate) fn marker(base_offset: i64, producer: (i64, i16), commit: bool) -> Self {
            let key = vec![0, 0, 0, u8::from(commit)];
            Build {
                base_offset,
                leader_epoch: 1,
                producer: (producer.0, producer.1, -1),
                attributes: 0x30,
                records: vec![(Some(key), Some(vec![0; 6]), 5)],
            }
        }

        pub(crate) fn bytes(&self) -> Vec<u8> {
            let mut body = Vec::new();
            let first = self.records.first().map_or(0, |record| record.2);
            for (i, (key, value, timestamp)) in self.records.iter().enumerate() {
                let mut record = vec![0];
                varint(&mut record, timestamp - first);
                varint(&mut record, i as i64);
                for field in [key, value] {
                    varint(&mut record, field.as_ref().map_or(-1, |field| field.len() as i64));
                    record.extend(field.iter().flatten());
                }
                varint(&mut record, 0);
                varint(&mut body, record.len() as i64);
                body.extend(record);
            }
            if self.attributes & 7 == 3 {
                let mut frame = lz4_flex::frame::FrameEncoder::new(Vec::new());
                frame.write_all(&body).unwrap();
                body = frame.finish().unwrap();
            }
            let newest = self.records.iter().map(|record| record.2).max().unwrap_or(0);
            let count = self.records.len() as i32;
            let mut covered = Vec::new();
            covered.extend(self.attributes.to_be_bytes());
            covered.extend((count - 1).to_be_bytes());
            covered.extend(first.to_be_bytes());
            covered.extend(newest.to_be_bytes());
            covered.extend(self.producer.0.to_be_bytes());
            covered.extend(self.producer.1.to_be_bytes());
            covered.extend(self.producer.2.to_be_bytes());
            covered.extend(count.to_be_bytes());
            covered.extend(body);
            let mut out = Vec::new();
            out.extend(self.base_offset.to_be_bytes());
            out.extend((covered.len() as i32 + 9).to_be_bytes());
            out.extend(self.leader_epoch.to_be_bytes());
            out.push(2);
            out.extend(crc32c::crc32c(&covered).to_be_bytes());
            out.extend(covered);
            out
        }
    }

    fn varint(out: &mut Vec<u8>, value: i64) {
        let mut zigzag = ((value << 1) ^ (value >> 63)) as u64;
        while zigzag >= 0x80 {
            out.push(zigzag as u8 | 0x80);
            zigzag >>= 7;
        }
        out.push(zigzag as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::build::Build;
    use super::*;
    use crate::chaos::random::Random;

    fn sample(attributes: i16) -> Vec<u8> {
        let mut build = Build::new(7, &["one", "two", ""]);
        build.attributes = attributes;
        build.records[1].0 = Some(b"key".to_vec());
        build.records[1].2 = 900;
        build.bytes()
    }

    #[test]
    fn what_was_built_is_read() {
        for attributes in [0, 3] {
            let bytes = sample(attributes);
            let (batch, size) = decode(&[bytes.as_slice(), b"rest"].concat()).unwrap();
            assert_eq!(size, bytes.len());
            assert_eq!((batch.base_offset, batch.next_offset, batch.leader_epoch), (7, 10, 1));
            let [one, two, three] = batch.records.as_slice() else { panic!("{batch:?}") };
            assert_eq!((one.offset, one.value.as_deref()), (7, Some(b"one".as_slice())));
            assert_eq!((two.key.as_deref(), two.timestamp), (Some(b"key".as_slice()), 900));
            assert_eq!(three.value.as_deref(), Some(b"".as_slice()));
        }
    }

    /// A commit marker as Kafka's coordinator writes it (checked against the `kafka-protocol` crate in the log's tests).
    #[test]
    fn a_fixed_batch_is_read() {
        let hex = "0000000000000000000000420000000702820167a30030000000000000014d615574e00000014d615574e00000000000000fa00003\
                   ffffffff000000012000000008000000010c00000000000000";
        let bytes: Vec<u8> =
            (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
        let (batch, size) = decode(&bytes).unwrap();
        assert_eq!((size, batch.leader_epoch, batch.producer), (bytes.len(), 7, (4000, 3, -1)));
        assert_eq!(batch.marker, Some(Marker::Commit));
        let mut build = Build::marker(0, (4000, 3), true);
        (build.leader_epoch, build.records[0].2) = (7, 1_431_857_100_000);
        assert_eq!(build.bytes(), bytes, "the encoder of these tests writes the same");
    }

    #[test]
    fn markers_are_told_apart() {
        for (commit, marker) in [(true, Marker::Commit), (false, Marker::Abort)] {
            let (batch, _) = decode(&Build::marker(3, (9, 4), commit).bytes()).unwrap();
            assert_eq!((batch.marker, batch.producer), (Some(marker), (9, 4, -1)));
            assert!(batch.transactional && batch.records.is_empty());
        }
        let mut odd = Build::marker(3, (9, 4), true);
        odd.records[0].0 = Some(vec![0, 0, 0, 2]);
        assert!(decode(&odd.bytes()).unwrap_err().to_string().contains("kind"));
        odd.attributes = 0x20;
        assert!(decode(&odd.bytes()).unwrap_err().to_string().contains("outside"));
    }

    /// Every cut and every flipped bit is an error or, above the crc, at least no panic.
    #[test]
    fn hostile_bytes_are_errors() {
        for attributes in [0, 3] {
            let good = sample(attributes);
            for cut in 0..good.len() {
                assert!(decode(&good[..cut]).is_err(), "cut at {cut}");
            }
            for bit in 0..good.len() * 8 {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                let decoded = decode(&bad);
                // Base offset and leader epoch are not covered by the crc.
                assert!(decoded.is_err() || bit / 8 < 8 || (12..16).contains(&(bit / 8)), "bit {bit}");
            }
        }
    }

    /// Nonsense behind a right crc reaches the record decoder; it must not panic either.
    #[test]
    fn hostile_records_are_errors() {
        let mut random = Random::new(11);
        for attributes in [0i16, 3] {
            let good = sample(attributes);
            let mut refused = 0;
            for _ in 0..20_000 {
                let mut bad = good.clone();
                for _ in 0..1 + random.below(4) {
                    let at = 21 + random.below(good.len() as u64 - 21) as usize;
                    bad[at] = random.below(256) as u8;
                }
                let crc = crc32c::crc32c(&bad[21..]);
                bad[17..21].copy_from_slice(&crc.to_be_bytes());
                refused += u32::from(decode(&bad).is_err());
            }
            assert!(refused > 10_000, "{refused}");
        }
    }
}
