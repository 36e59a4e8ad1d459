//! Batches against an independent implementation of the format (`kafka-protocol`, with the C library's lz4), and
//! against bytes that are no batches.

use bytes::{Bytes, BytesMut};
use kafka_protocol::protocol::StrBytes;
use kafka_protocol::records::{
    Compression as TheirCompression, Record as TheirRecord, RecordBatchDecoder, RecordBatchEncoder,
    RecordEncodeOptions, TimestampType,
};
use proptest::prelude::*;
use tidemill_log::batch::{
    BatchBuilder, BatchError, BatchHeader, BatchOptions, Batches, Compression, HEADER_BYTES, Marker,
    OpenBatch, ProducerStamp, Record, RecordParts, UNCOVERED_BYTES, advance_sequence, control_batch,
    set_position, verify, verify_produced,
};

const BUDGET: usize = 16 << 20;

type Headers = Vec<(String, Option<Vec<u8>>)>;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Parts {
    timestamp: i64,
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    headers: Headers,
}

fn bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
    // Half of them repeat, so that there is something to compress and to refer back to.
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..max),
        (any::<u8>(), 0..max).prop_map(|(byte, n)| vec![byte; n]),
    ]
}

fn parts(times: impl Strategy<Value = i64>) -> impl Strategy<Value = Parts> {
    // Few names, so that they repeat within a record.
    let header = ("[a-c]{0,1}|é", prop::option::of(bytes(20)));
    let headers = prop_oneof![3 => Just(vec![]), 1 => prop::collection::vec(header, 0..4)];
    (times, prop::option::of(bytes(40)), prop::option::of(bytes(700)), headers)
        .prop_map(|(timestamp, key, value, headers)| Parts { timestamp, key, value, headers })
}

fn records(times: impl Strategy<Value = i64>) -> impl Strategy<Value = Vec<Parts>> {
    prop::collection::vec(parts(times), 1..400)
}

const CODECS: [Compression; 4] =
    [Compression::None, Compression::Gzip, Compression::Snappy, Compression::Lz4];

fn compression() -> impl Strategy<Value = Compression> {
    prop::sample::select(CODECS.to_vec())
}

fn producer() -> impl Strategy<Value = (ProducerStamp, bool)> {
    prop_oneof![
        Just((ProducerStamp::NONE, false)),
        (0..i64::MAX, 0..i16::MAX, 0..i32::MAX, any::<bool>())
            .prop_map(|(id, epoch, sequence, txn)| (ProducerStamp { id, epoch, sequence }, txn)),
    ]
}

fn push(builder: &mut BatchBuilder, record: &Parts) -> bool {
    let headers: Vec<_> =
        record.headers.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect();
    builder.push(RecordParts {
        timestamp: record.timestamp,
        key: record.key.as_deref(),
        value: record.value.as_deref(),
        headers: &headers,
    })
}

fn build(records: &[Parts], compression: Compression, producer: ProducerStamp, transactional: bool) -> Bytes {
    let mut builder = BatchBuilder::new(BatchOptions { compression, transactional, bytes_max: 1 << 24 });
    for record in records {
        assert!(push(&mut builder, record));
    }
    builder.build(producer)
}

fn placed(batch: &Bytes, offset: i64, epoch: i32) -> Bytes {
    let mut batch = BytesMut::from(&batch[..]);
    set_position(&mut batch, offset, epoch);
    batch.freeze()
}

fn headers_of(headers: impl Iterator<Item = (Vec<u8>, Option<Vec<u8>>)>) -> Headers {
    // A damaged name need not be text; the reader gives its bytes.
    headers.map(|(name, value)| (String::from_utf8_lossy(&name).into_owned(), value)).collect()
}

/// Opens a batch and returns its records, read both ways.
fn open(batch: &Bytes) -> Result<Vec<(i64, Parts)>, BatchError> {
    let opened = OpenBatch::open(batch, BUDGET)?;
    let owned: Vec<Record> = opened.records().collect::<Result<_, _>>()?;
    let mut out = Vec::new();
    for (record, owned) in opened.iter().zip(&owned) {
        let record = record?;
        assert_eq!((record.offset, record.timestamp), (owned.offset, owned.timestamp));
        assert_eq!((record.key, record.value), (owned.key.as_deref(), owned.value.as_deref()));
        assert_eq!(record.headers, owned.headers.as_ref());
        assert_eq!(record.headers.iter().count(), record.headers.len());
        let headers = record.headers.iter().map(|h| (h.key.to_vec(), h.value.map(<[u8]>::to_vec)));
        out.push((
            record.offset,
            Parts {
                timestamp: record.timestamp,
                key: record.key.map(<[u8]>::to_vec),
                value: record.value.map(<[u8]>::to_vec),
                headers: headers_of(headers),
            },
        ));
    }
    assert_eq!(out.len(), owned.len());
    Ok(out)
}

/// Hex, for goldens.
mod hex {
    pub(super) fn encode(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    pub(super) fn decode(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
    }
}

/// A map is how they keep headers: the last of a name wins, at the place of the first.
fn as_map(headers: &Headers) -> Headers {
    let mut out = Headers::new();
    for (name, value) in headers {
        match out.iter_mut().find(|(n, _)| n == name) {
            Some(entry) => entry.1 = value.clone(),
            None => out.push((name.clone(), value.clone())),
        }
    }
    out
}

fn theirs(
    record: &Parts,
    offset: i64,
    sequence: i32,
    producer: ProducerStamp,
    transactional: bool,
) -> TheirRecord {
    let header = |(name, value): &(String, Option<Vec<u8>>)| {
        (StrBytes::from_string(name.clone()), value.clone().map(Bytes::from))
    };
    TheirRecord {
        transactional,
        control: false,
        delete_horizon: false,
        partition_leader_epoch: 5,
        producer_id: producer.id,
        producer_epoch: producer.epoch,
        timestamp_type: TimestampType::Creation,
        offset,
        sequence,
        timestamp: record.timestamp,
        key: record.key.clone().map(Bytes::from),
        value: record.value.clone().map(Bytes::from),
        headers: record.headers.iter().map(header).collect(),
    }
}

/// Few, or as many as `PROPTEST_CASES` says.
fn cases() -> ProptestConfig {
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => ProptestConfig::default(),
        None => ProptestConfig::with_cases(64),
    }
}

proptest! {
    #![proptest_config(cases())]

    /// Times at the limits, too: deltas wrap there and back.
    #[test]
    fn what_is_built_is_read(
        records in records(prop_oneof![any::<i64>(), Just(i64::MIN), Just(i64::MAX)]),
        compression in compression(),
        (producer, transactional) in producer(),
        offset in 0..i64::MAX / 2,
        epoch in any::<i32>(),
    ) {
        let batch = build(&records, compression, producer, transactional);
        let header = verify_produced(&batch).unwrap();
        prop_assert_eq!(header.base_offset, 0);
        prop_assert_eq!(header.max_timestamp, records.iter().map(|r| r.timestamp).max().unwrap());
        let batch = placed(&batch, offset, epoch);
        let header = verify(&batch).unwrap();
        prop_assert_eq!((header.base_offset, header.leader_epoch), (offset, epoch));
        prop_assert_eq!(header.next_offset(), offset + records.len() as i64);
        prop_assert_eq!((header.producer_id, header.producer_epoch), (producer.id, producer.epoch));
        prop_assert_eq!((header.base_sequence, header.is_transactional()), (producer.sequence, transactional));
        let expected: Vec<_> = (offset..).zip(records).collect();
        prop_assert_eq!(open(&batch).unwrap(), expected);
        // Several in one buffer.
        let two = Bytes::from([&batch[..], &batch[..]].concat());
        let split: Vec<_> = Batches::new(two.clone()).map(|b| b.unwrap().1).collect();
        prop_assert_eq!(split, vec![batch.clone(), batch.clone()]);
        let cut = two.slice(..two.len() - 1);
        prop_assert!(Batches::new(cut).last().unwrap().is_err());
    }

    #[test]
    fn theirs_reads_ours(
        records in records(-1i64 << 60..1 << 60),
        compression in compression(),
        (producer, transactional) in producer(),
        offset in 0i64..1 << 40,
    ) {
        let batch = placed(&build(&records, compression, producer, transactional), offset, 5);
        let set = RecordBatchDecoder::decode(&mut batch.clone()).unwrap();
        prop_assert_eq!(set.version, 2);
        prop_assert_eq!(set.records.len(), records.len());
        for ((i, record), found) in (0..).zip(&records).zip(&set.records) {
            let mut expected = theirs(record, offset + i64::from(i), producer.sequence.wrapping_add(i), producer, transactional);
            expected.headers = theirs(&Parts { headers: as_map(&record.headers), ..record.clone() }, 0, 0, producer, false).headers;
            prop_assert_eq!(found, &expected);
        }
    }

    #[test]
    fn ours_reads_theirs(
        records in records(-1i64 << 60..1 << 60),
        compression in compression(),
        (producer, transactional) in producer(),
        offset in 0i64..1 << 40,
    ) {
        let set: Vec<_> = (0..)
            .zip(&records)
            .map(|(i, record)| {
                let sequence = if producer.id < 0 { i - 1 } else { producer.sequence.wrapping_add(i) };
                theirs(record, offset + i64::from(i), sequence, producer, transactional)
            })
            .collect();
        let version = 2;
        let codec = match compression {
            Compression::None => TheirCompression::None,
            Compression::Gzip => TheirCompression::Gzip,
            Compression::Snappy => TheirCompression::Snappy,
            Compression::Lz4 => TheirCompression::Lz4,
        };
        let mut buf = BytesMut::new();
        RecordBatchEncoder::encode(&mut buf, &set, &RecordEncodeOptions { version, compression: codec }).unwrap();
        let batch = buf.freeze();
        let header = verify(&batch).unwrap();
        prop_assert_eq!((header.base_offset, header.leader_epoch), (offset, 5));
        prop_assert_eq!((header.producer_id, header.producer_epoch), (producer.id, producer.epoch));
        prop_assert_eq!((header.compression, header.is_transactional()), (compression, transactional));
        let expected: Vec<_> =
            (offset..).zip(records).map(|(o, r)| (o, Parts { headers: as_map(&r.headers), ..r })).collect();
        prop_assert_eq!(open(&batch).unwrap(), expected);
    }

    /// Hostile bytes: flipped, cut, grown; with the crc made good again, so that what is behind it is reached.
    #[test]
    fn no_bytes_make_it_panic(
        records in prop::collection::vec(parts(any::<i64>()), 1..8),
        compression in compression(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
        fix in any::<bool>(),
    ) {
        let good = build(&records, compression, ProducerStamp::NONE, false);
        let mut bad = good.to_vec();
        for (at, byte) in changes {
            let at = at.index(bad.len());
            bad[at] = byte;
        }
        if let Some(cut) = cut {
            bad.truncate(cut.index(bad.len() + 1));
        }
        if fix {
            mend(&mut bad);
        }
        let bad = Bytes::from(bad);
        let unchanged = bad == good;
        match open(&bad) {
            // Without a mended crc, only what the crc leaves out can differ.
            Ok(_) => prop_assert!(fix || unchanged || bad[UNCOVERED_BYTES..] == good[UNCOVERED_BYTES..]),
            Err(_) => prop_assert!(!unchanged),
        }
        for batch in Batches::new(bad) {
            let _ = batch.map(|(header, batch)| OpenBatch::open_verified(&batch, header, 1000).map(|b| b.iter().count()));
        }
    }
}

/// Makes size and crc those of the bytes.
fn mend(batch: &mut [u8]) {
    if batch.len() >= HEADER_BYTES {
        let length = (batch.len() - 12) as u32;
        batch[8..12].copy_from_slice(&length.to_be_bytes());
        batch[16] = 2;
        let crc = crc32c::crc32c(&batch[UNCOVERED_BYTES..]);
        batch[17..21].copy_from_slice(&crc.to_be_bytes());
    }
}

fn small(compression: Compression) -> Bytes {
    let record = |i: i64| Parts {
        timestamp: 1_431_857_100_000 + i,
        key: (i != 1).then(|| b"83.149.9.216".to_vec()),
        value: (i != 2).then(|| b"abcabcabcabcabcabcabc".repeat(3)),
        headers: if i == 0 { vec![("h".into(), None), ("h".into(), Some(b"2".to_vec()))] } else { vec![] },
    };
    let stamp = ProducerStamp { id: 4000, epoch: 3, sequence: i32::MAX };
    build(&[record(0), record(1), record(2)], compression, stamp, true)
}

#[test]
fn every_bit_and_every_cut_of_a_batch_is_noticed() {
    for compression in CODECS {
        let good = small(compression);
        for bit in 0..good.len() * 8 {
            let mut bad = good.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            let result = verify(&bad);
            // Base offset and leader epoch are the sidecar's to guard.
            let unguarded = bit / 8 < 8 || (12..16).contains(&(bit / 8));
            assert!(unguarded || result.is_err(), "bit {bit}: {result:?}");
        }
        for cut in 0..good.len() {
            let error = verify(&good[..cut]).unwrap_err();
            assert!(matches!(error, BatchError::Truncated { have, .. } if have == cut), "{cut}: {error}");
        }
        assert_eq!(verify(&[&good[..], b"x"].concat()), Err(BatchError::Trailing { extra: 1 }));
    }
}

#[test]
fn golden_batch() {
    let batch = placed(&small(Compression::None), 258, 7);
    assert_eq!(
        hex::encode(&batch),
        concat!(
            "0000000000000102", // base offset 258
            "000000e5",         // length 229
            "00000007",         // leader epoch 7
            "02",               // magic
            "98d0ab98",         // crc32c
            "0010",             // attributes: transactional
            "00000002",         // last offset delta 2
            "0000014d615574e0", // base timestamp
            "0000014d615574e2", // max timestamp
            "0000000000000fa0", // producer id 4000
            "0003",             // producer epoch 3
            "7fffffff",         // base sequence
            "00000003",         // three records
            "b0010000001838332e3134392e392e3231367e616263616263616263616263616263616263616263", // record 0: key, value, header h twice
            "61626361626361626361626361626361626361626361626361626361626361626361626361626361", // ...
            "62630402680102680232",                                                             // ...
            "8a01000202017e616263616263616263616263616263616263616263616263616263616263616263", // record 1: no key
            "61626361626361626361626361626361626361626361626361626361626300",                   // ...
            "240004041838332e3134392e392e3231360100", // record 2: no value
        )
    );
    let marker = control_batch(Marker::Commit, 4000, 3, 1_431_857_100_000, 7);
    assert_eq!(
        hex::encode(&marker),
        "0000000000000000000000420000000702820167a30030000000000000014d615574e00000014d615574e00000000000000fa00003ffffffff000000012000000008000000010c00000000000000"
    );
}

/// A batch as brokers store it after compaction (from the documentation of `kafka-protocol`): one record of four is
/// left, and one of its attribute bits is set, which means nothing.
#[test]
fn a_compacted_batch() {
    let batch = hex::decode(concat!(
        "0000000000000000000000430000000002736d297b00000000000300000000000000000000010000",
        "0000000000000000000000000000000000000000012201d00f020a68656c6c6f0a776f726c6400",
    ));
    let header = verify(&batch).unwrap();
    assert_eq!((header.record_count, header.next_offset(), header.producer_id), (1, 4, 0));
    assert!(verify_produced(&batch).is_err());
    let record = Parts {
        timestamp: 1000,
        key: Some(b"hello".to_vec()),
        value: Some(b"world".to_vec()),
        headers: vec![],
    };
    assert_eq!(open(&batch.into()).unwrap(), [(1, record)]);
}

#[test]
fn markers_are_kafkas() {
    for (marker, kind) in [(Marker::Abort, 0), (Marker::Commit, 1)] {
        let ours = placed(&control_batch(marker, 77, 9, 123, 4), 1000, 4);
        let record = TheirRecord {
            control: true,
            partition_leader_epoch: 4,
            key: Some(Bytes::from(vec![0, 0, 0, kind])),
            value: Some(Bytes::from(vec![0; 6])),
            timestamp: 123,
            headers: [].into_iter().collect(),
            ..theirs(
                &Parts { timestamp: 0, key: None, value: None, headers: vec![] },
                1000,
                -1,
                ProducerStamp { id: 77, epoch: 9, sequence: -1 },
                true,
            )
        };
        assert_eq!(
            RecordBatchDecoder::decode(&mut ours.clone()).unwrap().records,
            std::slice::from_ref(&record)
        );
        let mut buf = BytesMut::new();
        let options = RecordEncodeOptions { version: 2, compression: TheirCompression::None };
        RecordBatchEncoder::encode(&mut buf, [&record], &options).unwrap();
        assert_eq!(ours, buf, "byte for byte");
        let header = verify(&ours).unwrap();
        assert!(header.is_control() && header.is_transactional());
        assert_eq!(header.last_sequence(), None);
        assert!(verify_produced(&ours).is_err(), "a client may not write markers");
        let (_, record) = open(&ours).unwrap().remove(0);
        assert_eq!(Marker::from_key(&record.key.unwrap()), Some(marker));
    }
    assert_eq!(Marker::from_key(&[0, 0, 0, 2]), None);
    assert_eq!(Marker::from_key(&[0, 0, 0]), None);
}

#[test]
fn a_full_builder_refuses_and_goes_on_with_the_next_batch() {
    let mut builder = BatchBuilder::new(BatchOptions { bytes_max: 400, ..BatchOptions::default() });
    let record = RecordParts { timestamp: 1, value: Some(&[7; 100]), ..RecordParts::default() };
    assert!(!builder.push(RecordParts { value: Some(&[7; 400]), ..record }), "fits no batch");
    assert!(builder.is_empty());
    let accepted = std::iter::repeat_with(|| builder.push(record)).take_while(|&pushed| pushed).count();
    assert_eq!((accepted, builder.count()), (3, 3));
    let bytes = builder.bytes();
    let first = builder.build(ProducerStamp::NONE);
    assert_eq!(first.len(), bytes);
    assert!(first.len() <= 400);
    assert!(builder.push(RecordParts { timestamp: 9, ..record }));
    let second = builder.build(ProducerStamp::NONE);
    let header = verify(&second).unwrap();
    assert_eq!((header.base_timestamp, header.max_timestamp, header.record_count), (9, 9, 1));
    assert_eq!(open(&first).unwrap().len(), 3);
}

#[test]
fn bombs_stop_at_the_budget() {
    let zeros = Parts { timestamp: 0, key: None, value: Some(vec![0; 4 << 20]), headers: vec![] };
    for codec in [Compression::Gzip, Compression::Snappy, Compression::Lz4] {
        let batch = build(std::slice::from_ref(&zeros), codec, ProducerStamp::NONE, false);
        assert!(batch.len() < 250_000, "{codec:?}: {}", batch.len());
        assert!(OpenBatch::open(&batch, 5 << 20).is_ok(), "{codec:?}");
        for budget in [0, 1000, 1 << 20, 4 << 20] {
            assert_eq!(OpenBatch::open(&batch, budget).unwrap_err(), BatchError::Budget(budget), "{codec:?}");
        }
    }
    let plain = small(Compression::None);
    assert_eq!(OpenBatch::open(&plain, 10).unwrap_err(), BatchError::Budget(10));
}

#[test]
fn other_codecs_and_formats_are_named() {
    let mut batch = small(Compression::None).to_vec();
    batch[22] = batch[22] & !7 | 4;
    mend(&mut batch);
    assert_eq!(verify(&batch), Err(BatchError::Unsupported("zstd")));
    // Records that are not compressed as the header says.
    for (bits, name) in [(1, "gzip"), (2, "snappy")] {
        let mut batch = small(Compression::None).to_vec();
        batch[22] = batch[22] & !7 | bits;
        mend(&mut batch);
        let opened = OpenBatch::open(&batch.into(), 1 << 20);
        assert_eq!(opened.unwrap_err(), BatchError::Compressed(name));
    }
    let mut old = small(Compression::None).to_vec();
    old[16] = 1;
    assert_eq!(BatchHeader::parse(&old), Err(BatchError::Magic(1)));
}

#[test]
fn what_producers_may_not_send() {
    let good = small(Compression::None);
    let with = |at: usize, bytes: &[u8]| {
        let mut batch = good.to_vec();
        batch[at..at + bytes.len()].copy_from_slice(bytes);
        mend(&mut batch);
        verify_produced(&batch)
    };
    assert!(with(0, &[]).is_ok());
    assert!(with(57, &2i32.to_be_bytes()).is_err(), "fewer records than offsets");
    assert!(with(57, &i32::MAX.to_be_bytes()).is_err(), "more records than bytes");
    assert!(with(57, &(-1i32).to_be_bytes()).is_err());
    assert!(with(23, &(-1i32).to_be_bytes()).is_err());
    assert!(with(43, &(-1i64).to_be_bytes()).is_err(), "transactional without a producer");
    assert!(with(43, &(-2i64).to_be_bytes()).is_err());
    assert!(with(51, &(-1i16).to_be_bytes()).is_err(), "no epoch");
    assert!(with(53, &(-1i32).to_be_bytes()).is_err(), "no sequence");
    assert!(with(0, &(-1i64).to_be_bytes()).is_err());
    assert!(with(0, &i64::MAX.to_be_bytes()).is_err(), "no offset after it");
    // More offsets than records is how a compacted batch looks: it is stored so, not produced so.
    let mut compacted = good.to_vec();
    compacted[23..27].copy_from_slice(&9i32.to_be_bytes());
    mend(&mut compacted);
    assert_eq!(verify(&compacted).unwrap().last_offset(), 9);
    assert!(verify_produced(&compacted).is_err());
}

#[test]
fn append_time_is_the_batchs() {
    let mut batch = small(Compression::None).to_vec();
    batch[22] |= 8;
    batch[35..43].copy_from_slice(&55i64.to_be_bytes());
    mend(&mut batch);
    assert!(open(&batch.into()).unwrap().iter().all(|(_, record)| record.timestamp == 55));
}

#[test]
fn sequences_wrap_to_zero() {
    assert_eq!(advance_sequence(i32::MAX, 1), 0);
    assert_eq!(advance_sequence(i32::MAX - 1, 3), 1);
    assert_eq!(verify(&small(Compression::None)).unwrap().last_sequence(), Some(1));
}
