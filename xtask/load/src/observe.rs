//! Reads everything that a log serves.

use std::collections::BTreeSet;

use anyhow::{Context, Result, anyhow, ensure};
use tidemill_log::batch::{Batches, OpenBatch};
use tidemill_log::{Isolation, Log, Position, TopicPartition};

use crate::drive::GROUP;
use crate::script::{Found, Id, Partition, value};

/// Bytes of one read.
const READ_BYTES: usize = 1 << 20;

/// All topics, records and offsets; an error if a served byte is not what was sent, or something is still open.
pub(crate) fn observe(log: &Log) -> Result<Found> {
    let mut found = Found::default();
    let mut names = std::collections::BTreeMap::new();
    for topic in log.topics() {
        let mut partitions = Vec::new();
        for tp in topic.topic_partitions() {
            names.insert(tp, (topic.name.clone(), tp.partition));
            let of = |isolation| {
                read(log, tp, isolation).with_context(|| format!("{}/{}", topic.name, tp.partition))
            };
            partitions.push(Partition {
                all: of(Isolation::ReadUncommitted)?,
                committed: of(Isolation::ReadCommitted)?,
            });
        }
        found.topics.insert(topic.name.clone(), partitions);
    }
    let offsets = log.group_offsets(GROUP, None);
    ensure!(offsets.pending.is_empty(), "a transaction of the dead process is still open");
    for offset in offsets.committed {
        let name =
            names.get(&offset.partition).ok_or_else(|| anyhow!("an offset of a topic that is gone"))?;
        found.group.insert(name.clone(), offset.position.offset);
    }
    Ok(found)
}

fn read(log: &Log, tp: TopicPartition, isolation: Isolation) -> Result<Vec<Id>> {
    let (mut records, mut aborted, mut from) = (Vec::new(), BTreeSet::new(), Position::START);
    loop {
        let got = log.read(tp, from, READ_BYTES, isolation)?;
        if got.batches.is_empty() {
            let end = got.offsets.end.offset;
            ensure!(from.offset == end, "reading ends at {}, the partition at {end}", from.offset);
            break;
        }
        ensure!(got.next.offset > from.offset, "a read from {from:?} goes on at {:?}", got.next);
        aborted.extend(got.aborted);
        for batch in Batches::new(got.batches) {
            let (header, batch) = batch?;
            for record in &OpenBatch::open(&batch, READ_BYTES)? {
                let record = record?;
                if header.is_control() {
                    continue;
                }
                let bytes = record.value.unwrap_or_default();
                let id = bytes.first_chunk().map(|id| u64::from_be_bytes(*id));
                let id = id.with_context(|| format!("offset {} is no record of ours", record.offset))?;
                ensure!(bytes == value(id), "offset {}: record {id:#x} has other bytes", record.offset);
                records.push((record.offset, header.producer_id, id));
            }
        }
        from = got.next;
    }
    let gone = |offset: i64, producer: i64| {
        aborted.iter().any(|r| r.producer_id == producer && (r.first..=r.last).contains(&offset))
    };
    records.retain(|(offset, producer, _)| !gone(*offset, *producer));
    Ok(records.into_iter().map(|(_, _, id)| id).collect())
}
