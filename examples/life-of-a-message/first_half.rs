//! From the producer to the reader: one record, one batch, one entry of the journal, one place in a segment.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use tidemill::broker::batch::{BatchBuilder, BatchHeader, BatchOptions, ProducerStamp, RecordParts};
use tidemill::broker::{Broker as _, Fetch, FetchPartition, Isolation, Position, Topic};
use tidemill::{Directory, NewRecord};

use crate::disk::{self, Round};
use crate::dump::{Is, Walk, claim, step, text};
use crate::job::{COUNTS, VISITS};

pub(crate) const KEY: &str = "192.168.1.7";
const VALUE: &str = "GET /index.html";
/// 17 May 2024, 10:00:03 UTC.
pub(crate) const AT: i64 = 1_715_940_003_000;
/// Bytes at the front of a batch that its crc leaves out.
const PLACED_BY_LOG: usize = 21;

/// Tells it; returns topic `visits`.
pub(crate) fn tell(path: &Path) -> Result<Topic> {
    let data = Directory::create(path)?;
    let visits = data.create_topic(VISITS, 1)?;
    data.create_topic(COUNTS, 1)?;
    ensure!(data.describe(VISITS)?.offsets[0].high_watermark == 0, "{} was used before", path.display());

    let producer = data.producer()?;
    let offset = producer.send(&visits, NewRecord::of(VALUE).key(KEY).at(AT))?.offset()?;
    let fetched = fetch(&data, &visits)?;
    drop((producer, data));
    // The owner has closed the directory: everything is in its files now.
    let segment = disk::partition_file(path, visits.id.0, 0, "log")?;
    let stored = *disk::batches(&segment.bytes)?.first().context("the segment is empty")?;

    the_record(offset)?;
    let sent = the_batch(stored)?;
    the_round(path, &visits, &sent)?;
    the_segment(&segment.name, stored, &sent)?;
    the_side_files(path, &visits, stored)?;
    the_fetch(&fetched, stored)?;
    Ok(visits)
}

/// What a consumer asks for and gets: batches as they are stored.
fn fetch(data: &Directory, topic: &Topic) -> Result<Vec<u8>> {
    let partition =
        FetchPartition { partition: topic.partition(0), position: Position::START, bytes_max: 1 << 20 };
    let request = Fetch {
        partitions: vec![partition],
        bytes_max: 1 << 20,
        wait_ms_max: 0,
        isolation: Isolation::ReadCommitted,
    };
    let (_, batches) = data.wait(data.access().fetch(request))?;
    Ok(batches.into_bytes().to_vec())
}

fn the_record(offset: i64) -> Result<()> {
    step(1, "A program sends a record", "src/directory/write.rs, log/broker/src/producer/lanes.rs")?;
    text(&format!(
        "   key {KEY:?}, value {VALUE:?}, timestamp {AT} (milliseconds since 1970).\n   \
         The key decides the partition, the producer waits a few milliseconds for company and sends what came together."
    ))?;
    claim(offset == 0, "the acknowledgement says: offset 0 of partition 0, and durable")
}

/// Builds the producer's batch again and shows it.
fn the_batch(stored: &[u8]) -> Result<Vec<u8>> {
    step(2, "The producer makes a batch of it", "log/src/batch/build.rs")?;
    text(
        "   Kafka's format, version 2: 61 bytes about the batch, then the records. Numbers are big-endian.\n",
    )?;
    let header = BatchHeader::parse(stored)?;
    let mut builder = BatchBuilder::new(BatchOptions::default());
    let record =
        RecordParts { timestamp: AT, key: Some(KEY.as_bytes()), value: Some(VALUE.as_bytes()), headers: &[] };
    ensure!(builder.push(record), "one record fits a batch");
    let stamp = ProducerStamp {
        id: header.producer_id,
        epoch: header.producer_epoch,
        sequence: header.base_sequence,
    };
    let sent = builder.build(stamp).to_vec();
    show_batch(&sent, BatchOf::Producer)?;
    claim(
        crc32c::crc32c(&sent[PLACED_BY_LOG..]).to_be_bytes() == sent[17..21],
        "the crc is that of the bytes from 21 on: whoever has the batch can check it, down to the reader",
    )?;
    claim(
        sent[PLACED_BY_LOG..] == stored[PLACED_BY_LOG..],
        "from byte 21 on, the log has stored exactly this batch",
    )?;
    Ok(sent)
}

/// Whose batch is shown: what differs from run to run depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BatchOf {
    /// Its times are the records', its producer the only one.
    Producer,
    /// Which epoch the job has by then depends on how often it committed.
    Job,
    /// Its time is that of the commit.
    Transaction,
}

/// A batch of one record, field by field.
pub(crate) fn show_batch(batch: &[u8], batch_of: BatchOf) -> Result<()> {
    let varying = |does: bool| if does { Is::Varying } else { Is::Fixed };
    let (epoch, times) = (varying(batch_of != BatchOf::Producer), varying(batch_of == BatchOf::Transaction));
    let mut walk = Walk::new(batch);
    walk.big::<8>("base offset", Is::Fixed, "offset of the first record; the log sets it")?;
    walk.big::<4>("length", Is::Fixed, "bytes from here on")?;
    walk.big::<4>("leader epoch", Is::Fixed, "the log sets it: how often the directory was opened")?;
    walk.big::<1>("magic", Is::Fixed, "format v2")?;
    walk.field(4, "crc32c", epoch, |_| "of everything behind it".to_owned())?;
    walk.field(2, "attributes", Is::Fixed, |bytes| attributes(bytes[1]))?;
    walk.big::<4>("last offset delta", Is::Fixed, "the last record is this far behind the first")?;
    walk.big::<8>("base timestamp", times, "records count from here")?;
    walk.big::<8>("max timestamp", times, "")?;
    walk.big::<8>("producer id", Is::Fixed, "who sent it")?;
    walk.big::<2>("producer epoch", epoch, "an older epoch of this id is refused")?;
    walk.big::<4>("base sequence", Is::Fixed, "by it the log drops what is sent twice; -1: none")?;
    walk.big::<4>("record count", Is::Fixed, "")?;
    walk.zigzag("record length", Is::Fixed, "varints from here on: 1 is written as 2, -1 as 1")?;
    walk.big::<1>("attributes", Is::Fixed, "of the record; none are defined yet")?;
    walk.zigzag("timestamp delta", Is::Fixed, "")?;
    walk.zigzag("offset delta", Is::Fixed, "")?;
    for part in ["key", "value"] {
        let len = walk.zigzag(&format!("{part} length"), Is::Fixed, "")?;
        show_part(&mut walk, part, usize::try_from(len).unwrap_or(0))?;
    }
    walk.zigzag("header count", Is::Fixed, "")?;
    ensure!(walk.rest().is_empty(), "{} bytes follow the record", walk.rest().len());
    Ok(())
}

fn show_part(walk: &mut Walk<'_>, part: &str, len: usize) -> Result<()> {
    let bytes = walk.rest().get(..len).unwrap_or_default();
    if bytes.is_ascii() && bytes.iter().all(|b| *b >= b' ') {
        walk.text(len, part)?;
    } else {
        walk.field(len, part, Is::Fixed, |_| "not text: see below".to_owned())?;
    }
    Ok(())
}

fn attributes(bits: u8) -> String {
    let mut said = vec![if bits & 7 == 0 { "not compressed" } else { "compressed" }];
    said.extend((bits & 0x10 != 0).then_some("transactional"));
    said.extend((bits & 0x20 != 0).then_some("a marker"));
    said.join(", ")
}

fn the_round(path: &Path, topic: &Topic, sent: &[u8]) -> Result<()> {
    let round = disk::round_with(path, &sent[PLACED_BY_LOG..])?;
    step(3, "The log writes it to the journal, and syncs", "log/src/writer.rs, log/src/journal/round.rs")?;
    text(
        "   One file takes the appends of all partitions in one order. What came in while the disk was busy goes out as\n   \
         one round: one write, one sync, one checksum. Once it is synced the acknowledgement may leave.\n   \
         Numbers are little-endian.\n",
    )?;
    let mut walk = show_round(path, &round)?;
    let entry = find_entry(&mut walk, &sent[PLACED_BY_LOG..])?;
    text("\n   Its entry (log/src/entry.rs): a head in postcard's encoding, then the batches.\n")?;
    let mut walk = Walk::new(entry);
    walk.little::<4>("length", Is::Varying, "bytes from here on")?;
    walk.little::<4>("length of head", Is::Varying, "")?;
    walk.zigzag("clock", Is::Varying, "milliseconds by which retention ages")?;
    walk.unsigned("change", Is::Fixed, |n| format!("{n} (append a batch)"))?;
    walk.unsigned("batches", Is::Fixed, |n| n.to_string())?;
    walk.unsigned("length of uuid", Is::Fixed, |n| n.to_string())?;
    let uuid = walk
        .field(16, "topic uuid", Is::Varying, |_| "topic `visits`; the name is not used here".to_owned())?;
    walk.unsigned("partition", Is::Fixed, |n| n.to_string())?;
    walk.unsigned("length of batch", Is::Fixed, |n| n.to_string())?;
    claim(uuid == topic.id.0.to_be_bytes(), "the uuid is that of topic `visits`")?;
    claim(walk.rest()[PLACED_BY_LOG..] == sent[PLACED_BY_LOG..], "the batch follows, and ends the entry")
}

/// Shows the head of a round; the walk stands before its entries.
pub(crate) fn show_round<'a>(path: &Path, round: &'a Round) -> Result<Walk<'a>> {
    text("   The round, in one of the files journal/*.wal:\n")?;
    let mut walk = Walk::new(&round.bytes);
    walk.text(4, "magic")?;
    walk.field(4, "crc32c", Is::Varying, |_| "of everything behind it".to_owned())?;
    walk.little::<8>(
        "synced through",
        Is::Varying,
        "up to here the journal was synced when this was written",
    )?;
    walk.field(16, "directory id", Is::Varying, |_| {
        "a file of another directory is not believed".to_owned()
    })?;
    let lsn = walk.little::<8>("LSN", Is::Varying, "position in the journal as a whole")?;
    walk.little::<8>("first entry", Is::Varying, "number of its first entry")?;
    let previous = walk.little::<8>("end before", Is::Varying, "where the round before this one ended")?;
    let crc =
        walk.field(4, "its crc", Is::Varying, |_| "with which checksum: so rounds are a chain".to_owned())?;
    walk.little::<4>("length", Is::Varying, "")?;
    walk.little::<4>("entries", Is::Varying, "")?;
    walk.little::<4>("incarnation", Is::Fixed, "how often the directory was opened")?;
    let file_bytes = disk::journal_file_bytes(path)?;
    claim(crc32c::crc32c(&round.bytes[8..]).to_le_bytes() == round.bytes[4..8], "the crc is right")?;
    claim(
        lsn == round.file_number * file_bytes + round.at as u64,
        "the LSN is file number x file size + position: an old round of a reused file has another one",
    )?;
    let before = disk::round_ending_at(path, previous, file_bytes)?;
    claim(before[4..8] == *crc, "the round before is there, with that crc")?;
    Ok(walk)
}

/// The entry of a round that holds these bytes.
pub(crate) fn find_entry<'a>(walk: &mut Walk<'a>, needle: &[u8]) -> Result<&'a [u8]> {
    loop {
        let rest = walk.rest();
        let length = rest.first_chunk::<4>().context("the round ends before the entry")?;
        let entry = rest.get(..4 + u32::from_le_bytes(*length) as usize).context("the entry is cut off")?;
        if entry.windows(needle.len()).any(|part| part == needle) {
            return Ok(entry);
        }
        walk.skip(entry.len(), "another entry, which came at the same time")?;
    }
}

fn the_segment(name: &str, stored: &[u8], sent: &[u8]) -> Result<()> {
    step(4, "The same bytes go to the partition's segment", "log/src/segment.rs, log/src/entry.rs")?;
    text(
        "   topics/<uuid of visits>/0/00000000000000000000.log, named after its first offset: batches, one after the\n   \
         other, and nothing else. It is written while the journal is synced, and nobody waits for it: after a crash\n   \
         it is made again from the journal. Only what the log has to say was changed:\n",
    )?;
    ensure!(name.ends_with("/00000000000000000000.log"), "the segment is called {name}");
    let mut walk = Walk::new(stored);
    walk.big::<8>("base offset", Is::Fixed, "set by the log; it was 0 before, too")?;
    walk.big::<4>("length", Is::Fixed, "")?;
    walk.big::<4>("leader epoch", Is::Fixed, "set by the log; it was -1 before")?;
    walk.big::<1>("magic", Is::Fixed, "")?;
    walk.field(4, "crc32c", Is::Fixed, |_| "as before: it leaves the first 21 bytes out".to_owned())?;
    walk.skip(walk.rest().len(), "as in 2")?;
    claim(stored[8..12] == sent[8..12] && stored[16..] == sent[16..], "everything else is the producer's")
}

/// The seed of all checks beside a segment: they hold for this topic, partition and file, and for no other.
fn seed(topic: &Topic) -> u32 {
    let mut bytes = topic.id.0.to_be_bytes().to_vec();
    bytes.extend([0; 4 + 8 + 4]); // partition 0, base offset 0, revision 0
    crc32c::crc32c(&bytes)
}

fn the_side_files(path: &Path, topic: &Topic, stored: &[u8]) -> Result<()> {
    step(5, "Two small files beside the segment are brought up to date", "log/src/segment/sidecars.rs")?;
    let head = disk::partition_file(path, topic.id.0, 0, "headcrc")?.bytes;
    let index = disk::partition_file(path, topic.id.0, 0, "index")?.bytes;
    text("   .headcrc has 8 bytes a batch and covers what the batch's own crc leaves out:\n")?;
    let mut walk = Walk::new(&head);
    let value = walk
        .field(4, "value", Is::Varying, |_| "crc of number, position and first 21 bytes of batch 0".into())?;
    let check = walk.field(4, "check", Is::Varying, |_| "crc of this entry's number and value".into())?;
    let numbered = crc32c::crc32c_append(seed(topic), &0u32.to_le_bytes());
    let expected = crc32c::crc32c_append(numbered, &0u64.to_le_bytes());
    let expected = crc32c::crc32c_append(expected, &stored[..PLACED_BY_LOG]);
    claim(
        expected.to_le_bytes() == *value,
        "the value is right: base offset and leader epoch are as the log set them",
    )?;
    claim(crc32c::crc32c_append(numbered, value).to_le_bytes() == *check, "the check is right")?;
    text("\n   .index notes a batch after every 4096 bytes, so a reader need not walk from the front:\n")?;
    let mut walk = Walk::new(&index);
    walk.little::<4>("offset", Is::Fixed, "counted from the segment's first")?;
    walk.little::<4>("position", Is::Fixed, "where that batch begins in the .log")?;
    walk.little::<4>("ordinal", Is::Fixed, "number of that batch in the segment, from 0")?;
    walk.field(8, "largest time", Is::Fixed, |_| {
        "none yet (of the batches before; by it a time is looked up)".into()
    })?;
    let at = walk.at();
    let check = walk.field(4, "check", Is::Varying, |_| "crc, as above".into())?;
    claim(crc32c::crc32c_append(numbered, &index[..at]).to_le_bytes() == *check, "the check is right")
}

fn the_fetch(fetched: &[u8], stored: &[u8]) -> Result<()> {
    step(6, "A reader fetches it", "log/src/segment/read.rs, log/broker/src/consumer.rs")?;
    text(
        "   The log looks the offset up, checks both checksums, and hands out the batch as it lies there. It is unpacked\n   \
         where it is used, and nowhere before.",
    )?;
    claim(fetched == stored, &format!("the reader got the {} bytes of the segment", stored.len()))
}
