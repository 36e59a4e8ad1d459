//! Decoders against hostile bytes and odd cuts: frames, HELLO, bodies (docs/wire.md: F2, L3, L4, E5).

use std::collections::BTreeMap;
use std::fmt;

use bytes::{BufMut, Bytes};
use proptest::prelude::*;
use serde::de::{Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::codec::{self, CodecError};
use crate::error::ErrorBody;
use crate::frame::{Header, Kind, Reader};
use crate::hello::{Hello, Served};
use crate::wire::Wire;

fn header() -> impl Strategy<Value = Header> {
    let kinds = prop::sample::select(Kind::ALL);
    (kinds, any::<(u8, u8, u8)>(), any::<(u32, u32, u64, u32)>(), 0..2000_u32, 0..40_u32, 0..100_000_u32)
        .prop_map(
            |(
                kind,
                (flags, codec, status),
                (slot, generation, method, budget_us),
                body,
                metadata,
                attachment,
            )| {
                let flags = flags & 0xf0;
                Header {
                    kind,
                    flags,
                    codec,
                    status,
                    slot,
                    generation,
                    method,
                    budget_us,
                    body,
                    metadata,
                    attachment,
                }
            },
        )
}

fn part(length: u32, salt: u8) -> Vec<u8> {
    (0..length).map(|index| (index as u8).wrapping_mul(31).wrapping_add(salt)).collect()
}

/// Growing doubles: a quarter of the buffer full and a little more to come is no reason to.
#[test]
fn a_buffer_nearly_large_enough_does_not_double() {
    let header = Header { attachment: 84_781, ..Header::new(Kind::Hello) };
    read_in_cuts(&[header], &[1_025, 3_594, 1_540]).unwrap();
}

fn read_in_cuts(headers: &[Header], cuts: &[usize]) -> Result<(), TestCaseError> {
    let mut stream = Vec::new();
    for header in headers {
        stream.extend_from_slice(&header.encode());
        stream.extend(part(header.metadata, 1));
        stream.extend(part(header.body, 2));
        stream.extend(part(header.attachment, 3));
    }
    let mut reader = Reader::new(1 << 20);
    let mut rest = &stream[..];
    let mut cuts = cuts.iter().cycle();
    let mut expected = headers.iter();
    while !rest.is_empty() {
        let space = reader.space();
        let room = space.capacity() - space.len();
        prop_assert!(room > 0);
        let count = (*cuts.next().unwrap()).min(room).min(rest.len());
        space.put_slice(&rest[..count]);
        rest = &rest[count..];
        reader.filled(count);
        // Memory of earlier frames is used again, so the bound is on all that was received.
        let have = stream.len() - rest.len();
        prop_assert!(reader.capacity() <= (64 << 10) + 4 * have, "{} for {have}", reader.capacity());
        while let Some(frame) = reader.next_frame().unwrap() {
            let header = expected.next().unwrap();
            prop_assert_eq!(&frame.header, header);
            prop_assert!(frame.body == part(header.body, 2));
            prop_assert!(frame.attachment == part(header.attachment, 3));
        }
    }
    prop_assert!(expected.next().is_none());
    prop_assert!(!reader.is_partial());
    Ok(())
}

proptest! {
    /// However the bytes are cut, the same frames come out; the buffer stays within its bound.
    #[test]
    fn frames_survive_any_cut(
        headers in prop::collection::vec(header(), 1..6),
        cuts in prop::collection::vec(1..30_000_usize, 1..20),
    ) {
        read_in_cuts(&headers, &cuts)?;
    }

    /// No bytes panic, and nothing is reserved for what was only declared.
    #[test]
    fn hostile_frames_cost_nothing(
        mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        length in prop_oneof![Just(32_u32), 0..4000_u32, any::<u32>()],
        sane in any::<bool>(),
    ) {
        if sane && bytes.len() >= 6 {
            bytes[..4].copy_from_slice(&length.to_le_bytes());
            bytes[4] = bytes[4] % 10 + 1;
            bytes[5] &= 0xf0;
        }
        let mut reader = Reader::new(u32::MAX);
        for chunk in bytes.chunks(7) {
            reader.space().put_slice(chunk);
            loop {
                match reader.next_frame() {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => return Ok(()),
                }
            }
            reader.space();
            prop_assert!(reader.capacity() <= (64 << 10) + 4 * bytes.len());
        }
    }

    #[test]
    fn hello_round_trips(
        limits in (64_u32 << 10.., 1_u32..),
        codecs in prop::collection::vec(any::<u8>(), 0..5),
        methods in prop::collection::vec((any::<u64>(), any::<u64>(), "[a-z.]{0,40}"), 0..5),
    ) {
        let methods = methods.into_iter().map(|(id, signature, name)| Served { id, signature, name }).collect();
        let hello = Hello {
            version_min: 1, version_max: 4, frame_bytes_max: limits.0, in_flight: limits.1, codecs, methods,
        };
        let mut body = Bytes::from(hello.encode()).slice(36..);
        prop_assert_eq!(Hello::decode(body.clone()).unwrap(), hello);
        let _ = body.split_off(body.len() - 1);
        prop_assert!(Hello::decode(body).is_err());
    }

    #[test]
    fn hostile_hellos_and_errors_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        let mut hello = b"TMRP\x01\x00\x01\x00".to_vec();
        hello.extend_from_slice(&bytes);
        let _ = Hello::decode(hello.into());
        let _ = Hello::decode(Bytes::from(bytes.clone()));
        let _ = ErrorBody::read(Bytes::from(bytes)).map(|body| body.unknown());
    }

    #[test]
    fn hostile_bodies_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
        let _ = codec::decode::<Deep>(&bytes);
        let _ = codec::decode::<Vec<Vec<String>>>(&bytes);
        let _ = codec::decode::<(Bytes, [u8; 16], f64)>(&bytes);
        let _ = codec::decode::<BTreeMap<String, Option<u128>>>(&bytes);
    }

    #[test]
    fn bodies_round_trip_exactly(deep in deep()) {
        let mut bytes = Vec::new();
        codec::encode(&deep, &mut bytes).unwrap();
        prop_assert!(bytes.len() >= Deep::MIN);
        prop_assert_eq!(&codec::decode::<Deep>(&bytes).unwrap(), &deep);
        prop_assert!(codec::decode::<Deep>(&bytes[..bytes.len() - 1]).is_err());
        bytes.push(0);
        let trailing = matches!(codec::decode::<Deep>(&bytes), Err(CodecError::Trailing { left: 1 }));
        prop_assert!(trailing);
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Choice {
    Nothing,
    One(i64),
    Two { text: String, flag: bool },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Deep {
    number: u32,
    list: Vec<Option<i32>>,
    map: BTreeMap<u16, String>,
    choices: (Choice, Choice),
    bytes: Bytes,
    letter: char,
}

// The derive names the crate from outside; here it is written out, which also shows what it writes.
impl Wire for Deep {
    const SCHEMA: &'static crate::Schema = <()>::SCHEMA;
    const MIN: usize = 1 + 1 + 1 + 2 + 1 + 1;
}

fn deep() -> impl Strategy<Value = Deep> {
    let choice = prop_oneof![
        Just(Choice::Nothing),
        any::<i64>().prop_map(Choice::One),
        (any::<String>(), any::<bool>()).prop_map(|(text, flag)| Choice::Two { text, flag }),
    ];
    (
        any::<u32>(),
        prop::collection::vec(any::<Option<i32>>(), 0..5),
        prop::collection::btree_map(any::<u16>(), any::<String>(), 0..4),
        (choice.clone(), choice),
        prop::collection::vec(any::<u8>(), 0..20),
        any::<char>(),
    )
        .prop_map(|(number, list, map, choices, bytes, letter)| Deep {
            number,
            list,
            map,
            choices,
            bytes: bytes.into(),
            letter,
        })
}

/// An attachment is cut from the read buffer: it lies where it was read.
#[test]
fn attachments_are_not_copied() {
    let header = Header { body: 5, attachment: 3000, ..Header::new(Kind::Req) };
    let mut reader = Reader::new(1 << 20);
    let space = reader.space();
    space.put_slice(&header.encode());
    space.put_slice(&part(3005, 0));
    let start = space.as_ptr() as usize;
    let frame = reader.next_frame().unwrap().unwrap();
    assert_eq!(frame.body.as_ptr() as usize, start + 36);
    assert_eq!(frame.attachment.as_ptr() as usize, start + 36 + 5);
}

/// serde is told no sizes, at any depth: a declared length reserves nothing.
#[test]
fn collections_get_no_size_hint() {
    #[derive(Debug, PartialEq)]
    struct Hints(Vec<Option<usize>>);

    struct Look;

    impl<'de> Visitor<'de> for Look {
        type Value = Hints;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a sequence")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Hints, A::Error> {
            let mut hints = vec![seq.size_hint()];
            while seq.next_element::<u8>()?.is_some() {}
            hints.push(seq.size_hint());
            Ok(Hints(hints))
        }
    }

    impl<'de> Deserialize<'de> for Hints {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_seq(Look)
        }
    }

    let nested: (Option<Hints>, Vec<Hints>) = codec::decode(&[1, 2, 9, 9, 1, 1, 9]).unwrap();
    let none = || Hints(vec![None, None]);
    assert_eq!(nested, (Some(none()), vec![none()]));
}

/// A length beyond the body fails before anything is allocated for it.
#[test]
fn lengths_beyond_the_body_fail() {
    // 253: a u64 follows, here 2^62.
    let huge = [253, 0, 0, 0, 0, 0, 0, 0, 0x40, b'x'];
    assert!(codec::decode::<String>(&huge).is_err());
    assert!(codec::decode::<Bytes>(&huge).is_err());
    assert!(codec::decode::<Vec<u64>>(&huge).is_err());
    assert!(codec::decode::<BTreeMap<u8, u8>>(&huge).is_err());
}
