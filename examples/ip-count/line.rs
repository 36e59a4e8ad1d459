//! The lines that are counted, in their three forms.
//!
//! ```text
//!   23:59:58 192.168.1.2                                            of our source: a time without a date
//!   192.168.1.2 - - [29/Feb/2024:00:00:03 +0000] "GET / ..." 200 5  of a web server, common format
//!   192.168.1.2 - - [29/Feb/2024:00:00:03 +0000] "..." 200 5 "-" "Mozilla/5.0 ..."          combined
//! ```

use std::net::IpAddr;

/// What a line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) ip: IpAddr,
    pub(crate) time: Time,
}

/// When, as far as the line knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Time {
    /// Seconds since midnight. Of which day, the line does not say.
    OfDay(i64),
    /// Milliseconds since 1970.
    Full(i64),
}

/// Reads a line; the error says what is wrong with it.
pub(crate) fn parse(line: &[u8]) -> Result<Line, String> {
    let text = std::str::from_utf8(line).map_err(|_| "it is not text")?;
    let (first, rest) = text.split_once(' ').ok_or("it is a single word")?;
    if let Some(seconds) = time_of_day(first) {
        let ip = rest.parse().map_err(|_| format!("{rest:?} is not an address"))?;
        return Ok(Line { ip, time: Time::OfDay(seconds) });
    }
    let ip = first.parse().map_err(|_| format!("{first:?} is neither a time nor an address"))?;
    let (_, time) = rest.split_once('[').ok_or("it has no [time]")?;
    let (time, _) = time.split_once(']').ok_or("it has no [time]")?;
    let time = jiff::fmt::strtime::parse("%d/%b/%Y:%H:%M:%S %z", time)
        .and_then(|broken_down| broken_down.to_timestamp())
        .map_err(|_| format!("{time:?} is no time"))?;
    Ok(Line { ip, time: Time::Full(time.as_millisecond()) })
}

/// Seconds since midnight of `HH:mm:ss`.
fn time_of_day(text: &str) -> Option<i64> {
    let mut parts = text.split(':').map(|part| {
        let number = part.len() == 2 && part.bytes().all(|b| b.is_ascii_digit());
        number.then(|| part.parse::<i64>().ok()).flatten()
    });
    let (hour, minute, second) = (parts.next()??, parts.next()??, parts.next()??);
    let exists = parts.next().is_none() && hour < 24 && minute < 60 && second < 60;
    exists.then_some((hour * 60 + minute) * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_forms_are_read() {
        let line = parse(b"23:59:58 192.168.1.2").unwrap();
        assert_eq!((line.ip.to_string().as_str(), line.time), ("192.168.1.2", Time::OfDay(86_398)));
        let common = parse(b"::1 - - [29/Feb/2024:01:00:03 +0100] \"GET / HTTP/1.1\" 200 5").unwrap();
        assert_eq!((common.ip.to_string().as_str(), common.time), ("::1", Time::Full(1_709_164_803_000)));
    }

    #[test]
    fn others_are_refused_and_never_panic() {
        let bad: [&[u8]; 9] = [
            b"",
            b"hello",
            b"hello world",
            b"24:00:00 192.168.1.1",
            b"1:00:00 192.168.1.1",
            b"12:00:00 192.168.1",
            b"12:00:00:00 192.168.1.1",
            b"10.0.0.1 - - [30/Feb/2024:00:00:00 +0000] \"GET /\" 200 1",
            b"\xff\xfe \xff",
        ];
        for line in bad {
            assert!(parse(line).is_err(), "{}", String::from_utf8_lossy(line));
        }
    }
}
