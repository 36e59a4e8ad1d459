//! What building and reading batches allocates, counted.

use bytes::Bytes;
use proptest::prelude::*;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tidemill_log::batch::{
    BatchBuilder, BatchOptions, Compression, HEADER_BYTES, OpenBatch, ProducerStamp, RecordParts, verify,
};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<std::alloc::System> = &INSTRUMENTED_SYSTEM;

/// One test function: the counters are the process's.
#[test]
fn memory_is_bounded_by_batches_and_bytes() {
    building_and_reading_allocates_per_batch();
    nothing_is_allocated_that_the_bytes_do_not_back();
}

fn batch(records: usize, compression: Compression) -> Bytes {
    let mut builder = BatchBuilder::new(BatchOptions { compression, ..BatchOptions::default() });
    for i in 0..records {
        assert!(push(&mut builder, i));
    }
    builder.build(ProducerStamp::NONE)
}

fn push(builder: &mut BatchBuilder, i: usize) -> bool {
    let headers = [("name", Some(&b"value"[..]))];
    builder.push(RecordParts {
        timestamp: i as i64,
        key: Some(b"key"),
        value: Some(&[i as u8; 90]),
        headers: &headers,
    })
}

fn building_and_reading_allocates_per_batch() {
    for compression in [Compression::None, Compression::Gzip, Compression::Snappy, Compression::Lz4] {
        let mut builder = BatchBuilder::new(BatchOptions { compression, ..BatchOptions::default() });
        for round in 0..3 {
            let region = Region::new(ALLOCATOR);
            for i in 0..5000 {
                assert!(push(&mut builder, i));
            }
            let built = builder.build(ProducerStamp::NONE);
            let stats = region.change();
            let calls = stats.allocations + stats.reallocations;
            assert!(calls < 60, "{compression:?} {round}: {stats:?}");
            let region = Region::new(ALLOCATOR);
            let open = OpenBatch::open(&built, 1 << 20).unwrap();
            assert_eq!(open.iter().map(|r| r.unwrap().headers.iter().count()).sum::<usize>(), 5000);
            assert_eq!(open.records().map(|r| r.unwrap().value.unwrap().len()).sum::<usize>(), 5000 * 90);
            let stats = region.change();
            assert!(stats.allocations + stats.reallocations < 40, "{compression:?}: {stats:?}");
        }
    }
}

fn nothing_is_allocated_that_the_bytes_do_not_back() {
    const BUDGET: usize = 1 << 20;
    let packed = [Compression::Gzip, Compression::Snappy, Compression::Lz4];
    let mut seeds = vec![batch(3, Compression::None)];
    seeds.extend(packed.into_iter().flat_map(|codec| [batch(3, codec), batch(2000, codec)]));
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(3000));
    let strategy = (prop::sample::select(seeds), changes);
    let result = runner.run(&strategy, |(seed, changes)| {
        let mut bad = seed.to_vec();
        for (at, byte) in changes {
            let at = 21 + at.index(bad.len() - 21);
            bad[at] = byte;
        }
        let crc = crc32c::crc32c(&bad[21..]);
        bad[17..21].copy_from_slice(&crc.to_be_bytes());
        let (bad, received) = (Bytes::from(bad), seed.len());
        let region = Region::new(ALLOCATOR);
        let walked = OpenBatch::open(&bad, BUDGET)
            .map(|b| (b.header().compression, b.iter().count(), b.records().count()));
        let stats = region.change();
        let allocated = stats.bytes_allocated + stats.bytes_reallocated.unsigned_abs();
        // How much a codec's bytes may become, up to the budget, and what its decoder takes however small they are;
        // growing by doubling touches four times that.
        let (times, fixed) = match verify(&bad).map(|h| h.compression) {
            Ok(Compression::Gzip) => (1032, 64 << 10),
            Ok(Compression::Snappy) => (22, 0),
            Ok(Compression::Lz4) => (255, 0),
            Ok(Compression::None) | Err(_) => (0, 0),
        };
        let backed = ((received - HEADER_BYTES) * times).min(BUDGET);
        prop_assert!(
            allocated <= 4 * backed + fixed + 1024,
            "{} bytes for {}: {:?}",
            allocated,
            received,
            walked
        );
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}
