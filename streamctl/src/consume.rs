//! `streamctl consume`: prints the records of a topic.
//!
//! Where it ends with `--until-end` is decided once, at the start: the stable offset of each partition, or the high
//! watermark for those who read uncommitted records. A partition that cannot be read is said and left out; the others
//! go on, and the exit code tells.

use std::collections::HashMap;
use std::io::{BufWriter, Stdout, Write};

use anyhow::{Result, anyhow, bail};
use tidemill_broker::{
    Access, At, Broker, BrokerError, Consumed, Consumer, ConsumerOptions, Event, ListOffsets, ListedOffset,
    PartitionOffsets, Position, Topic, TopicPartition,
};

use crate::cli::{self, From, Isolation};
use crate::data::{self, Intent};
use crate::exit::Usage;
use crate::print::{self, Shown};
use crate::stdout::{self, OrClosed};
use crate::stop::Stop;
use crate::target::Target;

/// Runs the command.
pub async fn run(target: &Target, args: &cli::Consume, stop: &Stop) -> Result<()> {
    if matches!(args.from, From::Offset(_)) && args.partition.is_none() {
        return Err(Usage::error("--from N is an offset of one partition: say which with --partition"));
    }
    let access = data::open(target, Intent::Use).await?;
    let result = consume(&access, args, stop).await;
    data::close(access, result).await
}

/// One partition that is read.
#[derive(Debug)]
struct Part {
    start: i64,
    /// Where `--until-end` ends.
    end: i64,
    /// Visible records to leave out first.
    skip: u64,
    done: bool,
}

async fn consume(access: &Access, args: &cli::Consume, stop: &Stop) -> Result<()> {
    let described = match access.describe(args.topic.clone()).await {
        Err(BrokerError::UnknownTopic { topic }) => return Err(data::unknown_topic(access, &topic).await),
        described => described.map_err(data::explain)?,
    };
    let topic = described.topic;
    let times = times(access, args, &topic).await?;
    let mut parts = HashMap::new();
    for (number, offsets) in (0..).zip(&described.offsets) {
        if args.partition.is_none_or(|wanted| wanted == number) {
            let mut part = part(access, args, &topic, number, offsets, stop).await?;
            part.start = times.get(&number).copied().unwrap_or(part.start);
            parts.insert(topic.partition(number), part);
        }
    }
    if parts.is_empty() {
        let wanted = args.partition.unwrap_or_default();
        return Err(Usage::error(format!(
            "topic {} has {} partitions, from 0 on; there is no partition {wanted}",
            topic.name, topic.partitions
        )));
    }
    let mut reader =
        Reader { args, topic: &topic, parts, out: stdout::buffered(), left: args.max.unwrap_or(u64::MAX) };
    let result = reader.run(access, stop).await;
    let flushed = reader.out.flush().or_closed();
    result.and(flushed)
}

/// With `--from @TIME`: the offset of each partition's first record that is not older; its end where all are.
async fn times(access: &Access, args: &cli::Consume, topic: &Topic) -> Result<HashMap<u32, i64>> {
    let From::Time(time) = args.from else { return Ok(HashMap::new()) };
    let numbers: Vec<u32> = (0..topic.partitions)
        .filter(|number| args.partition.is_none_or(|wanted| wanted == *number))
        .collect();
    let partitions = numbers.iter().map(|number| topic.partition(*number)).collect();
    let request = ListOffsets { partitions, at: At::Time(time.as_millisecond()) };
    let listed = access.list_offsets(request).await.map_err(data::explain)?;
    let (mut starts, mut older) = (HashMap::new(), Vec::new());
    for (number, found) in numbers.into_iter().zip(listed.offsets) {
        let position = match found {
            ListedOffset::Found(position) => position,
            ListedOffset::AllOlder(end) => {
                older.push(number.to_string());
                end
            }
            ListedOffset::Refused(error) => {
                let error = data::explain(error.into_error());
                return Err(
                    error.context(format!("looking for {time} in partition {number} of {}", topic.name))
                );
            }
        };
        starts.insert(number, position.offset);
    }
    match older.len() {
        0 => {}
        n if n == starts.len() => {
            crate::note(format_args!(
                "every record of {} is older than {time}: starts at the end",
                topic.name
            ));
        }
        _ => crate::note(format_args!(
            "every record of partition {} is older than {time}: starts at the end there",
            older.join(", ")
        )),
    }
    Ok(starts)
}

/// Where reading one partition starts and ends.
async fn part(
    access: &Access,
    args: &cli::Consume,
    topic: &Topic,
    number: u32,
    offsets: &PartitionOffsets,
    stop: &Stop,
) -> Result<Part> {
    let end = match args.isolation {
        Isolation::ReadCommitted => offsets.last_stable,
        Isolation::ReadUncommitted => offsets.high_watermark,
    };
    let mut part = Part { start: offsets.log_start, end, skip: 0, done: false };
    match args.from {
        From::Earliest | From::Time(_) => {}
        From::Latest => part.start = end,
        From::Offset(offset) if (offsets.log_start..=offsets.high_watermark).contains(&offset) => {
            part.start = offset
        }
        From::Offset(offset) => bail!(
            "offset {offset} is outside {}..={} of partition {number} of {}; `streamctl topic describe {}` shows the ranges",
            offsets.log_start,
            offsets.high_watermark,
            topic.name,
            topic.name
        ),
        From::Last(last) => {
            // Offsets also count markers and records that are not visible, so the first guess may be too late.
            let mut back = i64::try_from(last).unwrap_or(i64::MAX);
            loop {
                part.start = end.saturating_sub(back).max(offsets.log_start);
                let there =
                    count(access, args.isolation, topic.partition(number), part.start, end, stop).await?;
                part.skip = there.saturating_sub(last);
                if there >= last || part.start == offsets.log_start || stop.asked() {
                    break;
                }
                back = back.saturating_mul(2);
            }
        }
    }
    Ok(part)
}

/// Visible records in a range of offsets.
async fn count(
    access: &Access,
    isolation: Isolation,
    partition: TopicPartition,
    start: i64,
    end: i64,
    stop: &Stop,
) -> Result<u64> {
    let mut there = 0;
    if start >= end {
        return Ok(there);
    }
    let positions = vec![(partition, Position::unchecked(start))];
    let mut consumer = Consumer::start(access.clone(), positions, options(isolation));
    while let Some(event) = tokio::select! { event = consumer.next() => event, () = stop.wait() => None } {
        match event.map_err(data::explain)? {
            Event::Batches(consumed) => {
                for batch in &consumed.batches {
                    for record in &batch.open()? {
                        there += u64::from((consumed.from..end).contains(&record?.offset));
                    }
                }
                if consumed.next.offset >= end {
                    break;
                }
            }
            Event::CaughtUp => {}
            Event::Failed { error, .. } => return Err(data::explain(error)),
        }
    }
    Ok(there)
}

fn options(isolation: Isolation) -> ConsumerOptions {
    let isolation = match isolation {
        Isolation::ReadCommitted => tidemill_broker::Isolation::ReadCommitted,
        Isolation::ReadUncommitted => tidemill_broker::Isolation::ReadUncommitted,
    };
    ConsumerOptions { isolation, ..ConsumerOptions::default() }
}

struct Reader<'a> {
    args: &'a cli::Consume,
    topic: &'a Topic,
    parts: HashMap<TopicPartition, Part>,
    out: BufWriter<Stdout>,
    /// Records that may still be printed.
    left: u64,
}

impl Reader<'_> {
    async fn run(&mut self, access: &Access, stop: &Stop) -> Result<()> {
        let mut positions: Vec<_> = self
            .parts
            .iter()
            .map(|(partition, part)| (*partition, Position::unchecked(part.start)))
            .collect();
        positions.sort_by_key(|(partition, _)| partition.partition);
        let mut consumer = Consumer::start(access.clone(), positions, options(self.args.isolation));
        let until_end = self.args.until_end;
        for part in self.parts.values_mut() {
            part.done = until_end && part.start >= part.end;
        }
        let mut failed = Vec::new();
        let mut said = false;
        let mut gone = std::pin::pin!(stdout::gone());
        while self.left > 0 && self.parts.values().any(|part| !part.done) {
            let event = match consumer.try_next() {
                Some(event) => Some(event),
                None => {
                    // About to wait: what is known is shown.
                    self.out.flush().or_closed()?;
                    tokio::select! {
                        biased;
                        () = stop.wait() => break,
                        event = consumer.next() => event,
                        // A reader that has what it wanted (`| head`) is not waited with for more.
                        () = &mut gone => return Err(anyhow::Error::new(stdout::Closed)),
                    }
                }
            };
            if stop.asked() {
                break;
            }
            match event {
                Some(Ok(Event::Batches(consumed))) => self.print(&consumed)?,
                Some(Ok(Event::CaughtUp)) => {
                    if !until_end && !std::mem::replace(&mut said, true) {
                        self.out.flush().or_closed()?;
                        crate::note(format_args!(
                            "waits at the end of {} for more; Ctrl-C ends this",
                            self.topic.name
                        ));
                    }
                }
                Some(Ok(Event::Failed { partition, at, error })) => {
                    let number = partition.partition;
                    self.out.flush().or_closed()?;
                    let error = data::explain(error);
                    crate::note(format_args!(
                        "error: partition {number} of {} at offset {}: {error}",
                        self.topic.name, at.offset
                    ));
                    failed.push(number.to_string());
                    if let Some(part) = self.parts.get_mut(&partition) {
                        part.done = true;
                    }
                }
                Some(Err(error)) => return Err(data::explain(error)),
                None => break,
            }
        }
        match failed.as_slice() {
            [] => Ok(()),
            failed => {
                Err(anyhow!("{} was not read to its end in partition {}", self.topic.name, failed.join(", ")))
            }
        }
    }

    fn print(&mut self, consumed: &Consumed) -> Result<()> {
        let Some(part) = self.parts.get_mut(&consumed.partition) else { return Ok(()) };
        if part.done {
            return Ok(());
        }
        let end = if self.args.until_end { part.end } else { i64::MAX };
        for batch in &consumed.batches {
            let open = batch.open()?;
            for record in &open {
                let record = record?;
                if !(consumed.from..end).contains(&record.offset) {
                    continue;
                }
                if part.skip > 0 {
                    part.skip -= 1;
                    continue;
                }
                if self.left == 0 {
                    return Ok(());
                }
                self.left -= 1;
                let names: Vec<_> =
                    record.headers.iter().map(|header| (header.name(), header.value)).collect();
                let headers: Vec<_> = names.iter().map(|(name, value)| (name.as_ref(), *value)).collect();
                let shown = Shown {
                    topic: &self.topic.name,
                    partition: consumed.partition.partition,
                    offset: record.offset,
                    timestamp: record.timestamp,
                    key: record.key,
                    value: record.value,
                    headers: &headers,
                };
                print::record(&mut self.out, self.args.format, shown).or_closed()?;
            }
        }
        part.done = self.args.until_end && consumed.next.offset >= part.end;
        Ok(())
    }
}
