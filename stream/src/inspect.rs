//! A job seen from outside: what it committed, read from the log alone, so beside a running job too.
//!
//! ```text
//!   _jobs ─▶ JobRecord ─▶ stores ─▶ ends of both changelogs, taken at one commit ─▶ marks ─▶ fold of a shard ─▶ cells
//! ```
//!
//! Invariants
//! * What is shown is a committed state. Between two looks at all ends that agree no commit ended, so ends taken there
//!   belong to one commit; a job that commits faster than this can look is shown with [`StoreView::steady`] false.
//! * Nothing is written, and nobody is fenced.
//! * A shard is folded at a time: memory for the live cells of one shard, not of the store.
//!
//! Left out: reading the store instead of the changelog where that is shorter. The store may be younger or older than
//! the last commit; the changelog says which state was committed.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::Value;

use crate::hash::shard_of;
use crate::io::{Log, LogError, PartitionEnds, Position, TopicId, TopicInfo};
use crate::key::Shard;
use crate::names::{BadName, Identity, JOBS_TOPIC, JobRecord, StoreRecord};
use crate::plan::StepSpec;
use crate::state::{
    Marks, StateBackend, StateError, StoreId, mark_of_changelog_key, stored_position, window_and_key,
};

/// Bytes read from a topic at once.
const CHUNK_BYTES: usize = 4 << 20;
/// How often the ends are looked at again before the state is shown as it is.
const LOOKS: usize = 20;

/// Why a job's committed state cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The log failed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The identity makes names that cannot be.
    #[error(transparent)]
    Name(#[from] BadName),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StateError),
    /// A topic holds what the engine does not write.
    #[error("{topic} holds what the engine does not write: {what}")]
    Corrupt {
        /// The topic.
        topic: String,
        /// What is wrong.
        what: String,
    },
}

/// What every identity committed to, by identity. Empty where no job ran yet.
///
/// # Errors
///
/// If the log fails or a record cannot be read.
pub fn jobs(log: &dyn Log) -> Result<BTreeMap<String, JobRecord>, InspectError> {
    let mut found = BTreeMap::new();
    let Some(topic) = log.topic(JOBS_TOPIC)? else { return Ok(found) };
    for partition in 0..topic.partitions {
        let end = log.ends(&topic.id, partition)?;
        each_record(log, &topic.id, partition, &end, &mut |key, value| {
            let name = String::from_utf8_lossy(key).into_owned();
            if value.is_empty() {
                found.remove(&name);
                return Ok(());
            }
            let record = serde_json::from_slice(value).map_err(|e| InspectError::Corrupt {
                topic: JOBS_TOPIC.to_owned(),
                what: format!("the record of `{name}` ({e})"),
            })?;
            found.insert(name, record);
            Ok(())
        })?;
    }
    Ok(found)
}

/// Is given window end, key and value of a cell.
pub type CellVisitor<'a, E> = dyn FnMut(i64, &[u8], &[u8]) -> Result<(), E> + 'a;

/// A window store as it was committed at one moment.
pub struct StoreView<'a> {
    log: &'a dyn Log,
    /// Its name.
    pub name: String,
    /// What the identity committed to about it.
    pub record: StoreRecord,
    /// What of it fired and closed.
    pub marks: Marks,
    /// Whether all of it belongs to one commit.
    pub steady: bool,
    /// The changelog of its cells.
    pub changelog: TopicId,
    /// Ends of that changelog, by shard.
    pub ends: Vec<PartitionEnds>,
}

impl fmt::Debug for StoreView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreView")
            .field("name", &self.name)
            .field("marks", &self.marks)
            .finish_non_exhaustive()
    }
}

impl<'a> StoreView<'a> {
    /// Takes the ends and reads the marks; `None` where a changelog is not there.
    ///
    /// # Errors
    ///
    /// If the log fails or the marks cannot be read.
    pub fn open(
        log: &'a dyn Log,
        identity: &Identity,
        name: &str,
        record: &StoreRecord,
    ) -> Result<Option<Self>, InspectError> {
        let topic = |name: String| -> Result<Option<TopicInfo>, InspectError> { Ok(log.topic(&name)?) };
        let (Some(keyed), Some(windows)) =
            (topic(identity.keyed_changelog()?)?, topic(identity.changelog(name)?)?)
        else {
            return Ok(None);
        };
        let look = || -> Result<Vec<Vec<PartitionEnds>>, InspectError> {
            let ends = |topic: &TopicInfo| -> Result<Vec<_>, InspectError> {
                (0..topic.partitions).map(|p| Ok(log.ends(&topic.id, p)?)).collect()
            };
            Ok(vec![ends(&keyed)?, ends(&windows)?])
        };
        let stable = |all: &[Vec<PartitionEnds>]| -> Vec<i64> {
            all.iter().flatten().map(|e| e.last_stable).collect()
        };
        let (mut ends, mut steady) = (look()?, false);
        for _ in 0..LOOKS {
            let again = look()?;
            steady = stable(&ends) == stable(&again);
            ends = again;
            if steady {
                break;
            }
        }
        let mut marks = Marks::NONE;
        for (partition, end) in (0..keyed.partitions).zip(&ends[0]) {
            each_record(log, &keyed.id, partition, end, &mut |key, value| {
                if mark_of_changelog_key(key) != Some(StoreId(record.id)) {
                    return Ok(());
                }
                let found = Marks::decode(value).ok_or_else(|| InspectError::Corrupt {
                    topic: keyed.id.name.to_string(),
                    what: format!("marks {value:02x?}"),
                })?;
                marks.raise(found);
                Ok(())
            })?;
        }
        let ends = ends.pop().unwrap_or_default();
        Ok(Some(Self {
            log,
            name: name.to_owned(),
            record: record.clone(),
            marks,
            steady,
            changelog: windows.id,
            ends,
        }))
    }

    /// How many shards it has.
    pub fn shards(&self) -> u16 {
        u16::try_from(self.ends.len()).unwrap_or(u16::MAX)
    }

    /// The shard of a key.
    pub fn shard_of(&self, key: &[u8]) -> Shard {
        shard_of(key, self.shards().max(1))
    }

    /// Visits the live cells of a shard in the order of window end and key: window end, key, value.
    ///
    /// # Errors
    ///
    /// If the changelog cannot be read, or `each` fails.
    pub fn each_cell<E: From<InspectError>>(
        &self,
        shard: Shard,
        each: &mut CellVisitor<'_, E>,
    ) -> Result<(), E> {
        let Some(end) = self.ends.get(usize::from(shard.0)) else { return Ok(()) };
        let mut cells: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        each_record(self.log, &self.changelog, u32::from(shard.0), end, &mut |key, value| {
            let Some((window_end, _)) = window_and_key(key) else {
                let (topic, what) = (self.changelog.name.to_string(), format!("key {key:02x?}"));
                return Err(InspectError::Corrupt { topic, what });
            };
            // A closed window is dead, wherever its cells still stand.
            if value.is_empty() {
                cells.remove(key);
            } else if window_end > self.marks.closed {
                cells.insert(key.to_vec(), value.to_vec());
            }
            Ok(())
        })?;
        for (key, value) in &cells {
            if let Some((window_end, key)) = window_and_key(key) {
                each(window_end, key, value)?;
            }
        }
        Ok(())
    }

    /// How many offsets a store on disk stands behind the changelog, over all shards: what a start would replay,
    /// markers included. A position that does not hold, or none, counts from the start of the changelog.
    ///
    /// # Errors
    ///
    /// If log or store fail.
    pub fn behind(&self, store: &dyn StateBackend) -> Result<u64, InspectError> {
        let mut behind = 0;
        for (end, shard) in self.ends.iter().zip((0..).map(Shard)) {
            let at = match stored_position(store, shard, self.changelog.uuid)? {
                Some(at) if self.log.holds(&self.changelog, u32::from(shard.0), at)? => at,
                _ => Position::beginning(end.log_start),
            };
            behind += end.last_stable.saturating_sub(at.offset.max(end.log_start)).max(0).unsigned_abs();
        }
        Ok(behind)
    }
}

/// Is given key and value of a record.
type RecordVisitor<'a> = dyn FnMut(&[u8], &[u8]) -> Result<(), InspectError> + 'a;

/// Visits the committed records of a partition up to ends that were taken before.
fn each_record(
    log: &dyn Log,
    topic: &TopicId,
    partition: u32,
    ends: &PartitionEnds,
    each: &mut RecordVisitor<'_>,
) -> Result<(), InspectError> {
    let mut at = Position::beginning(ends.log_start);
    while at.offset < ends.last_stable {
        let fetched = log.read(topic, partition, at, CHUNK_BYTES)?;
        for batch in &fetched.batches {
            for i in (0..batch.len()).filter(|i| batch.offset(*i) < ends.last_stable) {
                let record = batch.record(i);
                each(record.key().unwrap_or_default(), record.value().unwrap_or_default())?;
            }
        }
        if fetched.next.offset <= at.offset {
            return Err(LogError::nothing_read(topic, partition, at.offset, ends.last_stable).into());
        }
        at = fetched.next;
    }
    Ok(())
}

/// A value's text from its bytes; none where they are not of the step's type.
type ShowValue = fn(&[u8]) -> Option<Value>;

/// How keys and values of a store read as text. Without the job's code, bytes can only be guessed at.
#[derive(Clone, Copy, Debug, Default)]
pub struct StateText {
    key_type: Option<&'static str>,
    value: Option<ShowValue>,
}

impl StateText {
    /// As the job's step has it.
    pub fn of(step: &StepSpec) -> Self {
        Self { key_type: Some(step.key_type), value: Some(step.show_value) }
    }

    /// A key as text.
    pub fn key(&self, bytes: &[u8]) -> String {
        let integer = |bytes: [u8; 8]| match self.kind() {
            Integer::Unsigned => Some(u64::from_be_bytes(bytes).to_string()),
            Integer::Signed => Some(i64::from_be_bytes(bytes).to_string()),
            Integer::No => None,
        };
        bytes.try_into().ok().and_then(integer).unwrap_or_else(|| text_or_hex(bytes))
    }

    /// The key's bytes of a text as [`Self::key`] shows it; `0x` and hex digits are bytes as they are. `None` if no key
    /// reads like that.
    pub fn parse_key(&self, text: &str) -> Option<Vec<u8>> {
        match self.kind() {
            Integer::Unsigned => return text.parse().ok().map(|n: u64| n.to_be_bytes().to_vec()),
            Integer::Signed => return text.parse().ok().map(|n: i64| n.to_be_bytes().to_vec()),
            Integer::No => {}
        }
        if let Some(hex) = text.strip_prefix("0x") {
            let digits: Option<Vec<u8>> =
                hex.chars().map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok())).collect();
            let digits = digits.filter(|d| d.len().is_multiple_of(2))?;
            return Some(digits.chunks_exact(2).map(|pair| (pair[0] << 4) | pair[1]).collect());
        }
        // Addresses have one canonical text.
        if self.key_type.is_some_and(|name| name.contains("net::ip_addr")) {
            return text.parse().ok().map(|ip: std::net::IpAddr| ip.to_string().into_bytes());
        }
        Some(text.as_bytes().to_vec())
    }

    /// A value as JSON; a string of hex where its type is not known.
    pub fn value(&self, bytes: &[u8]) -> Value {
        let known = self.value.and_then(|show| show(bytes));
        known.unwrap_or_else(|| Value::String(hex(bytes)))
    }

    fn kind(&self) -> Integer {
        match self.key_type {
            Some("u8" | "u16" | "u32" | "u64") => Integer::Unsigned,
            Some("i8" | "i16" | "i32" | "i64") => Integer::Signed,
            _ => Integer::No,
        }
    }
}

enum Integer {
    Unsigned,
    Signed,
    No,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold("0x".to_owned(), |mut text, b| {
        text.push_str(&format!("{b:02x}"));
        text
    })
}

fn text_or_hex(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        _ => hex(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_read_back_what_they_show() {
        let of = |key_type| StateText { key_type, value: None };
        let cases: [(StateText, &str, &[u8]); 7] = [
            (of(Some("u32")), "7", &[0, 0, 0, 0, 0, 0, 0, 7]),
            (of(Some("i64")), "-1", &[255; 8]),
            (of(Some("core::net::ip_addr::IpAddr")), "2001:db8::1", b"2001:db8::1"),
            (of(Some("alloc::string::String")), "straße", "straße".as_bytes()),
            (of(None), "1.2.3.4", b"1.2.3.4"),
            (of(None), "0xff00", &[255, 0]),
            (of(None), "0x0a", b"\n"),
        ];
        for (text, shown, bytes) in cases {
            assert_eq!(text.key(bytes), shown);
            assert_eq!(text.parse_key(shown).as_deref(), Some(bytes), "{shown}");
        }
        let address = of(Some("core::net::ip_addr::IpAddr"));
        assert_eq!(
            address.parse_key("2001:DB8:0::1").as_deref(),
            Some(&b"2001:db8::1"[..]),
            "one text per address"
        );
        assert_eq!(
            (address.parse_key("1.2.3"), of(Some("u8")).parse_key("a"), of(None).parse_key("0x0")),
            (None, None, None)
        );
    }
}
