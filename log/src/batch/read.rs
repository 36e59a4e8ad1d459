//! Reading batches: splitting what a fetch returned, opening a batch, walking its records.
//!
//! ```text
//! fetched Bytes ── Batches ──▶ one batch (Bytes) ── OpenBatch ──▶ iter():    RecordRef<'_>, borrows
//!                                                               └▶ records(): Record, slices of the same buffer
//! ```
//!
//! Where the batch is not compressed, an owned record's key and value are slices of the fetched buffer: they keep all
//! of it alive, so what lives longer than its batch should be copied.

use std::borrow::Cow;

use bytes::Bytes;

use super::{BatchError, BatchHeader, Compression, HEADER_BYTES, gzip, lz4, snappy, varint, verify};

/// Splits a buffer into its batches without looking inside them. A batch that is cut off at the end of the buffer is
/// an error; a log never returns half a batch.
#[derive(Debug, Clone)]
pub struct Batches {
    rest: Bytes,
}

impl Batches {
    /// The batches of `bytes`.
    pub fn new(bytes: Bytes) -> Self {
        Self { rest: bytes }
    }
}

impl Iterator for Batches {
    type Item = Result<(BatchHeader, Bytes), BatchError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let have = self.rest.len();
        match BatchHeader::parse(&self.rest) {
            Ok(header) if header.size <= have => Some(Ok((header, self.rest.split_to(header.size)))),
            failed => {
                self.rest.clear();
                Some(Err(failed.map_or_else(|e| e, |h| BatchError::Truncated { need: h.size, have })))
            }
        }
    }
}

/// A verified batch with its records uncompressed.
#[derive(Debug, Clone)]
pub struct OpenBatch {
    header: BatchHeader,
    payload: Bytes,
}

impl OpenBatch {
    /// Verifies the one batch in `batch` and uncompresses its records, up to `budget` bytes of them.
    pub fn open(batch: &Bytes, budget: usize) -> Result<Self, BatchError> {
        let header = verify(batch)?;
        Self::open_verified(batch, header, budget)
    }

    /// The same for a batch that [`verify`] accepted before, with the header it returned.
    pub fn open_verified(batch: &Bytes, header: BatchHeader, budget: usize) -> Result<Self, BatchError> {
        let payload = match header.compression {
            Compression::None if batch.len() - HEADER_BYTES > budget => {
                return Err(BatchError::Budget(budget));
            }
            Compression::None => batch.slice(HEADER_BYTES..),
            Compression::Gzip => gzip::decompress(&batch[HEADER_BYTES..], budget)?.into(),
            Compression::Snappy => snappy::decompress(&batch[HEADER_BYTES..], budget)?.into(),
            Compression::Lz4 => lz4::decompress(&batch[HEADER_BYTES..], budget)?.into(),
        };
        Ok(Self { header, payload })
    }

    /// The batch's header.
    pub fn header(&self) -> &BatchHeader {
        &self.header
    }

    /// The buffer of which all keys and values are slices: the uncompressed records.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// The records, borrowed. After an error the iterator ends.
    pub fn iter(&self) -> RecordIter<'_> {
        RecordIter { walk: Walk::new(&self.header), header: &self.header, rest: &self.payload }
    }

    /// The records as slices of the buffer. After an error the iterator ends.
    pub fn records(&self) -> Records {
        Records { walk: Walk::new(&self.header), at: 0, batch: self.clone() }
    }
}

impl<'a> IntoIterator for &'a OpenBatch {
    type Item = Result<RecordRef<'a>, BatchError>;
    type IntoIter = RecordIter<'a>;
    fn into_iter(self) -> RecordIter<'a> {
        self.iter()
    }
}

/// One record, borrowed from its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordRef<'a> {
    /// Its offset in the partition.
    pub offset: i64,
    /// Milliseconds since the epoch.
    pub timestamp: i64,
    /// The key.
    pub key: Option<&'a [u8]>,
    /// The value.
    pub value: Option<&'a [u8]>,
    /// Names and values, in order.
    pub headers: HeadersRef<'a>,
}

/// One record whose parts are slices of the fetched buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its offset in the partition.
    pub offset: i64,
    /// Milliseconds since the epoch.
    pub timestamp: i64,
    /// The key.
    pub key: Option<Bytes>,
    /// The value.
    pub value: Option<Bytes>,
    /// Names and values, in order.
    pub headers: Headers,
}

/// The headers of a borrowed record. They were checked when the record was read; names may repeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HeadersRef<'a> {
    count: usize,
    bytes: &'a [u8],
}

/// One header. Kafka's names are UTF-8, but nothing on the way checks it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeaderRef<'a> {
    /// The name's bytes.
    pub key: &'a [u8],
    /// The value.
    pub value: Option<&'a [u8]>,
}

impl<'a> HeaderRef<'a> {
    /// The name as text, with U+FFFD for what is not UTF-8.
    pub fn name(&self) -> Cow<'a, str> {
        String::from_utf8_lossy(self.key)
    }
}

impl<'a> HeadersRef<'a> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// In order.
    pub fn iter(&self) -> impl Iterator<Item = HeaderRef<'a>> + use<'a> {
        let mut rest = self.bytes;
        std::iter::from_fn(move || if rest.is_empty() { None } else { take_header(&mut rest).ok() })
    }
}

/// The headers of an owned record, still encoded.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Headers {
    count: usize,
    bytes: Bytes,
}

impl Headers {
    /// The same, borrowed.
    pub fn as_ref(&self) -> HeadersRef<'_> {
        HeadersRef { count: self.count, bytes: &self.bytes }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// In order.
    pub fn iter(&self) -> impl Iterator<Item = HeaderRef<'_>> {
        self.as_ref().iter()
    }
}

/// Borrowing iterator over the records of a batch.
#[derive(Debug, Clone)]
pub struct RecordIter<'a> {
    walk: Walk,
    header: &'a BatchHeader,
    rest: &'a [u8],
}

impl<'a> Iterator for RecordIter<'a> {
    type Item = Result<RecordRef<'a>, BatchError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        self.walk.next(self.header, &mut self.rest)
    }
}

/// Owning iterator over the records of a batch.
#[derive(Debug, Clone)]
pub struct Records {
    walk: Walk,
    at: usize,
    batch: OpenBatch,
}

impl Iterator for Records {
    type Item = Result<Record, BatchError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let payload = &self.batch.payload;
        let mut rest = &payload[self.at..];
        let item = self.walk.next(&self.batch.header, &mut rest)?;
        self.at = payload.len() - rest.len();
        Some(item.map(|record| Record {
            offset: record.offset,
            timestamp: record.timestamp,
            key: record.key.map(|key| payload.slice_ref(key)),
            value: record.value.map(|value| payload.slice_ref(value)),
            headers: match record.headers.count {
                0 => Headers::default(),
                count => Headers { count, bytes: payload.slice_ref(record.headers.bytes) },
            },
        }))
    }
}

/// Where a walk over the records of a batch is.
#[derive(Debug, Clone)]
struct Walk {
    index: u32,
    /// Records still to come, -1 once the end was checked or an error returned.
    left: i32,
    /// Offset deltas ascend; the next one is at least this.
    next_delta: i32,
}

impl Walk {
    fn new(header: &BatchHeader) -> Self {
        Self { index: 0, left: header.record_count, next_delta: 0 }
    }

    #[inline]
    fn next<'a>(
        &mut self,
        header: &BatchHeader,
        rest: &mut &'a [u8],
    ) -> Option<Result<RecordRef<'a>, BatchError>> {
        if self.left <= 0 {
            let trailing = self.left == 0 && !rest.is_empty();
            self.left = -1;
            let index = self.index;
            return trailing
                .then_some(Err(BatchError::Record { index, what: "bytes follow the last record" }));
        }
        match self.take(header, rest) {
            Ok(record) => {
                self.left -= 1;
                self.index += 1;
                Some(Ok(record))
            }
            Err(what) => {
                self.left = -1;
                Some(Err(BatchError::Record { index: self.index, what }))
            }
        }
    }

    #[inline]
    fn take<'a>(&mut self, header: &BatchHeader, rest: &mut &'a [u8]) -> Result<RecordRef<'a>, &'static str> {
        let length = varint::take_int(rest).ok_or("no length")?;
        let length = usize::try_from(length).map_err(|_| "negative length")?;
        let (mut body, after) = rest.split_at_checked(length).ok_or("longer than the batch")?;
        let body = &mut body;
        body.split_off_first().ok_or("no attributes")?;
        let timestamp_delta = varint::take_long(body).ok_or("no timestamp")?;
        let delta = varint::take_int(body).ok_or("no offset")?;
        if delta < self.next_delta || delta > header.last_offset_delta {
            return Err("offset out of order");
        }
        let key = take_blob(body)?;
        let value = take_blob(body)?;
        let count = varint::take_int(body).ok_or("no header count")?;
        let count = usize::try_from(count).map_err(|_| "negative header count")?;
        let headers = HeadersRef { count, bytes: body };
        for _ in 0..count {
            take_header(body)?;
        }
        if !body.is_empty() {
            return Err("bytes after the headers");
        }
        *rest = after;
        self.next_delta = delta.saturating_add(1);
        Ok(RecordRef {
            offset: header.base_offset + i64::from(delta),
            timestamp: match header.is_append_time() {
                true => header.max_timestamp,
                false => header.base_timestamp.wrapping_add(timestamp_delta),
            },
            key,
            value,
            headers,
        })
    }
}

#[inline]
fn take_blob<'a>(body: &mut &'a [u8]) -> Result<Option<&'a [u8]>, &'static str> {
    let length = varint::take_int(body).ok_or("no field length")?;
    if length == -1 {
        return Ok(None);
    }
    let length = usize::try_from(length).map_err(|_| "negative field length")?;
    Ok(Some(body.split_off(..length).ok_or("field longer than the record")?))
}

#[inline]
fn take_header<'a>(body: &mut &'a [u8]) -> Result<HeaderRef<'a>, &'static str> {
    let key = take_blob(body)?.ok_or("header without a name")?;
    Ok(HeaderRef { key, value: take_blob(body)? })
}
