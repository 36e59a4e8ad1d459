//! Topics come, change and go.

use super::{Context, Plan, Request};
use crate::entry::Change;
use crate::error::Refusal;
use crate::state::{State, Txn};
use crate::types::{IfUsed, Mode, NewTopic, TopicChange, TopicInfo, TopicPartition};
use uuid::Uuid;

#[derive(Debug)]
pub(crate) struct CreateTopic {
    pub topic: NewTopic,
    pub uuid: Uuid,
    /// Its directories are there. They are not made where the name was taken when they were asked for.
    pub made: bool,
}

#[derive(Debug)]
pub(crate) struct DeleteTopic {
    pub uuid: Uuid,
    pub if_used: IfUsed,
}

#[derive(Debug)]
pub(crate) struct AlterTopic {
    pub uuid: Uuid,
    pub alter: TopicChange,
    /// So many partitions have their directories.
    pub directories: u32,
}

/// Is this a topic the log can make? Checked before its directories are.
pub(crate) fn check(topic: &NewTopic) -> Result<(), Refusal> {
    let name = topic.name.as_str();
    let of_name = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    if !(1..=249).contains(&name.len()) || !name.bytes().all(of_name) || name == "." || name == ".." {
        return Err(Refusal::BadName(topic.name.clone()));
    }
    check_numbers(topic.partitions, topic.segment_bytes_max)?;
    match topic.mode {
        Mode::Durable => Ok(()),
        _ => Err(Refusal::Invalid("only topics of mode durable can be created so far".into())),
    }
}

fn check_numbers(partitions: u32, segment_bytes_max: u64) -> Result<(), Refusal> {
    if !(1..=NewTopic::PARTITIONS_MAX).contains(&partitions) {
        let most = NewTopic::PARTITIONS_MAX;
        return Err(Refusal::Invalid(format!("{partitions} partitions are not 1 to {most}")));
    }
    if segment_bytes_max == 0 || segment_bytes_max > u64::from(u32::MAX >> 1) {
        return Err(Refusal::Invalid(format!("segments of {segment_bytes_max} bytes")));
    }
    Ok(())
}

/// Is this a change that a topic can take? Its partitions, as far as is known.
pub(crate) fn check_alter(alter: &TopicChange, topic: &TopicInfo) -> Result<(), Refusal> {
    let partitions = alter.partitions.unwrap_or(topic.partitions);
    if partitions < topic.partitions {
        let what = format!(
            "topic {} has {} partitions, which cannot become {partitions}: the records of those that went would be lost, \
             and the offsets that readers committed in them",
            topic.name, topic.partitions
        );
        return Err(Refusal::Invalid(what));
    }
    check_numbers(partitions, alter.segment_bytes_max.unwrap_or(topic.segment_bytes_max))
}

impl Request for CreateTopic {
    type Answer = TopicInfo;

    fn plan(&self, s: &State, with: &mut Context) -> Plan<TopicInfo> {
        let t = &self.topic;
        if let Err(why) = check(t) {
            return Plan::refused(why);
        }
        // Not made: the name was taken a moment ago, and a topic without directories would stop the log.
        if s.topic_named(&t.name).is_some() || !self.made {
            return Plan::Refused { n: s.n, error: Refusal::TopicExists(t.name.clone()).into() };
        }
        let entry = with.entry(Change::CreateTopic {
            uuid: self.uuid,
            name: t.name.clone(),
            partitions: t.partitions,
            segment_bytes_max: t.segment_bytes_max,
            mode: t.mode,
            cleanup: t.cleanup,
        });
        let answer = TopicInfo {
            name: t.name.clone(),
            uuid: self.uuid,
            partitions: t.partitions,
            segment_bytes_max: t.segment_bytes_max,
            mode: t.mode,
            cleanup: t.cleanup,
        };
        Plan::Entry { entry, answer }
    }
}

impl Request for DeleteTopic {
    type Answer = ();

    fn plan(&self, s: &State, with: &mut Context) -> Plan<()> {
        let Some(topic) = s.topics.get(&self.uuid) else {
            return Plan::Rests { n: s.n, answer: () };
        };
        if self.if_used == IfUsed::Refuse {
            let (groups, transactions) = users(s, self.uuid);
            if !groups.is_empty() || !transactions.is_empty() {
                let refusal = Refusal::TopicInUse { topic: topic.name.clone(), groups, transactions };
                return Plan::Refused { n: s.n, error: refusal.into() };
            }
        }
        Plan::Entry { entry: with.entry(Change::DeleteTopic { uuid: self.uuid }), answer: () }
    }
}

/// The groups with offsets in a topic, and the transactional ids whose open transaction touches it.
fn users(s: &State, topic: Uuid) -> (Vec<String>, Vec<String>) {
    let in_topic = |tp: &TopicPartition| tp.topic == topic;
    let groups = s.groups.iter().filter(|(_, offsets)| offsets.keys().any(in_topic));
    let touches = |txn: &Txn| {
        txn.partitions.keys().any(in_topic) || txn.offsets.values().any(|of| of.keys().any(in_topic))
    };
    let owners = s.owners.iter().filter(|(_, owner)| owner.txn.as_ref().is_some_and(touches));
    (groups.map(|(id, _)| id.clone()).collect(), owners.map(|(id, _)| id.clone()).collect())
}

impl Request for AlterTopic {
    type Answer = TopicInfo;

    fn plan(&self, s: &State, with: &mut Context) -> Plan<TopicInfo> {
        let partition = TopicPartition { topic: self.uuid, partition: 0 };
        let unknown = Plan::Refused { n: s.n, error: Refusal::UnknownPartition(partition).into() };
        let Some(topic) = s.topics.get(&self.uuid) else { return unknown };
        let mut answer = topic.info(self.uuid);
        if let Err(why) = check_alter(&self.alter, &answer) {
            return Plan::Refused { n: s.n, error: why.into() };
        }
        let before = answer.clone();
        answer.partitions = self.alter.partitions.unwrap_or(answer.partitions);
        answer.segment_bytes_max = self.alter.segment_bytes_max.unwrap_or(answer.segment_bytes_max);
        answer.cleanup = self.alter.cleanup.unwrap_or(answer.cleanup);
        if answer.partitions > before.partitions.max(self.directories) {
            return unknown; // it was not there when its directories were to be made
        }
        if answer == before {
            return Plan::Rests { n: s.n, answer };
        }
        let entry = with.entry(Change::AlterTopic {
            uuid: self.uuid,
            partitions: answer.partitions,
            segment_bytes_max: answer.segment_bytes_max,
            cleanup: answer.cleanup,
        });
        Plan::Entry { entry, answer }
    }
}
