//! Zigzag varints of 32 and 64 bits, as protobuf and Kafka write them.

use bytes::BufMut;

/// Bytes of the longest 64-bit varint.
pub(super) const VARLONG_BYTES_MAX: usize = 10;

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)).cast_unsigned()
}

/// Appends a value; 32-bit values have the same bytes in both widths.
#[inline]
pub(super) fn put(out: &mut impl BufMut, value: i64) {
    let mut rest = zigzag(value);
    while rest >= 0x80 {
        out.put_u8((rest & 0x7f) as u8 | 0x80);
        rest >>= 7;
    }
    out.put_u8(rest as u8);
}

/// The number of bytes [`put`] appends.
#[inline]
pub(super) fn size(value: i64) -> usize {
    let bits = 64 - (zigzag(value) | 1).leading_zeros() as usize;
    bits.div_ceil(7)
}

/// Takes a 64-bit varint off the front of `bytes`.
#[inline]
pub(super) fn take_long(bytes: &mut &[u8]) -> Option<i64> {
    // The varints of a record are its deltas and its lengths: one byte, or two.
    let (value, rest) = match *bytes {
        [byte @ 0..0x80, rest @ ..] => (u64::from(*byte), rest),
        [low, high @ 0..0x80, rest @ ..] => (u64::from(low & 0x7f) | u64::from(*high) << 7, rest),
        _ => return take_longer(bytes),
    };
    *bytes = rest;
    Some((value >> 1).cast_signed() ^ -(value & 1).cast_signed())
}

fn take_longer(bytes: &mut &[u8]) -> Option<i64> {
    let mut value = 0u64;
    for (i, &byte) in bytes.iter().take(VARLONG_BYTES_MAX).enumerate() {
        let part = u64::from(byte & 0x7f);
        if i == VARLONG_BYTES_MAX - 1 && part > 1 {
            return None; // a 65th bit
        }
        value |= part << (7 * i);
        if byte < 0x80 {
            *bytes = &bytes[i + 1..];
            return Some((value >> 1).cast_signed() ^ -(value & 1).cast_signed());
        }
    }
    None
}

/// Takes a 32-bit varint off the front of `bytes`.
#[inline]
pub(super) fn take_int(bytes: &mut &[u8]) -> Option<i32> {
    i32::try_from(take_long(bytes)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_round_trips_in_the_size_foretold() {
        let edges = (0..63).flat_map(|bit| [1i64 << bit, (1 << bit) - 1, -(1 << bit), -(1 << bit) - 1]);
        for value in edges.chain([0, i64::MIN, i64::MAX]) {
            let mut out = Vec::new();
            put(&mut out, value);
            assert_eq!(out.len(), size(value), "{value}");
            let mut rest = out.as_slice();
            assert_eq!(take_long(&mut rest), Some(value));
            assert!(rest.is_empty());
            assert_eq!(take_long(&mut &out[..out.len() - 1]), None, "cut off");
        }
    }

    #[test]
    fn known_bytes() {
        for (value, bytes) in
            [(0, &[0u8][..]), (-1, &[1]), (1, &[2]), (63, &[126]), (64, &[128, 1]), (-65, &[129, 1])]
        {
            let mut out = Vec::new();
            put(&mut out, value);
            assert_eq!(out, bytes);
        }
    }

    #[test]
    fn too_long_is_refused() {
        assert_eq!(take_long(&mut &[0x80; 11][..]), None);
        assert_eq!(take_long(&mut &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2][..]), None);
        let mut wide = Vec::new();
        put(&mut wide, i64::from(i32::MAX) + 1);
        assert_eq!(take_int(&mut wide.as_slice()), None);
    }
}
