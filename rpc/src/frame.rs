//! Frames: a 36-byte little-endian header, then metadata, body and attachment (docs/wire.md, F1).
//!
//! ```text
//!  0 length u32      of what follows these four bytes
//!  4 kind u8         HELLO REQ RESP ITEM END CANCEL CREDIT PING PONG GOAWAY = 1..10
//!  5 flags u8        low nibble critical: an unknown one set is a violation
//!  6 codec u8        of the body
//!  7 status u8       of a RESP
//!  8 slot u32        the call: slot and slot generation
//! 12 generation u32
//! 16 method u64      FNV-1a 64 of `service.method`
//! 24 budget u32      time left, in microseconds
//! 28 body u32        length of the body
//! 32 metadata u32    length of the metadata
//! 36 metadata, body, attachment (the rest)
//! ```

use bytes::{Buf, Bytes, BytesMut};

use crate::error::Code;
use crate::fate::Fate;

/// The header's size.
pub const HEADER: usize = 36;
/// The part of the header that `length` counts.
const COUNTED: u32 = 32;
/// No frame before or during HELLO is larger.
pub const HELLO_BYTES_MAX: u32 = 64 << 10;
/// What the codec decodes in one go; anything large travels as an attachment.
pub const BODY_BYTES_MAX: u32 = 1 << 20;
/// Flags that a receiver must understand. None is defined; 0x1 (MORE) is reserved.
const CRITICAL: u8 = 0x0f;
/// One read asks for at most this much at a time unless a larger frame is under way.
const CHUNK_MAX: usize = 64 << 10;
/// What an idle connection's read buffer takes.
const CHUNK_MIN: usize = 4 << 10;

macro_rules! numbered {
    ($(#[$meta:meta])* $name:ident { $($(#[doc = $doc:literal])+ $variant:ident = $number:literal,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[doc = $doc])+ $variant = $number,)*
        }

        impl $name {
            /// All, in the order of their numbers.
            pub const ALL: &'static [$name] = &[$($name::$variant),*];

            /// The byte on the wire.
            pub fn number(self) -> u8 {
                self as u8
            }

            /// What a byte stands for.
            pub fn from_number(number: u8) -> Option<Self> {
                match number {
                    $($number => Some($name::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

numbered! {
    /// The kinds of frames.
    Kind {
        /// Opens a connection, each way.
        Hello = 1,
        /// A request.
        Req = 2,
        /// The answer to a request.
        Resp = 3,
        /// Reserved: an item of a stream.
        Item = 4,
        /// Reserved: the end of a stream.
        End = 5,
        /// The caller gave up; the server answers all the same.
        Cancel = 6,
        /// Reserved: bytes a stream may send.
        Credit = 7,
        /// Asks for a PONG with the same call id.
        Ping = 8,
        /// Answers a PING.
        Pong = 9,
        /// No further requests are accepted; says how many were.
        GoAway = 10,
    }
}

numbered! {
    /// The status of an answer.
    Status {
        /// The body is the result.
        Ok = 0,
        /// The body is an application error: number, length, fields.
        Application = 1,
        /// The deadline passed before the first poll.
        Expired = 2,
        /// The deadline passed while the handler ran; it was dropped.
        Deadline = 3,
        /// The caller cancelled and the handler was dropped, or a drain ran out of time.
        Cancelled = 4,
        /// No such method.
        Unimplemented = 5,
        /// The arguments do not decode.
        InvalidRequest = 6,
        /// Refused for a limit of the server's.
        Overloaded = 7,
        /// The handler ran, but its answer is larger than the caller takes.
        TooLarge = 8,
        /// The handler panicked.
        Panicked = 9,
        /// The handler ran, but its answer does not encode.
        Unencodable = 10,
    }
}

impl Status {
    /// What an answer with this status means to the caller (docs/wire.md, E2).
    pub fn meaning(self) -> (Code, Fate) {
        match self {
            Status::Ok | Status::Application => (Code::InvalidReply, Fate::Executed),
            Status::Expired => (Code::DeadlineExceeded, Fate::Rejected),
            Status::Deadline => (Code::DeadlineExceeded, Fate::Unknown),
            Status::Cancelled => (Code::Cancelled, Fate::Unknown),
            Status::Unimplemented => (Code::Unimplemented, Fate::Rejected),
            Status::InvalidRequest => (Code::InvalidRequest, Fate::Rejected),
            Status::Overloaded => (Code::Overloaded, Fate::Rejected),
            Status::TooLarge => (Code::TooLarge, Fate::Executed),
            Status::Panicked => (Code::Panicked, Fate::Unknown),
            Status::Unencodable => (Code::InvalidReply, Fate::Executed),
        }
    }
}

/// The fixed part of a frame. Fields a kind does not use are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// Low nibble critical.
    pub flags: u8,
    /// Of the body.
    pub codec: u8,
    /// Of an answer, unread.
    pub status: u8,
    /// The call's slot.
    pub slot: u32,
    /// The slot's generation.
    pub generation: u32,
    /// FNV-1a 64 of `service.method`.
    pub method: u64,
    /// Time left in microseconds.
    pub budget_us: u32,
    /// Bytes of body.
    pub body: u32,
    /// Bytes of metadata.
    pub metadata: u32,
    /// Bytes of attachment: the rest of the frame.
    pub attachment: u32,
}

/// A peer that broke the protocol. The connection is closed; nothing after it is read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Violation {
    #[error("frame of {length} bytes, the limit is {limit}")]
    FrameLength { length: u32, limit: u32 },
    #[error("frame of {length} bytes is shorter than its header")]
    ShortFrame { length: u32 },
    #[error("unknown kind of frame {0}")]
    Kind(u8),
    #[error("unknown critical flags {0:#04x}")]
    Flags(u8),
    #[error("body of {body} and metadata of {metadata} bytes in a frame of {length}")]
    Lengths { length: u32, body: u32, metadata: u32 },
    #[error("body of {0} bytes")]
    BodyLength(u32),
    #[error("unexpected {0:?} frame")]
    Unexpected(Kind),
    #[error("unknown status {0}")]
    Status(u8),
    #[error("unknown codec {0}")]
    Codec(u8),
    #[error("answer to {slot}.{generation}, which is not in flight")]
    NotInFlight { slot: u32, generation: u32 },
    #[error("request in slot {slot}, which is not free or beyond the limit")]
    Slot { slot: u32 },
    #[error("malformed {0}")]
    Malformed(&'static str),
}

impl Header {
    /// A header with everything else zero.
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            flags: 0,
            codec: 0,
            status: 0,
            slot: 0,
            generation: 0,
            method: 0,
            budget_us: 0,
            body: 0,
            metadata: 0,
            attachment: 0,
        }
    }

    /// The bytes on the wire.
    ///
    /// # Panics
    /// Where the parts together exceed 32 bits; senders check their limits first.
    pub fn encode(&self) -> [u8; HEADER] {
        let length = COUNTED
            .checked_add(self.metadata)
            .and_then(|sum| sum.checked_add(self.body))
            .and_then(|sum| sum.checked_add(self.attachment))
            .expect("a frame is below 4 GiB: its sender checked the peer's limit");
        let mut out = [0; HEADER];
        out[0..4].copy_from_slice(&length.to_le_bytes());
        out[4] = self.kind.number();
        out[5] = self.flags;
        out[6] = self.codec;
        out[7] = self.status;
        out[8..12].copy_from_slice(&self.slot.to_le_bytes());
        out[12..16].copy_from_slice(&self.generation.to_le_bytes());
        out[16..24].copy_from_slice(&self.method.to_le_bytes());
        out[24..28].copy_from_slice(&self.budget_us.to_le_bytes());
        out[28..32].copy_from_slice(&self.body.to_le_bytes());
        out[32..36].copy_from_slice(&self.metadata.to_le_bytes());
        out
    }

    /// Reads and checks a header; `limit` bounds the whole frame. `None` while bytes are missing. A
    /// length beyond the limit is refused from its four bytes alone.
    pub fn decode(mut bytes: &[u8], limit: u32) -> Result<Option<Self>, Violation> {
        if bytes.len() < 4 {
            return Ok(None);
        }
        let whole = bytes.len();
        let length = bytes.get_u32_le();
        if length < COUNTED {
            return Err(Violation::ShortFrame { length });
        }
        if length.checked_add(4).is_none_or(|total| total > limit) {
            return Err(Violation::FrameLength { length, limit });
        }
        if whole < HEADER {
            return Ok(None);
        }
        let kind = bytes.get_u8();
        let kind = Kind::from_number(kind).ok_or(Violation::Kind(kind))?;
        let flags = bytes.get_u8();
        if flags & CRITICAL != 0 {
            return Err(Violation::Flags(flags));
        }
        let mut header = Self {
            kind,
            flags,
            codec: bytes.get_u8(),
            status: bytes.get_u8(),
            slot: bytes.get_u32_le(),
            generation: bytes.get_u32_le(),
            method: bytes.get_u64_le(),
            budget_us: bytes.get_u32_le(),
            body: bytes.get_u32_le(),
            metadata: bytes.get_u32_le(),
            attachment: 0,
        };
        if header.body > BODY_BYTES_MAX {
            return Err(Violation::BodyLength(header.body));
        }
        let rest =
            (length - COUNTED).checked_sub(header.body).and_then(|rest| rest.checked_sub(header.metadata));
        header.attachment =
            rest.ok_or(Violation::Lengths { length, body: header.body, metadata: header.metadata })?;
        Ok(Some(header))
    }

    /// The frame's size on the wire.
    fn total(&self) -> usize {
        HEADER + self.metadata as usize + self.body as usize + self.attachment as usize
    }
}

/// A whole frame, cut from the read buffer without copying. Metadata is skipped: nothing reads it yet.
#[derive(Debug)]
pub struct Frame {
    /// The fixed part.
    pub header: Header,
    /// The encoded value.
    pub body: Bytes,
    /// The rest.
    pub attachment: Bytes,
}

/// The read buffer: bytes in, frames out.
///
/// Space is reserved for what has arrived, not for what was declared: at most four times the bytes of
/// the frame under way, or one chunk. A frame that grows is moved at most once per doubling; its
/// parts are then cut out without a copy.
#[derive(Debug)]
pub struct Reader {
    buffer: BytesMut,
    limit: u32,
    chunk: usize,
}

impl Reader {
    /// Reads frames of at most `limit` bytes.
    pub fn new(limit: u32) -> Self {
        Self { buffer: BytesMut::new(), limit, chunk: CHUNK_MIN }
    }

    /// Another limit from now on: that of the handshake no longer holds.
    pub fn set_limit(&mut self, limit: u32) {
        self.limit = limit;
    }

    /// The next whole frame.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, Violation> {
        let Some(header) = Header::decode(&self.buffer, self.limit)? else { return Ok(None) };
        if self.buffer.len() < header.total() {
            return Ok(None);
        }
        let mut frame = self.buffer.split_to(header.total());
        frame.advance(HEADER + header.metadata as usize);
        let body = frame.split_to(header.body as usize).freeze();
        Ok(Some(Frame { header, body, attachment: frame.freeze() }))
    }

    /// Where to read into: has room for at least one byte.
    pub fn space(&mut self) -> &mut BytesMut {
        let have = self.buffer.len();
        let need = match Header::decode(&self.buffer, self.limit) {
            Ok(Some(header)) => header.total().saturating_sub(have).min(have * 3),
            _ => 0,
        };
        let room = self.buffer.capacity() - have;
        // `reserve` at least doubles: asked for a little more than there is, it would take eight times what came.
        let doubles = have + need >= 2 * self.buffer.capacity();
        if room < CHUNK_MIN / 4 || (room < need && doubles) {
            self.buffer.reserve(need.max(self.chunk));
        }
        &mut self.buffer
    }

    /// What a read brought: many bytes at once make the next chunk larger.
    pub fn filled(&mut self, bytes: usize) {
        if bytes >= self.chunk {
            self.chunk = (self.chunk * 2).min(CHUNK_MAX);
        }
    }

    /// Whether a frame has begun and not ended.
    pub fn is_partial(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Bytes of memory behind the buffer and not yet handed out.
    pub fn capacity(&self) -> usize {
        self.buffer.capacity()
    }
}
