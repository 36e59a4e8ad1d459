//! What a caller is told is true, wherever the connection is cut: random calls, cancellations and drains over a stream that
//! dies after so many bytes, against the server's own record of what it executed.
//!
//! * an answer means: executed once; nothing is ever executed twice;
//! * `NotSent` and `Rejected` mean: never executed, then or later;
//! * every call ends, and the table is empty afterwards.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use parking_lot::Mutex;
use proptest::prelude::*;
use tidemill_rpc::{Attachment, Client, ClientConfig, Fate, RpcError, Server, ServerConfig, service};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf, duplex};
use tokio::task::yield_now;
use tokio::time::timeout;

#[service(name = "record.v1")]
trait Record: Send + Sync + 'static {
    #[rpc(timeout = "5s")]
    async fn run(&self, call: u32, yields: u8, body: Attachment) -> Result<(u32, Attachment), RpcError>;
}

#[derive(Clone, Default)]
struct Local(Arc<Mutex<HashMap<u32, u32>>>);

impl Record for Local {
    async fn run(&self, call: u32, yields: u8, body: Attachment) -> Result<(u32, Attachment), RpcError> {
        *self.0.lock().entry(call).or_default() += 1;
        if yields == NEVER {
            return std::future::pending().await;
        }
        for _ in 0..yields {
            yield_now().await;
        }
        Ok((call, body))
    }
}

const NEVER: u8 = 9;

/// A stream whose ends die after so many bytes.
struct Cut {
    inner: DuplexStream,
    writes_left: usize,
    reads_left: usize,
}

impl AsyncRead for Cut {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.reads_left == 0 {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let mut part = [0; 512];
        let most = part.len().min(self.reads_left).min(buf.remaining());
        let mut part = ReadBuf::new(&mut part[..most]);
        let polled = Pin::new(&mut self.inner).poll_read(cx, &mut part);
        self.reads_left -= part.filled().len();
        buf.put_slice(part.filled());
        polled
    }
}

impl AsyncWrite for Cut {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.writes_left == 0 {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let most = bytes.len().min(self.writes_left);
        let polled = Pin::new(&mut self.inner).poll_write(cx, &bytes[..most]);
        if let Poll::Ready(Ok(count)) = &polled {
            self.writes_left -= count;
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[derive(Debug, Clone)]
struct Case {
    /// Yields before it begins, attachment, yields of the handler, and after how many yields the caller cancels.
    calls: Vec<(u8, usize, u8, Option<u8>)>,
    in_flight: u32,
    pipe: usize,
    writes: usize,
    reads: usize,
    drain_after: Option<u8>,
}

fn case() -> impl Strategy<Value = Case> {
    let size = prop_oneof![3 => 0..300_usize, 1 => 1000..20_000_usize];
    let bytes = prop_oneof![2 => 0..3000_usize, 1 => 0..60_000_usize, 1 => Just(usize::MAX)];
    let call = (0..12_u8, size, 0..=NEVER, prop::option::weighted(0.3, 0..30_u8));
    (
        prop::collection::vec(call, 1..12),
        1..6_u32,
        prop_oneof![100..1000_usize, Just(64 << 10)],
        bytes.clone(),
        bytes,
        prop::option::weighted(0.3, 0..40_u8),
    )
        .prop_map(|(calls, in_flight, pipe, writes, reads, drain_after)| Case {
            calls,
            in_flight,
            pipe,
            writes,
            reads,
            drain_after,
        })
}

#[derive(Debug, PartialEq)]
enum Told {
    Answer,
    Cancelled,
    Failed(Fate),
}

async fn run(case: Case) {
    let local = Local::default();
    let server = Server::builder()
        .service(RecordServer::new(local.clone()))
        .config(ServerConfig { in_flight: case.in_flight, ..ServerConfig::default() })
        .build();
    let (near, far) = duplex(case.pipe);
    let serving = tokio::spawn({
        let server = server.clone();
        async move { server.serve_stream(far).await }
    });
    // The handshake is not what this test is about.
    let stream = Cut {
        inner: near,
        writes_left: case.writes.saturating_add(200),
        reads_left: case.reads.saturating_add(200),
    };
    let client = Client::connect(stream, ClientConfig::default()).await.expect("200 bytes are a HELLO");
    let calls: Vec<_> = (0..)
        .zip(case.calls.clone())
        .map(|(number, (before, size, yields, cancel))| {
            let record = RecordClient::new(client.clone());
            tokio::spawn(async move {
                for _ in 0..before {
                    yield_now().await;
                }
                let call = record.run(number, yields, vec![number as u8; size].into());
                let cancelled = async {
                    match cancel {
                        Some(after) => {
                            for _ in 0..after {
                                yield_now().await;
                            }
                        }
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    biased;
                    ended = call => match ended {
                        Ok((back, body)) => {
                            assert_eq!((back, body), (number, vec![number as u8; size].into()));
                            Told::Answer
                        }
                        Err(error) => Told::Failed(error.fate),
                    },
                    () = cancelled => Told::Cancelled,
                }
            })
        })
        .collect();
    let drain = case.drain_after.map(|after| {
        let server = server.clone();
        tokio::spawn(async move {
            for _ in 0..after {
                yield_now().await;
            }
            server.drain(Duration::from_secs(2)).await
        })
    });
    let mut told = Vec::new();
    for call in calls {
        told.push(timeout(Duration::from_secs(60), call).await.expect("every call ends").unwrap());
    }
    let empty = async {
        while client.in_flight() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(60), empty).await.expect("every slot comes back");
    if let Some(drain) = drain {
        drain.await.unwrap();
    }
    drop(client);
    // What was on the wire is executed, or dropped, before the record is read.
    let _ = timeout(Duration::from_secs(90), serving).await.expect("the server's side ends too").unwrap();
    let executed = local.0.lock();
    for (number, told) in (0_u32..).zip(&told) {
        let times = executed.get(&number).copied().unwrap_or(0);
        assert!(times <= 1, "{number} was executed {times} times");
        match told {
            Told::Answer | Told::Failed(Fate::Executed) => assert_eq!(times, 1, "{number}: {told:?}"),
            Told::Failed(Fate::NotSent | Fate::Rejected) => assert_eq!(times, 0, "{number}: {told:?}"),
            Told::Failed(Fate::Unknown) | Told::Cancelled => {}
        }
    }
}

/// 1500 cases, or as many as `PROPTEST_CASES` says.
fn config() -> ProptestConfig {
    let told = std::env::var_os("PROPTEST_CASES").is_some();
    let config = ProptestConfig::default();
    if told { config } else { ProptestConfig { cases: 1500, ..config } }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn what_a_caller_is_told_is_true(case in case()) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        runtime.block_on(run(case));
    }
}
