//! Between bytes and values: decoders for sources, encoders for sinks, and the versioned codec of state.

use std::marker::PhantomData;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::record::RecordRef;

/// Why a record could not be decoded. The text becomes the `reason` header of the dead letter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub String);

impl Malformed {
    /// With this reason.
    pub fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

/// Reads the rows of a source. One record is one row.
pub trait Decoder: Send + Sync + 'static {
    /// The row.
    type Item: Send + 'static;

    /// Decodes one record. Allocates nothing if it can be helped: it runs once per row.
    ///
    /// # Errors
    ///
    /// If the record is not one of the source's rows: it goes to the dead letters or is skipped.
    fn decode(&self, record: RecordRef<'_>) -> Result<Self::Item, Malformed>;
}

/// Writes the rows of a sink.
pub trait Encoder<T>: Send + Sync + 'static {
    /// Appends the record's value.
    ///
    /// # Errors
    ///
    /// If the row has no encoding: the job stops.
    fn encode(&self, item: &T, to: &mut Vec<u8>) -> Result<(), Malformed>;
}

/// JSON, one object per record: a decoder for what serde can read, an encoder for what it can write.
pub struct Json<T>(PhantomData<fn() -> T>);

impl<T> Json<T> {
    /// The codec.
    pub fn new() -> Self {
        Self(PhantomData)
    }
}

impl<T> Default for Json<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: DeserializeOwned + Send + 'static> Decoder for Json<T> {
    type Item = T;
    fn decode(&self, record: RecordRef<'_>) -> Result<T, Malformed> {
        let value = record.value().ok_or_else(|| Malformed::new("the record has no value"))?;
        serde_json::from_slice(value).map_err(|e| Malformed(e.to_string()))
    }
}

impl<T: Serialize + 'static> Encoder<T> for Json<T> {
    fn encode(&self, item: &T, to: &mut Vec<u8>) -> Result<(), Malformed> {
        serde_json::to_writer(to, item).map_err(|e| Malformed(e.to_string()))
    }
}

/// The record's value as a line of UTF-8 text.
#[derive(Clone, Copy, Debug, Default)]
pub struct Text;

impl Decoder for Text {
    type Item = String;
    fn decode(&self, record: RecordRef<'_>) -> Result<String, Malformed> {
        let value = record.value().ok_or_else(|| Malformed::new("the record has no value"))?;
        let text = std::str::from_utf8(value).map_err(|e| Malformed(e.to_string()))?;
        Ok(text.to_owned())
    }
}

impl<T: std::fmt::Display> Encoder<T> for Text {
    fn encode(&self, item: &T, to: &mut Vec<u8>) -> Result<(), Malformed> {
        use std::io::Write as _;
        write!(to, "{item}").map_err(|e| Malformed(e.to_string()))
    }
}

/// A decoder made of a function: `decode_with(|record| ...)`.
pub fn decode_with<T, F>(decode: F) -> impl Decoder<Item = T>
where
    T: Send + 'static,
    F: Fn(RecordRef<'_>) -> Result<T, Malformed> + Send + Sync + 'static,
{
    With(decode, PhantomData)
}

struct With<F, T>(F, PhantomData<fn() -> T>);

impl<T, F> Decoder for With<F, T>
where
    T: Send + 'static,
    F: Fn(RecordRef<'_>) -> Result<T, Malformed> + Send + Sync + 'static,
{
    type Item = T;
    fn decode(&self, record: RecordRef<'_>) -> Result<T, Malformed> {
        (self.0)(record)
    }
}

/// State values on disk: a codec-version byte, then postcard.
pub(crate) mod state {
    use super::*;

    pub(crate) const VERSION: u8 = 1;

    /// Bytes in the store or changelog that are not this job's state.
    #[derive(Debug, thiserror::Error)]
    pub enum BadState {
        /// Written by another version of the codec.
        #[error("state was written with codec version {found}, this build reads {VERSION}")]
        Version {
            /// The first byte, if there was one.
            found: u8,
        },
        /// Damaged, or of another type.
        #[error("state of {expected} cannot be read: {source}")]
        Malformed {
            /// The accumulator's type.
            expected: &'static str,
            /// postcard's view.
            source: postcard::Error,
        },
    }

    pub(crate) fn encode<A: Serialize>(value: &A, to: &mut Vec<u8>) {
        to.push(VERSION);
        let taken = std::mem::take(to);
        // Only a Serialize impl that fails by itself can fail here: a Vec takes every byte.
        *to = postcard::to_extend(value, taken).expect("an accumulator serializes");
    }

    pub(crate) fn decode<A: DeserializeOwned>(from: &[u8]) -> Result<A, BadState> {
        match from {
            [VERSION, value @ ..] => postcard::from_bytes(value)
                .map_err(|source| BadState::Malformed { expected: std::any::type_name::<A>(), source }),
            _ => Err(BadState::Version { found: from.first().copied().unwrap_or(0) }),
        }
    }
}

pub use state::BadState;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_carries_its_version() {
        let mut bytes = vec![9];
        state::encode(&300u64, &mut bytes);
        assert_eq!(bytes, [9, 1, 0xac, 2]);
        assert_eq!(state::decode::<u64>(&bytes[1..]).unwrap(), 300);
        assert!(matches!(state::decode::<u64>(&[2, 0]), Err(BadState::Version { found: 2 })));
        assert!(matches!(state::decode::<u64>(&[1]), Err(BadState::Malformed { .. })));
        assert!(state::decode::<u64>(&[]).is_err());
    }
}
