//! A served directory: who may serve it, what its clients see when it goes and comes back, how it drains.

mod common;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::*;
use tidemill_broker::*;
use tidemill_log::batch::RecordParts;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

async fn serve(dir: &Path, listen: SocketAddr) -> Serving {
    within(Serving::start(dir, ServeOptions { listen, ..serve_options() })).await.expect("serves")
}

/// An access by address, and what it tells.
async fn connect(address: SocketAddr) -> (Access, mpsc::UnboundedReceiver<AccessEvent>) {
    let (sender, events) = mpsc::unbounded_channel();
    let tell: Listener = Arc::new(move |event: &AccessEvent| drop(sender.send(event.clone())));
    (within(Access::connect(address.to_string(), Some(tell))).await.expect("connects"), events)
}

fn value(value: &str) -> RecordParts<'_> {
    RecordParts { value: Some(value.as_bytes()), ..RecordParts::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_outlive_a_broker_that_is_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let serving = serve(dir.path(), serve_options().listen).await;
    let address = serving.address();
    let (access, mut events) = connect(address).await;
    let broker = access.broker();
    let topic = topic(&broker, "t", 1).await;
    let producer = Producer::open(broker.clone(), ProducerOptions::default()).await.unwrap();
    let ack = within(producer.send(&topic, None, value("before"))).await.unwrap();
    assert_eq!(within(ack.offset()).await, Ok(0));
    within(serving.close()).await.unwrap();
    // Nobody is there: a produce and a call wait.
    let ack = within(producer.send(&topic, None, value("between"))).await.unwrap();
    let call = tokio::spawn({
        let broker = broker.clone();
        async move { broker.topics().await }
    });
    assert!(matches!(within(events.recv()).await, Some(AccessEvent::Searching { .. })));
    assert_eq!(access.place(), None);
    let serving = serve(dir.path(), address).await;
    assert_eq!(within(ack.offset()).await, Ok(1));
    assert_eq!(within(call).await.unwrap(), Ok(vec![topic.clone()]));
    assert!(matches!(within(events.recv()).await, Some(AccessEvent::Reconnected { .. })));
    assert_eq!(access.place(), Some(Place::Address(address)));
    let read = read_all(&broker, topic.partition(0), Isolation::ReadCommitted).await;
    assert_eq!(read, ["before", "between"]);
    within(access.close()).await;
    let closed = within(broker.topics()).await;
    assert!(
        matches!(&closed, Err(BrokerError::Unavailable { what }) if what.contains("closed")),
        "{closed:?}"
    );
    within(serving.close()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closing_answers_what_is_in_flight() {
    let dir = tempfile::tempdir().unwrap();
    let serving = serve(dir.path(), serve_options().listen).await;
    let (access, _events) = connect(serving.address()).await;
    let broker = access.broker();
    let tp = topic(&broker, "t", 1).await.partition(0);
    let who = plain(&broker).await;
    send(&broker, who, tp, batch(who, 0, false, &["x"])).await.unwrap();
    // A fetch that would wait for long is answered at the close.
    let waiting = tokio::spawn({
        let (broker, from) = (broker.clone(), Position::unchecked(1));
        async move { fetch(&broker, tp, from, Isolation::ReadCommitted, Duration::from_secs(15)).await }
    });
    // Requests of one connection are begun in their order: once this one is answered, the fetch waits.
    tokio::task::yield_now().await;
    within(broker.topics()).await.unwrap();
    let drained = within(serving.close()).await.unwrap();
    assert_eq!(drained.cancelled, 0, "{drained:?}");
    waiting.abort();
    // The log was closed in order: the next open finds nothing to replay, and the directory is free.
    let owner = within(Data::open(dir.path(), Intent::Use)).await.unwrap();
    assert_eq!(owner.place(), Some(Place::Here));
    assert_eq!(read_all(&owner.broker(), tp, Isolation::ReadCommitted).await, ["x"]);
    owner.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_on_the_directory_and_by_the_address_meet_in_one_log() {
    let dir = tempfile::tempdir().unwrap();
    let serving = serve(dir.path(), serve_options().listen).await;
    let (remote, _events) = connect(serving.address()).await;
    let beside = within(Data::open(dir.path(), Intent::Use)).await.unwrap();
    assert_eq!(beside.place(), Some(Place::Process(std::process::id())));
    let tp = topic(&remote.broker(), "t", 1).await.partition(0);
    let who = plain(&beside.broker()).await;
    send(&beside.broker(), who, tp, batch(who, 0, false, &["x"])).await.unwrap();
    assert_eq!(read_all(&remote.broker(), tp, Isolation::ReadCommitted).await, ["x"]);
    // Nobody else serves it meanwhile, and the error says who does.
    let second = within(Serving::start(dir.path(), serve_options())).await;
    let Err(error @ ServeError::Owned { .. }) = second else { panic!("{second:?}") };
    assert!(error.to_string().contains(&format!("process {} owns", std::process::id())), "{error}");
    within(remote.close()).await;
    within(serving.close()).await.unwrap();
    within(beside.close()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_served_is_refused_before_anything_is_made() {
    let temp = tempfile::tempdir().unwrap();
    let start = |path: &Path, listen: &str, intent| {
        let options = ServeOptions { intent, listen: listen.parse().unwrap(), ..serve_options() };
        within(Serving::start(path.to_owned(), options))
    };
    let missing = temp.path().join("missing");
    let refused = start(&missing, "127.0.0.1:0", Intent::Fill).await;
    assert!(matches!(refused, Err(ServeError::Dir(DirError::Missing { .. }))), "{refused:?}");
    let refused = start(&missing, "0.0.0.0:0", Intent::Create).await;
    assert!(matches!(refused, Err(ServeError::Exposed { .. })), "{refused:?}");
    let refused = start(&missing, "[::]:0", Intent::Create).await;
    assert!(matches!(refused, Err(ServeError::Exposed { .. })), "{refused:?}");
    assert!(!missing.exists());
    let other = temp.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("thesis.txt"), "years of work").unwrap();
    let refused = start(&other, "127.0.0.1:0", Intent::Fill).await;
    assert!(matches!(refused, Err(ServeError::Dir(DirError::NotOurs { .. }))), "{refused:?}");
    // An empty directory is filled; its port is taken from then on.
    let empty = temp.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let serving = start(&empty, "127.0.0.1:0", Intent::Fill).await.unwrap();
    let again = temp.path().join("again");
    std::fs::create_dir(&again).unwrap();
    let refused = start(&again, &serving.address().to_string(), Intent::Fill).await;
    assert!(matches!(refused, Err(ServeError::Listen { .. })), "{refused:?}");
    within(serving.close()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_and_somebody_else_are_told_apart() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let web = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 64]).await;
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").await;
        }
    });
    let other = within(Access::connect(address.to_string(), None)).await;
    assert!(matches!(other, Err(AccessError::NotABroker { .. })), "{other:?}");
    web.abort();
    let _ = web.await;
    let nobody = within(Access::connect(address.to_string(), None)).await;
    let Err(error @ AccessError::NobodyListens { .. }) = nobody else { panic!("{nobody:?}") };
    assert!(error.to_string().contains(&format!("streamctl serve --listen {address}")), "{error}");
}
