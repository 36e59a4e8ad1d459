//! An owner that dies of a request.

use std::sync::atomic::{AtomicU32, Ordering};

use tidemill_rpc::Server;
use tokio::net::UnixListener;
use tokio::sync::Notify;

use super::*;
use crate::status::{Hello, Status};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// A broker that takes a request and never answers.
struct Mute {
    asked: Arc<Notify>,
    died: Arc<AtomicU32>,
}

impl Mute {
    async fn mute<T>(&self) -> T {
        self.died.fetch_add(1, Ordering::Relaxed);
        self.asked.notify_one();
        std::future::pending().await
    }
}

impl Broker for Mute {
    async fn create_topic(&self, _: NewTopic) -> Result<Topic, BrokerError> {
        self.mute().await
    }
    async fn delete_topic(&self, _: DeleteTopic) -> Result<(), BrokerError> {
        self.mute().await
    }
    async fn alter_topic(&self, _: AlterTopic) -> Result<Topic, BrokerError> {
        self.mute().await
    }
    async fn topics(&self) -> Result<Vec<Topic>, BrokerError> {
        self.mute().await
    }
    async fn describe(&self, _: String) -> Result<TopicDescription, BrokerError> {
        self.mute().await
    }
    async fn init_producer(&self, _: InitProducer) -> Result<ProducerIdentity, BrokerError> {
        self.mute().await
    }
    async fn produce(&self, _: Produce, _: Attachment) -> Result<Produced, BrokerError> {
        self.mute().await
    }
    async fn fetch(&self, _: Fetch) -> Result<(Fetched, Attachment), BrokerError> {
        self.mute().await
    }
    async fn list_offsets(&self, _: ListOffsets) -> Result<ListedOffsets, BrokerError> {
        self.mute().await
    }
    async fn commit_offsets(&self, _: CommitOffsets) -> Result<(), BrokerError> {
        self.mute().await
    }
    async fn fetch_offsets(&self, _: FetchOffsets) -> Result<FetchedOffsets, BrokerError> {
        self.mute().await
    }
    async fn end_transaction(&self, _: EndTransaction) -> Result<Ended, BrokerError> {
        self.mute().await
    }
}

/// One connection of an owner that dies of every request: watchers hear a line a second, requests the end of file.
async fn fatal(mut stream: UnixStream, died: Arc<AtomicU32>) {
    if Status::Serving.write(&mut stream).await.is_err() {
        return;
    }
    match Hello::read(&mut stream).await {
        Ok(Some(Hello::Rpc)) => {
            let asked = Arc::new(Notify::new());
            let server = Server::new(BrokerServer::new(Mute { asked: asked.clone(), died }));
            tokio::select! {
                _ = server.serve_stream(stream) => {}
                () = asked.notified() => {}
            }
        }
        Ok(Some(Hello::Watch)) => {
            while Status::Serving.write(&mut stream).await.is_ok() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        _ => {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_kills_five_owners_fails() {
    let temp = tempfile::tempdir().unwrap();
    let dir = DataDir::open(temp.path(), Intent::Create).unwrap();
    let _lock = dir.try_lock().unwrap().expect("free");
    let listener = UnixListener::bind(temp.path().join("sock")).unwrap();
    let died = Arc::new(AtomicU32::new(0));
    let count = died.clone();
    let owner = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(fatal(stream, count.clone()));
        }
    });
    let access = Access::open(temp.path(), AccessOptions::new(Intent::Use)).await.unwrap();
    let failed = timeout(Duration::from_secs(20), access.topics()).await.expect("bounded");
    let Err(BrokerError::Unavailable { what }) = failed else { panic!("{failed:?}") };
    assert!(what.contains("5 owners"), "{what}");
    assert_eq!(died.load(Ordering::Relaxed), DEATHS_MAX);
    // A produce is the producer's to repeat: it dies once.
    let produce = Produce { producer: ProducerIdentity { id: 1, epoch: 0 }, batches: Vec::new() };
    let once = timeout(Duration::from_secs(20), access.produce(produce, Attachment::default())).await;
    assert!(once.expect("bounded").is_err_and(|e| e.is_dead_connection()));
    assert_eq!(died.load(Ordering::Relaxed), DEATHS_MAX + 1);
    owner.abort();
}
