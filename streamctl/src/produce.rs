//! `streamctl produce`: a record a line.
//!
//! ```text
//! file or stdin ──reads, splits, finds keys (a thread)──▶ bounded queue of chunks ──▶ producer ──▶ broker
//! ```
//!
//! Lines are counted in the order of the input. However the command ends, it knows how many leading ones are durable:
//! `--skip-lines` with that number continues without a gap, and without a repeat unless some are in doubt.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use jiff::Timestamp;
use memchr::{memchr, memmem};
use regex::bytes::Regex;
use tidemill_broker::{Broker, BrokerError, NewTopic, Producer, ProducerOptions, Topic};
use tidemill_log::batch::{Compression, RecordParts};
use tokio::sync::mpsc;
use tokio::time::{Interval, MissedTickBehavior, interval, timeout};

use crate::cli;
use crate::data::{self, Intent};
use crate::exit::Usage;
use crate::stdout;
use crate::stop::Stop;
use crate::target::Target;

/// Bytes of input read at a time.
const CHUNK_BYTES: usize = 256 << 10;
/// Chunks read ahead.
const CHUNKS_AHEAD: usize = 8;
/// A line that is longer is no line of text but a file of another kind.
const LINE_BYTES_MAX: usize = 8 << 20;
/// How often `--status-lines` looks what is durable.
const TELL_DURABLE: Duration = Duration::from_millis(10);
/// After Ctrl-C, what was read already has this long to become durable.
const FLUSH_AFTER_STOP: Duration = Duration::from_secs(10);

/// Runs the command.
pub async fn run(target: &Target, args: &cli::Produce, stop: &Stop) -> Result<()> {
    let keys = match (&args.key_regex, args.key_delimiter) {
        (Some(text), _) => Keys::Regex(key_regex(text)?),
        (None, Some(delimiter)) => Keys::Delimiter(delimiter.0.to_string()),
        (None, None) => Keys::None,
    };
    // Before anything is made: a wrong path must not leave an empty topic behind.
    let input: Box<dyn Read + Send> = match &args.file {
        None => Box::new(io::stdin()),
        Some(path) => {
            let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
            let is_dir = file.metadata().is_ok_and(|metadata| metadata.is_dir());
            anyhow::ensure!(!is_dir, "cannot read {}: it is a directory", path.display());
            Box::new(file)
        }
    };
    if args.file.is_none() && io::stdin().is_terminal() {
        crate::note(format_args!("reads lines from the terminal; Ctrl-D ends them"));
    }
    if args.create {
        crate::topic::check_name(&args.topic)?;
    }
    let access = data::open(target, if args.create { Intent::Create } else { Intent::Use }).await?;
    let result = async {
        let topic = topic(&access, args).await?;
        append(access.clone(), &topic, args, input, keys, stop).await
    }
    .await;
    data::close(access, result).await
}

/// How a line's key is found.
#[derive(Debug)]
enum Keys {
    /// There are none.
    None,
    /// It is capture group 1; the value is the whole line.
    Regex(Regex),
    /// It ends before the first of these; the value begins behind it.
    Delimiter(String),
}

fn key_regex(text: &str) -> Result<Regex> {
    let regex = Regex::new(text).map_err(|error| Usage::error(format!("--key-regex: {error}")))?;
    if regex.captures_len() < 2 {
        return Err(Usage::error(format!(
            "--key-regex: {text:?} has no capture group; put the key in parentheses"
        )));
    }
    Ok(regex)
}

async fn topic(broker: &impl Broker, args: &cli::Produce) -> Result<Topic> {
    if args.create {
        let wanted = NewTopic::new(&args.topic, args.partitions.unwrap_or(cli::PARTITIONS)).keep_existing();
        let topic = broker.create_topic(wanted).await.map_err(data::explain)?;
        if args.partitions.is_some_and(|wanted| wanted != topic.partitions) {
            crate::note(format_args!(
                "topic {} is there already, with {}; `streamctl topic alter` adds some",
                topic.name,
                crate::units::plural(topic.partitions.into(), "partition", "partitions")
            ));
        }
        return Ok(topic);
    }
    match broker.describe(args.topic.clone()).await {
        Ok(described) => Ok(described.topic),
        Err(BrokerError::UnknownTopic { topic }) => Err(data::unknown_topic(broker, &topic).await),
        Err(error) => Err(data::explain(error)),
    }
}

async fn append(
    broker: impl Broker + Clone,
    topic: &Topic,
    args: &cli::Produce,
    input: Box<dyn Read + Send>,
    keys: Keys,
    stop: &Stop,
) -> Result<()> {
    let compression = match args.compression {
        cli::Codec::None => Compression::None,
        cli::Codec::Gzip => Compression::Gzip,
        cli::Codec::Snappy => Compression::Snappy,
        cli::Codec::Lz4 => Compression::Lz4,
    };
    let options = ProducerOptions { compression, ..ProducerOptions::default() };
    let producer = Producer::open(broker, options).await.map_err(data::explain)?;
    let wanted_by = match &keys {
        Keys::None => None,
        Keys::Regex(_) => Some("do not match --key-regex"),
        Keys::Delimiter(_) => Some("do not hold --key-delimiter"),
    };
    let mut chunks = read_chunks(input, keys);
    let (mut skip, mut skipped, mut sent, mut without_key) = (args.skip_lines, 0_u64, 0_u64, 0_u64);

    let mut told = Told::new(args.status_lines);
    let mut failure = loop {
        let chunk = tokio::select! {
            biased;
            () = stop.wait() => break None,
            () = told.due() => {
                told.durable(args.skip_lines + producer.durable_prefix().durable)?;
                continue;
            }
            chunk = chunks.recv() => chunk,
        };
        let chunk = match chunk {
            None => break None,
            Some(Err(error)) => break Some(anyhow::Error::new(error).context("cannot read the input")),
            Some(Ok(chunk)) => chunk,
        };
        let now = Timestamp::now().as_millisecond();
        let sending = async {
            for line in &chunk.lines {
                if skip > 0 {
                    skip -= 1;
                    skipped += 1;
                    continue;
                }
                let key = line.key.clone().map(|key| &chunk.bytes[key]);
                let value = Some(&chunk.bytes[line.value.clone()]);
                let record = RecordParts { timestamp: now, key, value, headers: &[] };
                // Not waited for here: the producer keeps the order, and its durable prefix says how far it got.
                let _ack = producer.send(topic, None, record).await?;
                sent += 1;
                without_key += u64::from(wanted_by.is_some() && key.is_none());
            }
            Ok::<_, BrokerError>(())
        };
        tokio::select! {
            biased;
            () = stop.wait() => break None,
            sent = sending => if let Err(error) = sent { break Some(data::explain(error)) },
        }
    };
    let stopped = stop.asked();
    if failure.is_none() {
        failure = match stopped {
            false => producer.flush().await.err().map(data::explain),
            true => match timeout(FLUSH_AFTER_STOP, producer.flush()).await {
                Ok(flushed) => flushed.err().map(data::explain),
                Err(_) => Some(anyhow!("not everything became durable within {FLUSH_AFTER_STOP:?}")),
            },
        };
    }
    let prefix = producer.durable_prefix();
    // The lines to skip are durable by the word of whoever skips them, however many of them were read by now.
    let durable = args.skip_lines + prefix.durable;
    told.durable(durable)?;
    if failure.is_some() || stopped {
        crate::note(format_args!(
            "{}: {durable} leading lines are durable, {} more are in doubt; continue with --skip-lines {durable}",
            if failure.is_some() { "failed" } else { "stopped" },
            prefix.in_doubt,
        ));
    } else {
        let skipped = if skipped > 0 { format!(" after {skipped} skipped ones") } else { String::new() };
        crate::note(format_args!("{sent} lines appended to {}{skipped}, all durable", topic.name));
        if skip > 0 {
            crate::note(format_args!("the input ended {skip} lines before --skip-lines {}", args.skip_lines));
        }
    }
    if let Some(why) = wanted_by.filter(|_| without_key > 0) {
        crate::note(format_args!("{without_key} of them {why} and got no key"));
    }
    failure.map_or(Ok(()), Err)
}

/// What `--status-lines` prints: how many leading lines are durable.
struct Told {
    ticks: Option<Interval>,
    lines: u64,
}

impl Told {
    fn new(wanted: bool) -> Self {
        let ticks = wanted.then(|| {
            let mut ticks = interval(TELL_DURABLE);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        });
        Told { ticks, lines: 0 }
    }

    /// Completes when it is time to look again; never where nobody asked.
    async fn due(&mut self) {
        match &mut self.ticks {
            Some(ticks) => drop(ticks.tick().await),
            None => std::future::pending().await,
        }
    }

    fn durable(&mut self, lines: u64) -> Result<()> {
        if self.ticks.is_some() && lines > self.lines {
            self.lines = lines;
            stdout::line(format_args!("{{\"event\":\"durable\",\"lines\":{lines}}}"))?;
        }
        Ok(())
    }
}

/// Some lines of the input.
#[derive(Debug)]
struct Chunk {
    bytes: Vec<u8>,
    lines: Vec<Line>,
}

/// Where one line's value and key are in its chunk.
#[derive(Debug, PartialEq)]
struct Line {
    value: Range<usize>,
    key: Option<Range<usize>>,
}

/// Reads on a thread of its own, because standard input cannot be waited for otherwise. The thread ends with the
/// receiver, or with the process if it is waiting for input then.
fn read_chunks(mut input: Box<dyn Read + Send>, keys: Keys) -> mpsc::Receiver<io::Result<Chunk>> {
    let (send, receive) = mpsc::channel(CHUNKS_AHEAD);
    std::thread::spawn(move || {
        let (mut rest, mut line) = (Vec::new(), 1_u64);
        loop {
            let had = rest.len();
            rest.resize(had + CHUNK_BYTES, 0);
            let read = match input.read(&mut rest[had..]) {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    rest.truncate(had);
                    continue;
                }
                Err(error) => {
                    let _ = send.blocking_send(Err(error));
                    return;
                }
            };
            rest.truncate(had + read);
            // All complete lines, and at the end what is left.
            let end = match read {
                0 => rest.len(),
                _ => rest.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1),
            };
            if end > 0 {
                let after = rest.split_off(end);
                let bytes = std::mem::replace(&mut rest, after);
                let lines = split(&bytes, &keys);
                line += lines.len() as u64;
                if send.blocking_send(Ok(Chunk { bytes, lines })).is_err() {
                    return;
                }
            } else if rest.len() > LINE_BYTES_MAX {
                let what = format!(
                    "line {line} is longer than {LINE_BYTES_MAX} bytes; leave it out or split it, and go on behind the lines before"
                );
                let _ = send.blocking_send(Err(io::Error::new(io::ErrorKind::InvalidData, what)));
                return;
            }
            if read == 0 {
                return;
            }
        }
    });
    receive
}

fn split(bytes: &[u8], keys: &Keys) -> Vec<Line> {
    let mut lines = Vec::with_capacity(bytes.len() / 100 + 1);
    let mut slots = match keys {
        Keys::Regex(regex) => Some((regex, regex.capture_locations())),
        Keys::None | Keys::Delimiter(_) => None,
    };
    let delimiter = match keys {
        Keys::Delimiter(text) => Some(memmem::Finder::new(text)),
        Keys::None | Keys::Regex(_) => None,
    };
    let mut start = 0;
    while start < bytes.len() {
        let end = memchr(b'\n', &bytes[start..]).map_or(bytes.len(), |length| start + length);
        let line = &bytes[start..end];
        let (mut value, mut key) = (start..end, None);
        if let Some((regex, slots)) = &mut slots {
            let group = regex.captures_read(slots, line).and_then(|_| slots.get(1));
            key = group.map(|(from, to)| start + from..start + to);
        } else if let Some((finder, at)) = delimiter.as_ref().and_then(|f| Some((f, f.find(line)?))) {
            key = Some(start..start + at);
            value = start + at + finder.needle().len()..end;
        }
        lines.push(Line { value, key });
        start = end + 1;
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(input: &'static [u8], keys: Option<&str>) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
        all_by(input, keys.map_or(Keys::None, |keys| Keys::Regex(Regex::new(keys).unwrap())))
    }

    fn all_by(input: &'static [u8], keys: Keys) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
        let mut chunks = read_chunks(Box::new(input), keys);
        let mut records = Vec::new();
        while let Some(chunk) = chunks.blocking_recv() {
            let Chunk { bytes, lines } = chunk.unwrap();
            for line in lines {
                records.push((bytes[line.value].to_vec(), line.key.map(|key| bytes[key].to_vec())));
            }
        }
        records
    }

    #[test]
    fn a_record_a_line() {
        let plain = |text: &[u8]| (text.to_vec(), None);
        assert_eq!(all(b"", None), []);
        assert_eq!(all(b"a\nb\n", None), [plain(b"a"), plain(b"b")]);
        assert_eq!(all(b"a\n\n\r\n\xff", None), [plain(b"a"), plain(b""), plain(b"\r"), plain(b"\xff")]);
    }

    #[test]
    fn group_one_is_the_key() {
        let records = all(b"1.1.1.1 - x\n x\n2 y\n", Some("^([^ ]+)"));
        let keys: Vec<_> = records.into_iter().map(|(_, key)| key).collect();
        assert_eq!(keys, [Some(b"1.1.1.1".to_vec()), None, Some(b"2".to_vec())]);
    }

    #[test]
    fn a_delimiter_parts_key_and_value() {
        let part = |key: &str, value: &str| (value.as_bytes().to_vec(), Some(key.as_bytes().to_vec()));
        let records = all_by("a=b=c\n=v\nk=\nnone\nü=ö".as_bytes(), Keys::Delimiter("=".into()));
        let none = (b"none".to_vec(), None);
        assert_eq!(records, [part("a", "b=c"), part("", "v"), part("k", ""), none, part("ü", "ö")]);
        let records = all_by("a·b\n".as_bytes(), Keys::Delimiter("·".into()));
        assert_eq!(records, [part("a", "b")]);
    }

    #[test]
    fn a_group_that_took_no_part_is_no_key() {
        assert_eq!(all(b"b", Some("(a)|b")), [(b"b".to_vec(), None)]);
        assert!(key_regex("abc").unwrap_err().is::<Usage>());
        assert!(key_regex("(").unwrap_err().is::<Usage>());
    }
}
