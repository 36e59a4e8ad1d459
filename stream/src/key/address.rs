//! Addresses as the text Rust displays, without the formatting machinery: keys are encoded once per group that crosses an
//! exchange and once per result, where `write!` was a tenth of a job's processor time. The tests hold both to std.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Appends a decimal octet.
fn octet(n: u8, to: &mut [u8; 15], at: &mut usize) {
    let mut put = |digit: u8| {
        to[*at] = b'0' + digit;
        *at += 1;
    };
    if n >= 100 {
        put(n / 100);
    }
    if n >= 10 {
        put(n / 10 % 10);
    }
    put(n % 10);
}

/// Appends dotted decimal.
pub(super) fn put_v4(ip: Ipv4Addr, to: &mut Vec<u8>) {
    let (mut text, mut at) = ([b'.'; 15], 0);
    for (i, n) in ip.octets().into_iter().enumerate() {
        // The dots are there already.
        at += usize::from(i > 0);
        octet(n, &mut text, &mut at);
    }
    to.extend_from_slice(&text[..at]);
}

/// Appends RFC 5952's form, which is what std displays: the first longest run of two or more zero groups is `::`, an
/// IPv4-mapped address ends in dotted decimal.
pub(super) fn put_v6(ip: Ipv6Addr, to: &mut Vec<u8>) {
    if let Some(v4) = ip.to_ipv4_mapped() {
        to.extend_from_slice(b"::ffff:");
        return put_v4(v4, to);
    }
    let groups = ip.segments();
    let (mut zeros, mut run) = (0..0, 0..0);
    for (i, group) in groups.into_iter().enumerate() {
        if group != 0 {
            run = i + 1..i + 1;
        } else {
            run.end = i + 1;
            if run.len() > zeros.len() {
                zeros = run.clone();
            }
        }
    }
    if zeros.len() < 2 {
        return put_groups(&groups, to);
    }
    put_groups(&groups[..zeros.start], to);
    to.extend_from_slice(b"::");
    put_groups(&groups[zeros.end..], to);
}

fn put_groups(groups: &[u16], to: &mut Vec<u8>) {
    for (i, group) in groups.iter().enumerate() {
        if i > 0 {
            to.push(b':');
        }
        let digits = (16 - group.leading_zeros()).div_ceil(4).max(1);
        for digit in (0..digits).rev() {
            to.push(b"0123456789abcdef"[usize::from(group >> (4 * digit) & 15)]);
        }
    }
}

/// Reads dotted decimal without leading zeros.
pub(super) fn v4(from: &[u8]) -> Option<Ipv4Addr> {
    let mut octets = [0u8; 4];
    let (mut part, mut value, mut length) = (0, 0u32, 0);
    for &b in from {
        if b == b'.' {
            if length == 0 || part == 3 {
                return None;
            }
            octets[part] = value as u8;
            (part, value, length) = (part + 1, 0, 0);
        } else {
            let digit = u32::from(b.wrapping_sub(b'0'));
            if digit > 9 || (length > 0 && value == 0) {
                return None;
            }
            (value, length) = (value * 10 + digit, length + 1);
            if value > 255 {
                return None;
            }
        }
    }
    if part != 3 || length == 0 {
        return None;
    }
    octets[3] = value as u8;
    Some(Ipv4Addr::from(octets))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{RngExt as _, SeedableRng as _};

    fn written(put: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut to = Vec::new();
        put(&mut to);
        String::from_utf8(to).unwrap()
    }

    #[test]
    fn addresses_are_written_and_read_as_std_does() {
        let mut rng = SmallRng::seed_from_u64(1);
        for i in 0..200_000u32 {
            let ip = Ipv4Addr::from(if i < 70_000 { i } else { rng.random() });
            let text = written(|to| put_v4(ip, to));
            assert_eq!(text, ip.to_string());
            assert_eq!(v4(text.as_bytes()), Some(ip));
            // Groups of every width, zero in half the places: runs of every length and position.
            let groups: [u16; 8] = std::array::from_fn(|_| match rng.random_range(0..8) {
                0..4 => 0,
                n @ 4..7 => rng.random::<u16>() >> (4 * (n - 3)),
                _ => rng.random(),
            });
            let ip = Ipv6Addr::from(groups);
            assert_eq!(written(|to| put_v6(ip, to)), ip.to_string());
            let mapped = Ipv4Addr::from(rng.random::<u32>()).to_ipv6_mapped();
            assert_eq!(written(|to| put_v6(mapped, to)), mapped.to_string());
        }
    }

    #[test]
    fn what_std_refuses_is_refused() {
        let mut rng = SmallRng::seed_from_u64(2);
        for _ in 0..200_000 {
            let len = rng.random_range(0..16);
            let text: String =
                (0..len).map(|_| char::from(b"00123459...:"[rng.random_range(0..12)])).collect();
            assert_eq!(v4(text.as_bytes()), text.parse().ok(), "{text}");
        }
    }
}
