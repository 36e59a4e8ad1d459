//! Building batches: records go straight into one buffer behind room for the header.

use bytes::{BufMut, Bytes};

use super::{
    CONTROL, Compression, HEADER_BYTES, MAGIC, PREFIX_BYTES, TRANSACTIONAL, UNCOVERED_BYTES, varint,
};

/// What a batch says about its producer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProducerStamp {
    /// Producer id.
    pub id: i64,
    /// Producer epoch.
    pub epoch: i16,
    /// Sequence number of the first record.
    pub sequence: i32,
}

impl ProducerStamp {
    /// No producer: what is appended cannot be recognised when it comes twice.
    pub const NONE: Self = Self { id: -1, epoch: -1, sequence: -1 };
}

/// How a batch is built.
#[derive(Debug, Clone, Copy)]
pub struct BatchOptions {
    /// Codec of the records.
    pub compression: Compression,
    /// True if the batch belongs to a transaction.
    pub transactional: bool,
    /// The most bytes the batch may have before compression, header included.
    pub bytes_max: usize,
}

impl Default for BatchOptions {
    /// Uncompressed, not transactional, at most 1 MiB.
    fn default() -> Self {
        Self { compression: Compression::None, transactional: false, bytes_max: 1 << 20 }
    }
}

/// The parts of one record to be written.
#[derive(Debug, Clone, Copy, Default)]
pub struct RecordParts<'a> {
    /// Milliseconds since the epoch.
    pub timestamp: i64,
    /// The key.
    pub key: Option<&'a [u8]>,
    /// The value.
    pub value: Option<&'a [u8]>,
    /// Names and values, in order; names may repeat.
    pub headers: &'a [(&'a str, Option<&'a [u8]>)],
}

/// Builds batches, one after the other, without allocating per record.
///
/// ```
/// use tidemill_log::batch::{BatchBuilder, BatchOptions, ProducerStamp, RecordParts, verify};
///
/// let mut builder = BatchBuilder::new(BatchOptions::default());
/// assert!(builder.push(RecordParts { timestamp: 7, value: Some(b"hello"), ..Default::default() }));
/// let batch = builder.build(ProducerStamp { id: 1, epoch: 0, sequence: 0 });
/// assert_eq!(verify(&batch).unwrap().record_count, 1);
/// ```
#[derive(Debug)]
pub struct BatchBuilder {
    options: BatchOptions,
    /// Room for the header, then the records.
    buf: Vec<u8>,
    count: i32,
    base_timestamp: i64,
    max_timestamp: i64,
}

impl BatchBuilder {
    /// A builder with nothing in it.
    pub fn new(options: BatchOptions) -> Self {
        Self { options, buf: vec![0; HEADER_BYTES], count: 0, base_timestamp: -1, max_timestamp: -1 }
    }

    /// Adds a record, or returns false and adds nothing where the batch would exceed its bytes. A record that an empty
    /// builder refuses fits no batch.
    #[must_use]
    pub fn push(&mut self, record: RecordParts<'_>) -> bool {
        let base_timestamp = if self.count == 0 { record.timestamp } else { self.base_timestamp };
        // Wrapping, as Kafka's Java does: the reader wraps back, so that times at the limits survive.
        let timestamp_delta = record.timestamp.wrapping_sub(base_timestamp);
        let body = body_bytes(timestamp_delta, self.count, &record);
        let room = self.options.bytes_max.min(i32::MAX as usize);
        if self.count == i32::MAX || self.buf.len() + body + varint::size(body as i64) > room {
            return false;
        }
        put_record(&mut self.buf, body, timestamp_delta, self.count, &record);
        self.base_timestamp = base_timestamp;
        self.max_timestamp =
            if self.count == 0 { record.timestamp } else { self.max_timestamp.max(record.timestamp) };
        self.count += 1;
        true
    }

    /// Records added.
    pub fn count(&self) -> usize {
        self.count as usize // counts up from 0
    }

    /// True if nothing was added.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes of the batch so far, before compression.
    pub fn bytes(&self) -> usize {
        self.buf.len()
    }

    /// The options it was made with.
    pub fn options(&self) -> BatchOptions {
        self.options
    }

    /// Finishes the batch and empties the builder. Base offset is 0 and leader epoch -1 until the log sets them.
    ///
    /// # Panics
    ///
    /// If nothing was added.
    pub fn build(&mut self, producer: ProducerStamp) -> Bytes {
        assert!(self.count > 0, "a batch has at least one record");
        let transactional = if self.options.transactional { TRANSACTIONAL } else { 0 };
        let head = Head {
            attributes: self.options.compression.bits() | transactional,
            count: self.count,
            base_timestamp: self.base_timestamp,
            max_timestamp: self.max_timestamp,
            producer,
            leader_epoch: -1,
        };
        self.count = 0;
        let batch = match self.options.compression {
            Compression::None => {
                let next = Vec::with_capacity(self.buf.len().min(self.options.bytes_max));
                std::mem::replace(&mut self.buf, next)
            }
            codec => {
                let mut packed = Vec::with_capacity(HEADER_BYTES + self.buf.len() / 2);
                packed.resize(HEADER_BYTES, 0);
                codec.compress(&self.buf[HEADER_BYTES..], &mut packed);
                packed
            }
        };
        self.buf.clear();
        self.buf.resize(HEADER_BYTES, 0);
        seal(batch, &head)
    }
}

/// The batch that ends a transaction in one partition, as Kafka's coordinator writes it: one record whose key is
/// (version 0, 0 abort or 1 commit) and whose value is (version 0, coordinator epoch).
pub fn control_batch(
    marker: Marker,
    producer_id: i64,
    producer_epoch: i16,
    timestamp: i64,
    leader_epoch: i32,
) -> Bytes {
    let key = marker.key();
    let value = [0, 0, 0, 0, 0, 0]; // version 0, coordinator epoch 0: one process is the coordinator for ever
    let record = RecordParts { timestamp, key: Some(&key), value: Some(&value), headers: &[] };
    let mut batch = Vec::with_capacity(HEADER_BYTES + 24);
    batch.resize(HEADER_BYTES, 0);
    put_record(&mut batch, body_bytes(0, 0, &record), 0, 0, &record);
    let producer = ProducerStamp { id: producer_id, epoch: producer_epoch, sequence: -1 };
    let head = Head {
        attributes: TRANSACTIONAL | CONTROL,
        count: 1,
        base_timestamp: timestamp,
        max_timestamp: timestamp,
        producer,
        leader_epoch,
    };
    seal(batch, &head)
}

/// How a transaction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Marker {
    /// Its records do not exist for a read-committed reader.
    Abort,
    /// Its records are there.
    Commit,
}

impl Marker {
    fn key(self) -> [u8; 4] {
        [0, 0, 0, self as u8]
    }

    /// Reads the key of a control record; `None` for kinds other than the two ends of a transaction.
    pub fn from_key(key: &[u8]) -> Option<Self> {
        // A later version may append fields; the kind stays where it is.
        match key.first_chunk::<4>()?[2..] {
            [0, 0] => Some(Self::Abort),
            [0, 1] => Some(Self::Commit),
            _ => None,
        }
    }
}

struct Head {
    attributes: i16,
    count: i32,
    base_timestamp: i64,
    max_timestamp: i64,
    producer: ProducerStamp,
    leader_epoch: i32,
}

/// Bytes of a record after its length.
fn body_bytes(timestamp_delta: i64, offset_delta: i32, record: &RecordParts<'_>) -> usize {
    let blob = |bytes: Option<&[u8]>| match bytes {
        Some(bytes) => varint::size(bytes.len() as i64) + bytes.len(),
        None => 1,
    };
    let headers: usize =
        record.headers.iter().map(|(name, value)| blob(Some(name.as_bytes())) + blob(*value)).sum();
    1 + varint::size(timestamp_delta)
        + varint::size(offset_delta.into())
        + blob(record.key)
        + blob(record.value)
        + varint::size(record.headers.len() as i64)
        + headers
}

fn put_record(
    out: &mut Vec<u8>,
    body: usize,
    timestamp_delta: i64,
    offset_delta: i32,
    record: &RecordParts<'_>,
) {
    let blob = |out: &mut Vec<u8>, bytes: Option<&[u8]>| match bytes {
        Some(bytes) => {
            varint::put(out, bytes.len() as i64);
            out.extend_from_slice(bytes);
        }
        None => varint::put(out, -1),
    };
    varint::put(out, body as i64);
    let start = out.len();
    out.push(0); // attributes: none are defined
    varint::put(out, timestamp_delta);
    varint::put(out, offset_delta.into());
    blob(out, record.key);
    blob(out, record.value);
    varint::put(out, record.headers.len() as i64);
    for (name, value) in record.headers {
        blob(out, Some(name.as_bytes()));
        blob(out, *value);
    }
    debug_assert_eq!(out.len() - start, body, "the size foretold");
}

/// Writes the header in front of the records and the crc over them.
fn seal(mut batch: Vec<u8>, head: &Head) -> Bytes {
    let length = i32::try_from(batch.len() - PREFIX_BYTES).expect("push keeps batches below 2 GiB");
    let mut out = &mut batch[..HEADER_BYTES];
    out.put_i64(0);
    out.put_i32(length);
    out.put_i32(head.leader_epoch);
    out.put_u8(MAGIC);
    out.put_u32(0);
    out.put_i16(head.attributes);
    out.put_i32(head.count - 1);
    out.put_i64(head.base_timestamp);
    out.put_i64(head.max_timestamp);
    out.put_i64(head.producer.id);
    out.put_i16(head.producer.epoch);
    out.put_i32(head.producer.sequence);
    out.put_i32(head.count);
    let crc = crc32c::crc32c(&batch[UNCOVERED_BYTES..]);
    batch[17..UNCOVERED_BYTES].copy_from_slice(&crc.to_be_bytes());
    Bytes::from(batch)
}
