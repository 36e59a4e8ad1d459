//! How calls end: deadlines, cancellation, panics, limits, drain, death of the connection.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use tidemill_rpc::{
    Attachment, Client, ClientConfig, Code, Fate, RpcError, Server, ServerConfig, WireError, deadline,
    service, with_deadline,
};
use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, advance, timeout};

#[service(name = "lab.v1")]
trait Lab: Send + Sync + 'static {
    /// Never answers.
    #[rpc(timeout = "2s")]
    async fn hang(&self) -> Result<(), RpcError>;
    /// The time left, in milliseconds.
    #[rpc(timeout = "2s")]
    async fn left(&self) -> Result<Option<u64>, RpcError>;
    async fn panics(&self, late: bool) -> Result<(), RpcError>;
    async fn turn(&self, body: Attachment) -> Result<(u64, Attachment), RpcError>;
    async fn give(&self, bytes: u64) -> Result<((), Attachment), RpcError>;
    async fn number(&self, n: u64) -> Result<u64, RpcError>;
    /// Holds its thread for a millisecond.
    async fn blocks(&self) -> Result<(), RpcError>;
    /// Answers when the gate opens.
    async fn gated(&self) -> Result<(), RpcError>;
}

#[derive(Default)]
struct Bench {
    started: AtomicU64,
    dropped: AtomicU64,
    changed: Notify,
    gate: Option<Semaphore>,
}

struct OnDrop(Arc<Bench>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.dropped.fetch_add(1, SeqCst);
        self.0.changed.notify_waiters();
    }
}

#[derive(Clone, Default)]
struct Local(Arc<Bench>);

impl Lab for Local {
    async fn hang(&self) -> Result<(), RpcError> {
        self.0.started.fetch_add(1, SeqCst);
        self.0.changed.notify_waiters();
        let _on_drop = OnDrop(Arc::clone(&self.0));
        pending().await
    }

    async fn left(&self) -> Result<Option<u64>, RpcError> {
        let left = |at: Instant| u64::try_from(at.duration_since(Instant::now()).as_millis()).unwrap();
        Ok(deadline().map(left))
    }

    async fn panics(&self, late: bool) -> Result<(), RpcError> {
        if late {
            tokio::task::yield_now().await;
        }
        panic!("on purpose")
    }

    async fn turn(&self, body: Attachment) -> Result<(u64, Attachment), RpcError> {
        Ok((body.len() as u64, body))
    }

    async fn give(&self, bytes: u64) -> Result<((), Attachment), RpcError> {
        Ok(((), vec![1; usize::try_from(bytes).unwrap()].into()))
    }

    async fn number(&self, n: u64) -> Result<u64, RpcError> {
        Ok(n)
    }

    async fn blocks(&self) -> Result<(), RpcError> {
        let begun = std::time::Instant::now();
        while begun.elapsed() < Duration::from_millis(1) {
            std::hint::spin_loop();
        }
        Ok(())
    }

    async fn gated(&self) -> Result<(), RpcError> {
        self.0.started.fetch_add(1, SeqCst);
        self.0.changed.notify_waiters();
        self.0.gate.as_ref().expect("a gate").acquire().await.unwrap().forget();
        Ok(())
    }
}

impl Local {
    /// Waits until the condition holds; a handler's progress wakes it.
    async fn until(&self, holds: impl Fn(&Bench) -> bool) {
        loop {
            let changed = self.0.changed.notified();
            if holds(&self.0) {
                return;
            }
            changed.await;
        }
    }
}

async fn lab(server: ServerConfig, client: ClientConfig) -> (Local, Server, LabClient) {
    let local = Local::default();
    let server = Server::builder().service(LabServer::new(local.clone())).config(server).build();
    let client = server.connect_in_memory(client).await.unwrap();
    (local, server, LabClient::new(client))
}

async fn default_lab() -> (Local, Server, LabClient) {
    lab(ServerConfig::default(), ClientConfig::default()).await
}

/// Yields until nothing is in flight; the peer's answer to a CANCEL frees the slot.
async fn until_empty(client: &Client) {
    let empty = async {
        while client.in_flight() > 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), empty).await.expect("every slot comes back");
}

fn known(error: &RpcError) -> (Code, Fate) {
    (error.code, error.fate)
}

#[tokio::test(start_paused = true)]
async fn a_deadline_ends_the_call_and_the_handler() {
    let (local, _server, lab) = default_lab().await;
    let begun = Instant::now();
    let error = lab.hang().await.unwrap_err();
    assert_eq!(known(&error), (Code::DeadlineExceeded, Fate::Unknown));
    assert_eq!(begun.elapsed().as_millis() / 10, 200, "the method says 2 s");
    local.until(|bench| bench.dropped.load(SeqCst) == 1).await;
    until_empty(lab.client()).await;
}

#[tokio::test(start_paused = true)]
async fn a_deadline_covers_the_wait_for_a_slot() {
    let one = ClientConfig { in_flight: 1, ..ClientConfig::default() };
    let (local, _server, lab) = lab(ServerConfig::default(), one).await;
    let first = tokio::spawn({
        let lab = lab.clone();
        async move { lab.hang().await }
    });
    local.until(|bench| bench.started.load(SeqCst) == 1).await;
    let second = with_deadline(Instant::now() + Duration::from_millis(100), lab.number(7)).await;
    assert_eq!(known(&second.unwrap_err()), (Code::DeadlineExceeded, Fate::NotSent));
    // The slot comes back when the first is over, and is handed on.
    assert_eq!(lab.number(7).await, Ok(7));
    assert_eq!(known(&first.await.unwrap().unwrap_err()), (Code::DeadlineExceeded, Fate::Unknown));
}

#[tokio::test(start_paused = true)]
async fn a_server_cuts_long_deadlines() {
    let short = ServerConfig { deadline_max: Duration::from_millis(500), ..ServerConfig::default() };
    let (_local, _server, lab) = lab(short, ClientConfig::default()).await;
    let begun = Instant::now();
    let error = lab.hang().await.unwrap_err();
    assert_eq!(known(&error), (Code::DeadlineExceeded, Fate::Unknown));
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_handler_sees_what_is_left() {
    let (_local, _server, lab) = default_lab().await;
    assert_eq!(lab.left().await, Ok(Some(2000)));
    let near = with_deadline(Instant::now() + Duration::from_millis(300), lab.left()).await;
    assert_eq!(near, Ok(Some(300)), "calls inherit the nearer deadline");
    let past = with_deadline(Instant::now(), lab.left()).await;
    assert_eq!(known(&past.unwrap_err()), (Code::DeadlineExceeded, Fate::NotSent));
    assert_eq!(deadline(), None);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_of_the_client_bounds_methods_without_one() {
    let config = ClientConfig { timeout: Duration::from_secs(3), ..ClientConfig::default() };
    let (_local, _server, lab) = lab(ServerConfig::default(), config).await;
    let local = Local(Arc::new(Bench { gate: Some(Semaphore::new(0)), ..Bench::default() }));
    let server = Server::new(LabServer::new(local));
    let config = ClientConfig { timeout: Duration::from_secs(3), ..ClientConfig::default() };
    drop(lab);
    let lab = LabClient::new(server.connect_in_memory(config).await.unwrap());
    let begun = Instant::now();
    assert_eq!(known(&lab.gated().await.unwrap_err()), (Code::DeadlineExceeded, Fate::Unknown));
    assert_eq!(begun.elapsed().as_millis() / 10, 300);
}

#[tokio::test]
async fn dropping_the_future_cancels_at_the_server() {
    let (local, _server, lab) = default_lab().await;
    let call = tokio::spawn({
        let lab = lab.clone();
        async move { lab.hang().await }
    });
    local.until(|bench| bench.started.load(SeqCst) == 1).await;
    assert_eq!(local.0.dropped.load(SeqCst), 0);
    call.abort();
    local.until(|bench| bench.dropped.load(SeqCst) == 1).await;
    until_empty(lab.client()).await;
    assert_eq!(lab.number(1).await, Ok(1));
}

#[tokio::test]
async fn a_panicking_handler_fails_only_its_call() {
    let (_local, _server, lab) = default_lab().await;
    let (early, late, other) = tokio::join!(lab.panics(false), lab.panics(true), lab.number(5));
    for panicked in [early, late] {
        let error = panicked.unwrap_err();
        assert_eq!(known(&error), (Code::Panicked, Fate::Unknown));
        assert_eq!(error.message, "on purpose");
    }
    assert_eq!(other, Ok(5));
    assert_eq!(lab.number(6).await, Ok(6));
}

#[tokio::test]
async fn a_parked_handler_holds_nobody_up() {
    let (local, _server, lab) = default_lab().await;
    let hanging: Vec<_> = (0..10)
        .map(|_| {
            let lab = lab.clone();
            tokio::spawn(async move { lab.hang().await })
        })
        .collect();
    local.until(|bench| bench.started.load(SeqCst) == 10).await;
    for n in 0..100 {
        assert_eq!(lab.number(n).await, Ok(n));
    }
    assert_eq!(lab.client().in_flight(), 10);
    hanging.iter().for_each(tokio::task::JoinHandle::abort);
    until_empty(lab.client()).await;
}

#[tokio::test]
async fn handlers_that_hold_their_connection_up_are_counted() {
    let (_local, server, lab) = default_lab().await;
    for _ in 0..3 {
        lab.blocks().await.unwrap();
    }
    let blocks = server.slow_polls().find(|(method, _)| method.name == "blocks").unwrap();
    assert_eq!(blocks.1, 3);
}

#[tokio::test]
async fn the_death_of_a_server_fails_its_calls_at_once() {
    let local = Local::default();
    let server = Server::new(LabServer::new(local.clone()));
    // So small that a large request is still being written when the server dies.
    let (near, far) = tokio::io::duplex(4 << 10);
    let serving = tokio::spawn(async move { server.serve_stream(far).await });
    let client = Client::connect(near, ClientConfig::default()).await.unwrap();
    let lab = LabClient::new(client.clone());
    let (one, two) = (lab.clone(), lab.clone());
    let sent = tokio::spawn(async move { one.hang().await });
    local.until(|bench| bench.started.load(SeqCst) == 1).await;
    // The server is killed before it reads the rest of this one: single-threaded, so nothing runs in between.
    let half = tokio::spawn(async move { two.turn(vec![0; 8 << 20].into()).await });
    tokio::task::yield_now().await;
    serving.abort();
    let sent = timeout(Duration::from_secs(5), sent).await.unwrap().unwrap().unwrap_err();
    let half = timeout(Duration::from_secs(5), half).await.unwrap().unwrap().unwrap_err();
    assert_eq!(known(&sent), (Code::Unavailable, Fate::Unknown));
    assert_eq!(known(&half), (Code::Unavailable, Fate::NotSent));
    assert_eq!(client.closed().await.code, Code::Unavailable);
    assert!(client.is_closed());
    assert_eq!(known(&lab.number(1).await.unwrap_err()), (Code::Unavailable, Fate::NotSent));
    assert_eq!(client.in_flight(), 0);
    assert_eq!(local.0.dropped.load(SeqCst), 1, "the handler went with its connection");
}

#[tokio::test]
async fn closing_the_last_handle_drops_the_handlers() {
    let (local, server, lab) = default_lab().await;
    let call = tokio::spawn(async move { lab.hang().await });
    local.until(|bench| bench.started.load(SeqCst) == 1).await;
    call.abort();
    local.until(|bench| bench.dropped.load(SeqCst) == 1).await;
    let empty = async {
        while server.connections() > 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(5), empty).await.expect("the connection ends with its last handle");
}

#[tokio::test]
async fn a_drain_answers_what_was_accepted() {
    let local = Local(Arc::new(Bench { gate: Some(Semaphore::new(0)), ..Bench::default() }));
    let server = Server::new(LabServer::new(local.clone()));
    let lab = LabClient::new(server.connect_in_memory(ClientConfig::default()).await.unwrap());
    let calls: Vec<_> = (0..3)
        .map(|_| {
            let lab = lab.clone();
            tokio::spawn(async move { lab.gated().await })
        })
        .collect();
    local.until(|bench| bench.started.load(SeqCst) == 3).await;
    let drain = tokio::spawn({
        let server = server.clone();
        async move { server.drain(Duration::from_secs(30)).await }
    });
    // The client learns it from GOAWAY; what it asks later was not sent.
    let refused = loop {
        if let Err(error) = lab.number(1).await {
            break error;
        }
    };
    assert_eq!(refused.code, Code::Draining);
    assert!(refused.fate.is_safe_to_resend(), "{refused}");
    assert_eq!(known(&lab.number(1).await.unwrap_err()), (Code::Draining, Fate::NotSent));
    local.0.gate.as_ref().unwrap().add_permits(3);
    for call in calls {
        assert_eq!(call.await.unwrap(), Ok(()), "what was accepted is answered");
    }
    lab.client().closed().await;
    let drained = timeout(Duration::from_secs(10), drain).await.unwrap().unwrap();
    assert_eq!((drained.completed, drained.cancelled), (3, 0));
    let refused = server.connect_in_memory(ClientConfig::default()).await.unwrap_err();
    assert_eq!(refused.fate, Fate::NotSent);
}

#[tokio::test(start_paused = true)]
async fn a_drain_drops_what_outlives_it() {
    let (local, server, lab) = default_lab().await;
    let call = tokio::spawn(async move { lab.hang().await });
    local.until(|bench| bench.started.load(SeqCst) == 1).await;
    let drained = server.drain(Duration::from_millis(500)).await;
    assert_eq!((drained.completed, drained.cancelled), (0, 1));
    assert_eq!(known(&call.await.unwrap().unwrap_err()), (Code::Cancelled, Fate::Unknown));
    assert_eq!(local.0.dropped.load(SeqCst), 1);
}

#[tokio::test]
async fn attachments_of_many_sizes_come_back() {
    let (_local, _server, lab) = default_lab().await;
    for length in [0, 1, 1023, 1024, 1025, 64 << 10, (1 << 20) + 7, 12 << 20] {
        let body: Vec<u8> = (0..length).map(|index| index as u8).collect();
        let (count, back) = lab.turn(body.clone().into()).await.unwrap();
        assert_eq!(count, length as u64);
        assert!(back.into_bytes() == body, "{length} bytes");
    }
}

#[tokio::test]
async fn what_is_too_large_is_refused_before_it_leaves() {
    let small = ServerConfig { frame_bytes_max: 64 << 10, ..ServerConfig::default() };
    let (_local, _server, lab) = lab(small, ClientConfig::default()).await;
    let error = lab.turn(vec![0; 64 << 10].into()).await.unwrap_err();
    assert_eq!(known(&error), (Code::TooLarge, Fate::NotSent));

    let small = ClientConfig { frame_bytes_max: 64 << 10, ..ClientConfig::default() };
    let (_local, _server, lab) = self::lab(ServerConfig::default(), small).await;
    let error = lab.give(64 << 10).await.unwrap_err();
    assert_eq!(known(&error), (Code::TooLarge, Fate::Executed));
    assert_eq!(lab.give(1 << 10).await.unwrap().1.len(), 1 << 10);
}

/// Cancelled before the first poll, in the queue, on the wire: nothing is left of a million of them.
#[tokio::test]
async fn a_million_cancelled_calls_leave_the_table_empty() {
    let config = ClientConfig { in_flight: 64, ..ClientConfig::default() };
    let (local, _server, lab) = lab(ServerConfig::default(), config).await;
    for round in 0..10_000_u64 {
        let mut calls: Vec<_> = (0..100).map(|_| Box::pin(lab.hang())).collect();
        for call in &mut calls {
            assert!(futures::poll!(call.as_mut()).is_pending());
        }
        if round % 4 == 0 {
            // Some get as far as the server.
            tokio::task::yield_now().await;
        }
    }
    until_empty(lab.client()).await;
    assert_eq!(lab.number(1).await, Ok(1));
    let (started, dropped) = (local.0.started.load(SeqCst), local.0.dropped.load(SeqCst));
    assert!(started > 10_000, "{started}");
    assert_eq!(started, dropped);
}

/// Another build's idea of the same service.
mod skewed {
    use super::*;

    #[service(name = "lab.v1")]
    pub(super) trait Lab: Send + Sync + 'static {
        async fn number(&self, n: u32) -> Result<u64, RpcError>;
        async fn give(&self, bytes: u64) -> Result<((), Attachment), RpcError>;
        async fn newer(&self) -> Result<(), RpcError>;
    }
}

#[tokio::test]
async fn skew_is_an_error_that_names_the_method() {
    use skewed::Lab as _;
    let (_local, _server, lab) = default_lab().await;
    let client = lab.client().clone();
    let skewed = skewed::LabClient::new(client.clone());
    let error = skewed.number(1).await.unwrap_err();
    assert_eq!(known(&error), (Code::Skew, Fate::NotSent));
    assert!(error.message.starts_with("lab.v1.number: arguments or result differ"), "{error}");
    assert_eq!(skewed.give(3).await.unwrap().1.len(), 3, "the other methods go on");
    let error = skewed.newer().await.unwrap_err();
    assert_eq!(known(&error), (Code::Unimplemented, Fate::NotSent));
    assert!(error.message.contains("lab.v1.newer"), "{error}");
    assert!(client.check(LabClient::METHODS).is_ok());
    assert_eq!(client.check(skewed::LabClient::METHODS).unwrap_err().code, Code::Skew);
}

/// Errors are not in the signature: an older client meets a newer number.
mod errors {
    use super::*;

    #[derive(Debug, PartialEq, thiserror::Error, WireError)]
    pub(super) enum Newer {
        #[error("one")]
        #[wire(code = 1)]
        One { at: u64, why: String },
        #[error("two")]
        #[wire(code = 2)]
        Two,
        #[error(transparent)]
        #[wire(rpc)]
        Rpc(#[from] RpcError),
    }

    #[derive(Debug, PartialEq, thiserror::Error, WireError)]
    pub(super) enum Older {
        #[error("one")]
        #[wire(code = 1)]
        One { at: u64, why: String },
        #[error(transparent)]
        #[wire(rpc)]
        Rpc(#[from] RpcError),
    }

    #[service(name = "errors.v1")]
    pub(super) trait Fails: Send + Sync + 'static {
        async fn fail(&self, which: u8) -> Result<(), Newer>;
    }

    pub(super) mod older {
        use super::*;

        #[service(name = "errors.v1")]
        pub(in super::super) trait Fails: Send + Sync + 'static {
            async fn fail(&self, which: u8) -> Result<(), Older>;
        }
    }

    pub(super) struct Failing;

    impl Fails for Failing {
        async fn fail(&self, which: u8) -> Result<(), Newer> {
            Err(match which {
                1 => Newer::One { at: 7, why: "so".into() },
                2 => Newer::Two,
                _ => Newer::Rpc(RpcError::new(Code::Unavailable, Fate::NotSent, "further down")),
            })
        }
    }
}

#[tokio::test]
async fn application_errors_travel_by_number() {
    use errors::older::Fails as _;
    use errors::{Fails as _, Newer, Older};
    let server = Server::new(errors::FailsServer::new(errors::Failing));
    let client = server.connect_in_memory(ClientConfig::default()).await.unwrap();
    let newer = errors::FailsClient::new(client.clone());
    let older = errors::older::FailsClient::new(client);
    assert_eq!(newer.fail(1).await, Err(Newer::One { at: 7, why: "so".into() }));
    assert_eq!(newer.fail(2).await, Err(Newer::Two));
    assert_eq!(older.fail(1).await, Err(Older::One { at: 7, why: "so".into() }));
    let Err(Older::Rpc(unknown)) = older.fail(2).await else { panic!("an unknown number") };
    assert_eq!(known(&unknown), (Code::UnknownError, Fate::Executed));
    // The handler's own call was not sent, but the handler was executed: resending is not safe.
    let Err(Newer::Rpc(nested)) = newer.fail(3).await else { panic!("a nested error") };
    assert_eq!(known(&nested), (Code::Unavailable, Fate::Executed));
    assert_eq!(nested.message, "further down");
}

#[tokio::test(start_paused = true)]
async fn idle_connections_live_and_silent_ones_do_not() {
    let (_local, server, lab) = default_lab().await;
    for _ in 0..60 {
        advance(Duration::from_secs(5)).await;
        tokio::task::yield_now().await;
    }
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(lab.number(1).await, Ok(1), "PING and PONG keep it");
    assert_eq!(server.connections(), 1);

    // A peer that says HELLO and then nothing, neither PONG nor end of file.
    let (near, far) = tokio::io::duplex(64 << 10);
    let (near_read, near_write) = tokio::io::split(near);
    let (mut far_read, mut far_write) = tokio::io::split(far);
    let hello = tidemill_rpc::hello::Hello {
        version_min: 1,
        version_max: 1,
        frame_bytes_max: 1 << 20,
        in_flight: 4,
        codecs: vec![1],
        methods: Vec::new(),
    };
    tokio::io::AsyncWriteExt::write_all(&mut far_write, &hello.encode()).await.unwrap();
    let drainer = tokio::spawn(async move {
        tokio::io::copy(&mut far_read, &mut tokio::io::sink()).await.unwrap();
    });
    let client =
        Client::connect(tokio::io::join(near_read, near_write), ClientConfig::default()).await.unwrap();
    let begun = Instant::now();
    let error = client.closed().await;
    assert_eq!(error.code, Code::Unavailable);
    assert!((30..=40).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    drop((client, far_write));
    drainer.await.unwrap();
}
