//! Names and records that persist: what a job is called on disk, and what its commits keep beside the offsets.
//!
//! The only place where these are spelled. The identity (the job's name, or `--name`) is consumer group and
//! transactional id; its changelogs are `<identity>-keyed-changelog` and `<identity>-<store>-changelog`, with one
//! partition per shard. What an identity committed to is the value of its key in [`JOBS_TOPIC`].

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::guarantee::Guarantee;
use crate::time::MIN;

/// The compacted one-partition topic that holds a [`JobRecord`] per identity.
pub const JOBS_TOPIC: &str = "_jobs";

/// The guarded argument that says what a crash may do to output. A record without it was written by an exact run.
pub(crate) const GUARANTEE: &str = "guarantee";

/// Longest topic name: Kafka's.
const TOPIC_BYTES_MAX: usize = 249;

/// A name that cannot be a topic's, or makes one that cannot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{name}` cannot be a topic's name: 1 to {TOPIC_BYTES_MAX} of the characters a-z A-Z 0-9 . _ -, and not `.` or `..`"
)]
pub struct BadName {
    /// The refused name.
    pub name: String,
}

/// Checks the rules of topic names.
///
/// # Errors
///
/// If a rule is broken.
pub fn check_topic(name: &str) -> Result<(), BadName> {
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let fine =
        (1..=TOPIC_BYTES_MAX).contains(&name.len()) && name.bytes().all(legal) && name != "." && name != "..";
    if fine { Ok(()) } else { Err(BadName { name: name.to_owned() }) }
}

/// A job's identity: consumer group, transactional id and prefix of its changelogs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity(String);

impl Identity {
    /// Checks the name.
    ///
    /// # Errors
    ///
    /// If it breaks the rules of topic names.
    pub fn new(name: impl Into<String>) -> Result<Self, BadName> {
        let name = name.into();
        check_topic(&name)?;
        Ok(Self(name))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The topic of marks and keyed state.
    ///
    /// # Errors
    ///
    /// If it is over-long.
    pub fn keyed_changelog(&self) -> Result<String, BadName> {
        let name = format!("{}-keyed-changelog", self.0);
        check_topic(&name).map(|()| name)
    }

    /// The topic of one window store.
    ///
    /// # Errors
    ///
    /// If it is over-long or the store's name breaks the rules.
    pub fn changelog(&self, store: &str) -> Result<String, BadName> {
        let name = format!("{}-{store}-changelog", self.0);
        check_topic(&name).map(|()| name)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a commit keeps of time in the metadata of a partition's offset: 1, then two big-endian `i64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartitionMark {
    /// The partition's effective event-time watermark: max(own, floor) for one that is idle.
    pub watermark: i64,
    /// The highest job value ever published, as this epoch knew it.
    pub floor: i64,
}

impl PartitionMark {
    /// Its bytes.
    pub fn encode(self) -> Vec<u8> {
        let mut bytes = vec![1];
        bytes.extend_from_slice(&self.watermark.to_be_bytes());
        bytes.extend_from_slice(&self.floor.to_be_bytes());
        bytes
    }

    /// Reads it; `None` if the bytes are something else. An offset committed without metadata (by hand) knows
    /// nothing of time.
    pub fn decode(from: &[u8]) -> Option<Self> {
        match from {
            [] => Some(Self { watermark: MIN, floor: MIN }),
            [1, rest @ ..] => {
                let (watermark, floor) = rest.split_first_chunk::<8>()?;
                let floor = i64::from_be_bytes(floor.try_into().ok()?);
                Some(Self { watermark: i64::from_be_bytes(*watermark), floor })
            }
            _ => None,
        }
    }
}

/// What an identity committed to: JSON, the value of its key in [`JOBS_TOPIC`], written in its first transaction, and
/// again in that of a run with other sinks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobRecord {
    /// The job of the registry.
    pub job: String,
    /// Arguments that state and output depend on.
    pub guarded: BTreeMap<String, String>,
    /// Number of shards.
    pub shards: u16,
    /// Its stores by name.
    pub stores: BTreeMap<String, StoreRecord>,
    /// The topics it writes to, and what for. A run may have others (of late rows, say), and then says so anew; a record of
    /// before has none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sinks: BTreeMap<String, String>,
    /// A reset began and has not ended: state and offsets may not belong together, so nothing may run on them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resetting: bool,
}

/// A store as an identity committed to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreRecord {
    /// Its number in store keys.
    pub id: u16,
    /// Order of the parts of a store key: `T` has the window end before the key.
    pub layout: char,
    /// Version of the codec of its values.
    pub codec: u8,
}

/// An identity was used for something else.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{identity}` committed with {what} `{committed}`, this run has `{now}`: \
     run it under another `--name`, or with the committed value, or `streamctl reset {identity}` first"
)]
pub struct Mismatch {
    /// The identity.
    pub identity: String,
    /// What differs.
    pub what: String,
    /// The value it committed with.
    pub committed: String,
    /// The value of this run.
    pub now: String,
}

impl JobRecord {
    /// Checks that a run that would commit `self` may go on from what `committed` says.
    ///
    /// # Errors
    ///
    /// The first difference.
    pub fn check(&self, identity: &Identity, committed: &Self) -> Result<(), Mismatch> {
        let differs = |what: &str, committed: String, now: String| {
            let (identity, what) = (identity.to_string(), what.to_owned());
            if committed == now { Ok(()) } else { Err(Mismatch { identity, what, committed, now }) }
        };
        differs("job", committed.job.clone(), self.job.clone())?;
        differs("shards", committed.shards.to_string(), self.shards.to_string())?;
        let all: std::collections::BTreeSet<_> =
            committed.guarded.keys().chain(self.guarded.keys()).collect();
        for name in all {
            let absent = || if name == GUARANTEE { Guarantee::default().name() } else { "nothing" };
            let value = |of: &Self| of.guarded.get(name).cloned().unwrap_or_else(|| absent().to_owned());
            differs(name, value(committed), value(self))?;
        }
        let stores = |of: &Self| {
            let show = |(n, s): (&String, &StoreRecord)| format!("{n} ({}{} v{})", s.layout, s.id, s.codec);
            of.stores.iter().map(show).collect::<Vec<_>>().join(", ")
        };
        differs("stores", stores(committed), stores(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_topic_rules() {
        assert_eq!(Identity::new("ip-count").unwrap().changelog("a").unwrap(), "ip-count-a-changelog");
        for bad in ["", ".", "..", "a/b", "ä", &"x".repeat(250)] {
            assert!(Identity::new(bad).is_err(), "{bad}");
        }
        assert!(Identity::new("x".repeat(240)).unwrap().keyed_changelog().is_err());
    }

    #[test]
    fn marks_round_trip_and_refuse_what_is_not_theirs() {
        let mark = PartitionMark { watermark: -3, floor: i64::MIN };
        assert_eq!(PartitionMark::decode(&mark.encode()), Some(mark));
        assert_eq!(PartitionMark::decode(&[]).unwrap().watermark, MIN);
        assert_eq!(PartitionMark::decode(&[1, 2]), None);
        assert_eq!(PartitionMark::decode(&[2; 17]), None);
    }

    /// As it was written before the record had sinks.
    #[test]
    fn a_record_of_before_sinks_is_read_and_goes_on() {
        let old = concat!(
            r#"{"job":"ip-count","guarded":{"input":"access-log","output":"ip-counts"},"shards":64,"#,
            r#""stores":{"per-ip":{"id":1,"layout":"T","codec":1}}}"#
        );
        let parsed: JobRecord = serde_json::from_str(old).unwrap();
        assert!(parsed.sinks.is_empty() && !parsed.resetting);
        assert_eq!(serde_json::to_string(&parsed).unwrap(), old);
        let sinks = [("ip-counts".to_owned(), "output".to_owned())].into();
        let now = JobRecord { sinks, ..parsed.clone() };
        assert_eq!(now.check(&Identity::new("ip-count").unwrap(), &parsed), Ok(()));
        assert_ne!(now, parsed, "it is written anew");
    }

    #[test]
    fn no_bytes_make_a_decoder_panic() {
        use rand::{RngExt as _, SeedableRng as _};
        let mut rng = rand::rngs::SmallRng::seed_from_u64(1);
        for _ in 0..20_000 {
            let mut bytes = vec![0u8; rng.random_range(0..24)];
            rng.fill(&mut bytes[..]);
            if rng.random_bool(0.5) && !bytes.is_empty() {
                bytes[0] = 1;
            }
            let _ = PartitionMark::decode(&bytes);
            let _ = crate::state::Marks::decode(&bytes);
            let _ = crate::state::window_and_key(&bytes);
            let _ = crate::state::mark_of_changelog_key(&bytes);
            let _ = crate::codec::state::decode::<(u64, String)>(&bytes);
            let _ = <std::net::IpAddr as crate::Key>::decode(&bytes);
            let _ = <u32 as crate::Key>::decode(&bytes);
            let _ = serde_json::from_slice::<JobRecord>(&bytes);
        }
    }

    #[test]
    fn a_changed_argument_is_refused_with_both_values_and_the_remedy() {
        let record = |window: &str| JobRecord {
            job: "ip-count".into(),
            guarded: [("window".to_owned(), window.to_owned())].into(),
            shards: 64,
            stores: [("visits".to_owned(), StoreRecord { id: 1, layout: 'T', codec: 1 })].into(),
            sinks: BTreeMap::new(),
            resetting: false,
        };
        let id = Identity::new("ip-count").unwrap();
        assert_eq!(record("5s").check(&id, &record("5s")), Ok(()));
        let text = record("5s").check(&id, &record("10s")).unwrap_err().to_string();
        assert!(text.contains("`10s`") && text.contains("`5s`") && text.contains("--name"), "{text}");
        assert!(text.contains("`streamctl reset ip-count`"), "{text}");
    }
}
