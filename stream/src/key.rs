//! Keys: what rows are grouped by, and the one encoding of it that shard, state, changelog and output share.
//!
//! | type | bytes |
//! |---|---|
//! | `IpAddr`, `Ipv4Addr`, `Ipv6Addr` | the text Rust displays (IPv6 canonical) |
//! | `String` | UTF-8 |
//! | `u8`..`u64`, `i8`..`i64` | 8 bytes, big-endian; signed ones as two's complement |
//! | `Vec<u8>`, `Bytes` | as they are |

use std::fmt;
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytes::Bytes;

mod address;

/// A number of a shard: a fixed range of the key hash, chosen when the job first runs. It is one partition of each
/// changelog and one key range of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Shard(pub u16);

impl Shard {
    /// The keyed task, of `tasks`, that owns this shard.
    pub fn task(self, tasks: usize) -> usize {
        usize::from(self.0) % tasks
    }
}

/// Bytes that are no encoding of the expected type.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{bytes}` is not a key of type {expected}")]
pub struct NotAKey {
    /// The key type.
    pub expected: &'static str,
    /// What was found, lossily as text.
    pub bytes: String,
}

/// Something rows can be grouped by.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be a key",
    label = "`key_by` needs a type that implements `Key`",
    note = "addresses, strings, integers and bytes are keys; implement `tidemill_stream::Key` for a type of your own"
)]
pub trait Key: Clone + Eq + Hash + Send + 'static {
    /// Appends the key's bytes. Equal keys have equal bytes, different ones different bytes: they are on disk.
    ///
    /// # Panics
    ///
    /// May panic for a value that cannot be a key: its record is tried again by itself, and goes to the dead letters if
    /// it still panics; in a job without dead letters the run stops and names it.
    fn encode(&self, to: &mut Vec<u8>);

    /// Reads back what [`Self::encode`] wrote.
    ///
    /// # Errors
    ///
    /// If the bytes are nothing that `encode` writes.
    fn decode(from: &[u8]) -> Result<Self, NotAKey>;
}

fn not<K>(from: &[u8]) -> NotAKey {
    NotAKey { expected: std::any::type_name::<K>(), bytes: String::from_utf8_lossy(from).into_owned() }
}

impl Key for IpAddr {
    fn encode(&self, to: &mut Vec<u8>) {
        match self {
            Self::V4(ip) => ip.encode(to),
            Self::V6(ip) => ip.encode(to),
        }
    }
    fn decode(from: &[u8]) -> Result<Self, NotAKey> {
        let v4 = address::v4(from).map(Self::V4);
        v4.or_else(|| parsed(from)).ok_or_else(|| not::<Self>(from))
    }
}

impl Key for Ipv4Addr {
    fn encode(&self, to: &mut Vec<u8>) {
        address::put_v4(*self, to);
    }
    fn decode(from: &[u8]) -> Result<Self, NotAKey> {
        address::v4(from).ok_or_else(|| not::<Self>(from))
    }
}

impl Key for Ipv6Addr {
    fn encode(&self, to: &mut Vec<u8>) {
        address::put_v6(*self, to);
    }
    fn decode(from: &[u8]) -> Result<Self, NotAKey> {
        parsed(from).ok_or_else(|| not::<Self>(from))
    }
}

fn parsed<K: std::str::FromStr>(from: &[u8]) -> Option<K> {
    std::str::from_utf8(from).ok()?.parse().ok()
}

macro_rules! integer {
    ($wide:ty: $($t:ty),*) => {$(
        impl Key for $t {
            fn encode(&self, to: &mut Vec<u8>) {
                to.extend_from_slice(&<$wide>::from(*self).to_be_bytes());
            }
            fn decode(from: &[u8]) -> Result<Self, NotAKey> {
                let wide = from.try_into().map(<$wide>::from_be_bytes).map_err(|_| not::<Self>(from))?;
                Self::try_from(wide).map_err(|_| not::<Self>(from))
            }
        }
    )*};
}
integer!(u64: u8, u16, u32, u64);
integer!(i64: i8, i16, i32, i64);

impl Key for String {
    fn encode(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(self.as_bytes());
    }
    fn decode(from: &[u8]) -> Result<Self, NotAKey> {
        std::str::from_utf8(from).map(str::to_owned).map_err(|_| not::<Self>(from))
    }
}

impl Key for Vec<u8> {
    fn encode(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(self);
    }
    fn decode(from: &[u8]) -> Result<Self, NotAKey> {
        Ok(from.to_vec())
    }
}

impl Key for Bytes {
    fn encode(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(self);
    }
    fn decode(from: &[u8]) -> Result<Self, NotAKey> {
        Ok(Bytes::copy_from_slice(from))
    }
}

const INLINE: usize = 22;

/// Key bytes in state: up to 22 inline (24 bytes in all), longer ones on the heap.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum KeyBytes {
    Inline { len: u8, bytes: [u8; INLINE] },
    Heap(Box<[u8]>),
}

impl KeyBytes {
    #[inline]
    pub(crate) fn new(key: &[u8]) -> Self {
        if key.len() <= INLINE {
            let mut bytes = [0; INLINE];
            bytes[..key.len()].copy_from_slice(key);
            Self::Inline { len: key.len() as u8, bytes }
        } else {
            Self::Heap(key.into())
        }
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        match self {
            Self::Inline { .. } => 0,
            Self::Heap(bytes) => bytes.len() + 16,
        }
    }
}

impl std::ops::Deref for KeyBytes {
    type Target = [u8];
    #[inline]
    fn deref(&self) -> &[u8] {
        match self {
            Self::Inline { len, bytes } => &bytes[..usize::from(*len)],
            Self::Heap(bytes) => bytes,
        }
    }
}

impl fmt::Debug for KeyBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", String::from_utf8_lossy(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round<K: Key + fmt::Debug>(key: K, bytes: &[u8]) {
        let mut encoded = Vec::new();
        key.encode(&mut encoded);
        assert_eq!(encoded, bytes);
        assert_eq!(K::decode(&encoded).unwrap(), key);
    }

    #[test]
    fn keys_are_encoded_as_documented() {
        round("83.149.9.216".parse::<IpAddr>().unwrap(), b"83.149.9.216");
        for octet in 0..=255 {
            let address = Ipv4Addr::new(octet, 0, 255 - octet, octet / 2);
            round(address, address.to_string().as_bytes());
        }
        round("2001:db8:0:0:0:0:0:1".parse::<IpAddr>().unwrap(), b"2001:db8::1");
        round("täg".to_owned(), "täg".as_bytes());
        round(258u16, &[0, 0, 0, 0, 0, 0, 1, 2]);
        round(-1i32, &[0xff; 8]);
        assert!(u8::decode(&256u64.to_be_bytes()).is_err());
        assert!(IpAddr::decode(b"1.2.3").is_err());
    }

    #[test]
    fn key_bytes_are_24_bytes_and_equal_what_they_were_made_of() {
        assert_eq!(size_of::<KeyBytes>(), 24);
        for len in [0, 1, 22, 23, 60] {
            let key = vec![7; len];
            assert_eq!(&*KeyBytes::new(&key), &key[..]);
        }
    }
}
