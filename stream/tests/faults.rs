//! Each broken rule is noticed by some seed of the random jobs: `cargo test --features faults --test faults`.
#![cfg(feature = "faults")]
#![allow(clippy::print_stdout, reason = "the table of what noticed what")]

use tidemill_stream::fault::{self, Fault};
use tidemill_stream::testing::random::simulate;

/// Seeds tried before a break counts as unnoticed.
const SEEDS: u64 = 20_000;

#[test]
fn each_broken_rule_is_noticed() {
    let all = std::env::var("TIDEMILL_FAULT_SEEDS").ok().map(|n| n.parse::<u64>().expect("a number"));
    let mut unnoticed = Vec::new();
    for broken in Fault::ALL {
        fault::set(Some(broken));
        let fails = |seed: &u64| std::panic::catch_unwind(|| simulate(*seed)).map_or(true, |r| r.is_err());
        let quiet = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let (first, count) = match all {
            Some(n) => {
                let failed: Vec<_> = (0..n).filter(fails).collect();
                (failed.first().copied(), failed.len())
            }
            None => {
                let first = (0..SEEDS).find(fails);
                (first, usize::from(first.is_some()))
            }
        };
        std::panic::set_hook(quiet);
        fault::set(None);
        match first {
            Some(seed) => println!("{:22} noticed by seed {seed} ({count})", format!("{broken:?}")),
            None => unnoticed.push(broken),
        }
    }
    assert!(unnoticed.is_empty(), "not noticed by any of {SEEDS} seeds: {unnoticed:?}");
}
