//! The producer: one record per address and second, in event time, without a hole and without a repeat.
//!
//! ```text
//!   start ─▶ fence the one before ─▶ last record of each address ─▶ next second ─▶ one transaction a second
//!     ▲                                                                               │
//!     └────────────── the transaction was aborted, or its outcome is not known ◀──────┘
//! ```
//!
//! A record's time is the second it was scheduled for, not the moment it was sent: a producer that was dead for a while
//! catches up, and the pause leaves no hole. What it has written is read from the topic, and only *after* the producer
//! before it was fenced: without that, a request of the dead one that is still on its way could be appended after the
//! look, and its second would be there twice.

use std::io::Read as _;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tidemill::broker::Topic;
use tidemill::{Directory, Isolation, NewRecord, Outcome, Transaction};
use tidemill_examples::say;

use crate::job::{SOURCE, WINDOW, moment};

pub(crate) const SECOND_MS: i64 = 1_000;
/// Each has a partition of its own, so the last record of the partition is the last one of the address.
pub(crate) const ADDRESSES: [Ipv4Addr; 4] = [
    Ipv4Addr::new(192, 168, 1, 1),
    Ipv4Addr::new(192, 168, 1, 2),
    Ipv4Addr::new(192, 168, 1, 3),
    Ipv4Addr::new(192, 168, 1, 4),
];
/// Attempts in a row to open a transaction; each waits for the directory's owner by itself.
const ATTEMPTS: u32 = 5;

/// What is produced, and how fast.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    /// The first second, milliseconds since 1970.
    pub(crate) start: i64,
    /// Seconds of event time per second.
    pub(crate) speed: f64,
    /// At least so many seconds.
    pub(crate) seconds: u32,
}

/// Produces until standard input has ended, at least [`Schedule::seconds`] are written and a window is full. Prints a
/// line for each second that is durable.
pub(crate) fn run(data: &Path, schedule: Schedule) -> Result<()> {
    let data = Directory::open_with(data, tidemill::broker::Intent::Create, |event| say(event))?;
    let topic = data.create_topic(SOURCE, ADDRESSES.len() as u32)?;
    let input_ended = Arc::new(AtomicBool::new(false));
    {
        let input_ended = Arc::clone(&input_ended);
        std::thread::spawn(move || {
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            input_ended.store(true, Ordering::Relaxed);
        });
    }
    let enough = schedule.start + i64::from(schedule.seconds) * SECOND_MS;
    let window = i64::try_from(WINDOW.as_millis())?;
    let (mut transaction, mut next) = resume(&data, &topic, schedule.start)?;
    let (began, first) = (Instant::now(), next.iter().copied().min().unwrap_or(schedule.start));
    loop {
        let second = next.iter().copied().min().unwrap_or(schedule.start);
        if input_ended.load(Ordering::Relaxed) && second >= enough && second % window == 0 {
            return Ok(());
        }
        let due = Duration::from_millis((second - first).unsigned_abs()).div_f64(schedule.speed);
        std::thread::sleep(due.saturating_sub(began.elapsed()));
        match write(&mut transaction, &topic, second, &next) {
            Ok(Outcome::Committed) => {
                next.iter_mut().filter(|next| **next == second).for_each(|next| *next += SECOND_MS);
                crate::tell(format_args!("written {}", moment(second)))?;
            }
            // The topic alone knows what became of it.
            Ok(Outcome::Aborted) | Err(_) => (transaction, next) = resume(&data, &topic, schedule.start)?,
        }
    }
}

/// One second of every address that has not got it yet.
fn write(
    transaction: &mut Transaction,
    topic: &Topic,
    second: i64,
    next: &[i64],
) -> Result<Outcome, tidemill::DirectoryError> {
    for ((ip, partition), _) in ADDRESSES.iter().zip(0..).zip(next).filter(|(_, next)| **next == second) {
        let (key, value) = (ip.to_string(), format!("{} {ip}", moment(second)));
        transaction.send(topic, NewRecord::of(&value).key(&key).at(second).partition(partition))?;
    }
    transaction.commit()
}

/// Fences whoever produced before, then looks where each address is to go on.
fn resume(data: &Directory, topic: &Topic, start: i64) -> Result<(Transaction, Vec<i64>)> {
    let mut attempt = 1;
    loop {
        match try_resume(data, topic, start) {
            Ok(resumed) => return Ok(resumed),
            Err(error) if attempt == ATTEMPTS => bail!(error),
            Err(_) => attempt += 1,
        }
    }
}

fn try_resume(
    data: &Directory,
    topic: &Topic,
    start: i64,
) -> Result<(Transaction, Vec<i64>), tidemill::DirectoryError> {
    let transaction = data.transactional_producer("ip-count-producer")?;
    let next = (0..topic.partitions).map(|partition| {
        let last = data.last(SOURCE, partition, Isolation::ReadCommitted)?;
        Ok(last.map_or(start, |record| record.timestamp + SECOND_MS))
    });
    Ok((transaction, next.collect::<Result<_, tidemill::DirectoryError>>()?))
}
