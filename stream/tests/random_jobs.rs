//! 10,000 random small jobs and schedules equal a sequential reference. `TIDEMILL_SEEDS=0-10000` runs them all.
#![allow(clippy::print_stdout, reason = "a seed told in words")]

use tidemill_stream::testing::random::{Tally, simulate};

fn seeds() -> std::ops::Range<u64> {
    let range = std::env::var("TIDEMILL_SEEDS").unwrap_or_else(|_| "0-1500".to_owned());
    let (first, last) = range.split_once('-').expect("TIDEMILL_SEEDS is FIRST-LAST");
    first.parse().expect("a number")..last.parse().expect("a number")
}

#[test]
fn random_jobs_equal_the_reference() {
    let mut total = Tally::default();
    let mut failed = Vec::new();
    for seed in seeds() {
        match simulate(seed) {
            Ok(tally) => total.add(&tally),
            Err(violation) => failed.push((seed, violation)),
        }
    }
    assert!(
        failed.is_empty(),
        "{} seeds fail, first {} of them: {:#?}",
        failed.len(),
        5.min(failed.len()),
        &failed[..5.min(failed.len())]
    );
    // A sweep that never meets the hard cases proves nothing.
    let Tally { outputs, late, crashes, aborts, bounded_ends, joins, replayed, evicted, store_hits, .. } =
        total;
    for (what, met) in [
        ("outputs", outputs),
        ("late rows", late),
        ("crashes", crashes),
        ("aborts", aborts),
        ("bounded ends", bounded_ends),
        ("joins", joins),
    ] {
        assert!(met > 0, "no {what} in {total:?}");
    }
    assert!(replayed > 0 && evicted > 0 && store_hits > 0, "{total:?}");
}

/// `TIDEMILL_TRACE=491 cargo test --test random_jobs trace -- --nocapture` tells what one seed went through.
#[test]
fn a_seed_can_be_told_in_words() {
    let seed = std::env::var("TIDEMILL_TRACE").map_or(1, |s| s.parse().expect("a seed"));
    let (result, words) = tidemill_stream::testing::random::trace(seed);
    println!("{}\n{result:?}", words.join("\n"));
    assert!(words.iter().any(|w| w.starts_with("-- start")));
}
