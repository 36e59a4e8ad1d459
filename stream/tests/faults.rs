//! Each broken rule is noticed, and by which test at the least cost: `cargo test --features faults --test faults`.
//!
//! A case of `script/cases` is cheaper than a seed of the random jobs, because it says what it shows; of the cases the one
//! with the fewest commands comes first, of the seeds the lowest. Whatever notices a fault first in this order is its
//! cheapest test. The table is `docs/engine-faults.md`; `TIDEMILL_GOLDEN=write` writes it. Which seed it was is printed and
//! not in the table: what a seed meets changes with every queue and limit of the engine.
#![cfg(feature = "faults")]
#![allow(clippy::print_stdout, reason = "the table of what noticed what")]

mod script;

use std::fmt::Write as _;
use std::panic::catch_unwind;

use script::{Case, cases};
use tidemill_stream::fault::{self, Fault};
use tidemill_stream::testing::random::simulate;

/// Seeds tried before a break counts as unnoticed.
const SEEDS: u64 = 20_000;

const HEAD: &str = "\
# What notices a broken rule of the engine

One rule is broken at a time (cargo feature `faults`, one build, the rule chosen at run time), and the tests are run until
one fails. Below, for each rule, the cheapest test that does: a case of `stream/tests/script/cases`, or the random jobs
(`stream/tests/random_jobs.rs`) from seed 0 on. `stream/tests/faults.rs` makes this table, prints the seeds, and holds the
code against it; the log's bank is in [fault-bank.md](fault-bank.md). `replayed-twice` changes no row, because a changelog
has whole values: it is noticed by what a start says that it replayed.

    cargo test --release -p tidemill-stream --features faults --test faults -- --nocapture

| broken rule | what is done wrong | cheapest test that notices |
|---|---|---|
";

fn notices_case(case: &Case) -> bool {
    let ran = catch_unwind(|| case.record(case.driver(case.tasks).expect("the plan of a case")));
    !matches!(ran, Ok(Ok(ran)) if ran.text == case.text)
}

fn notices_seed(seed: u64) -> bool {
    catch_unwind(|| simulate(seed)).map_or(true, |ran| ran.is_err())
}

fn cheapest(cases: &[Case]) -> Option<String> {
    if let Some(case) = cases.iter().find(|case| notices_case(case)) {
        println!("noticed by case {}", case.name);
        return Some(format!("case `{}`", case.name));
    }
    let seed = (0..SEEDS).find(|seed| notices_seed(*seed))?;
    println!("noticed by random job {seed}");
    Some("the random jobs".to_owned())
}

#[test]
fn each_broken_rule_is_noticed() {
    let mut cases: Vec<_> = cases().into_iter().filter(|case| !case.text.contains("> hour")).collect();
    cases.sort_by_key(|case| {
        (case.text.lines().filter(|line| line.starts_with('>')).count(), case.name.clone())
    });
    // What fails with every rule kept notices nothing.
    assert!(cases.iter().all(|case| !notices_case(case)));
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let (mut table, mut unnoticed) = (HEAD.to_owned(), Vec::new());
    for broken in Fault::ALL.iter().copied() {
        print!("{}: ", broken.name());
        fault::set(Some(broken));
        let by = cheapest(&cases);
        fault::set(None);
        match by {
            Some(by) => {
                writeln!(table, "| `{}` | {} | {by} |", broken.name(), broken.rule()).expect("a string")
            }
            None => unnoticed.push(broken),
        }
    }
    std::panic::set_hook(quiet);
    assert!(unnoticed.is_empty(), "not noticed by any case or any of {SEEDS} seeds: {unnoticed:?}");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/engine-faults.md");
    if std::env::var("TIDEMILL_GOLDEN").is_ok_and(|v| v == "write") {
        std::fs::write(path, &table).expect("the docs can be written");
    }
    let want = std::fs::read_to_string(path).unwrap_or_default();
    assert!(table == want, "the table changed (TIDEMILL_GOLDEN=write writes {path})");
}
