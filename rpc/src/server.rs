//! The serving side: services, listeners and drain. One connection is in `connection`.
//!
//! A [`Server`] is what all its connections share: the services, the limits, and the list of live connections,
//! which a drain walks. Its own tasks are those of the connections its listeners accepted; `serve_tcp` and
//! `serve_unix` own and join them.

mod connection;

use std::collections::HashMap;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::client::{Client, ClientConfig};
use crate::codec;
use crate::error::{Code, RpcError};
use crate::fate::Fate;
use crate::frame::{HELLO_BYTES_MAX, Reader};
use crate::hello::{Hello, Served, VERSION};
use crate::io::{Ended, HANDSHAKE, Io, read_hello, write_hello};
use crate::method::{Method, Service};
use connection::{Connection, Signals};

/// Limits of a server.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Requests in flight on one connection at most; the client learns it in the handshake.
    pub in_flight: u32,
    /// The largest frame the server takes.
    pub frame_bytes_max: u32,
    /// Longer deadlines are cut to this.
    pub deadline_max: Duration,
    /// Connections at most; further ones are closed at once.
    pub connections: usize,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            in_flight: 1024,
            frame_bytes_max: 16 << 20,
            deadline_max: Duration::from_secs(300),
            connections: 10_000,
        }
    }
}

/// What a drain came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Drained {
    /// Calls answered after the drain began.
    pub completed: u64,
    /// Calls dropped at its deadline.
    pub cancelled: u64,
}

/// Services and limits, shared by any number of listeners and connections. A clone is a handle.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

/// What the connections share.
struct Shared {
    services: Vec<Box<dyn Service>>,
    /// Sorted by id.
    methods: Vec<Entry>,
    hello: Hello,
    config: ServerConfig,
    live: Mutex<Live>,
    /// A connection ended, or a drain began.
    changed: Notify,
    completed: AtomicU64,
    cancelled: AtomicU64,
}

/// A method, where to find its handler, and how often one held its connection up.
struct Entry {
    method: Method,
    service: usize,
    slow_polls: AtomicU64,
}

#[derive(Default)]
struct Live {
    draining: bool,
    next: u64,
    connections: HashMap<u64, Arc<Signals>>,
}

/// Puts a server together. See [`Server::builder`].
pub struct ServerBuilder {
    services: Vec<Box<dyn Service>>,
    config: ServerConfig,
}

impl ServerBuilder {
    /// Serves this too.
    ///
    /// # Panics
    /// Where two services have a method of the same id, and where the names of all methods exceed one HELLO frame.
    pub fn service(mut self, service: impl Service) -> Self {
        self.services.push(Box::new(service));
        self
    }

    /// Other limits than the default ones.
    pub fn config(mut self, config: ServerConfig) -> Self {
        self.config = config;
        self
    }

    /// The server, which serves nothing until it is given a listener or a stream.
    pub fn build(self) -> Server {
        let mut methods = Vec::new();
        let mut served = Vec::new();
        for (index, service) in self.services.iter().enumerate() {
            for method in service.methods() {
                methods.push(Entry { method: *method, service: index, slow_polls: AtomicU64::new(0) });
                served.push(Served { id: method.id, signature: method.signature, name: method.to_string() });
            }
        }
        methods.sort_unstable_by_key(|entry| entry.method.id);
        for pair in methods.windows(2) {
            let [one, other] = [pair[0].method, pair[1].method];
            assert_ne!(one.id, other.id, "{one} and {other} have the same id: give one another name");
        }
        let hello = Hello {
            version_min: VERSION,
            version_max: VERSION,
            frame_bytes_max: self.config.frame_bytes_max.max(HELLO_BYTES_MAX),
            in_flight: self.config.in_flight.max(1),
            codecs: vec![codec::BINCODE],
            methods: served,
        };
        assert!(
            hello.encode().len() <= HELLO_BYTES_MAX as usize,
            "the methods' names do not fit into a HELLO"
        );
        let shared = Shared {
            services: self.services,
            methods,
            hello,
            config: self.config,
            live: Mutex::default(),
            changed: Notify::new(),
            completed: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
        };
        Server { shared: Arc::new(shared) }
    }
}

impl Server {
    /// A server of one service with the default limits.
    pub fn new(service: impl Service) -> Self {
        Self::builder().service(service).build()
    }

    /// A server of several services, or with limits of its own.
    pub fn builder() -> ServerBuilder {
        ServerBuilder { services: Vec::new(), config: ServerConfig::default() }
    }

    /// Accepts and serves connections until [`drain`](Self::drain); returns when the last has ended.
    /// Dropping it closes them.
    pub async fn serve_tcp(&self, listener: TcpListener) -> io::Result<()> {
        self.accept_loop(Listener::Tcp(listener)).await
    }

    /// Accepts and serves connections until [`drain`](Self::drain); returns when the last has ended.
    /// Dropping it closes them.
    pub async fn serve_unix(&self, listener: UnixListener) -> io::Result<()> {
        self.accept_loop(Listener::Unix(listener)).await
    }

    async fn accept_loop(&self, listener: Listener) -> io::Result<()> {
        let mut connections = JoinSet::new();
        loop {
            let changed = self.shared.changed.notified();
            if self.is_draining() {
                break;
            }
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok(io) => {
                        let server = self.clone();
                        connections.spawn(async move { server.serve(io).await.err() });
                    }
                    Err(error) => {
                        // Out of descriptors, or a peer that hung up already: neither ends the listener.
                        tracing::warn!(%error, "accept failed; trying again in 50 ms");
                        sleep(Duration::from_millis(50)).await;
                    }
                },
                Some(ended) = connections.join_next() => {
                    if let Ok(Some(error)) = ended {
                        tracing::debug!(%error, "connection ended");
                    }
                }
                () = changed => {}
            }
        }
        while connections.join_next().await.is_some() {}
        Ok(())
    }

    /// Serves one stream that was already accepted, until either side closes it. Dropping it drops the
    /// calls in flight.
    pub async fn serve_stream<S>(&self, stream: S) -> Result<(), RpcError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        self.serve(Box::new(stream)).await
    }

    /// A client of this server in the same process, over an in-memory stream; every byte is framed as on a
    /// socket. The connection's task ends with the client.
    pub async fn connect_in_memory(&self, config: ClientConfig) -> Result<Client, RpcError> {
        let (near, far) = tokio::io::duplex(64 << 10);
        let server = self.clone();
        tokio::spawn(async move {
            if let Err(error) = server.serve_stream(far).await {
                tracing::debug!(%error, "in-memory connection ended");
            }
        });
        Client::connect(near, config).await
    }

    async fn serve(&self, mut io: Box<dyn Io>) -> Result<(), RpcError> {
        let Some(place) = self.enter() else {
            return Err(RpcError::new(Code::Overloaded, Fate::NotSent, "draining, or too many connections"));
        };
        let mut reader = Reader::new(HELLO_BYTES_MAX);
        let exchange = async {
            let theirs = read_hello(&mut *io, &mut reader).await?;
            // Also to an incompatible client: it learns the versions from it.
            write_hello(&mut *io, &self.shared.hello).await?;
            Ok::<_, Ended>(theirs)
        };
        let theirs = match timeout(HANDSHAKE, exchange).await {
            Ok(Ok(hello)) => hello,
            Ok(Err(ended)) => return Err(ended.to_error()),
            Err(_) => return Err(Ended::Stalled("no HELLO within 10 s").to_error()),
        };
        if !theirs.is_compatible() {
            return Err(RpcError::new(
                Code::Skew,
                Fate::NotSent,
                "the client speaks another version or codec",
            ));
        }
        reader.set_limit(self.shared.hello.frame_bytes_max);
        let connection =
            Connection::new(io, reader, &theirs, Arc::clone(&self.shared), Arc::clone(&place.signals));
        match connection.await {
            Ok(()) | Err(Ended::Eof) => Ok(()),
            Err(ended) => Err(ended.to_error()),
        }
    }

    /// A place among the live connections.
    fn enter(&self) -> Option<Place> {
        let mut live = self.shared.live.lock();
        if live.draining || live.connections.len() >= self.shared.config.connections {
            return None;
        }
        let number = live.next;
        live.next += 1;
        let signals = Arc::new(Signals::default());
        live.connections.insert(number, Arc::clone(&signals));
        Some(Place { shared: Arc::clone(&self.shared), number, signals })
    }

    /// Per method, the polls of its handlers that took longer than 100 µs: each held up every other call of its
    /// connection. Handlers with a count here belong on a thread of their own.
    pub fn slow_polls(&self) -> impl Iterator<Item = (Method, u64)> + '_ {
        self.shared.methods.iter().map(|entry| (entry.method, entry.slow_polls.load(Ordering::Relaxed)))
    }

    /// Whether a drain has begun.
    pub fn is_draining(&self) -> bool {
        self.shared.live.lock().draining
    }

    /// Live connections.
    pub fn connections(&self) -> usize {
        self.shared.live.lock().connections.len()
    }

    /// Stops accepting connections and requests (GOAWAY tells each client how many were accepted),
    /// answers what is in flight, and closes every connection; at the deadline the remaining handlers are
    /// dropped. Dropping the future leaves the server draining without a deadline.
    pub async fn drain(&self, limit: Duration) -> Drained {
        {
            let mut live = self.shared.live.lock();
            live.draining = true;
            live.connections.values().for_each(|signals| signals.drain());
        }
        self.shared.changed.notify_waiters();
        if timeout(limit, self.empty()).await.is_err() {
            self.shared.live.lock().connections.values().for_each(|signals| signals.kill());
            // A connection ends at its next poll, unless a handler blocks the thread.
            if timeout_at(Instant::now() + Duration::from_secs(5), self.empty()).await.is_err() {
                tracing::warn!("connections outlive the drain: a handler blocks its thread");
            }
        }
        Drained {
            completed: self.shared.completed.load(Ordering::Relaxed),
            cancelled: self.shared.cancelled.load(Ordering::Relaxed),
        }
    }

    async fn empty(&self) {
        loop {
            let mut changed = pin!(self.shared.changed.notified());
            changed.as_mut().enable();
            if self.connections() == 0 {
                return;
            }
            changed.await;
        }
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    async fn accept(&self) -> io::Result<Box<dyn Io>> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Box::new(stream))
            }
            Listener::Unix(listener) => Ok(Box::new(listener.accept().await?.0)),
        }
    }
}

/// Leaves the list when the connection is gone, a panic included.
struct Place {
    shared: Arc<Shared>,
    number: u64,
    signals: Arc<Signals>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.live.lock().connections.remove(&self.number);
        self.shared.changed.notify_waiters();
    }
}
