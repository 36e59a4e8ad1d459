//! Topics come and go.

use super::{Context, Plan, Request};
use crate::entry::Change;
use crate::error::Refusal;
use crate::state::State;
use crate::types::{Mode, NewTopic, TopicInfo};
use uuid::Uuid;

#[derive(Debug)]
pub(crate) struct CreateTopic {
    pub topic: NewTopic,
    pub uuid: Uuid,
}

#[derive(Debug)]
pub(crate) struct DeleteTopic {
    pub uuid: Uuid,
}

/// Is this a topic the log can make? Checked before its directories are.
pub(crate) fn check(topic: &NewTopic) -> Result<(), Refusal> {
    let name = topic.name.as_str();
    let of_name = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    if !(1..=249).contains(&name.len()) || !name.bytes().all(of_name) || name == "." || name == ".." {
        return Err(Refusal::BadName(topic.name.clone()));
    }
    if !(1..=NewTopic::PARTITIONS_MAX).contains(&topic.partitions) {
        let most = NewTopic::PARTITIONS_MAX;
        return Err(Refusal::Invalid(format!("{} partitions are not 1 to {most}", topic.partitions)));
    }
    if topic.segment_bytes_max == 0 || topic.segment_bytes_max > u64::from(u32::MAX >> 1) {
        return Err(Refusal::Invalid(format!("segments of {} bytes", topic.segment_bytes_max)));
    }
    match topic.mode {
        Mode::Durable => Ok(()),
        _ => Err(Refusal::Invalid("only topics of mode durable can be created so far".into())),
    }
}

impl Request for CreateTopic {
    type Answer = TopicInfo;

    fn plan(&self, s: &State, with: &mut Context) -> Plan<TopicInfo> {
        let t = &self.topic;
        if let Err(why) = check(t) {
            return Plan::refused(why);
        }
        if s.topic_named(&t.name).is_some() {
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
        if !s.topics.contains_key(&self.uuid) {
            return Plan::Rests { n: s.n, answer: () };
        }
        Plan::Entry { entry: with.entry(Change::DeleteTopic { uuid: self.uuid }), answer: () }
    }
}
