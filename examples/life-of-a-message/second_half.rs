//! From the job to the committed output: a cell of state, a changelog record, a transaction, a count.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use tidemill::broker::batch::OpenBatch;
use tidemill::broker::{Broker as _, FetchOffsets, GroupOffset, Isolation, Stable, Topic};
use tidemill::engine::{Layout, Mode};
use tidemill::names::Identity;
use tidemill::runtime::Progress;
use tidemill::stream::shard_of;
use tidemill::{Directory, NewRecord, RunOptions};

use crate::disk;
use crate::dump::{Is, Walk, claim, step, text};
use crate::first_half::{AT, BatchOf, KEY, find_entry, show_batch, show_round};
use crate::job::{COUNTS, NAME, PerAddress, STORE, VISITS};

/// The window of the record: 10:00:00 to 10:00:05.
const WINDOW_END: i64 = AT + 2_000;
/// The longest that a commit may take on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// Tells it.
pub(crate) fn tell(path: &Path, visits: Topic) -> Result<()> {
    // The job reads the record and commits, while its window is open.
    let data = Directory::open(path)?;
    run_until(&data, "the record is committed as read", |now| now.committed.get(&0) == Some(&1))?;
    let request = FetchOffsets { group: NAME.to_owned(), stable: Stable::Wait(10_000) };
    let offsets = data.wait(data.access().fetch_offsets(request))?.offsets;
    let shard = shard_of(KEY.as_bytes(), Layout::SHARDS).0;
    let changelog_name = Identity::new(NAME)?.changelog(STORE)?;
    let changelog = data.describe(&changelog_name)?.topic;
    drop(data);
    the_cell(path, shard, &changelog)?;
    the_store(path, shard)?;
    the_offset(&offsets, &visits)?;

    // A second record, five seconds later: nothing older is expected any more, and the window closes.
    let data = Directory::open(path)?;
    data.producer()?.send(&visits, NewRecord::of("GET /").key("192.168.1.8").at(AT + 5_000))?.offset()?;
    run_until(&data, "the count is committed", |now| now.output_committed == 1)?;
    let counts = data.describe(COUNTS)?.topic;
    let seen = data.read(COUNTS, Isolation::ReadCommitted)?;
    drop(data);
    let segment = disk::partition_file(path, counts.id.0, 0, "log")?;
    let batches = disk::batches(&segment.bytes)?;
    let [output, marker] = batches[..] else { anyhow::bail!("{} batches in topic counts", batches.len()) };
    the_output(output)?;
    the_marker(marker)?;
    the_commit(path, marker)?;
    let [count] = &seen[..] else { anyhow::bail!("{} records in topic counts", seen.len()) };
    step(13, "A reader of committed records sees the count, once", "log/broker/src/visible.rs")?;
    text(&format!("   {:?}", count.text()))?;
    claim(
        count.text() == "2024-05-17T10:00:00.000Z 192.168.1.7 1",
        "address 192.168.1.7 was seen once from 10:00:00 on",
    )
}

/// Runs the job until `enough`, then stops it after a commit.
fn run_until(data: &Directory, what: &str, mut enough: impl FnMut(&Progress) -> bool) -> Result<()> {
    let options = RunOptions { mode: Mode::Unbounded, tasks: Some(1), ..RunOptions::default() };
    let job = data.start::<PerAddress>(options)?;
    let monitor = job.monitor().clone();
    let deadline = std::time::Instant::now() + DEADLINE;
    // A job that failed says so when it is stopped.
    let mut there = false;
    while !there && !job.is_over() && std::time::Instant::now() < deadline {
        there = monitor.wait_until(Duration::from_millis(50), &mut enough);
    }
    job.stop()?;
    ensure!(there, "within {} s it did not come to pass that {what}", DEADLINE.as_secs());
    Ok(())
}

fn the_cell(path: &Path, shard: u16, changelog: &Topic) -> Result<()> {
    step(7, "A job reads it and counts", "stream/src/engine/source.rs, stream/src/engine/window.rs")?;
    text(&format!(
        "   Event time is the record's timestamp; its window is 10:00:00 to 10:00:05, which stays open as long as older\n   \
         records may come. The count is a cell in memory, and the key decides whose: murmur2(key) modulo {}\n   \
         gives the shard, here {shard}, and shards are shared out among the tasks.",
        Layout::SHARDS
    ))?;
    claim(AT - AT % 5_000 + 5_000 == WINDOW_END, "the window ends at 10:00:05")?;
    step(
        8,
        "At a commit the cell becomes a record of the changelog",
        "stream/src/state/mod.rs, stream/src/codec.rs",
    )?;
    text(&format!(
        "   Topic {}, partition {shard}: the partition is the shard. What memory holds can be\n   \
         made again from it. The key and the value of the record:\n",
        changelog.name
    ))?;
    let segment = disk::partition_file(path, changelog.id.0, shard.into(), "log")?;
    let batches = disk::batches(&segment.bytes)?;
    let cell = batches.first().context("the changelog is empty")?;
    let (key, value) = key_and_value(cell)?;
    let mut walk = Walk::new(&key);
    walk.field(8, "window end", Is::Fixed, |bytes| {
        format!("{} (10:00:05; the first bit is flipped, so that bytes sort as times do)", window_end(bytes))
    })?;
    walk.text(walk.rest().len(), "key")?;
    text("")?;
    show_cell(&value)?;
    claim(
        key[..8] == (WINDOW_END.cast_unsigned() ^ 1 << 63).to_be_bytes() && key[8..] == *KEY.as_bytes(),
        "this is the window and the address of our record",
    )?;
    claim(value[..] == [1, 1], "and it was counted once")
}

fn show_cell(value: &[u8]) -> Result<()> {
    let mut walk = Walk::new(value);
    walk.big::<1>("codec version", Is::Fixed, "")?;
    walk.unsigned("count", Is::Fixed, |n| n.to_string())?;
    Ok(())
}

fn window_end(bytes: &[u8]) -> i64 {
    let number = bytes.iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
    (number ^ 1 << 63).cast_signed()
}

fn the_store(path: &Path, shard: u16) -> Result<()> {
    step(9, "After the commit the same bytes may go to RocksDB", "stream/adapters/src/rocks.rs")?;
    text(
        "   The store is a cache of the changelog that survives a restart; nothing uncommitted ever gets into it. A cell\n   \
         is kept under its store, its shard, and the changelog's key:\n",
    )?;
    let entries = tidemill::adapters::dump_state(&path.join("state").join(NAME))?;
    let cell = entries.iter().find(|(key, _)| key.ends_with(KEY.as_bytes()));
    let (key, value) = cell.context("the store does not hold the cell")?;
    let mut walk = Walk::new(key);
    walk.big::<2>("store", Is::Fixed, "the job's first; 0 is the engine's own")?;
    let found = walk.big::<2>("shard", Is::Fixed, "")?;
    walk.field(8, "window end", Is::Fixed, |bytes| format!("{} (10:00:05)", window_end(bytes)))?;
    walk.text(walk.rest().len(), "key")?;
    text("")?;
    show_cell(value)?;
    claim(
        found == i64::from(shard) && value[..] == [1, 1],
        "the same shard, the same value as in the changelog",
    )
}

fn the_offset(offsets: &[GroupOffset], visits: &Topic) -> Result<()> {
    step(10, "The same commit says how far the job has read", "stream/src/names.rs, log/src/plan/txn.rs")?;
    let [offset] = offsets else { anyhow::bail!("{} offsets are committed", offsets.len()) };
    text(&format!(
        "   Group {NAME:?}, partition 0 of `{VISITS}`: next offset {}. With it goes how far event time had come:\n",
        offset.position.offset
    ))?;
    let mut walk = Walk::new(&offset.metadata);
    walk.big::<1>("version", Is::Fixed, "")?;
    let watermark = walk.big::<8>("watermark", Is::Fixed, "10:00:02.999; nothing older is expected")?;
    walk.big::<8>("floor", Is::Fixed, "the highest that the job as a whole has reached")?;
    claim(
        offset.partition == visits.partition(0) && offset.position.offset == 1,
        "our record is read, nothing else was there",
    )?;
    claim(watermark == AT - 1, "the event-time watermark is the record's time less a millisecond")?;
    text(
        "   A kill from now on changes nothing: the next start reads on at offset 1, and has the count from the changelog.\n   \
         A kill before would have changed nothing either: it would read offset 0 again, and know of no count.",
    )
}

fn the_output(output: &[u8]) -> Result<()> {
    step(
        11,
        "A record of 10:00:08 arrives; the window closes; the count goes out",
        "stream/src/engine/window.rs, stream/adapters/src/transaction.rs",
    )?;
    text(&format!(
        "   No record before 10:00:07.999 is expected any more, so the window that ends at 10:00:05 is complete. Its result\n   \
         is a record of topic `{COUNTS}`, in a batch that belongs to an open transaction:\n"
    ))?;
    show_batch(output, BatchOf::Job)?;
    claim(output[22] & 0x10 != 0, "bit 4 of the attributes: nobody who reads committed data sees it yet")
}

fn the_marker(marker: &[u8]) -> Result<()> {
    step(
        12,
        "The transaction ends: a marker behind the records of each partition",
        "log/src/batch/build.rs, log/src/plan/txn.rs",
    )?;
    text(&format!(
        "   In `{COUNTS}` it follows the count. It is a batch like any other, and takes an offset:\n"
    ))?;
    show_batch(marker, BatchOf::Transaction)?;
    let (key, value) = key_and_value(marker)?;
    text("\n   The marker's key, then its value:\n")?;
    let mut walk = Walk::new(&key);
    walk.big::<2>("version of the key", Is::Fixed, "")?;
    let kind = walk.big::<2>("kind", Is::Fixed, "0 is abort, 1 is commit")?;
    text("")?;
    let mut walk = Walk::new(&value);
    walk.big::<2>("its version", Is::Fixed, "")?;
    walk.big::<4>("coordinator epoch", Is::Fixed, "")?;
    claim(marker[22] & 0x30 == 0x30, "the attributes say: transactional, a marker; readers pass over it")?;
    claim(kind == 1, "it says: committed")
}

fn the_commit(path: &Path, marker: &[u8]) -> Result<()> {
    text(
        "\n   The markers of all partitions are ONE entry of the journal, and the offsets that wait in the transaction count\n   \
         from that entry on. It is the commit: a crash leaves all of it or nothing.\n",
    )?;
    let round = disk::round_with(path, &marker[21..])?;
    let mut walk = show_round(path, &round)?;
    let entry = find_entry(&mut walk, &marker[21..])?;
    text("\n   Its entry:\n")?;
    let mut walk = Walk::new(entry);
    walk.little::<4>("length", Is::Varying, "bytes from here on")?;
    walk.little::<4>("length of head", Is::Varying, "")?;
    walk.zigzag("clock", Is::Varying, "")?;
    let change = walk.unsigned("change", Is::Fixed, |n| format!("{n} (the end of a transaction)"))?;
    let len = walk.unsigned("length of name", Is::Fixed, |n| n.to_string())?;
    walk.text(usize::try_from(len)?, "transactional id")?;
    let outcome = walk.unsigned("outcome", Is::Fixed, |n| format!("{n} (committed)"))?;
    walk.zigzag("next producer id", Is::Fixed, "the next transaction of this job")?;
    walk.zigzag("next epoch", Is::Varying, "of its own, so that a late request cannot touch it")?;
    let markers = walk.unsigned("batches", Is::Varying, |n| {
        format!("{n} (a marker for each partition that was written to)")
    })?;
    claim((change, outcome) == (7, 0), "it is the end of a transaction, and it committed")?;
    claim(markers > 1, "one marker is for the count, the others are for partitions of the changelogs")?;
    claim(
        entry.windows(marker.len() - 21).any(|part| part == &marker[21..]),
        "the marker above is one of them",
    )
}

/// Key and value of the only record of a batch.
fn key_and_value(batch: &[u8]) -> Result<(Bytes, Bytes)> {
    let open = OpenBatch::open(&Bytes::copy_from_slice(batch), 1 << 20)?;
    let record = open.records().next().context("the batch has no record")??;
    Ok((record.key.context("the record has no key")?, record.value.context("the record has no value")?))
}
