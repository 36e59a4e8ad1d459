//! Records on their way in and out. Both directions avoid a heap allocation per record.
//!
//! In: a [`RecordBatch`] is one fetched batch: the (decompressed) buffer, and per record its offset, timestamp and
//! the ranges of key and value in that buffer. Rows refer to their record by its index, so late rows and dead letters
//! cost nothing until they occur; only then are key and value sliced out of the buffer (counted, not copied).
//!
//! Out: an [`OutRecord`] owns counted slices, either of a fetched batch or of the buffer in which a sink encoded a
//! whole batch of rows.

use bytes::Bytes;

/// A record's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its name.
    pub name: Bytes,
    /// Its value; a header may have none.
    pub value: Option<Bytes>,
}

/// A range of a batch's buffer, or null.
#[derive(Clone, Copy, Debug)]
struct Span {
    at: u32,
    len: u32,
}

const NULL: Span = Span { at: 0, len: u32::MAX };

#[derive(Clone, Copy, Debug)]
struct Row {
    offset: i64,
    timestamp: i64,
    key: Span,
    value: Span,
}

/// One fetched batch of records. See the head of this file.
#[derive(Clone, Debug, Default)]
pub struct RecordBatch {
    bytes: Bytes,
    rows: Vec<Row>,
    /// Headers by row, only of rows that have some, in row order.
    headers: Vec<(u32, Vec<Header>)>,
}

impl RecordBatch {
    /// An empty batch over a buffer that holds its records' keys and values. At most 4 GiB.
    pub fn over(bytes: Bytes) -> Self {
        assert!(u32::try_from(bytes.len()).is_ok(), "a batch of {} bytes", bytes.len());
        Self { bytes, rows: Vec::new(), headers: Vec::new() }
    }

    /// Makes room for this many further records.
    pub fn reserve(&mut self, records: usize) {
        self.rows.reserve(records);
    }

    /// Adds a record. `key` and `value` are slices of the batch's own buffer.
    ///
    /// # Panics
    ///
    /// If they are not.
    #[inline]
    pub fn push(&mut self, offset: i64, timestamp: i64, key: Option<&[u8]>, value: Option<&[u8]>) {
        let row = Row { offset, timestamp, key: self.span(key), value: self.span(value) };
        self.rows.push(row);
    }

    /// Gives headers to the record that was added last.
    pub fn set_headers(&mut self, headers: Vec<Header>) {
        if let Some(last) = self.rows.len().checked_sub(1).filter(|_| !headers.is_empty()) {
            self.headers.push((last as u32, headers));
        }
    }

    #[inline]
    fn span(&self, part: Option<&[u8]>) -> Span {
        match part {
            None => NULL,
            Some([]) => Span { at: 0, len: 0 },
            Some(part) => {
                let at = (part.as_ptr() as usize).checked_sub(self.bytes.as_ptr() as usize);
                let at = at.filter(|at| at + part.len() <= self.bytes.len());
                Span {
                    at: at.expect("key and value are slices of the batch's own buffer") as u32,
                    len: part.len() as u32,
                }
            }
        }
    }

    /// A batch made of copies of the given records, at consecutive offsets from `base_offset`.
    pub fn copied<'a>(base_offset: i64, records: impl IntoIterator<Item = RecordParts<'a>>) -> Self {
        let mut bytes = Vec::new();
        let mut batch = Self::default();
        for (i, record) in records.into_iter().enumerate() {
            let mut copy = |part: Option<&[u8]>| match part {
                None => NULL,
                Some(part) => {
                    let at = bytes.len() as u32;
                    bytes.extend_from_slice(part);
                    Span { at, len: part.len() as u32 }
                }
            };
            let (key, value) = (copy(record.key), copy(record.value));
            if !record.headers.is_empty() {
                batch.headers.push((i as u32, record.headers.to_vec()));
            }
            let offset = base_offset + i as i64;
            batch.rows.push(Row { offset, timestamp: record.timestamp, key, value });
        }
        batch.bytes = Bytes::from(bytes);
        batch
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// True if there are no records.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// About the memory it holds.
    pub fn bytes(&self) -> usize {
        self.bytes.len() + self.rows.len() * size_of::<Row>()
    }

    /// Offset of the record at `index`.
    pub fn offset(&self, index: usize) -> i64 {
        self.rows[index].offset
    }

    /// The record at `index`, borrowed.
    #[inline]
    pub fn record(&self, index: usize) -> RecordRef<'_> {
        RecordRef { batch: self, row: &self.rows[index], index }
    }

    /// Drops the records before the first with an offset of at least `from`, and those from `until` on.
    pub fn cut(&mut self, from: i64, until: i64) {
        let first = self.rows.partition_point(|r| r.offset < from);
        let end = self.rows.partition_point(|r| r.offset < until).max(first);
        if first > 0 || end < self.rows.len() {
            self.rows.truncate(end);
            self.rows.drain(..first);
            self.headers.retain_mut(|(row, _)| {
                let keep = (first..end).contains(&(*row as usize));
                *row = row.wrapping_sub(first as u32);
                keep
            });
        }
    }

    /// The record at `index` as a batch of its own, over the same bytes.
    pub(crate) fn only(&self, index: usize) -> Self {
        let headers = self.record(index).headers();
        let own = if headers.is_empty() { Vec::new() } else { vec![(0, headers.to_vec())] };
        Self { bytes: self.bytes.clone(), rows: vec![self.rows[index]], headers: own }
    }

    #[inline]
    fn slice(&self, span: Span) -> Option<&[u8]> {
        (span.len != NULL.len).then(|| &self.bytes[span.at as usize..][..span.len as usize])
    }

    fn counted(&self, span: Span) -> Option<Bytes> {
        (span.len != NULL.len).then(|| self.bytes.slice(span.at as usize..(span.at + span.len) as usize))
    }
}

/// One record of a [`RecordBatch`].
#[derive(Clone, Copy, Debug)]
pub struct RecordRef<'a> {
    batch: &'a RecordBatch,
    row: &'a Row,
    index: usize,
}

impl<'a> RecordRef<'a> {
    /// Its offset.
    pub fn offset(&self) -> i64 {
        self.row.offset
    }

    /// Its timestamp, milliseconds since the epoch.
    #[inline]
    pub fn timestamp(&self) -> i64 {
        self.row.timestamp
    }

    /// Its key.
    #[inline]
    pub fn key(&self) -> Option<&'a [u8]> {
        self.batch.slice(self.row.key)
    }

    /// Its value.
    #[inline]
    pub fn value(&self) -> Option<&'a [u8]> {
        self.batch.slice(self.row.value)
    }

    /// Its headers.
    pub fn headers(&self) -> &'a [Header] {
        let found = self.batch.headers.binary_search_by_key(&(self.index as u32), |(row, _)| *row);
        found.map_or(&[], |at| &self.batch.headers[at].1)
    }

    /// The same record for the way out: counted slices of the batch, nothing is copied.
    pub fn to_out(&self) -> OutRecord {
        OutRecord {
            timestamp: self.row.timestamp,
            key: self.batch.counted(self.row.key),
            value: self.batch.counted(self.row.value),
            headers: self.headers().to_vec(),
        }
    }
}

/// A record as a sink hands it to a producer: borrowed parts.
#[derive(Clone, Copy, Debug, Default)]
pub struct RecordParts<'a> {
    /// Milliseconds since the epoch.
    pub timestamp: i64,
    /// Its key.
    pub key: Option<&'a [u8]>,
    /// Its value. In a compacted topic an empty or absent one is a delete.
    pub value: Option<&'a [u8]>,
    /// Its headers.
    pub headers: &'a [Header],
}

/// A record that leaves the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutRecord {
    /// Milliseconds since the epoch.
    pub timestamp: i64,
    /// Its key.
    pub key: Option<Bytes>,
    /// Its value.
    pub value: Option<Bytes>,
    /// Its headers.
    pub headers: Vec<Header>,
}

impl OutRecord {
    /// Borrowed parts.
    pub fn parts(&self) -> RecordParts<'_> {
        RecordParts {
            timestamp: self.timestamp,
            key: self.key.as_deref(),
            value: self.value.as_deref(),
            headers: &self.headers,
        }
    }

    /// About the memory it holds.
    pub fn bytes(&self) -> usize {
        let headers: usize =
            self.headers.iter().map(|h| h.name.len() + h.value.as_ref().map_or(0, Bytes::len)).sum();
        size_of::<Self>()
            + self.key.as_ref().map_or(0, Bytes::len)
            + self.value.as_ref().map_or(0, Bytes::len)
            + headers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_gives_back_its_records_and_cuts_by_offset() {
        let header = Header { name: Bytes::from_static(b"h"), value: None };
        let headers = [header];
        let parts = |key, value, headers| RecordParts { timestamp: 7, key, value, headers };
        let mut batch = RecordBatch::copied(
            10,
            [
                parts(None, Some(&b"a"[..]), &[][..]),
                parts(Some(&b"k"[..]), None, &headers[..]),
                parts(Some(&b""[..]), Some(&b"c"[..]), &headers[..]),
            ],
        );
        assert_eq!(batch.record(1).key(), Some(&b"k"[..]));
        assert_eq!(batch.record(1).value(), None);
        assert_eq!(batch.record(2).key(), Some(&b""[..]));
        assert_eq!((batch.record(0).headers().len(), batch.record(1).headers().len()), (0, 1));
        let second = batch.only(1);
        assert_eq!((second.len(), second.offset(0)), (1, 11));
        assert_eq!(second.record(0).to_out(), batch.record(1).to_out());
        batch.cut(11, 12);
        assert_eq!((batch.len(), batch.offset(0)), (1, 11));
        assert_eq!(batch.record(0).headers(), &headers);
        assert_eq!(batch.record(0).to_out().key.as_deref(), Some(&b"k"[..]));
    }

    #[test]
    fn slices_of_the_buffer_become_ranges() {
        let bytes = Bytes::from_static(b"keyvalue");
        let mut batch = RecordBatch::over(bytes.clone());
        batch.push(0, 1, Some(&bytes[..3]), Some(&bytes[3..]));
        batch.push(1, 1, None, Some(&bytes[8..]));
        assert_eq!(batch.record(0).value(), Some(&b"value"[..]));
        assert_eq!(batch.record(1).value(), Some(&b""[..]));
    }
}
