//! Frames: a 36-byte little-endian header, then metadata, body and attachment (docs/wire.md, F1).
//!
//!      0 length u32      of what follows these four bytes
//!      4 kind u8         HELLO REQ RESP ITEM END CANCEL CREDIT PING PONG GOAWAY = 1..10
//!      5 flags u8        low nibble critical: an unknown one set is a violation
//!      6 codec u8        of the body
//!      7 status u8       of a RESP
//!      8 slot u32        the call: slot and slot generation
//!     12 generation u32
//!     16 method u64      FNV-1a 64 of `service.method`
//!     24 budget u32      time left, in microseconds
//!     28 body u32        length of the body
//!     32 metadata u32    length of the metadata
//!     36 metadata, body, attachment (the rest)

use crate::error::Code;
use crate::fate::Fate;

/// The header's size.
pub(crate) const HEADER: usize = 36;

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
