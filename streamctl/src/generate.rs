//! `streamctl gen access-log`: a synthetic access log in the combined format, the same for the same seed.
//!
//! ```text
//! line i is due at start + i / rate; the address is drawn by a Zipf law over `addresses`
//!   929 in 1000   written with that time
//!    68 in 1000   up to 8 s behind: out of order, within the default bound of job ip-count
//!     2 in 1000   15 to 75 s behind: beyond it
//!     1 in 1000   does not parse (cut off, no address, no such date, another log's line, bytes that are no text)
//! ```
//!
//! One address in six is IPv6. Each address keeps one zone offset; the times of all of them agree once the offset is
//! taken away. Nothing depends on the machine, so a seed names a file.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use jiff::tz::Offset;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::cli::GenAccessLog;
use crate::stdout::{self, OrClosed};

/// Of addresses: how much more often the first is seen than the others. 0.9 is close to what web servers see.
const ZIPF_EXPONENT: f64 = 0.9;

/// Seconds east of UTC an address may write; UTC is the most common by far.
const ZONES: [i32; 12] = [0, 0, 0, 0, 0, 0, 7200, -25_200, 19_800, 32_400, -12_600, 45_900];

const PATHS: [&str; 16] = [
    "/",
    "/index.html",
    "/favicon.ico",
    "/robots.txt",
    "/style/main.css",
    "/js/app.js",
    "/images/logo.png",
    "/images/banner-wide.jpg",
    "/blog/",
    "/blog/2015/05/a-queue-from-scratch.html",
    "/blog/tags/streams?page=2",
    "/downloads/tidemill-0.1.0.tar.gz",
    "/search?q=exactly+once&lang=en",
    "/api/v1/items/4711",
    "/login",
    "/feed.xml",
];

const REFERERS: [&str; 5] = [
    "-",
    "-",
    "http://www.example.com/",
    "https://www.google.com/search?q=message+queue",
    "http://www.example.com/blog/",
];

const AGENTS: [&str; 6] = [
    "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_9_1) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/32.0.1700.77 Safari/537.36",
    "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)",
    "curl/8.5.0",
    "UniversalFeedParser/4.2-pre-314-svn +http://feedparser.org/",
    "-",
];

/// Runs the command.
pub fn access_log(args: &GenAccessLog) -> Result<()> {
    let mut log = AccessLog::new(args.seed, args.addresses, args.rate, args.start);
    let shown = io::stderr().is_terminal() && (args.file.is_some() || !io::stdout().is_terminal());
    let progress = if shown {
        let style = ProgressStyle::with_template("{bar:40} {human_pos} of {human_len} lines, {eta} left")?;
        ProgressBar::new(args.lines).with_style(style)
    } else {
        ProgressBar::hidden()
    };
    match &args.file {
        Some(path) => {
            let cannot = || cannot_write(path);
            let mut out = BufWriter::with_capacity(1 << 20, File::create(path).with_context(cannot)?);
            write_lines(&mut log, args.lines, &progress, |line| out.write_all(line)).with_context(cannot)?;
            out.flush().with_context(cannot)?;
        }
        None => {
            let mut out = stdout::buffered();
            write_lines(&mut log, args.lines, &progress, |line| out.write_all(line)).or_closed()?;
            out.flush().or_closed()?;
        }
    }
    progress.finish_and_clear();
    Ok(())
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
}

fn write_lines(
    log: &mut AccessLog,
    lines: u64,
    progress: &ProgressBar,
    mut write: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut line = Vec::with_capacity(400);
    for i in 0..lines {
        line.clear();
        log.next_line(&mut line);
        line.push(b'\n');
        write(&line)?;
        if i % 65_536 == 0 {
            progress.set_position(i);
        }
    }
    Ok(())
}

/// One client: its address as a log writes it, and the zone it writes times in.
#[derive(Debug)]
struct Address {
    text: String,
    zone: Offset,
    zone_text: String,
}

/// The lines of one seed, one after the other.
#[derive(Debug)]
pub struct AccessLog {
    rng: ChaCha8Rng,
    addresses: Vec<Address>,
    /// Share of all lines that the addresses up to this one have.
    cumulative: Vec<f64>,
    rate: u64,
    start: Timestamp,
    written: u64,
    text: String,
}

impl AccessLog {
    /// A log that starts at `start` of event time and has `rate` lines a second; both counts are at least 1.
    pub fn new(seed: u64, addresses: u32, rate: u32, start: Timestamp) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut known = HashSet::new();
        let mut list = Vec::with_capacity(addresses as usize);
        while list.len() < addresses as usize {
            let ip = address(&mut rng);
            if known.insert(ip) {
                let seconds = ZONES[below(&mut rng, ZONES.len() as u64) as usize];
                let minutes = seconds.abs() / 60;
                let sign = if seconds < 0 { '-' } else { '+' };
                list.push(Address {
                    text: ip.to_string(),
                    zone: Offset::from_seconds(seconds).unwrap_or(Offset::UTC),
                    zone_text: format!("{sign}{:02}{:02}", minutes / 60, minutes % 60),
                });
            }
        }
        let mut cumulative: Vec<f64> = (1..=addresses)
            .scan(0.0, |sum, rank| {
                *sum += f64::from(rank).powf(-ZIPF_EXPONENT);
                Some(*sum)
            })
            .collect();
        let total = cumulative.last().copied().unwrap_or(1.0);
        cumulative.iter_mut().for_each(|share| *share /= total);
        AccessLog {
            rng,
            addresses: list,
            cumulative,
            rate: u64::from(rate),
            start,
            written: 0,
            text: String::new(),
        }
    }

    /// Appends the next line to `line`, without its newline.
    pub fn next_line(&mut self, line: &mut Vec<u8>) {
        let rng = &mut self.rng;
        let due_ms = i64::try_from(self.written.saturating_mul(1000) / self.rate).unwrap_or(i64::MAX);
        self.written += 1;
        // 53 random bits are a number in [0, 1) exactly.
        let share = (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let who = self.cumulative.partition_point(|up_to| *up_to <= share).min(self.addresses.len() - 1);
        let kind = below(rng, 1000);
        let behind_ms = match kind {
            0 | 1 => 15_000 + below(rng, 60_000),
            2..=69 => below(rng, 8_000),
            _ => 0,
        } as i64;
        let at_ms = self.start.as_millisecond().saturating_add(due_ms).saturating_sub(behind_ms);
        let at = Timestamp::from_millisecond(at_ms).unwrap_or(Timestamp::MAX);
        let path = PATHS[(below(rng, 16) * below(rng, 16) / 15) as usize];
        let roll = below(rng, 100);
        let (method, status) = match roll {
            0..=84 => ("GET", "200"),
            85..=89 => ("GET", "304"),
            90..=93 => ("GET", "404"),
            94..=96 => ("POST", "302"),
            97..=98 => ("HEAD", "200"),
            _ => ("GET", "500"),
        };
        let size = below(rng, 200_000);
        let referer = REFERERS[below(rng, 5) as usize];
        let agent = AGENTS[below(rng, 6) as usize];

        let Address { text: ip, zone, zone_text } = &self.addresses[who];
        let local = zone.to_datetime(at);
        let text = &mut self.text;
        text.clear();
        // Writing to a String does not fail.
        let _ = write!(
            text,
            "{ip} - - [{:02}/{}/{:04}:{:02}:{:02}:{:02} {zone_text}] \"{method} {path} HTTP/1.1\" {status} ",
            local.day(),
            month(local.month()),
            local.year(),
            local.hour(),
            local.minute(),
            local.second(),
        );
        let _ = match status {
            "304" => write!(text, "-"),
            _ => write!(text, "{size}"),
        };
        let _ = write!(text, " \"{referer}\" \"{agent}\"");
        if kind == 70 { damage(rng, text, line) } else { line.extend_from_slice(text.as_bytes()) }
    }
}

/// Writes something in the place of the line `whole` that is no line of an access log.
fn damage(rng: &mut ChaCha8Rng, whole: &str, line: &mut Vec<u8>) {
    match below(rng, 7) {
        // A writer that died: the rest of the line is missing from somewhere within the time on.
        0 => {
            let time = whole.find('[').unwrap_or(0) as u64;
            line.extend_from_slice(&whole.as_bytes()[..(time + 1 + below(rng, 24)) as usize]);
        }
        1 => line.extend_from_slice(whole.replacen(|c: char| c.is_ascii_hexdigit(), "x", 1).as_bytes()),
        2 => {
            let (host, rest) = whole.split_once(' ').unwrap_or((whole, ""));
            let _ = write!(line, "unknown-{} {rest}", host.len());
        }
        3 => {
            let (before, after) = whole.split_once('[').unwrap_or((whole, ""));
            let _ = write!(line, "{before}[31/Feb{}", after.get(6..).unwrap_or(""));
        }
        4 => line.extend_from_slice(b"[error] [client 10.0.0.1] File does not exist: /var/www/favicon.ico"),
        5 => line.extend_from_slice(&[0x16, 0x03, 0x01, 0x02, 0x00, 0xff, 0xfe, 0x80]),
        _ => {}
    }
}

fn address(rng: &mut ChaCha8Rng) -> IpAddr {
    let bits = rng.next_u64();
    if below(rng, 6) == 0 {
        let low = rng.next_u64();
        // Short ones too, so that the `::` form of the text is met.
        let low = if bits.is_multiple_of(3) { low & 0xffff } else { low };
        IpAddr::V6(Ipv6Addr::from_bits(
            0x2001_0db8_u128 << 96 | u128::from(bits >> 48) << 64 | u128::from(low),
        ))
    } else {
        let [a, b, c, d, ..] = bits.to_be_bytes();
        // First octets 11 to 222 leave out private, loopback and multicast addresses (127 and 172 look like any other).
        IpAddr::V4(Ipv4Addr::new(11 + a % 212, b, c, 1 + d % 254))
    }
}

/// A number below `n`; the bias of the remainder does not matter here.
fn below(rng: &mut ChaCha8Rng, n: u64) -> u64 {
    rng.next_u64() % n
}

fn month(number: i8) -> &'static str {
    const NAMES: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    NAMES[usize::from(number.unsigned_abs().clamp(1, 12)) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;
    use xtask::recount::{self, Recount, Settings};

    fn lines(seed: u64, n: usize) -> Vec<u8> {
        let mut log = AccessLog::new(seed, 1000, 2000, "2015-05-17T10:05:00Z".parse().unwrap());
        let mut text = Vec::new();
        for _ in 0..n {
            log.next_line(&mut text);
            text.push(b'\n');
        }
        text
    }

    #[test]
    fn a_seed_names_a_file() {
        assert_eq!(lines(7, 500), lines(7, 500));
        assert_ne!(lines(7, 500), lines(8, 500));
    }

    #[test]
    fn every_kind_of_line_is_there() {
        let text = lines(1, 100_000);
        let recount = Recount::of(Settings { partitions: 4, window_ms: 5000, bound_ms: 10_000 }, &text);
        assert_eq!(recount.lines, 100_000);
        let (late, dead) = (recount.late.values().sum::<u64>(), recount.dead.values().sum::<u64>());
        assert!((100..300).contains(&late), "{late} late");
        assert!((50..200).contains(&dead), "{dead} dead");
        assert_eq!(recount.counted() + late + dead, 100_000);
        assert!(recount.counts.keys().any(|(_, ip)| ip.is_ipv6()), "no IPv6");
        let top = recount.top(2);
        assert!(top[0].1 > top[1].1 + top[1].1 / 3, "not Zipf: {top:?}");
        for sample in [" +0530]", " -0700]", " +0000]"] {
            assert!(text.windows(sample.len()).any(|w| w == sample.as_bytes()), "{sample}");
        }
    }

    #[test]
    fn out_of_order_within_the_bound_is_not_late() {
        let text = lines(3, 20_000);
        let mut times = text.split(|b| *b == b'\n').filter_map(recount::parse).map(|(_, at)| at);
        let first = times.next().unwrap();
        let mut newest = first;
        let mut behind = 0;
        for at in times {
            behind += u32::from(at < newest);
            newest = newest.max(at);
        }
        assert!(behind > 500, "{behind} lines behind");
        assert!((9_000..=10_000).contains(&(newest - first)), "20,000 lines at 2,000 a second take 10 s");
    }
}
