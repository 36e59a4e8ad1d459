//! Reads lines of a web server's access log, in common and combined format, without allocating.
//!
//! ```text
//! 83.149.9.216 - frank [17/May/2015:10:05:03 +0200] "GET /a?b HTTP/1.1" 200 203023 "http://from/" "Mozilla/5.0 ..."
//! address      | user  time and zone                 request           status bytes   referer        agent
//!              ident                                                          combined format only, not looked at
//! ```
//!
//! Rules
//! * The address is IPv4 or IPv6; a host name is refused, because the job counts addresses. Equal addresses are equal
//!   values however they are spelt, so `2001:DB8::0:1` and `2001:db8::1` are one key.
//! * The time is a real date and time with a zone offset; what is returned is UTC.
//! * A backslash in the request escapes the byte after it, as both Apache and nginx write a quote.
//! * What follows the byte count is free text that clients chose, and may be cut off: it is not checked.
//!
//! Everything else is an error that says which field is wrong.

use std::net::{IpAddr, Ipv4Addr};

use memchr::memchr;

/// What one line says, borrowed from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line<'a> {
    /// Who asked.
    pub ip: IpAddr,
    /// When, in milliseconds since 1970 UTC.
    pub at: i64,
    /// The request between its quotes, escapes as they are.
    pub request: &'a [u8],
    /// The status code; none where the server wrote `-`.
    pub status: Option<u16>,
    /// Bytes sent; none where the server wrote `-`.
    pub bytes: Option<u64>,
}

/// Why a line is not of an access log: the reason a dead letter carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Nothing there.
    #[error("the line is empty")]
    Empty,
    /// The line ends before this field.
    #[error("the line ends before its {0}")]
    Cut(&'static str),
    /// The first field is no address.
    #[error("the first field is not an IP address")]
    Address,
    /// The time's brackets or its form.
    #[error("the time is not of the form [17/May/2015:10:05:03 +0000]")]
    TimeForm,
    /// A time that does not exist.
    #[error("the time does not exist")]
    NoSuchTime,
    /// The request is not between quotes.
    #[error("the request is not in quotes")]
    Request,
    /// The status is not three digits.
    #[error("the status is neither three digits nor -")]
    Status,
    /// The byte count is no number.
    #[error("the byte count is neither a number nor -")]
    Bytes,
}

/// Reads one line, without its newline; a carriage return at the end is ignored.
///
/// ```
/// let line = br#"83.149.9.216 - - [17/May/2015:10:05:03 +0000] "GET / HTTP/1.1" 200 203023"#;
/// let line = tidemill_jobs::access_log::parse(line)?;
/// assert_eq!((line.ip.to_string().as_str(), line.at), ("83.149.9.216", 1_431_857_103_000));
/// # Ok::<_, tidemill_jobs::access_log::Malformed>(())
/// ```
pub fn parse(line: &[u8]) -> Result<Line<'_>, Malformed> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.is_empty() {
        return Err(Malformed::Empty);
    }
    let (host, rest) = word(line, "ident")?;
    let ip = address(host).ok_or(Malformed::Address)?;
    let (_ident, rest) = word(rest, "user")?;
    let (_user, rest) = word(rest, "time")?;
    let (at, rest) = time(rest)?;
    let (request, rest) = quoted(rest)?;
    let (status, rest) = word(rest, "byte count")?;
    let status = dash(status, |s| digits(s).filter(|_| s.len() == 3)).ok_or(Malformed::Status)?;
    let bytes = memchr(b' ', rest).map_or(rest, |end| &rest[..end]);
    let bytes = dash(bytes, |b| digits(b).filter(|_| b.len() <= 18)).ok_or(Malformed::Bytes)?;
    // Three digits fit.
    Ok(Line { ip, at, request, status: status.map(|s| s as u16), bytes })
}

/// The bytes up to the next space, and what follows it.
fn word<'a>(from: &'a [u8], next: &'static str) -> Result<(&'a [u8], &'a [u8]), Malformed> {
    let end = memchr(b' ', from).ok_or(Malformed::Cut(next))?;
    Ok((&from[..end], &from[end + 1..]))
}

fn dash<T>(field: &[u8], read: impl FnOnce(&[u8]) -> Option<T>) -> Option<Option<T>> {
    if field == b"-" { Some(None) } else { read(field).map(Some) }
}

/// A number of at most 18 digits (longer input may wrap; callers bound the length).
fn digits(field: &[u8]) -> Option<u64> {
    if field.is_empty() {
        return None;
    }
    field.iter().try_fold(0u64, |n, b| {
        let digit = b.wrapping_sub(b'0');
        (digit < 10).then(|| n.wrapping_mul(10).wrapping_add(u64::from(digit)))
    })
}

fn address(host: &[u8]) -> Option<IpAddr> {
    if let Some(v4) = ipv4(host) {
        return Some(IpAddr::V4(v4));
    }
    std::str::from_utf8(host).ok()?.parse().ok()
}

/// Dotted decimal without leading zeros: the common case, decided in one pass over at most 15 bytes.
fn ipv4(host: &[u8]) -> Option<Ipv4Addr> {
    let mut parts = [0u8; 4];
    let (mut part, mut value, mut length) = (0, 0u32, 0);
    for &b in host {
        if b == b'.' {
            if length == 0 || part == 3 {
                return None;
            }
            parts[part] = value as u8;
            (part, value, length) = (part + 1, 0, 0);
        } else {
            let digit = u32::from(b.wrapping_sub(b'0'));
            if digit > 9 || (length > 0 && value == 0) {
                return None;
            }
            value = value * 10 + digit;
            length += 1;
            if value > 255 {
                return None;
            }
        }
    }
    if part != 3 || length == 0 {
        return None;
    }
    parts[3] = value as u8;
    Some(Ipv4Addr::from(parts))
}

/// `[17/May/2015:10:05:03 +0000] `: 28 bytes and a space, always of this length.
fn time(from: &[u8]) -> Result<(i64, &[u8]), Malformed> {
    let Some((field, rest)) = from.split_first_chunk::<28>() else {
        return Err(if from.is_empty() { Malformed::Cut("time") } else { Malformed::TimeForm });
    };
    let form = || -> Option<[i64; 7]> {
        let fixed =
            [(0, b'['), (3, b'/'), (7, b'/'), (12, b':'), (15, b':'), (18, b':'), (21, b' '), (27, b']')];
        if fixed.iter().any(|&(at, b)| field[at] != b) {
            return None;
        }
        let number = |at: usize, len: usize| digits(&field[at..at + len]).map(u64::cast_signed);
        let zone = number(23, 2)? * 100 + number(25, 2)?;
        let zone = match field[22] {
            b'+' => zone,
            b'-' => -zone,
            _ => return None,
        };
        let month = month(&field[4..7])?;
        Some([number(8, 4)?, month, number(1, 2)?, number(13, 2)?, number(16, 2)?, number(19, 2)?, zone])
    };
    let [year, month, day, hour, minute, second, zone] = form().ok_or(Malformed::TimeForm)?;
    let (zone_hours, zone_minutes) = (zone / 100, zone % 100);
    let exists = (1..=days_in(year, month)).contains(&day)
        && hour < 24
        && minute < 60
        && second < 60
        && zone_hours.abs() < 24
        && zone_minutes.abs() < 60;
    if !exists {
        return Err(Malformed::NoSuchTime);
    }
    let local = days_since_1970(year, month, day) * 86_400 + hour * 3_600 + minute * 60 + second;
    let at = (local - zone_hours * 3_600 - zone_minutes * 60) * 1_000;
    match rest {
        [] => Err(Malformed::Cut("request")),
        [b' ', rest @ ..] => Ok((at, rest)),
        _ => Err(Malformed::TimeForm),
    }
}

fn month(name: &[u8]) -> Option<i64> {
    Some(match name {
        b"Jan" => 1,
        b"Feb" => 2,
        b"Mar" => 3,
        b"Apr" => 4,
        b"May" => 5,
        b"Jun" => 6,
        b"Jul" => 7,
        b"Aug" => 8,
        b"Sep" => 9,
        b"Oct" => 10,
        b"Nov" => 11,
        b"Dec" => 12,
        _ => return None,
    })
}

fn days_in(year: i64, month: i64) -> i64 {
    match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days of the proleptic Gregorian calendar (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms"): years
/// begin in March, so the leap day comes last.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// What stands between quotes, and what follows the closing quote and its space.
fn quoted(from: &[u8]) -> Result<(&[u8], &[u8]), Malformed> {
    let Some(inner) = from.strip_prefix(b"\"") else {
        return Err(if from.is_empty() { Malformed::Cut("request") } else { Malformed::Request });
    };
    let mut end = 0;
    loop {
        let quote = end + memchr(b'"', &inner[end..]).ok_or(Malformed::Request)?;
        // The quote is escaped by an odd number of backslashes before it.
        let slashes = inner[..quote].iter().rev().take_while(|b| **b == b'\\').count();
        if slashes % 2 == 0 {
            let rest = match &inner[quote + 1..] {
                [] => return Err(Malformed::Cut("status")),
                [b' ', rest @ ..] => rest,
                _ => return Err(Malformed::Request),
            };
            return Ok((&inner[..quote], rest));
        }
        end = quote + 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The same rules by the slow way: text split at spaces, jiff for the date, std for the address.
    fn slow(line: &[u8]) -> Option<(IpAddr, i64, Option<u16>, Option<u64>)> {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        // Only the checked fields are ASCII; the request may be any bytes.
        let text: String = line.iter().map(|b| char::from(*b)).collect();
        let mut fields = text.splitn(4, ' ');
        let ip = fields.next()?.parse().ok()?;
        let rest = fields.nth(2)?;
        let (time, rest) = rest.split_once(']')?;
        let time = time.strip_prefix('[')?;
        let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        if shape.len() != 26 || !shape.is_ascii() {
            return None;
        }
        let plain = [&shape[..2], &shape[6..21]].join("");
        if plain != "00/0000:00:00:00 " {
            return None;
        }
        if !matches!(&shape[21..22], "+" | "-") || &shape[22..] != "0000" || &shape[2..3] != "/" {
            return None;
        }
        let capital =
            time[3..4].chars().all(char::is_uppercase) && time[4..6].chars().all(char::is_lowercase);
        let zone: i64 = time[22..24].parse().ok()?;
        let minutes: i64 = time[24..26].parse().ok()?;
        if !capital || &time[18..20] == "60" || zone > 23 || minutes > 59 {
            return None;
        }
        let sign = if &time[21..22] == "-" { -1 } else { 1 };
        let local = jiff::civil::DateTime::strptime("%d/%b/%Y:%H:%M:%S", &time[..20]).ok()?;
        let utc = local.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp().as_millisecond();
        let at = utc - sign * (zone * 3600 + minutes * 60) * 1000;
        let mut rest = rest.strip_prefix(" \"")?.chars();
        loop {
            match rest.next()? {
                '\\' => drop(rest.next()?),
                '"' => break,
                _ => {}
            }
        }
        let rest = rest.as_str().strip_prefix(' ')?;
        let mut fields = rest.split(' ');
        let all_digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
        let status = match fields.next()? {
            "-" => None,
            s if s.len() == 3 && all_digits(s) => Some(s.parse().ok()?),
            _ => return None,
        };
        let bytes = match fields.next()? {
            "-" => None,
            s if s.len() <= 18 && all_digits(s) => Some(s.parse().ok()?),
            _ => return None,
        };
        Some((ip, at, status, bytes))
    }

    fn agree(line: &[u8]) -> Result<(), TestCaseError> {
        let fast = parse(line).map(|l| (l.ip, l.at, l.status, l.bytes));
        prop_assert_eq!(fast.ok(), slow(line), "{} -> {:?}", String::from_utf8_lossy(line), fast);
        Ok(())
    }

    fn ip() -> impl Strategy<Value = String> {
        prop_oneof![
            any::<[u8; 4]>().prop_map(|a| Ipv4Addr::from(a).to_string()),
            any::<u128>().prop_map(|a| std::net::Ipv6Addr::from(a).to_string()),
            any::<u32>().prop_map(|a| std::net::Ipv6Addr::from(u128::from(a)).to_string()),
            "[0-9]{1,4}(\\.[0-9]{1,4}){2,4}",
        ]
    }

    prop_compose! {
        fn line()(
            ip in ip(),
            day in 0..33u8,
            month in prop::sample::select(vec![
                "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
            ]),
            year in 1890..2110u16,
            (h, m, s) in (0..25u8, 0..61u8, 0..62u8),
            zone in prop::sample::select(vec!["+0000", "-0000", "+0200", "-0330", "+1400", "+2359", "+2400", "-0060"]),
            request in "[ -~]{0,12}",
            status in prop::sample::select(vec!["200", "404", "-", "20", "2000"]),
            bytes in prop::sample::select(vec!["0", "203023", "-", "", "12a", "123456789012345678", "1234567890123456789"]),
            tail in prop::sample::select(vec!["", " \"-\" \"Mozilla", "\r", " "]),
        ) -> String {
            format!(
                "{ip} - - [{day:02}/{month}/{year}:{h:02}:{m:02}:{s:02} {zone}] \"{request}\" {status} {bytes}{tail}"
            )
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_000))]

        #[test]
        fn agrees_with_the_slow_reference(line in line()) {
            agree(line.as_bytes())?;
        }

        #[test]
        fn agrees_on_damaged_lines(line in line(), at: prop::sample::Index, byte: u8, cut: bool) {
            let mut line = line.into_bytes();
            let at = at.index(line.len());
            if cut { line.truncate(at) } else { line[at] = byte }
            agree(&line)?;
        }

        #[test]
        fn hostile_bytes_never_panic(line: Vec<u8>) {
            let _ = parse(&line);
        }
    }

    fn reason(line: &str) -> String {
        parse(line.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn each_field_has_its_reason() {
        assert_eq!(reason(""), "the line is empty");
        assert_eq!(reason("hello"), "the line ends before its ident");
        assert_eq!(reason("example.org - - x"), "the first field is not an IP address");
        assert_eq!(reason("1.2.3.4 - - "), "the line ends before its time");
        assert_eq!(
            reason("1.2.3.4 - - 17/May/2015"),
            "the time is not of the form [17/May/2015:10:05:03 +0000]"
        );
        let rest = |time: &str, rest: &str| reason(&format!("::1 - - [{time} +0000]{rest}"));
        assert_eq!(rest("29/Feb/2015:10:05:03", " \"-\" 200 1"), "the time does not exist");
        assert_eq!(rest("17/May/2015:10:05:03", ""), "the line ends before its request");
        assert_eq!(rest("17/May/2015:10:05:03", " GET / 200 1"), "the request is not in quotes");
        assert_eq!(rest("17/May/2015:10:05:03", " \"GET /"), "the request is not in quotes");
        assert_eq!(
            rest("17/May/2015:10:05:03", " \"GET /\" ok 1"),
            "the status is neither three digits nor -"
        );
        assert_eq!(
            rest("17/May/2015:10:05:03", " \"GET /\" 200 x"),
            "the byte count is neither a number nor -"
        );
    }

    #[test]
    fn one_address_has_one_value_and_zones_are_taken_away() {
        let at = |ip: &str, time: &str| {
            let line = format!("{ip} - - [{time}] \"GET \\\"x\\\\\" 304 - \"-\" \"cut");
            parse(line.as_bytes()).map(|l| (l.ip, l.at)).unwrap()
        };
        let utc = at("2001:db8::1", "17/May/2015:10:05:03 +0000");
        assert_eq!(utc, at("2001:0DB8:0::0:1", "17/May/2015:12:05:03 +0200"));
        assert_eq!(utc, at("2001:db8::1", "17/May/2015:06:35:03 -0330"));
    }
}
