//! The load: an endless access log in which every line is different and can be made again from its number.
//!
//! ```text
//!   line(n) = 10.0.0.<k> - - [17/May/2015:10:05:03 +0000] "GET /n/<n> HTTP/1.1" 200 1      k by a skewed draw
//! ```
//!
//! So the checker knows for each line it finds in the input which one it is, that it is unchanged, and which are
//! missing or there twice. Of 1000 lines about 70 are out of order within the bound, 3 are late, 2 do not parse.

use crate::chaos::random::{Random, mix};
use crate::recount::utc_text;

/// Event time of line 0: 2015-05-17T10:05:00Z.
const BEGIN_MS: i64 = 1_431_857_100_000;

/// What decides every line.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Chooses addresses and times.
    pub seed: u64,
    /// Addresses.
    pub addresses: u64,
    /// Lines per second of event time.
    pub event_rate: u64,
    /// How far out of order a line may be that is not late, in milliseconds.
    pub bound_ms: i64,
}

impl Load {
    /// Line number `n`, without a newline.
    pub fn line(&self, n: u64) -> String {
        let mut random = Random::new(mix(self.seed).wrapping_add(n.wrapping_mul(0x2545_f491_4f6c_dd1d)));
        // The square of a uniform draw: the first tenth of the addresses gets a third of the lines.
        let draw = (random.below(1 << 20) * random.below(1 << 20)) >> 20;
        let k = (draw * self.addresses) >> 20;
        let ip = match k % 6 {
            5 => format!("2001:db8::{k:x}"),
            _ => format!("10.{}.{}.{}", k >> 16, k >> 8 & 255, k & 255),
        };
        let kind = random.below(1000);
        if kind < 2 {
            return format!("{ip} wrote no line of any log /n/{n} ");
        }
        let behind = match kind {
            2..5 => self.bound_ms + random.between(3_000, 20_000) as i64,
            5..75 => random.below(self.bound_ms as u64 * 3 / 4) as i64,
            _ => 0,
        };
        let at = BEGIN_MS + (n * 1000 / self.event_rate) as i64 - behind;
        let time = clf(at);
        format!("{ip} - - [{time} +0000] \"GET /n/{n} HTTP/1.1\" 200 1")
    }

    /// The number of a line, if it is one of this load, unchanged.
    pub fn number(&self, line: &[u8]) -> Option<u64> {
        let line = std::str::from_utf8(line).ok()?;
        let (_, rest) = line.split_once("/n/")?;
        let n = rest.split(' ').next()?.parse().ok()?;
        (self.line(n) == line).then_some(n)
    }
}

/// `17/May/2015:10:05:03` of milliseconds since the epoch.
fn clf(at_ms: i64) -> String {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    // 2015-05-17T10:05:03.000Z
    let text = utc_text(at_ms);
    let month = text[5..7].parse::<usize>().map_or("???", |month| MONTHS[month - 1]);
    format!("{}/{month}/{}:{}", &text[8..10], &text[..4], &text[11..19])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recount::parse;

    const LOAD: Load = Load { seed: 3, addresses: 100, event_rate: 400, bound_ms: 3_000 };

    #[test]
    fn lines_are_known_again() {
        for n in 0..5_000 {
            let line = LOAD.line(n);
            assert_eq!(LOAD.number(line.as_bytes()), Some(n), "{line}");
        }
        let line = LOAD.line(77);
        assert_eq!(LOAD.number((line.clone() + "2").as_bytes()), None);
        assert_eq!(LOAD.number(b"nothing"), None);
        assert_ne!(Load { seed: 4, ..LOAD }.line(77), line);
    }

    #[test]
    fn there_is_something_of_every_kind() {
        let lines: Vec<_> = (0..20_000).map(|n| LOAD.line(n)).collect();
        let dead = lines.iter().filter(|line| parse(line.as_bytes()).is_none()).count();
        assert!((10..100).contains(&dead), "{dead}");
        let v6 = lines.iter().filter(|line| line.starts_with("2001")).count();
        assert!((1_000..8_000).contains(&v6), "{v6}");
        let mut ips: Vec<_> = lines.iter().map(|line| line.split(' ').next()).collect();
        ips.sort_unstable();
        ips.dedup();
        assert!((70..=100).contains(&ips.len()), "{}", ips.len());
        let first = parse(lines[100].as_bytes()).unwrap().1;
        let last = parse(lines[19_999].as_bytes()).unwrap().1;
        assert!((last - first - 50_000).abs() < 30_000, "{first} {last}");
    }
}
