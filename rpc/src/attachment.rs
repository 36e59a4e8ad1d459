//! Bytes that travel beside the encoded arguments, never through the codec.

use bytes::Bytes;

/// Large bytes beside a request or an answer: record batches, files.
///
/// It is the last argument of a method, or the second half of a `(T, Attachment)` result. It has no
/// serde, so it cannot be nested in an argument. Sending writes the pieces as they are, in one
/// vectored write; a received attachment is one piece, cut from the read buffer without a copy, so it
/// keeps that buffer alive until dropped. An absent attachment and an empty one are the same.
#[derive(Clone, Default)]
pub struct Attachment {
    first: Bytes,
    rest: Vec<Bytes>,
}

impl Attachment {
    /// One piece.
    pub fn new(bytes: impl Into<Bytes>) -> Self {
        Self { first: bytes.into(), rest: Vec::new() }
    }

    /// Appends a piece; the receiver sees the pieces joined.
    pub fn push(&mut self, bytes: Bytes) {
        if bytes.is_empty() {
            return;
        }
        if self.first.is_empty() {
            self.first = bytes;
        } else {
            self.rest.push(bytes);
        }
    }

    /// All bytes together.
    pub fn len(&self) -> usize {
        self.first.len() + self.rest.iter().map(Bytes::len).sum::<usize>()
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.first.is_empty()
    }

    /// The pieces in order, none of them empty.
    pub fn pieces(&self) -> impl Iterator<Item = &Bytes> {
        std::iter::once(&self.first).filter(|piece| !piece.is_empty()).chain(&self.rest)
    }

    /// The whole as one `Bytes`; copies only where there are several pieces.
    pub fn into_bytes(self) -> Bytes {
        if self.rest.is_empty() {
            return self.first;
        }
        let mut joined = Vec::with_capacity(self.len());
        self.pieces().for_each(|piece| joined.extend_from_slice(piece));
        joined.into()
    }
}

impl From<Bytes> for Attachment {
    fn from(bytes: Bytes) -> Self {
        Self::new(bytes)
    }
}

impl From<Vec<u8>> for Attachment {
    fn from(bytes: Vec<u8>) -> Self {
        Self::new(bytes)
    }
}

impl FromIterator<Bytes> for Attachment {
    fn from_iter<I: IntoIterator<Item = Bytes>>(pieces: I) -> Self {
        let mut attachment = Self::default();
        pieces.into_iter().for_each(|piece| attachment.push(piece));
        attachment
    }
}

/// Equal bytes, however they are cut.
impl PartialEq for Attachment {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.pieces().flatten().eq(other.pieces().flatten())
    }
}

impl Eq for Attachment {}

impl std::fmt::Debug for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Attachment({} bytes in {} pieces)", self.len(), self.pieces().count())
    }
}
