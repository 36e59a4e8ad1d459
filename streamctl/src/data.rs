//! The broker a command works with, and what its errors mean to a user.

use std::sync::Arc;

use anyhow::{Result, anyhow};
pub use tidemill_broker::Intent;
use tidemill_broker::{Access, AccessEvent, AccessOptions, Broker, BrokerError};

use crate::exit::Stopped;
use crate::stop;
use crate::target::Target;

/// Connects to the broker, or owns the directory, or reaches its owner. A change later on is one line on stderr.
/// Whatever the intent, a broker's own directory is there.
///
/// # Errors
///
/// If that cannot be; [`Stopped`] if a stop is asked for while it takes its time.
pub async fn open(target: &Target, intent: Intent) -> Result<Access> {
    let tell = |event: &AccessEvent| crate::note(format_args!("{event}"));
    let opening = async {
        Ok(match target {
            Target::Directory(dir) => {
                let mut options = AccessOptions::new(intent).on_event(tell);
                options.log.probe = crate::chaos::log_probe();
                Access::open(dir, options).await?
            }
            Target::Broker(address) => Access::connect(address, Some(Arc::new(tell))).await?,
        })
    };
    tokio::select! {
        opened = opening => opened,
        () = stop::asked() => Err(anyhow::Error::new(Stopped)),
    }
}

/// Gives the broker up in order, then goes on with what the command came to.
pub async fn close<T>(access: Access, result: Result<T>) -> Result<T> {
    access.close().await;
    result
}

/// The error a user reads: what happened, and what to do about it.
pub fn explain(error: BrokerError) -> anyhow::Error {
    match remedy(&error) {
        Some(remedy) => anyhow!("{error}; {remedy}"),
        None => anyhow::Error::new(error),
    }
}

/// What a user can do about it.
pub fn remedy(error: &BrokerError) -> Option<String> {
    Some(match error {
        BrokerError::UnknownTopic { topic } => format!("`streamctl topic create {topic}` makes it"),
        BrokerError::UnknownPartition { .. } => {
            "it was deleted while this command used it; a topic made under its name since is another one".into()
        }
        BrokerError::DiskFull { .. } => {
            "nothing that was acknowledged is lost. Free some space on that disk and run the command again".into()
        }
        BrokerError::Stopped { .. } => {
            "nothing that was acknowledged is lost. Look at the disk, end all commands on this directory, and run this one \
             again: opening the directory anew recovers it"
                .into()
        }
        BrokerError::Corrupt { .. } => "the other partitions stay readable. Restore the file from a copy; what is whole is read \
             with `streamctl consume TOPIC --partition P --from N`"
            .into(),
        BrokerError::Fenced { .. } => "only one command at a time runs under one name; --name gives this one another".into(),
        _ => return None,
    })
}

/// A topic that is not there: names those that are, and the command that makes it.
pub async fn unknown_topic(broker: &impl Broker, topic: &str) -> anyhow::Error {
    let known = match broker.topics().await {
        Ok(topics) if !topics.is_empty() => {
            let names: Vec<_> = topics.iter().map(|topic| topic.name.as_str()).collect();
            format!(" (there are {})", names.join(", "))
        }
        _ => String::new(),
    };
    anyhow!(
        "there is no topic {topic:?}{known}; `streamctl topic create {topic}` or `streamctl produce {topic} --create` makes it"
    )
}
