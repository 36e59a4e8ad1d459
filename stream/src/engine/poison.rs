//! Poison: input that makes the job's own code panic.
//!
//! ```text
//!   panic in a batch of a source chain ─▶ restart; its records run one by one ─▶ panic: this record, one more try (durable)
//!        tries left ─▶ restart, alone again      none left ─▶ restart; it goes to the dead letters and is not run
//!                                                           └ no dead-letter topic: the job stops and names it
//!   panic in a key's encoding, rows later ─▶ restart; all that may have been it runs one by one, keys encoded at once
//!   panic in the keyed step ─▶ restart; groups and results run one by one ─▶ as often as tries: the job stops and names
//!                                                                            step, key and window
//! ```
//!
//! Every restart is from the last commit: a machine in which something panicked is in no known state and is thrown away.
//!
//! Invariants
//! * Only a panic that was caught counts. A kill leaves no trace, so it never costs a record one of its tries.
//! * Tries are counted outside the transaction, which is aborted with the epoch that panicked, and saved before the
//!   restart ([`TryBook`]): a process that is killed between two tries goes on counting.
//! * The batch in which a record panicked first is a try of that record: its code has run and panicked.
//! * No record is dropped: without a dead-letter topic the job stops.
//! * A buried record moves no time: it counts like one that cannot be read.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::Start;
use crate::error::StepError;
use crate::io::TopicUuid;
use crate::plan::Plan;
use crate::time::Timestamp;

/// How often a record may make the job panic where nothing else is said.
pub const TRIES: u32 = 3;

/// A record that made the job panic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tried {
    /// The input topic's incarnation.
    #[serde(with = "hex")]
    pub topic: TopicUuid,
    /// The partition.
    pub partition: u32,
    /// The offset.
    pub offset: i64,
    /// How often.
    pub tries: u32,
    /// The message of the last panic.
    pub error: String,
}

/// A uuid is written as people see it elsewhere.
mod hex {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    use crate::io::TopicUuid;

    pub(super) fn serialize<S: Serializer>(uuid: &TopicUuid, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{uuid:?}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<TopicUuid, D::Error> {
        let text = String::deserialize(from)?;
        u128::from_str_radix(&text, 16).map(TopicUuid).map_err(D::Error::custom)
    }
}

/// Where tries are kept from run to run.
pub trait TryBook: fmt::Debug + Send + Sync + 'static {
    /// What was saved last; nothing if there is nothing.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    fn load(&self) -> std::io::Result<Vec<Tried>>;

    /// Replaces what was saved, durably, before it returns.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    fn save(&self, tried: &[Tried]) -> std::io::Result<()>;
}

/// A [`TryBook`] that forgets everything with the process.
#[derive(Debug, Default)]
pub struct MemoryBook(Mutex<Vec<Tried>>);

impl TryBook for MemoryBook {
    fn load(&self) -> std::io::Result<Vec<Tried>> {
        Ok(self.0.lock().clone())
    }

    fn save(&self, tried: &[Tried]) -> std::io::Result<()> {
        *self.0.lock() = tried.to_vec();
        Ok(())
    }
}

/// What the machines of one start do with care.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Care {
    /// Offsets of partitions whose records are run one by one.
    pub(crate) alone: Vec<(u32, Range<i64>)>,
    /// Records that go to the dead letters unprocessed.
    pub(crate) buried: Vec<Tried>,
    /// Whether groups and results of the keyed step are run one by one.
    pub(crate) groups: bool,
}

impl Care {
    /// Whether records of this partition with offsets in `of` are to be run one by one.
    pub(crate) fn concerns(&self, partition: u32, of: &Range<i64>) -> bool {
        let meets = |r: &Range<i64>| r.start < of.end && of.start < r.end;
        self.alone.iter().any(|(p, range)| *p == partition && meets(range))
    }

    /// The record, if it goes to the dead letters.
    pub(crate) fn buried(&self, partition: u32, offset: i64) -> Option<&Tried> {
        self.buried.iter().find(|t| t.partition == partition && t.offset == offset)
    }
}

/// What becomes of a run in which something panicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It starts again from the last commit.
    Again,
    /// It stops with the error.
    Stop,
}

/// Offsets in which some record panicked, before it was known which.
#[derive(Clone, Debug)]
struct Suspects {
    partition: u32,
    offsets: Range<i64>,
    /// Tries that the record has used up that will turn out to be it.
    tries: u32,
}

/// Decides what a panic means. One per run; see the head of this file.
#[derive(Debug)]
pub struct Triage {
    tries_max: u32,
    dead_letters: bool,
    topic: TopicUuid,
    tried: Vec<Tried>,
    suspects: Vec<Suspects>,
    /// Panics of the keyed step by key and window; `None` before they were known.
    groups: BTreeMap<Option<KeyAndWindow>, u32>,
    /// Panics of keys' encodings since a record was found to be to blame.
    keys: u32,
    /// Panics anywhere else.
    elsewhere: u32,
}

/// A key and a window of a keyed step, for messages.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyAndWindow {
    /// The key as text.
    pub key: String,
    /// Where its window starts.
    pub start: Timestamp,
    /// Where its window ends.
    pub end: Timestamp,
}

impl fmt::Display for KeyAndWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "key `{}` in the window from {} to {}", self.key, self.start, self.end)
    }
}

impl Triage {
    /// For a run of this plan, with what a [`TryBook`] remembers.
    pub fn new(plan: &Plan, tries_max: u32, remembered: Vec<Tried>) -> Self {
        Self {
            tries_max: tries_max.max(1),
            dead_letters: plan.dead_letters().is_some(),
            topic: TopicUuid::default(),
            tried: remembered,
            suspects: Vec::new(),
            groups: BTreeMap::new(),
            keys: 0,
            elsewhere: 0,
        }
    }

    /// What the machines of a start are to be careful with. Forgets what is committed, or of another incarnation.
    pub fn begin(&mut self, start: &Start) -> Care {
        self.topic = start.input.id.uuid;
        let committed: BTreeMap<u32, i64> =
            start.partitions.iter().map(|p| (p.partition, p.position.offset)).collect();
        self.committed(&committed);
        let is_done = |t: &&Tried| t.tries >= self.tries_max && self.dead_letters;
        let tried = self.tried.iter().map(|t| (t.partition, t.offset..t.offset.saturating_add(1)));
        let suspects = self.suspects.iter().map(|s| (s.partition, s.offsets.clone()));
        Care {
            alone: tried.chain(suspects).collect(),
            buried: self.tried.iter().filter(is_done).cloned().collect(),
            groups: !self.groups.is_empty(),
        }
    }

    /// Forgets records below the committed offsets: they were run after all, or are in the dead letters.
    pub fn committed(&mut self, offsets: &BTreeMap<u32, i64>) {
        let topic = self.topic;
        let behind =
            |partition: u32, at: i64| offsets.get(&partition).is_some_and(|committed| at < *committed);
        self.tried.retain(|t| t.topic == topic && !behind(t.partition, t.offset));
        self.suspects.retain(|s| !behind(s.partition, s.offsets.end - 1));
    }

    /// What a [`TryBook`] is to remember.
    pub fn tried(&self) -> &[Tried] {
        &self.tried
    }

    /// A task failed with this error; `None` if it is no panic.
    pub fn failed(&mut self, error: &StepError) -> Option<Verdict> {
        match error {
            StepError::RecordPanicked { partition, offsets, message } => {
                Some(self.record(*partition, offsets, message))
            }
            StepError::KeyPanicked { read, .. } => {
                for (partition, offsets) in read {
                    self.suspects.push(Suspects {
                        partition: *partition,
                        offsets: offsets.clone(),
                        tries: 1,
                    });
                }
                // Once they run one by one it is known which record it is, unless the encoding panics as it likes.
                self.keys += 1;
                Some(if self.keys < self.tries_max.max(2) { Verdict::Again } else { Verdict::Stop })
            }
            StepError::StepPanicked { group, .. } => Some(self.group(group.as_deref().cloned())),
            _ => None,
        }
    }

    /// Something else than a chain or a step panicked.
    pub fn panicked_elsewhere(&mut self) -> Verdict {
        self.elsewhere += 1;
        if self.elsewhere < self.tries_max { Verdict::Again } else { Verdict::Stop }
    }

    fn record(&mut self, partition: u32, offsets: &Range<i64>, message: &str) -> Verdict {
        if offsets.end - offsets.start > 1 {
            self.suspects.push(Suspects { partition, offsets: offsets.clone(), tries: 1 });
            return Verdict::Again;
        }
        self.keys = 0;
        let (topic, offset) = (self.topic, offsets.start);
        let same = |t: &Tried| t.topic == topic && t.partition == partition && t.offset == offset;
        let at = self.tried.iter().position(same).unwrap_or_else(|| {
            let mut of = self.suspects.iter_mut();
            let within = of.find(|s| s.partition == partition && s.offsets.contains(&offset));
            let tries = within.map_or(0, |s| std::mem::take(&mut s.tries));
            self.tried.push(Tried { topic, partition, offset, tries, error: String::new() });
            self.tried.len() - 1
        });
        let tried = &mut self.tried[at];
        tried.tries = tried.tries.saturating_add(1);
        message.clone_into(&mut tried.error);
        if tried.tries < self.tries_max || self.dead_letters {
            return Verdict::Again;
        }
        // Whoever starts the job again has mended it, or wants to see it fail: the record has its tries anew.
        self.tried.swap_remove(at);
        Verdict::Stop
    }

    fn group(&mut self, group: Option<KeyAndWindow>) -> Verdict {
        let known = group.is_some();
        let mut tries = self.groups.get(&group).copied().unwrap_or(0) + 1;
        if known && tries == 1 {
            // The panic before it was known which group it was.
            tries += self.groups.insert(None, 0).unwrap_or(0);
        }
        self.groups.insert(group, tries);
        if tries < self.tries_max { Verdict::Again } else { Verdict::Stop }
    }
}

/// Bytes that are kept of a panic's message: it may quote the whole record, and goes into a header, a file and an error.
const MESSAGE_BYTES_MAX: usize = 1_024;

/// The message of a caught panic, its beginning if it is long.
pub(crate) fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
    if text.len() <= MESSAGE_BYTES_MAX {
        return text.to_owned();
    }
    format!("{}... ({} bytes)", &text[..text.floor_char_boundary(MESSAGE_BYTES_MAX)], text.len())
}

/// Key bytes for a message: text where they are text.
pub(crate) fn key_text(key: &[u8]) -> String {
    match std::str::from_utf8(key) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        _ => key.iter().fold("0x".to_owned(), |all, byte| format!("{all}{byte:02x}")),
    }
}

/// What a run does about panics.
#[derive(Clone, Debug)]
pub struct PoisonPolicy {
    /// How often a record may make the job panic before it goes to the dead letters, and a group of the keyed step before
    /// the job stops. At least 1.
    pub tries: u32,
    /// Where tries are kept.
    pub book: std::sync::Arc<dyn TryBook>,
}

impl Default for PoisonPolicy {
    /// [`TRIES`] tries, forgotten with the process.
    fn default() -> Self {
        Self { tries: TRIES, book: std::sync::Arc::new(MemoryBook::default()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Text;
    use crate::dsl::{Flow, topic};
    use crate::plan::Job;

    struct Copy {
        dead_letters: bool,
    }
    impl Job for Copy {
        const NAME: &'static str = "copy";
        fn build(&self, flow: &Flow) -> crate::Result<()> {
            let source = flow.source(topic("in"), Text);
            let source = if self.dead_letters { source.dead_letter_to(topic("dead")) } else { source };
            source.to(topic("out"), Text);
            Ok(())
        }
    }

    fn triage(dead_letters: bool) -> Triage {
        Triage::new(&Plan::of(&Copy { dead_letters }).unwrap(), 3, Vec::new())
    }

    fn panicked(offsets: Range<i64>) -> StepError {
        StepError::RecordPanicked { partition: 1, offsets, message: "boom".into() }
    }

    #[test]
    fn the_batch_counts_as_a_try_of_the_record_that_it_turns_out_to_be() {
        let mut triage = triage(true);
        for (offsets, tries) in [(10..20, None), (13..14, Some(2)), (13..14, Some(3)), (15..16, Some(1))] {
            assert_eq!(triage.failed(&panicked(offsets.clone())), Some(Verdict::Again), "{offsets:?}");
            assert_eq!(triage.tried().last().map(|t| t.tries), tries, "{offsets:?}");
        }
        assert_eq!(triage.tried.len(), 2);
        triage.committed(&[(1, 14)].into());
        assert_eq!(triage.tried.iter().map(|t| t.offset).collect::<Vec<_>>(), [15]);
        assert_eq!(triage.suspects.len(), 1, "the rest of the batch is still run one by one");
        triage.committed(&[(1, 20)].into());
        assert!(triage.tried.is_empty() && triage.suspects.is_empty());
    }

    #[test]
    fn without_dead_letters_the_last_try_stops_the_job_and_is_forgotten() {
        let mut triage = triage(false);
        let verdicts: Vec<_> = (0..3).map(|_| triage.failed(&panicked(4..5)).unwrap()).collect();
        assert_eq!(verdicts, [Verdict::Again, Verdict::Again, Verdict::Stop]);
        assert!(triage.tried().is_empty());
    }

    #[test]
    fn a_group_stops_the_job_after_its_tries_whatever_else_was_committed() {
        let mut triage = triage(true);
        let of = |key: Option<&str>| StepError::StepPanicked {
            step: "s".into(),
            group: key.map(|key| {
                Box::new(KeyAndWindow { key: key.into(), start: Timestamp(0), end: Timestamp(5) })
            }),
            message: "boom".into(),
        };
        let all = [None, Some("a"), Some("b"), Some("a")];
        let verdicts: Vec<_> = all.iter().map(|key| triage.failed(&of(*key)).unwrap()).collect();
        assert_eq!(verdicts, [Verdict::Again, Verdict::Again, Verdict::Again, Verdict::Stop]);
    }

    #[test]
    fn a_tried_record_survives_its_encoding_and_strange_bytes_do_not_panic() {
        let tried = Tried {
            topic: TopicUuid(0xabc << 100),
            partition: 3,
            offset: i64::MAX - 1,
            tries: 2,
            error: "at \"x\"\n".into(),
        };
        let text = serde_json::to_string(&tried).unwrap();
        assert_eq!(serde_json::from_str::<Tried>(&text).unwrap(), tried, "{text}");
        assert!(serde_json::from_str::<Tried>(&text.replace("abc", "xyz")).is_err());
        assert_eq!((key_text(b"a b"), key_text(&[0, 255])), ("a b".to_owned(), "0x00ff".to_owned()));
    }
}
