//! How `consume` prints one record.
//!
//! ```text
//! text   the value and a newline; an absent value is an empty line
//! json   {"topic":"t","partition":0,"offset":12,"timestamp":"2015-05-17T10:05:03.000Z","key":"k","value":"v","headers":[["n","v"]]}
//!        null where absent; "key_base64" and "value_base64" in the place of "key" and "value" where those are no UTF-8
//! ```

use std::io::{self, Write};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::cli::Format;

/// What is known of a record.
#[derive(Debug, Clone, Copy)]
pub struct Shown<'a> {
    /// The topic's name.
    pub topic: &'a str,
    /// The partition's number.
    pub partition: u32,
    /// Its offset.
    pub offset: i64,
    /// Milliseconds since the epoch.
    pub timestamp: i64,
    /// Its key.
    pub key: Option<&'a [u8]>,
    /// Its value.
    pub value: Option<&'a [u8]>,
    /// Its headers, in order.
    pub headers: &'a [(&'a str, Option<&'a [u8]>)],
}

/// Writes the record and a newline.
pub fn record(out: &mut impl Write, format: Format, record: Shown<'_>) -> io::Result<()> {
    match format {
        Format::Text => out.write_all(record.value.unwrap_or_default())?,
        Format::Json => json_object(out, record)?,
    }
    out.write_all(b"\n")
}

/// Written by hand so that the fields keep their order.
fn json_object(out: &mut impl Write, record: Shown<'_>) -> io::Result<()> {
    let Shown { topic, partition, offset, timestamp, key, value, headers } = record;
    let time = time(timestamp);
    write!(
        out,
        "{{\"topic\":{},\"partition\":{partition},\"offset\":{offset},\"timestamp\":{time}",
        json!(topic)
    )?;
    for (name, bytes) in [("key", key), ("value", value)] {
        match bytes.map(|bytes| (std::str::from_utf8(bytes), bytes)) {
            None => write!(out, ",\"{name}\":null")?,
            Some((Ok(text), _)) => write!(out, ",\"{name}\":{}", json!(text))?,
            Some((Err(_), bytes)) => write!(out, ",\"{name}_base64\":\"{}\"", BASE64_STANDARD.encode(bytes))?,
        }
    }
    let headers: Vec<Value> = headers
        .iter()
        .map(|(name, value)| match value.map(|bytes| (std::str::from_utf8(bytes), bytes)) {
            None => json!([name, null]),
            Some((Ok(text), _)) => json!([name, text]),
            Some((Err(_), bytes)) => json!([name, { "base64": BASE64_STANDARD.encode(bytes) }]),
        })
        .collect();
    write!(out, ",\"headers\":{}}}", Value::Array(headers))
}

/// RFC 3339 in UTC with milliseconds; the bare number where the calendar does not reach.
fn time(at_ms: i64) -> Value {
    match Timestamp::from_millisecond(at_ms) {
        Ok(at) => Value::String(at.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()),
        Err(_) => Value::from(at_ms),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(format: Format, shown: Shown<'_>) -> String {
        let mut out = Vec::new();
        record(&mut out, format, shown).unwrap();
        String::from_utf8(out).unwrap()
    }

    const RECORD: Shown<'static> = Shown {
        topic: "t",
        partition: 3,
        offset: 42,
        timestamp: 1_431_857_103_007,
        key: Some(b"1.1.1.1"),
        value: Some(b"say \"hi\""),
        headers: &[("reason", Some(b"no date")), ("reason", None)],
    };

    #[test]
    fn json_is_as_documented() {
        assert_eq!(
            shown(Format::Json, RECORD),
            "{\"topic\":\"t\",\"partition\":3,\"offset\":42,\"timestamp\":\"2015-05-17T10:05:03.007Z\",\"key\":\"1.1.1.1\",\
             \"value\":\"say \\\"hi\\\"\",\"headers\":[[\"reason\",\"no date\"],[\"reason\",null]]}\n"
        );
        let bytes = Shown {
            key: None,
            value: Some(b"\xff\x00"),
            headers: &[("h", Some(b"\xfe"))],
            timestamp: 0,
            ..RECORD
        };
        assert_eq!(
            shown(Format::Json, bytes),
            "{\"topic\":\"t\",\"partition\":3,\"offset\":42,\"timestamp\":\"1970-01-01T00:00:00.000Z\",\"key\":null,\
             \"value_base64\":\"/wA=\",\"headers\":[[\"h\",{\"base64\":\"/g==\"}]]}\n"
        );
        let far = Shown { timestamp: i64::MAX, ..RECORD };
        assert!(shown(Format::Json, far).contains("\"timestamp\":9223372036854775807,"));
        let before = Shown { timestamp: -1, ..RECORD };
        assert!(shown(Format::Json, before).contains("\"1969-12-31T23:59:59.999Z\""));
    }

    #[test]
    fn text_is_the_value() {
        assert_eq!(shown(Format::Text, RECORD), "say \"hi\"\n");
        assert_eq!(shown(Format::Text, Shown { value: None, ..RECORD }), "\n");
    }
}
