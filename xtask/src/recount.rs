//! The oracle of job `ip-count`: a sequential recount of an access log, partition by partition.
//!
//! It shares no code with the job, the engine or the log: its own line parser, its own calendar, its own murmur2, and
//! the three rules below, applied to one line after the other.
//!
//! ```text
//! line ─▶ key = text before the first space ─▶ partition = (murmur2(key) & 0x7fff_ffff) % partitions
//!                                                 │
//!      does not parse ─▶ dead letter              ▼
//!      window end - 1 ms <= stamp ─▶ late         stamp = largest event time seen in the partition - bound - 1 ms
//!      else count[window, address] += 1
//! ```
//!
//! Rules, as the engine documents them:
//!
//! * The stamp of a row is its partition's event-time watermark *before* the row.
//! * A row that is late still is a row: it cannot raise the maximum, so nothing depends on whether it is looked at.
//! * After a bounded run has closed every window, a row is also late for any window that ends at or below the largest
//!   end that was closed ([`Recount::end_bounded_run`]).

use std::collections::HashMap;
use std::net::IpAddr;

/// What a row counts towards: window start in milliseconds since the epoch, and the address.
pub type Cell = (i64, IpAddr);

/// Lines and how often each occurs: a set in which repeats count.
pub type Lines = HashMap<Vec<u8>, u64>;

/// The settings of the job that decide its output.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Partitions of the input topic.
    pub partitions: u32,
    /// Window size in milliseconds.
    pub window_ms: i64,
    /// How far out of order event times may be, in milliseconds.
    pub bound_ms: i64,
}

/// What the job must have written once it has read all lines and closed all windows.
#[derive(Debug)]
pub struct Recount {
    settings: Settings,
    /// Largest event time per partition; none before its first row.
    newest: Vec<Option<i64>>,
    closed_through: Option<i64>,
    /// Rows per window and address.
    pub counts: HashMap<Cell, u64>,
    /// Lines that came after their window had closed.
    pub late: Lines,
    /// Lines that do not parse.
    pub dead: Lines,
    /// All lines seen.
    pub lines: u64,
}

impl Recount {
    /// An empty recount.
    pub fn new(settings: Settings) -> Self {
        Recount {
            settings,
            newest: vec![None; settings.partitions as usize],
            closed_through: None,
            counts: HashMap::new(),
            late: Lines::new(),
            dead: Lines::new(),
            lines: 0,
        }
    }

    /// The recount of a whole file of lines.
    pub fn of(settings: Settings, text: &[u8]) -> Self {
        let mut recount = Recount::new(settings);
        recount.add_all(text);
        recount
    }

    /// Adds every line of `text`; a last line without a newline is one too.
    pub fn add_all(&mut self, text: &[u8]) {
        let text = text.strip_suffix(b"\n").unwrap_or(text);
        if text.is_empty() && self.lines == 0 {
            return;
        }
        for line in text.split(|b| *b == b'\n') {
            self.add(line);
        }
    }

    /// Adds one line, without its newline.
    pub fn add(&mut self, line: &[u8]) {
        self.lines += 1;
        let Some((ip, at)) = parse(line) else {
            *self.dead.entry(line.to_vec()).or_default() += 1;
            return;
        };
        let key = line.split(|b| *b == b' ').next().unwrap_or_default();
        let partition = partition_of(key, self.settings.partitions);
        let newest = &mut self.newest[partition as usize];
        let stamp = newest.map(|newest| newest - self.settings.bound_ms - 1);
        *newest = Some(newest.map_or(at, |newest| newest.max(at)));
        let start = at - at.rem_euclid(self.settings.window_ms);
        let end = start + self.settings.window_ms;
        let late = stamp.is_some_and(|stamp| end - 1 <= stamp);
        if late || self.closed_through.is_some_and(|closed| end <= closed) {
            *self.late.entry(line.to_vec()).or_default() += 1;
        } else {
            *self.counts.entry((start, ip)).or_default() += 1;
        }
    }

    /// A `--until-end` run ended here: every window with a row in it was closed.
    pub fn end_bounded_run(&mut self) {
        let last = self.counts.keys().map(|(start, _)| start + self.settings.window_ms).max();
        self.closed_through = self.closed_through.max(last);
    }

    /// Rows in all windows.
    pub fn counted(&self) -> u64 {
        self.counts.values().sum()
    }

    /// The addresses with the most counted rows, most first, equal ones by text.
    pub fn top(&self, n: usize) -> Vec<(String, u64)> {
        let mut by_address: HashMap<IpAddr, u64> = HashMap::new();
        for ((_, ip), count) in &self.counts {
            *by_address.entry(*ip).or_default() += count;
        }
        let mut top: Vec<_> = by_address.into_iter().map(|(ip, n)| (ip.to_string(), n)).collect();
        top.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        top.truncate(n);
        top
    }
}

/// Address and event time (milliseconds since the epoch) of a line in the common or combined log format:
/// `host ident user [17/May/2015:10:05:03 +0000] "request" status size`, then whatever the server appends. Real logs cut
/// the quoted texts of the combined format off, so those are not looked at.
pub fn parse(line: &[u8]) -> Option<(IpAddr, i64)> {
    let line = std::str::from_utf8(line).ok()?;
    let (host, rest) = line.split_once(' ')?;
    let ip: IpAddr = host.parse().ok()?;
    let (names, rest) = rest.split_once(" [")?;
    let (ident, user) = names.split_once(' ')?;
    if ident.is_empty() || user.is_empty() {
        return None;
    }
    let (time, rest) = rest.split_once("] ")?;
    let at = time_of(time)?;
    let rest = quoted(rest)?.strip_prefix(' ')?;
    let (status, rest) = rest.split_once(' ')?;
    if status.len() != 3 || !status.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let size = rest.split_once(' ').map_or(rest, |(size, _)| size);
    let sized = size == "-" || (!size.is_empty() && size.bytes().all(|b| b.is_ascii_digit()));
    sized.then_some((ip, at))
}

/// What follows a quoted text; a backslash takes the next character's meaning away.
fn quoted(text: &str) -> Option<&str> {
    let body = text.strip_prefix('"')?;
    let mut escaped = false;
    for (at, c) in body.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return Some(&body[at + 1..]),
            _ => {}
        }
    }
    None
}

/// Milliseconds since the epoch of `17/May/2015:10:05:03 +0000`.
fn time_of(text: &str) -> Option<i64> {
    const MONTHS: [(&str, i64); 12] = [
        ("Jan", 31),
        ("Feb", 28),
        ("Mar", 31),
        ("Apr", 30),
        ("May", 31),
        ("Jun", 30),
        ("Jul", 31),
        ("Aug", 31),
        ("Sep", 30),
        ("Oct", 31),
        ("Nov", 30),
        ("Dec", 31),
    ];
    let bytes = text.as_bytes();
    let shape = b"dd/mmm/dddd:dd:dd:dd sdddd";
    if bytes.len() != shape.len() {
        return None;
    }
    for (have, want) in bytes.iter().zip(shape) {
        let fits = match want {
            b'd' => have.is_ascii_digit(),
            b'm' => have.is_ascii_alphabetic(),
            b's' => matches!(have, b'+' | b'-'),
            other => have == other,
        };
        if !fits {
            return None;
        }
    }
    let number = |from: usize, to: usize| text[from..to].parse::<i64>().ok();
    let (day, year) = (number(0, 2)?, number(7, 11)?);
    let (hour, minute, second) = (number(12, 14)?, number(15, 17)?, number(18, 20)?);
    let (zone_hours, zone_minutes) = (number(22, 24)?, number(24, 26)?);
    let month = MONTHS.iter().position(|(name, _)| *name == &text[3..6])?;
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let month_days = MONTHS[month].1 + i64::from(leap && month == 1);
    if !(1..=month_days).contains(&day) || hour > 23 || minute > 59 || second > 59 || zone_minutes > 59 {
        return None;
    }
    let whole_years = year - 1;
    let days_before_year = whole_years * 365 + whole_years / 4 - whole_years / 100 + whole_years / 400;
    let days_before_month: i64 =
        MONTHS[..month].iter().map(|(_, days)| days).sum::<i64>() + i64::from(leap && month > 1);
    // 719,162 days lie between 0001-01-01 and 1970-01-01.
    let days = days_before_year - 719_162 + days_before_month + day - 1;
    let zone = (zone_hours * 3600 + zone_minutes * 60) * if bytes[21] == b'-' { -1 } else { 1 };
    Some((days * 86_400 + hour * 3600 + minute * 60 + second - zone) * 1000)
}

/// `2015-05-17T10:05:00.000Z`, as the job writes times, of milliseconds since the epoch in years 0 to 9999.
pub fn utc_text(at_ms: i64) -> String {
    let (days, ms) = (at_ms.div_euclid(86_400_000), at_ms.rem_euclid(86_400_000));
    // Howard Hinnant's civil_from_days: eras of 400 years that begin on a first of March.
    let z = days + 719_468;
    let (era, day_of_era) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute) = (ms / 3_600_000, ms / 60_000 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}.{:03}Z", ms / 1000 % 60, ms % 1000)
}

/// The partition Kafka's default partitioner gives a key.
pub fn partition_of(key: &[u8], partitions: u32) -> u32 {
    (murmur2(key) & 0x7fff_ffff) % partitions
}

/// The 32-bit murmur2 of Kafka's `Utils.murmur2`.
fn murmur2(data: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    let mut h: u32 = 0x9747_b28c ^ data.len() as u32;
    let mut chunks = data.chunks_exact(4);
    for chunk in &mut chunks {
        let mut k = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]).wrapping_mul(M);
        k = (k ^ (k >> 24)).wrapping_mul(M);
        h = h.wrapping_mul(M) ^ k;
    }
    let rest = chunks.remainder();
    if !rest.is_empty() {
        for (at, byte) in rest.iter().enumerate() {
            h ^= u32::from(*byte) << (8 * at);
        }
        h = h.wrapping_mul(M);
    }
    h = (h ^ (h >> 13)).wrapping_mul(M);
    h ^ (h >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors of Kafka's own UtilsTest.
    #[test]
    fn murmur2_is_kafkas() {
        for (key, hash) in [
            ("21", -973932308),
            ("foobar", -790332482),
            ("a-little-bit-long-string", -985981536),
            ("a-little-bit-longer-string", -1486304829),
            ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
            ("abc", 479470107),
        ] {
            assert_eq!(murmur2(key.as_bytes()) as i32, hash, "{key}");
        }
    }

    #[test]
    fn times_follow_the_calendar_and_the_zone() {
        // Each right side is what `date -u -d '...' +%s` prints.
        for (text, seconds) in [
            ("01/Jan/1970:00:00:00 +0000", 0),
            ("17/May/2015:10:05:03 +0000", 1_431_857_103),
            ("17/May/2015:12:05:03 +0200", 1_431_857_103),
            ("17/May/2015:04:35:03 -0530", 1_431_857_103),
            ("29/Feb/2024:23:59:59 +0000", 1_709_251_199),
            ("01/Mar/2000:00:00:00 +0000", 951_868_800),
            ("31/Dec/1969:23:59:59 +0000", -1),
        ] {
            assert_eq!(time_of(text), Some(seconds * 1000), "{text}");
        }
        for text in [
            "29/Feb/2023:00:00:00 +0000",
            "31/Apr/2024:00:00:00 +0000",
            "00/Apr/2024:00:00:00 +0000",
            "17/Mai/2015:10:05:03 +0000",
            "17/May/2015:24:05:03 +0000",
            "17/May/2015:10:05:60 +0000",
            "17/May/2015:10:05:03 0000",
            "1/May/2015:10:05:03 +0000",
        ] {
            assert_eq!(time_of(text), None, "{text}");
        }
    }

    #[test]
    fn utc_text_is_the_inverse_of_the_calendar() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (1_431_857_103_000, "2015-05-17T10:05:03.000Z"),
            (1_709_251_199_999, "2024-02-29T23:59:59.999Z"),
            (951_868_800_000, "2000-03-01T00:00:00.000Z"),
            (-1, "1969-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(utc_text(ms), text);
        }
    }

    #[test]
    fn lines_of_both_formats_parse_and_broken_ones_do_not() {
        let common = r#"83.149.9.216 - - [17/May/2015:10:05:03 +0000] "GET / HTTP/1.1" 200 203023"#;
        let combined = format!("{common} \"http://a/\" \"Agent (\\\"quoted\\\")\"");
        let expected = Some(("83.149.9.216".parse().unwrap(), 1_431_857_103_000));
        assert_eq!(parse(common.as_bytes()), expected);
        assert_eq!(parse(combined.as_bytes()), expected);
        assert_eq!(parse(common.replace("203023", "-").as_bytes()), expected);
        let v6 = common.replace("83.149.9.216", "2001:db8::7");
        assert_eq!(parse(v6.as_bytes()).unwrap().0.to_string(), "2001:db8::7");
        // Cut anywhere before the size, nothing is left to count.
        for cut in 0..common.len() - 6 {
            assert_eq!(parse(&common.as_bytes()[..cut]), None, "{}", &common[..cut]);
        }
        // Behind it anything may stand: a real log has agents cut off.
        for cut in common.len()..combined.len() {
            assert_eq!(parse(&combined.as_bytes()[..cut]), expected, "{}", &combined[..cut]);
        }
        assert_eq!(parse(common.replace("83.149.9.216", "83.149.9.256").as_bytes()), None);
        assert_eq!(parse(common.replace(" 200 ", " OK ").as_bytes()), None);
    }

    fn line(second: i64) -> String {
        format!(
            "1.1.1.1 - - [17/May/2015:10:{:02}:{:02} +0000] \"GET / HTTP/1.1\" 200 1",
            second / 60,
            second % 60
        )
    }

    fn recount(bound_ms: i64, seconds: &[i64]) -> Recount {
        let mut recount = Recount::new(Settings { partitions: 1, window_ms: 5000, bound_ms });
        for second in seconds {
            recount.add(line(*second).as_bytes());
        }
        recount
    }

    /// Window [0 s, 5 s) ends at 5 s. With a bound of 10 s it closes for the row *after* the one that is at 15 s or
    /// later: 15 - 10 s - 1 ms = 4.999 s, which is its end - 1 ms.
    #[test]
    fn a_row_is_late_from_the_first_stamp_that_reaches_its_window_end() {
        assert_eq!(recount(10_000, &[0, 14, 4]).late.len(), 0);
        assert_eq!(recount(10_000, &[0, 15, 4]).late.len(), 1);
        assert_eq!(recount(10_000, &[0, 15, 5]).late.len(), 0, "the next window is still open");
        assert_eq!(recount(10_000, &[0, 15]).late.len(), 0);
    }

    #[test]
    fn a_bounded_end_closes_every_window_it_counted_in() {
        let mut recount = recount(10_000, &[0, 7]);
        recount.end_bounded_run();
        recount.add(line(9).as_bytes());
        assert_eq!(recount.late.len(), 1, "its window, to 10 s, was closed");
        recount.add(line(10).as_bytes());
        assert_eq!(recount.late.len(), 1);
        assert_eq!(recount.counted(), 3);
    }

    #[test]
    fn every_line_is_somewhere() {
        let recount = Recount::of(
            Settings { partitions: 4, window_ms: 5000, bound_ms: 0 },
            format!("{}\nnothing\n\n{}\n{}", line(50), line(1), line(50)).as_bytes(),
        );
        assert_eq!((recount.lines, recount.counted()), (5, 2));
        assert_eq!(recount.late[line(1).as_bytes()], 1);
        assert_eq!((recount.dead[b"nothing".as_slice()], recount.dead[b"".as_slice()]), (1, 1));
        assert_eq!(recount.top(1), [("1.1.1.1".to_owned(), 2)]);
    }
}
