//! Who depends on a topic: what the jobs of a log committed to.
//!
//! A job writes a record into topic `_jobs` in its first transaction: its input, the topics it writes to, and its stores,
//! which have changelogs; and again when the topics it writes to differ. The broker knows nothing of that; it knows groups
//! and transactions, and refuses by itself where those touch a topic.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, anyhow};
use tidemill::stream::names::{Identity, JOBS_TOPIC, JobRecord};
use tidemill_broker::{Broker, BrokerError, Consumer, ConsumerOptions, Event, Position};

use crate::data;

/// Why a job needs a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Use {
    /// It reads or writes it.
    Flow {
        /// The job's identity.
        identity: String,
        /// What it is to the job: its `input`, `output`, `late rows`, `dead letters`.
        role: String,
    },
    /// It holds the job's state.
    Changelog {
        /// The job's identity.
        identity: String,
    },
    /// It holds what these jobs committed to.
    Records {
        /// Their identities.
        identities: Vec<String>,
    },
}

/// Every use of a topic by a job that committed something.
pub async fn uses(broker: &(impl Broker + Clone), topic: &str) -> Result<Vec<Use>> {
    let jobs = records(broker).await?;
    if topic == JOBS_TOPIC {
        let identities: Vec<String> = jobs.into_keys().collect();
        return Ok(if identities.is_empty() { Vec::new() } else { vec![Use::Records { identities }] });
    }
    let mut uses = Vec::new();
    for (identity, record) in jobs {
        // A record of before sinks were in it has one output in its arguments.
        let arguments =
            ["input", "output"].into_iter().filter_map(|name| Some((record.guarded.get(name)?, name)));
        let sinks = record.sinks.iter().map(|(topic, role)| (topic, role.as_str()));
        let roles: BTreeSet<&str> =
            arguments.chain(sinks).filter(|(named, _)| *named == topic).map(|(_, role)| role).collect();
        uses.extend(
            roles.into_iter().map(|role| Use::Flow { identity: identity.clone(), role: role.to_owned() }),
        );
        let Ok(name) = Identity::new(&identity) else { continue };
        let mut changelogs = record.stores.keys().map(|store| name.changelog(store));
        if name.keyed_changelog().is_ok_and(|changelog| changelog == topic)
            || changelogs.any(|changelog| changelog.is_ok_and(|changelog| changelog == topic))
        {
            uses.push(Use::Changelog { identity });
        }
    }
    Ok(uses)
}

/// The committed record of every identity that was not reset.
async fn records(broker: &(impl Broker + Clone)) -> Result<BTreeMap<String, JobRecord>> {
    let described = match broker.describe(JOBS_TOPIC.to_owned()).await {
        Err(BrokerError::UnknownTopic { .. }) => return Ok(BTreeMap::new()),
        described => described.map_err(data::explain)?,
    };
    let mut jobs = BTreeMap::new();
    let Some(offsets) = described.offsets.first() else { return Ok(jobs) };
    if offsets.log_start >= offsets.last_stable {
        return Ok(jobs);
    }
    let from = vec![(described.topic.partition(0), Position::unchecked(offsets.log_start))];
    let mut consumer = Consumer::start(broker.clone(), from, ConsumerOptions::default());
    while let Some(event) = consumer.next().await {
        match event.map_err(data::explain)? {
            Event::Batches(consumed) => {
                for batch in &consumed.batches {
                    for record in &batch.open()? {
                        let record = record?;
                        let Some(identity) = record.key.and_then(|key| std::str::from_utf8(key).ok()) else {
                            continue;
                        };
                        // A record of another version is the job's to refuse; a tombstone is a reset.
                        match record.value.and_then(|value| serde_json::from_slice(value).ok()) {
                            Some(found) => jobs.insert(identity.to_owned(), found),
                            None => jobs.remove(identity),
                        };
                    }
                }
                if consumed.next.offset >= offsets.last_stable {
                    break;
                }
            }
            Event::CaughtUp => break,
            Event::Failed { error, .. } => return Err(data::explain(error)),
        }
    }
    Ok(jobs)
}

/// Refuses to delete what a job needs, with the remedy. `force` takes away what a user may want to lose, never a part
/// of a job's state: without it the job would count wrong and not notice.
pub fn check_delete(topic: &str, uses: &[Use], force: bool) -> Result<()> {
    for one in uses {
        match one {
            Use::Changelog { identity } => {
                return Err(anyhow!(
                    "topic {topic} holds the state of job {identity}, which would count wrong without it; \
                     `streamctl reset {identity}` takes the job back to its beginning, its state included"
                ));
            }
            Use::Records { identities } => {
                return Err(anyhow!(
                    "topic {topic} holds what jobs committed to ({}); `streamctl reset JOB` takes a job back to its beginning",
                    identities.join(", ")
                ));
            }
            Use::Flow { identity, role } if !force => {
                let is = match role.as_str() {
                    "input" | "output" => format!("is the {role}"),
                    _ => format!("has the {role}"),
                };
                return Err(anyhow!(
                    "topic {topic} {is} of job {identity}; `streamctl reset {identity}` takes the job back to its \
                     beginning, or --force deletes the topic all the same"
                ));
            }
            Use::Flow { .. } => {}
        }
    }
    Ok(())
}

/// Refuses more partitions where their number is part of a job's state.
pub fn check_partitions(topic: &str, uses: &[Use]) -> Result<()> {
    for one in uses {
        match one {
            Use::Changelog { identity } => {
                return Err(anyhow!(
                    "topic {topic} holds the state of job {identity}, a partition a shard: their number is fixed"
                ));
            }
            Use::Records { .. } => {
                return Err(anyhow!("topic {topic} holds what jobs committed to, in one partition"));
            }
            Use::Flow { .. } => {}
        }
    }
    Ok(())
}
