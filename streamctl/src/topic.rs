//! `streamctl topic create | list | describe`.

use anyhow::Result;
use tidemill_broker::{Broker, BrokerError, NewTopic};

use crate::cli::TopicCommand;
use crate::data::{self, Intent};
use crate::stdout;
use crate::target::Target;

/// Runs the command.
pub async fn run(target: &Target, command: &TopicCommand) -> Result<()> {
    let intent = match command {
        TopicCommand::Create { .. } => Intent::Create,
        TopicCommand::List | TopicCommand::Describe { .. } => Intent::Use,
    };
    let access = data::open(target, intent).await?;
    let result = execute(&access, command).await;
    data::close(access, result).await
}

async fn execute(broker: &impl Broker, command: &TopicCommand) -> Result<()> {
    match command {
        TopicCommand::Create { name, partitions } => {
            let topic = broker.create_topic(NewTopic::new(name, *partitions)).await.map_err(data::explain)?;
            crate::note(format_args!("created topic {} with {} partitions", topic.name, topic.partitions));
        }
        TopicCommand::List => {
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
        }
        TopicCommand::Describe { name } => {
            let described = match broker.describe(name.clone()).await {
                Err(BrokerError::UnknownTopic { topic }) => {
                    return Err(data::unknown_topic(broker, &topic).await);
                }
                described => described.map_err(data::explain)?,
            };
            stdout::line(format_args!("partition       start         end  high watermark  stable offset"))?;
            for (partition, offsets) in described.offsets.iter().enumerate() {
                stdout::line(format_args!(
                    "{partition:>9}  {:>10}  {:>10}  {:>14}  {:>13}",
                    offsets.log_start, offsets.end.offset, offsets.high_watermark, offsets.last_stable
                ))?;
            }
        }
    }
    Ok(())
}
