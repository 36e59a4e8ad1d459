//! The error of a call that the framework, not the application, ended; and how an application's
//! own errors travel.
//!
//! An application error is a written number, a length and the encoded fields (docs/wire.md, E1).
//! Number 0 is an [`RpcError`] that the handler itself met further down; decoded at the caller it
//! is `Executed` whatever it was there, because the handler answered. An unknown number becomes an
//! [`RpcError`] too, fate `Executed`.

use std::borrow::Cow;

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

use crate::codec;
use crate::fate::Fate;

/// A call that failed without an application error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message} ({fate:?})")]
pub struct RpcError {
    /// What happened; the reaction hangs on it.
    pub code: Code,
    /// Whether it may have been executed.
    pub fate: Fate,
    /// For people.
    pub message: Cow<'static, str>,
}

impl RpcError {
    /// An error of these parts.
    pub fn new(code: Code, fate: Fate, message: impl Into<Cow<'static, str>>) -> Self {
        Self { code, fate, message: message.into() }
    }
}

macro_rules! codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $text:literal;)*) => {
        /// Why a call failed. The numbers are those of the wire (docs/wire.md, E2).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Code {
            $($(#[doc = $doc])+ $name = $number,)*
        }

        impl Code {
            /// Every code, in the order of its number.
            pub const ALL: &'static [Code] = &[$(Code::$name),*];

            /// The number on the wire.
            pub fn number(self) -> u8 {
                self as u8
            }

            /// The code of a number.
            pub fn from_number(number: u8) -> Option<Self> {
                match number {
                    $($number => Some(Code::$name),)*
                    _ => None,
                }
            }
        }

        impl std::fmt::Display for Code {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self { $(Code::$name => $text),* })
            }
        }
    };
}

codes! {
    /// The deadline passed, at the caller or at the server.
    DeadlineExceeded = 1, "deadline exceeded";
    /// The caller gave up, or a drain ran out of time.
    Cancelled = 2, "cancelled";
    /// There is no connection, or it died. Connect again.
    Unavailable = 3, "unavailable";
    /// The server has no such method.
    Unimplemented = 4, "unimplemented";
    /// The server could not decode the request.
    InvalidRequest = 5, "invalid request";
    /// The client could not decode the answer.
    InvalidReply = 6, "invalid reply";
    /// The server is past a limit of its own.
    Overloaded = 7, "overloaded";
    /// The server is stopping. Another may answer.
    Draining = 8, "draining";
    /// Request or answer is larger than the other side takes.
    TooLarge = 9, "too large";
    /// The handler panicked.
    Panicked = 10, "handler panicked";
    /// Client and server disagree about the method's signature. One of them must be rebuilt.
    Skew = 11, "signature skew";
    /// The peer broke the wire protocol; the connection is closed.
    Protocol = 12, "protocol violation";
    /// An application error with a number this build does not know.
    UnknownError = 13, "unknown application error";
}

/// An application error on the wire: its number and its encoded fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorBody {
    code: u32,
    fields: Bytes,
}

/// An error that methods return: an enum whose variants carry written numbers, with
/// `#[derive(WireError)]`. It takes in [`RpcError`], because every call can fail on the way.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot travel as the error of a service method",
    note = "derive `tidemill_rpc::WireError` for it, with `From<RpcError>`: every call can fail on the way"
)]
pub trait WireError: From<RpcError> + std::fmt::Debug + Send + 'static {
    /// The number and the fields.
    fn encode(&self) -> ErrorBody;

    /// The error of a number this build knows; what is wrong otherwise.
    fn decode(body: &ErrorBody) -> Result<Self, RpcError>;
}

/// A method without errors of its own returns the framework's.
impl WireError for RpcError {
    fn encode(&self) -> ErrorBody {
        let fate: u8 = match self.fate {
            Fate::NotSent => 1,
            Fate::Rejected => 2,
            Fate::Executed => 3,
            Fate::Unknown => 4,
        };
        ErrorBody::new(0, &(self.code.number(), fate, self.message.as_ref()))
    }

    fn decode(body: &ErrorBody) -> Result<Self, RpcError> {
        Err(body.unknown())
    }
}

impl ErrorBody {
    /// Encodes the fields of the variant with this number.
    pub fn new<T: Serialize>(code: u32, fields: &T) -> Self {
        let mut out = Vec::new();
        match codec::encode(fields, &mut out) {
            Ok(()) => Self { code, fields: out.into() },
            // Fields that do not encode (a map without a length, say) must not hide the error.
            Err(error) => {
                tracing::warn!(code, %error, "fields of an error do not encode; sent without them");
                Self { code, fields: Bytes::new() }
            }
        }
    }

    /// What [`into_parts`](Self::into_parts) gave: errors that travel inside an answer, beside results.
    pub fn from_parts(code: u32, fields: Bytes) -> Self {
        Self { code, fields }
    }

    /// The written number and the encoded fields.
    pub fn into_parts(self) -> (u32, Bytes) {
        (self.code, self.fields)
    }

    /// The written number; 0 for an [`RpcError`] met by the handler.
    pub fn code(&self) -> u32 {
        self.code
    }

    /// The fields, decoded exactly.
    pub fn fields<T: DeserializeOwned>(&self) -> Result<T, RpcError> {
        codec::decode(&self.fields).map_err(|error| {
            let message = format!("application error {}: {error}", self.code);
            RpcError::new(Code::InvalidReply, Fate::Executed, message)
        })
    }

    /// What an unknown number becomes; number 0 gives back the handler's own [`RpcError`].
    pub fn unknown(&self) -> RpcError {
        if self.code != 0 {
            let message = format!("application error {} is not known to this build", self.code);
            return RpcError::new(Code::UnknownError, Fate::Executed, message);
        }
        match self.fields::<(u8, u8, String)>() {
            Ok((number, _, message)) => {
                let code = Code::from_number(number).unwrap_or(Code::UnknownError);
                RpcError::new(code, Fate::Executed, message)
            }
            Err(error) => error,
        }
    }

    /// Appends number, length and fields.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.code.to_le_bytes());
        // Far below 4 GiB: the body limit of 1 MiB is checked on the whole answer.
        out.extend_from_slice(&u32::try_from(self.fields.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(&self.fields);
    }

    /// Reads what [`write`](Self::write) wrote; `None` where the length does not fit exactly.
    pub(crate) fn read(mut body: Bytes) -> Option<Self> {
        use bytes::Buf;
        let code = body.try_get_u32_le().ok()?;
        let length = body.try_get_u32_le().ok()?;
        (u32::try_from(body.len()).ok()? == length).then_some(Self { code, fields: body })
    }
}
