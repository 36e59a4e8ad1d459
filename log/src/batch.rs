//! Record batches: Kafka's format v2, byte for byte. What a producer builds, a segment stores and a reader gets.
//!
//! ```text
//!  0  base offset        i64 ┐
//!  8  length             i32 │ bytes after this field
//! 12  leader epoch       i32 │ not covered by the crc: the log sets base offset and leader epoch in place, and
//! 16  magic = 2          i8  ┘ guards these 21 bytes with the `.headcrc` sidecar
//! 17  crc32c             u32   of everything from 21 to the end
//! 21  attributes         i16   bits 0-2 compression, 3 append time, 4 transactional, 5 control, 6 delete horizon
//! 23  last offset delta  i32
//! 27  base timestamp     i64   milliseconds; record timestamps are deltas to it (wrapping)
//! 35  max timestamp      i64
//! 43  producer id        i64   -1: none
//! 51  producer epoch     i16
//! 53  base sequence      i32
//! 57  record count       i32
//! 61  records, compressed as one block if at all:
//!       length varint · attributes i8 · timestamp delta varlong · offset delta varint
//!       key (length varint, -1 null) · value (the same) · header count varint · (key · value)*
//! ```
//!
//! All integers are big-endian, varints are zigzag. A control batch holds one record, the marker that ends a
//! transaction ([`control_batch`]).
//!
//! Invariants:
//!
//! * a decoder returns an error for every input that is not a batch, never panics, and allocates nothing for a
//!   declared length that the bytes at hand do not back; decompression stops at the caller's budget;
//! * [`verify`] accepts a batch only if size, crc and counts agree, so that its header can be trusted; the records
//!   inside are checked as they are read, and the last one must end where the batch ends;
//! * building allocates per batch, never per record.
//!
//! Left out: zstd (refused by name: there is no well-kept encoder without C), and formats v0 and v1, which no client has written since 2017.
//!
//! Sources: Kafka's `DefaultRecordBatch`, `DefaultRecord`, `EndTransactionMarker`; KIP-98.

mod build;
mod gzip;
mod lz4;
mod partition;
mod read;
mod snappy;
mod varint;

pub use build::{BatchBuilder, BatchOptions, Marker, ProducerStamp, RecordParts, control_batch};
pub use partition::{murmur2, partition_for_key};
pub use read::{Batches, HeaderRef, Headers, HeadersRef, OpenBatch, Record, RecordIter, RecordRef, Records};

/// Bytes of a batch before its first record.
pub const HEADER_BYTES: usize = 61;
/// Bytes at the front that the batch's crc does not cover: base offset, length, leader epoch, magic, and the crc.
pub const UNCOVERED_BYTES: usize = 21;
/// Bytes of the base offset and length fields, which the length does not count.
const PREFIX_BYTES: usize = 12;
/// The smallest record: its length and six more fields of one byte each.
const RECORD_BYTES_MIN: usize = 7;

const MAGIC: u8 = 2;
const COMPRESSION_MASK: i16 = 0x07;
const APPEND_TIME: i16 = 0x08;
const TRANSACTIONAL: i16 = 0x10;
const CONTROL: i16 = 0x20;

/// Why bytes are not a batch, or not one we read. Only [`BatchError::Unsupported`] and [`BatchError::Budget`] may
/// come from an intact batch; everything else is damage, or a client that does not speak the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// The bytes end before the batch does.
    #[error("batch is cut off: {have} of {need} bytes")]
    Truncated {
        /// Bytes the batch needs.
        need: usize,
        /// Bytes there are.
        have: usize,
    },
    /// Bytes follow the one batch that was expected.
    #[error("{extra} bytes follow the batch")]
    Trailing {
        /// How many.
        extra: usize,
    },
    /// Not format v2.
    #[error("batch has magic {0}, expected 2")]
    Magic(u8),
    /// A header field has a value that no batch can have.
    #[error("batch header has {field} {value}")]
    Field {
        /// The field's name.
        field: &'static str,
        /// What it holds.
        value: i64,
    },
    /// The crc32c differs.
    #[error("batch crc is {found:#010x}, expected {expected:#010x}")]
    Crc {
        /// What the batch says.
        expected: u32,
        /// What its bytes give.
        found: u32,
    },
    /// A codec this build does not read.
    #[error("batch is compressed with {0}, which is not supported (none, gzip, snappy and lz4 are)")]
    Unsupported(&'static str),
    /// The records would be larger than the caller allows.
    #[error("batch opens to more than {0} bytes")]
    Budget(usize),
    /// The compressed block is malformed.
    #[error("lz4 frame is malformed: {0}")]
    Lz4(&'static str),
    /// The compressed records are malformed.
    #[error("{0} data is malformed")]
    Compressed(&'static str),
    /// A record is malformed, or the records do not add up to what the header says.
    #[error("record {index} is malformed: {what}")]
    Record {
        /// Its place in the batch, from 0.
        index: u32,
        /// What is wrong.
        what: &'static str,
    },
}

/// How the records of a batch are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// gzip, as every HTTP library knows it.
    Gzip,
    /// Snappy blocks in the frame of xerial's library, as Kafka writes them.
    Snappy,
    /// LZ4 frames of independent 64 KiB blocks, as Kafka writes them.
    Lz4,
}

impl Compression {
    fn from_attributes(attributes: i16) -> Result<Self, BatchError> {
        match attributes & COMPRESSION_MASK {
            0 => Ok(Self::None),
            3 => Ok(Self::Lz4),
            1 => Ok(Self::Gzip),
            2 => Ok(Self::Snappy),
            4 => Err(BatchError::Unsupported("zstd")),
            other => Err(BatchError::Field { field: "compression", value: other.into() }),
        }
    }

    /// Appends `records` to `out`, compressed.
    fn compress(self, records: &[u8], out: &mut Vec<u8>) {
        match self {
            Self::None => out.extend_from_slice(records),
            Self::Gzip => gzip::compress(records, out),
            Self::Snappy => snappy::compress(records, out),
            Self::Lz4 => lz4::compress(records, out),
        }
    }

    fn bits(self) -> i16 {
        match self {
            Self::None => 0,
            Self::Gzip => 1,
            Self::Snappy => 2,
            Self::Lz4 => 3,
        }
    }
}

/// The fixed fields of a batch. Nothing is trusted yet when [`BatchHeader::parse`] returns one; after [`verify`] all
/// but the first 21 bytes are what was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    /// Offset of the first record.
    pub base_offset: i64,
    /// Bytes of the whole batch, header included.
    pub size: usize,
    /// Leader epoch under which the log stored it; -1 from a producer.
    pub leader_epoch: i32,
    /// crc32c of the bytes from 21 on.
    pub crc: u32,
    /// All attribute bits.
    pub attributes: i16,
    /// Codec of the records.
    pub compression: Compression,
    /// Offset of the last record (or of what was the last, once compacted) minus `base_offset`.
    pub last_offset_delta: i32,
    /// What record timestamps are relative to, in milliseconds.
    pub base_timestamp: i64,
    /// The largest record timestamp, in milliseconds.
    pub max_timestamp: i64,
    /// The idempotent or transactional producer; -1: none.
    pub producer_id: i64,
    /// Its epoch; -1: none.
    pub producer_epoch: i16,
    /// Sequence number of the first record; -1: none.
    pub base_sequence: i32,
    /// How many records there are.
    pub record_count: i32,
}

impl BatchHeader {
    /// Reads the header at the front of `bytes`, which may end before the batch does (see `size`).
    pub fn parse(bytes: &[u8]) -> Result<Self, BatchError> {
        let Some(head) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(BatchError::Truncated { need: HEADER_BYTES, have: bytes.len() });
        };
        if head[16] != MAGIC {
            return Err(BatchError::Magic(head[16]));
        }
        let length = i32::from_be_bytes(field(head, 8));
        let size = match usize::try_from(length) {
            Ok(n) if n >= HEADER_BYTES - PREFIX_BYTES => n + PREFIX_BYTES,
            _ => return Err(BatchError::Field { field: "length", value: length.into() }),
        };
        let base_offset = i64::from_be_bytes(field(head, 0));
        let last_offset_delta = i32::from_be_bytes(field(head, 23));
        if base_offset < 0
            || base_offset.checked_add(last_offset_delta.into()).is_none_or(|last| last == i64::MAX)
        {
            return Err(BatchError::Field { field: "base offset", value: base_offset });
        }
        let attributes = i16::from_be_bytes(field(head, 21));
        Ok(Self {
            base_offset,
            size,
            leader_epoch: i32::from_be_bytes(field(head, 12)),
            crc: u32::from_be_bytes(field(head, 17)),
            attributes,
            compression: Compression::from_attributes(attributes)?,
            last_offset_delta,
            base_timestamp: i64::from_be_bytes(field(head, 27)),
            max_timestamp: i64::from_be_bytes(field(head, 35)),
            producer_id: i64::from_be_bytes(field(head, 43)),
            producer_epoch: i16::from_be_bytes(field(head, 51)),
            base_sequence: i32::from_be_bytes(field(head, 53)),
            record_count: i32::from_be_bytes(field(head, 57)),
        })
    }

    /// True if the batch belongs to a transaction.
    pub fn is_transactional(&self) -> bool {
        self.attributes & TRANSACTIONAL != 0
    }

    /// True if the batch holds a marker, which readers skip.
    pub fn is_control(&self) -> bool {
        self.attributes & CONTROL != 0
    }

    /// True if every record has the time of its append, which is `max_timestamp`.
    pub fn is_append_time(&self) -> bool {
        self.attributes & APPEND_TIME != 0
    }

    /// Offset of the last record.
    pub fn last_offset(&self) -> i64 {
        self.base_offset + i64::from(self.last_offset_delta)
    }

    /// The offset after the batch.
    pub fn next_offset(&self) -> i64 {
        self.last_offset() + 1
    }

    /// Sequence number of the last record; sequences wrap from `i32::MAX` to 0. `None` without a producer.
    pub fn last_sequence(&self) -> Option<i32> {
        (self.base_sequence >= 0).then(|| advance_sequence(self.base_sequence, self.last_offset_delta))
    }

    fn check_counts(&self) -> Result<(), BatchError> {
        if self.last_offset_delta < 0 {
            return Err(BatchError::Field {
                field: "last offset delta",
                value: self.last_offset_delta.into(),
            });
        }
        let records = i64::from(self.record_count);
        let fits = match self.compression {
            Compression::None => {
                usize::try_from(records).is_ok_and(|n| n <= (self.size - HEADER_BYTES) / RECORD_BYTES_MIN)
            }
            Compression::Gzip | Compression::Snappy | Compression::Lz4 => true,
        };
        if records < 0 || records > i64::from(self.last_offset_delta) + 1 || !fits {
            return Err(BatchError::Field { field: "record count", value: records });
        }
        Ok(())
    }
}

/// The sequence number `by` records after `sequence`.
pub fn advance_sequence(sequence: i32, by: i32) -> i32 {
    sequence.wrapping_add(by) & i32::MAX
}

/// Checks that `bytes` are exactly one intact batch: sizes, crc32c, counts.
pub fn verify(bytes: &[u8]) -> Result<BatchHeader, BatchError> {
    let header = BatchHeader::parse(bytes)?;
    if bytes.len() < header.size {
        return Err(BatchError::Truncated { need: header.size, have: bytes.len() });
    }
    if bytes.len() > header.size {
        return Err(BatchError::Trailing { extra: bytes.len() - header.size });
    }
    let found = crc32c::crc32c(&bytes[UNCOVERED_BYTES..]);
    if found != header.crc {
        return Err(BatchError::Crc { expected: header.crc, found });
    }
    header.check_counts()?;
    Ok(header)
}

/// [`verify`], and what the log asks of a batch that a producer sends: at least one record, an offset for each, no
/// marker, and a producer id, epoch and sequence that are all there or all absent.
pub fn verify_produced(bytes: &[u8]) -> Result<BatchHeader, BatchError> {
    let header = verify(bytes)?;
    if header.record_count != header.last_offset_delta + 1 {
        return Err(BatchError::Field { field: "record count", value: header.record_count.into() });
    }
    if header.is_control() {
        return Err(BatchError::Field { field: "attributes", value: header.attributes.into() });
    }
    if header.producer_id >= 0 {
        if header.producer_epoch < 0 {
            return Err(BatchError::Field { field: "producer epoch", value: header.producer_epoch.into() });
        }
        if header.base_sequence < 0 {
            return Err(BatchError::Field { field: "base sequence", value: header.base_sequence.into() });
        }
    } else if header.producer_id != -1 || header.is_transactional() {
        return Err(BatchError::Field { field: "producer id", value: header.producer_id });
    }
    Ok(header)
}

/// Gives a batch its place: sets base offset and leader epoch, which the crc leaves out.
///
/// # Panics
///
/// If `batch` is shorter than a header.
pub fn set_position(batch: &mut [u8], base_offset: i64, leader_epoch: i32) {
    batch[..8].copy_from_slice(&base_offset.to_be_bytes());
    batch[12..16].copy_from_slice(&leader_epoch.to_be_bytes());
}

/// Gives a batch another producer: sets id, epoch and sequence, and the crc, which covers them.
///
/// ```
/// use tidemill_log::batch::{BatchBuilder, BatchOptions, ProducerStamp, RecordParts, set_producer, verify};
///
/// let mut builder = BatchBuilder::new(BatchOptions::default());
/// assert!(builder.push(RecordParts { value: Some(b"hello"), ..Default::default() }));
/// let mut batch = Vec::from(builder.build(ProducerStamp { id: 1, epoch: 5, sequence: 60 }));
/// set_producer(&mut batch, ProducerStamp { id: 2, epoch: 0, sequence: 3 });
/// let header = verify(&batch).unwrap();
/// assert_eq!((header.producer_id, header.producer_epoch, header.base_sequence), (2, 0, 3));
/// ```
///
/// # Panics
///
/// If `batch` is shorter than a header.
pub fn set_producer(batch: &mut [u8], producer: ProducerStamp) {
    batch[43..51].copy_from_slice(&producer.id.to_be_bytes());
    batch[51..53].copy_from_slice(&producer.epoch.to_be_bytes());
    batch[53..57].copy_from_slice(&producer.sequence.to_be_bytes());
    let crc = crc32c::crc32c(&batch[UNCOVERED_BYTES..]);
    batch[17..21].copy_from_slice(&crc.to_be_bytes());
}

/// The `N` bytes at `at`.
fn field<const N: usize>(head: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&head[at..at + N]);
    out
}
