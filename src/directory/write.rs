//! Producers without futures.

use tidemill_adapters::broker::batch::RecordParts;
use tidemill_adapters::broker::{
    self as broker, Access, Ack, Outcome, ProducerOptions, Topic, TransactionalOptions,
};

use super::{Directory, DirectoryError};

/// A record to append: a value, and whatever else is set.
#[derive(Clone, Copy, Debug)]
pub struct NewRecord<'a> {
    key: Option<&'a [u8]>,
    value: &'a [u8],
    timestamp: Option<i64>,
    partition: Option<u32>,
}

impl<'a> NewRecord<'a> {
    /// A record without a key, at the time of its sending.
    pub fn of(value: &'a (impl AsRef<[u8]> + ?Sized)) -> Self {
        Self { key: None, value: value.as_ref(), timestamp: None, partition: None }
    }

    /// With a key: records of one key go to one partition, and stay in order there.
    pub fn key(mut self, key: &'a (impl AsRef<[u8]> + ?Sized)) -> Self {
        self.key = Some(key.as_ref());
        self
    }

    /// With a timestamp, in milliseconds since 1970 UTC.
    pub fn at(mut self, timestamp: i64) -> Self {
        self.timestamp = Some(timestamp);
        self
    }

    /// To this partition, whatever the key.
    pub fn partition(mut self, partition: u32) -> Self {
        self.partition = Some(partition);
        self
    }

    fn parts(&self) -> RecordParts<'a> {
        let timestamp = self.timestamp.unwrap_or_else(now);
        RecordParts { timestamp, key: self.key, value: Some(self.value), headers: &[] }
    }
}

/// Milliseconds since 1970; a clock before that reads as 1970.
fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// A record on its way. Dropping it changes nothing for the record.
#[derive(Debug)]
pub struct Sent {
    ack: Ack,
    directory: Directory,
}

impl Sent {
    /// Waits until the record is durable, and tells its offset.
    ///
    /// # Errors
    ///
    /// If it was refused, or not acknowledged in time; then it may or may not be in the log.
    pub fn offset(&self) -> Result<i64, DirectoryError> {
        Ok(self.directory.wait(self.ack.offset())?)
    }
}

/// Appends records, in batches; what it has to send twice is stored once. See [`Directory::producer`].
#[derive(Debug)]
pub struct Producer {
    producer: broker::Producer<Access>,
    directory: Directory,
}

/// Appends records by transaction: those of one become visible together, or never. See
/// [`Directory::transactional_producer`].
#[derive(Debug)]
pub struct Transaction {
    producer: broker::TransactionalProducer<Access>,
    directory: Directory,
}

impl Directory {
    /// A producer. Each has an identity of its own by which the log drops repeats.
    ///
    /// # Errors
    ///
    /// If the directory's owner does not answer.
    pub fn producer(&self) -> Result<Producer, DirectoryError> {
        let producer =
            self.wait(broker::Producer::open(self.access().clone(), ProducerOptions::default()))?;
        Ok(Producer { producer, directory: self.clone() })
    }

    /// A producer that goes by a name. Whoever had the name before is fenced when this returns: what it has open is
    /// aborted, and nothing it sends counts any more. So what is read *after* this call is all it ever wrote.
    ///
    /// # Errors
    ///
    /// If the directory's owner does not answer.
    pub fn transactional_producer(&self, name: &str) -> Result<Transaction, DirectoryError> {
        let opened =
            broker::TransactionalProducer::open(self.access().clone(), name, TransactionalOptions::default());
        Ok(Transaction { producer: self.wait(opened)?, directory: self.clone() })
    }
}

impl Producer {
    /// Takes a record; it goes out with others within a few milliseconds. Waits where too much is on its way already.
    ///
    /// # Errors
    ///
    /// If the producer failed before.
    pub fn send(&self, topic: &Topic, record: NewRecord<'_>) -> Result<Sent, DirectoryError> {
        let (partition, record) = (record.partition, record.parts());
        let ack = match self.producer.try_send(topic, partition, record)? {
            Some(ack) => ack,
            None => self.directory.wait(self.producer.send(topic, partition, record))?,
        };
        Ok(Sent { ack, directory: self.directory.clone() })
    }

    /// Sends what was taken so far, and waits until it is durable.
    ///
    /// # Errors
    ///
    /// If a record was refused, or not acknowledged in time.
    pub fn flush(&self) -> Result<(), DirectoryError> {
        Ok(self.directory.wait(self.producer.flush())?)
    }
}

impl Transaction {
    /// Takes a record into the transaction; the first one after a commit begins the next.
    ///
    /// # Errors
    ///
    /// If the producer failed before, or was fenced. Then the transaction can only be aborted.
    pub fn send(&self, topic: &Topic, record: NewRecord<'_>) -> Result<Sent, DirectoryError> {
        let (partition, record) = (record.partition, record.parts());
        let ack = match self.producer.try_send(topic, partition, record)? {
            Some(ack) => ack,
            None => self.directory.wait(self.producer.send(topic, partition, record))?,
        };
        Ok(Sent { ack, directory: self.directory.clone() })
    }

    /// Commits, and tells how the transaction ended: [`Outcome::Aborted`] where the log aborted it before, because it
    /// was open for too long or the directory's owner died. Durable on return.
    ///
    /// # Errors
    ///
    /// If a record was refused (then [`Transaction::abort`]), or the outcome cannot be learnt in time (then open
    /// another one by the same name, which settles it).
    pub fn commit(&mut self) -> Result<Outcome, DirectoryError> {
        Ok(self.directory.wait(self.producer.commit())?)
    }

    /// Aborts: nothing of it becomes visible.
    ///
    /// # Errors
    ///
    /// If the outcome cannot be learnt in time.
    pub fn abort(&mut self) -> Result<Outcome, DirectoryError> {
        Ok(self.directory.wait(self.producer.abort())?)
    }
}
