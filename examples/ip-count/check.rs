//! The check: the same counts by a loop over the lines, without topic, job or windows in state.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use tidemill_examples::say;

use crate::count::{Counted, Counts, WINDOW_MS};

/// What should come out.
#[derive(Debug, Default)]
pub(crate) struct Expected {
    counts: Counts,
    lines: u64,
    damaged: u64,
    late: u64,
}

/// Counts lines in their order; each is a moment and an address, or nothing where it is damaged. A line is late if the
/// lines before it had already closed its window.
pub(crate) fn recount(
    lines: impl IntoIterator<Item = Option<(i64, IpAddr)>>,
    out_of_order_ms: i64,
) -> Expected {
    let mut expected = Expected::default();
    let mut newest = i64::MIN;
    for line in lines {
        expected.lines += 1;
        let Some((at, ip)) = line else {
            expected.damaged += 1;
            continue;
        };
        let start = at - at.rem_euclid(WINDOW_MS);
        if start + WINDOW_MS <= newest.saturating_sub(out_of_order_ms) {
            expected.late += 1;
        } else {
            *expected.counts.entry((start, ip)).or_default() += 1;
        }
        newest = newest.max(at);
    }
    expected
}

/// Compares, and says how it went.
pub(crate) fn compare(counted: &Counted, expected: &Expected) -> Result<()> {
    let sum: u64 = counted.counts.values().sum();
    say(format_args!(
        "{} lines = {sum} counted + {} damaged + {} late; {} rows; {} closed only because the input ended",
        counted.lines,
        counted.damaged,
        counted.late,
        counted.counts.len(),
        match counted.closed_early {
            1 => "1 window".to_owned(),
            n => format!("{n} windows"),
        },
    ));
    let different =
        counted.counts.iter().filter(|(at, count)| expected.counts.get(at) != Some(count)).count();
    let missing = expected.counts.keys().filter(|at| !counted.counts.contains_key(at)).count();
    let exact = different == 0
        && missing == 0
        && counted.twice == 0
        && (counted.lines, counted.damaged, counted.late)
            == (expected.lines, expected.damaged, expected.late);
    say(format_args!("every window exact: {}", if exact { "yes" } else { "NO" }));
    ensure!(
        exact,
        "{different} rows differ from a recount, {missing} are missing, {} came twice; a recount of {} lines finds {} \
         damaged and {} late",
        counted.twice,
        expected.lines,
        expected.damaged,
        expected.late
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_can_fail() {
        let ip = IpAddr::from([192, 168, 1, 1]);
        let lines = [Some((1_000, ip)), Some((4_999, ip)), None, Some((5_000, ip)), Some((0, ip))];
        let expected = recount(lines, 0);
        assert_eq!((expected.lines, expected.damaged, expected.late), (5, 1, 1));
        let mut counted = Counted {
            counts: [((0, ip), 2), ((5_000, ip), 1)].into(),
            lines: 5,
            damaged: 1,
            late: 1,
            ..Counted::default()
        };
        assert!(compare(&counted, &expected).is_ok());
        counted.counts.insert((0, ip), 3);
        assert!(compare(&counted, &expected).is_err(), "a row that is one too high");
        counted.counts.remove(&(0, ip));
        assert!(compare(&counted, &expected).is_err(), "a row that is missing");
        counted.counts.insert((0, ip), 2);
        counted.twice = 1;
        assert!(compare(&counted, &expected).is_err(), "a row that came twice");
        assert_eq!(recount(lines, 5_000).late, 0, "with the bound, nothing is late");
    }
}
