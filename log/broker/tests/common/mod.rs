//! Where the suites find a broker: in this process, over TCP, over the Unix socket of a data directory.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tidemill_broker::*;
use tidemill_log::batch::{BatchBuilder, BatchOptions, ProducerStamp, RecordParts};
use tidemill_log::fs::RealFs;
use tidemill_log::{Config, Create, Log};
use tidemill_rpc::Attachment;

/// No single wait of a test is longer: a test that hangs says where.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A broker to which any number of connections can be made.
pub trait Host: Send + Sync {
    /// A connection, newer than all before it.
    fn connect(&self) -> impl Future<Output = AnyBroker> + Send;
}

pub fn config() -> Config {
    Config { create: Create::IfMissing, journal_file_bytes: 1 << 20, ..Config::default() }
}

pub fn open_log(dir: &std::path::Path) -> Log {
    let fs = RealFs::new(dir).expect("a directory");
    Log::open(Arc::new(fs), config()).expect("opens")
}

pub struct Local {
    broker: LocalBroker,
    _dir: tempfile::TempDir,
}

impl Local {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        Local { broker: LocalBroker::new(open_log(dir.path())), _dir: dir }
    }
}

impl Host for Local {
    async fn connect(&self) -> AnyBroker {
        AnyBroker::new(self.broker.session())
    }
}

/// A served directory; every connection is an access by its address.
pub struct Tcp {
    serving: Serving,
    _dir: tempfile::TempDir,
}

impl Tcp {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let serving = Serving::start(dir.path(), serve_options()).await.expect("serves");
        Tcp { serving, _dir: dir }
    }
}

pub fn serve_options() -> ServeOptions {
    let listen = "127.0.0.1:0".parse().expect("an address");
    ServeOptions { log: config(), ..ServeOptions::new(Intent::Create, listen) }
}

impl Host for Tcp {
    async fn connect(&self) -> AnyBroker {
        let access = Access::connect(self.serving.address().to_string(), None).await.expect("connects");
        assert_eq!(access.place(), Some(Place::Address(self.serving.address())));
        access.broker()
    }
}

/// The first access owns the directory; every connection is another access, which reaches it by the socket.
pub struct Unix {
    owner: Access,
    dir: tempfile::TempDir,
}

impl Unix {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let owner = Data::open(dir.path(), Intent::Create).await.expect("owns");
        assert_eq!(owner.place(), Some(Place::Here));
        Unix { owner, dir }
    }
}

impl Host for Unix {
    async fn connect(&self) -> AnyBroker {
        let access = Data::open(self.dir.path(), Intent::Use).await.expect("connects");
        assert_eq!(access.place(), Some(Place::Process(std::process::id())));
        access.broker()
    }
}

/// A batch of these values.
pub fn batch(who: ProducerIdentity, sequence: i32, transactional: bool, values: &[&str]) -> Bytes {
    let mut builder = BatchBuilder::new(BatchOptions { transactional, ..BatchOptions::default() });
    for value in values {
        assert!(builder.push(RecordParts { value: Some(value.as_bytes()), ..RecordParts::default() }));
    }
    builder.build(ProducerStamp { id: who.id, epoch: who.epoch, sequence })
}

/// A batch of records with these times.
pub fn timed(who: ProducerIdentity, sequence: i32, times: &[i64]) -> Bytes {
    let mut builder = BatchBuilder::new(BatchOptions::default());
    for timestamp in times {
        assert!(builder.push(RecordParts {
            timestamp: *timestamp,
            value: Some(b"v"),
            ..RecordParts::default()
        }));
    }
    builder.build(ProducerStamp { id: who.id, epoch: who.epoch, sequence })
}

/// Sends one batch and gives its outcome.
pub async fn send(
    broker: &AnyBroker,
    who: ProducerIdentity,
    to: TopicPartition,
    batch: Bytes,
) -> Result<(i64, bool), BrokerError> {
    let bytes = u32::try_from(batch.len()).unwrap();
    let request = Produce { producer: who, batches: vec![ProducePartition { partition: to, bytes }] };
    let produced = within(broker.produce(request, Attachment::new(batch))).await?;
    assert_eq!(produced.outcomes.len(), 1);
    match produced.outcomes.into_iter().next().unwrap() {
        ProduceOutcome::Appended { base_offset, duplicate, .. } => Ok((base_offset, duplicate)),
        ProduceOutcome::Refused(error) => Err(error.into_error()),
    }
}

pub async fn plain(broker: &AnyBroker) -> ProducerIdentity {
    let init = InitProducer { transactional_id: None, timeout_ms: 0, carried: None };
    within(broker.init_producer(init)).await.expect("a producer id")
}

pub async fn transactional(broker: &AnyBroker, id: &str) -> ProducerIdentity {
    let init = InitProducer { transactional_id: Some(id.into()), timeout_ms: 60_000, carried: None };
    within(broker.init_producer(init)).await.expect("a producer id")
}

pub async fn end(
    broker: &AnyBroker,
    id: &str,
    producer: ProducerIdentity,
    end: End,
) -> Result<Ended, BrokerError> {
    let who = TransactionalIdentity { transactional_id: id.into(), producer };
    within(broker.end_transaction(EndTransaction { who, end })).await
}

/// One fetch of one partition: what is visible, where it goes on.
pub async fn fetch(
    broker: &AnyBroker,
    partition: TopicPartition,
    position: Position,
    isolation: Isolation,
    wait: Duration,
) -> Result<(Vec<String>, Position, PartitionOffsets), BrokerError> {
    let request = Fetch {
        partitions: vec![FetchPartition { partition, position, bytes_max: 1 << 20 }],
        bytes_max: 1 << 20,
        wait_ms_max: u32::try_from(wait.as_millis()).unwrap(),
        isolation,
    };
    let (fetched, attachment) = within(broker.fetch(request)).await?;
    let got = fetched.partitions.into_iter().next().expect("one partition");
    if let Some(error) = got.error {
        return Err(error.into_error());
    }
    let bytes = attachment.into_bytes();
    assert_eq!(bytes.len(), got.bytes as usize);
    let batches = visible(bytes, &got.aborted, isolation).expect("intact");
    let mut values = Vec::new();
    for_each_record(&batches, position.offset, |record| {
        values.push(String::from_utf8(record.value.expect("a value").to_vec()).expect("text"));
    })
    .expect("intact");
    Ok((values, got.next, got.offsets))
}

/// Everything visible from a position to the end.
pub async fn read_all(broker: &AnyBroker, partition: TopicPartition, isolation: Isolation) -> Vec<String> {
    let mut position = Position::START;
    let mut all = Vec::new();
    loop {
        let (values, next, _) =
            fetch(broker, partition, position, isolation, Duration::ZERO).await.expect("reads");
        all.extend(values);
        if next == position {
            return all;
        }
        position = next;
    }
}

pub async fn topic(broker: &AnyBroker, name: &str, partitions: u32) -> Topic {
    within(broker.create_topic(NewTopic::new(name, partitions))).await.expect("creates")
}

/// Fails the test where `future` takes too long.
pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("takes too long")
}
