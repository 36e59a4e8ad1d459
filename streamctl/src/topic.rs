//! `streamctl topic create | list | describe | alter | delete`.

use anyhow::{Result, anyhow};
use tidemill_broker::{
    AlterTopic, Broker, BrokerError, Cleanup, DeleteTopic, IfUsed, NewTopic, TopicDescription,
};

use crate::cli::{self, TopicCommand};
use crate::data::{self, Intent};
use crate::exit::Usage;
use crate::stdout;
use crate::target::Target;
use crate::units::plural;
use crate::used::{self, Use};

/// Runs the command.
pub async fn run(target: &Target, command: &TopicCommand) -> Result<()> {
    let intent = match command {
        TopicCommand::Create { .. } => Intent::Create,
        _ => Intent::Use,
    };
    if let TopicCommand::Create { name, .. } = command {
        check_name(name)?;
    }
    let access = data::open(target, intent).await?;
    let result = match command {
        TopicCommand::Create { name, partitions } => create(&access, name, *partitions).await,
        TopicCommand::List => list(&access).await,
        TopicCommand::Describe { name } => describe(&access, name).await,
        TopicCommand::Alter(args) => alter(&access, args).await,
        TopicCommand::Delete { name, force } => delete(&access, name, *force).await,
    };
    data::close(access, result).await
}

/// The log's own rule, told before anything is made.
pub fn check_name(name: &str) -> Result<()> {
    tidemill::names::check_topic(name).map_err(|error| Usage::error(error.to_string()))
}

async fn create(broker: &impl Broker, name: &str, partitions: u32) -> Result<()> {
    let topic = broker.create_topic(NewTopic::new(name, partitions)).await.map_err(data::explain)?;
    crate::note(format_args!("created topic {} with {} partitions", topic.name, topic.partitions));
    Ok(())
}

async fn list(broker: &impl Broker) -> Result<()> {
    let topics = broker.topics().await.map_err(data::explain)?;
    let width = topics.iter().map(|topic| topic.name.len()).max().unwrap_or(0).max("topic".len());
    if topics.is_empty() {
        crate::note(format_args!("no topics yet; `streamctl topic create NAME` makes one"));
    } else {
        stdout::line(format_args!("{:width$}  partitions", "topic"))?;
    }
    for topic in topics {
        stdout::line(format_args!("{:width$}  {:>10}", topic.name, topic.partitions))?;
    }
    Ok(())
}

async fn find(broker: &impl Broker, name: &str) -> Result<TopicDescription> {
    match broker.describe(name.to_owned()).await {
        Err(BrokerError::UnknownTopic { topic }) => Err(data::unknown_topic(broker, &topic).await),
        described => described.map_err(data::explain),
    }
}

async fn describe(broker: &impl Broker, name: &str) -> Result<()> {
    let described = find(broker, name).await?;
    stdout::line(format_args!("partition       start         end  high watermark  stable offset"))?;
    for (partition, offsets) in described.offsets.iter().enumerate() {
        stdout::line(format_args!(
            "{partition:>9}  {:>10}  {:>10}  {:>14}  {:>13}",
            offsets.log_start, offsets.end.offset, offsets.high_watermark, offsets.last_stable
        ))?;
    }
    Ok(())
}

async fn alter(broker: &(impl Broker + Clone), args: &cli::Alter) -> Result<()> {
    let before = find(broker, &args.name).await?.topic;
    let more = args.partitions.is_some_and(|partitions| partitions > before.partitions);
    let uses = if more { used::uses(broker, &before.name).await? } else { Vec::new() };
    used::check_partitions(&before.name, &uses)?;
    let request = AlterTopic {
        topic: before.id,
        partitions: args.partitions,
        segment_bytes_max: args.segment_bytes.map(|bytes| bytes.0),
        cleanup: args.cleanup.map(|cleanup| match cleanup {
            cli::Cleanup::Delete => Cleanup::Delete,
            cli::Cleanup::Compact => Cleanup::Compact,
        }),
    };
    let after = broker.alter_topic(request).await.map_err(data::explain)?;
    let mut changed = Vec::new();
    if after.partitions != before.partitions {
        changed.push(format!("{} partitions (was {})", after.partitions, before.partitions));
    }
    if after.segment_bytes_max != before.segment_bytes_max {
        changed.push(format!(
            "segments of {} bytes (was {})",
            after.segment_bytes_max, before.segment_bytes_max
        ));
    }
    if after.cleanup != before.cleanup {
        changed.push(format!("cleanup {:?} (was {:?})", after.cleanup, before.cleanup).to_lowercase());
    }
    if changed.is_empty() {
        crate::note(format_args!("topic {} is so already", after.name));
        return Ok(());
    }
    crate::note(format_args!("topic {} has {} now", after.name, changed.join(", ")));
    if after.partitions != before.partitions {
        crate::note(format_args!(
            "keys hash to other partitions from now on: records of one key keep their order in each, not across both"
        ));
        for one in &uses {
            if let Use::Flow { identity, role } = one
                && role == "input"
            {
                crate::note(format_args!("job {identity} reads the new partitions once it is started again"));
            }
        }
    }
    if after.cleanup != before.cleanup {
        crate::note(format_args!("it is recorded; neither retention nor compaction removes anything yet"));
    }
    Ok(())
}

async fn delete(broker: &(impl Broker + Clone), name: &str, force: bool) -> Result<()> {
    let TopicDescription { topic, offsets } = find(broker, name).await?;
    used::check_delete(&topic.name, &used::uses(broker, &topic.name).await?, force)?;
    let if_used = if force { IfUsed::Delete } else { IfUsed::Refuse };
    match broker.delete_topic(DeleteTopic { topic: topic.id, if_used }).await {
        Err(error @ BrokerError::TopicInUse { .. }) => return Err(in_use(&error)),
        deleted => deleted.map_err(data::explain)?,
    }
    let held: i64 = offsets.iter().map(|of| of.high_watermark - of.log_start).sum();
    crate::note(format_args!(
        "deleted topic {} with its {} and {}; its files go with the next checkpoints",
        topic.name,
        plural(topic.partitions.into(), "partition", "partitions"),
        plural(held.unsigned_abs(), "offset", "offsets")
    ));
    Ok(())
}

fn in_use(error: &BrokerError) -> anyhow::Error {
    let BrokerError::TopicInUse { groups, transactions, .. } = error else { return anyhow!("{error}") };
    let mut remedies = Vec::new();
    if let Some(group) = groups.first() {
        remedies.push(format!("`streamctl reset {group}` forgets a job's offsets"));
    }
    if !transactions.is_empty() {
        remedies.push("a transaction ends when its job is stopped, or by its timeout".to_owned());
    }
    remedies.push("--force deletes the topic all the same, and takes it out of both".to_owned());
    anyhow!("{error}; {}", remedies.join("; "))
}
