//! The process that owns a data directory: from the lock to the socket to the open log, and back.
//!
//! ```text
//!   LOCK held ─▶ bind .sock.new, mode 0600, listen, rename to sock ─▶ opening ─▶ log recovered ─▶ serving
//!                                                                        │                          │
//!                                              failed(why) ◀──no────────┘                       closing
//!                                                   └────────────▶ sockets closed ─▶ LOCK freed ◀─────┘
//! ```
//!
//! Every connection hears the state on accept and every second (`status.rs`), so a client that came early waits for
//! the recovery and knows that somebody is at it.
//!
//! Invariants
//! * The socket has its name only once it listens: a client that is refused knows that nobody owns the directory, or
//!   that its owner is between the lock and the name.
//! * Peers of another user are not served.
//! * LOCK goes last: whoever takes it next finds the log closed and its files at rest. That holds where the owner is
//!   dropped without [`Owner::close`] too; then the log is closed on a thread of its own.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tidemill_log::fs::RealFs;
use tidemill_log::{Config, Log};
use tidemill_rpc::Drained;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::directory::{DataDir, DirError, DirLock, SOCKET, SOCKET_NEW};
use crate::local::LocalBroker;
use crate::sessions::Sessions;
use crate::status::{Hello, Status};
use crate::tcp;

/// How often the state is said again.
const TICK: Duration = Duration::from_secs(1);
/// A client says within this time what it wants.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// Connections at one time; more wait in the socket's backlog, which clients see as busy.
const CONNECTIONS_MAX: usize = 512;
/// How many may wait to be accepted.
const BACKLOG: i32 = 128;
/// Connections have this long to say the last state.
const FAREWELL_WITHIN: Duration = Duration::from_secs(1);
/// What is in flight when closing begins has this long; then what is queued in the log has as long.
const DRAIN_WITHIN: Duration = Duration::from_secs(5);
const CLOSE_WITHIN: Duration = Duration::from_secs(30);

/// Why the process that holds the lock does not serve.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// The directory or its socket could not be set up.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// The log did not open.
    #[error("cannot open the log in {}: {why}", path.display())]
    Open {
        /// The data directory.
        path: std::path::PathBuf,
        /// What the log says.
        why: String,
    },
    /// The log did not close in order.
    #[error("closing the log: {why}")]
    Close {
        /// What the log says.
        why: String,
    },
}

/// The owner's running parts.
pub(crate) struct Owner {
    status: watch::Sender<Status>,
    broker: Option<LocalBroker>,
    sessions: Sessions,
    accepting: JoinSet<()>,
    // Behind everything that uses the directory: freed when the last clone is dropped, after the log has closed.
    lock: Option<Arc<DirLock>>,
    dir: Arc<DataDir>,
}

impl Owner {
    /// Listens, then opens the log; peers hear meanwhile that it opens. The lock is given up where it fails.
    pub(crate) async fn start(dir: Arc<DataDir>, lock: DirLock, config: Config) -> Result<Owner, OwnerError> {
        let listener = listen(&dir)?;
        let (status, said) = watch::channel(Status::Opening);
        let sessions = Sessions::default();
        // The broker appears here once the log is open; connections that came before wait for `Serving` first.
        let (ready, broker) = watch::channel(None);
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, said, broker, sessions.clone()));
        let mut owner =
            Owner { status, broker: None, sessions, accepting, lock: Some(Arc::new(lock)), dir: dir.clone() };

        let path = dir.path().to_owned();
        let held = owner.lock.clone();
        let opening = tokio::task::spawn_blocking(move || {
            let opened = RealFs::new(&path)
                .map_err(|e| e.to_string())
                .and_then(|fs| Log::open(Arc::new(fs), config).map_err(|e| explain(&e)));
            // An open goes on where its future is dropped: the directory stays locked until it, and the log, are gone.
            (opened, held)
        });
        let (opened, _held) = opening.await.unwrap_or_else(|panic| (Err(panic.to_string()), None));
        match opened {
            Ok(log) => {
                let broker = LocalBroker::new(log);
                owner.broker = Some(broker.clone());
                ready.send_replace(Some(broker));
                owner.status.send_replace(Status::Serving);
                tracing::info!(directory = %dir.path().display(), "owns the data directory");
                Ok(owner)
            }
            Err(why) => {
                owner.status.send_replace(Status::Failed(why.clone()));
                owner.stop_listening().await;
                Err(OwnerError::Open { path: dir.path().to_owned(), why })
            }
        }
    }

    /// The broker of the open log.
    pub(crate) fn broker(&self) -> LocalBroker {
        self.broker.clone().expect("a started owner has a broker")
    }

    /// Serves connections of this listener, too, until the owner closes.
    pub(crate) fn accept_tcp(&mut self, listener: TcpListener) {
        let accepting = tcp::accept(listener, self.status.subscribe(), self.broker(), self.sessions.clone());
        self.accepting.spawn(accepting);
    }

    /// Answers what is in flight, closes the log in order, and frees the directory.
    pub(crate) async fn close(mut self) -> Result<Drained, OwnerError> {
        self.status.send_replace(Status::Closing);
        if let Some(broker) = &self.broker {
            broker.stop_waiting();
        }
        let drained = self.sessions.drain(DRAIN_WITHIN).await;
        self.stop_listening().await;
        let closed = match self.broker.take() {
            Some(broker) => {
                // A close goes on where its future is dropped, and the directory stays locked meanwhile.
                let held = self.lock.clone();
                let closing = tokio::task::spawn_blocking(move || {
                    let closed = broker.log().close(CLOSE_WITHIN);
                    drop(held);
                    closed
                });
                closing
                    .await
                    .map_err(|panic| panic.to_string())
                    .and_then(|closed| closed.map_err(|e| e.to_string()))
            }
            None => Ok(()),
        };
        drop(self.lock.take());
        closed.map(|()| drained).map_err(|why| OwnerError::Close { why })
    }

    /// Peers hear the last state, then the end of the file; the socket's name goes before the lock does.
    async fn stop_listening(&mut self) {
        if let Err(error) = self.dir.unlink(SOCKET) {
            tracing::warn!(%error, "the socket's name stays; the next owner replaces it");
        }
        // The accepting tasks let every connection say the last state, for a bounded time.
        let _ =
            timeout(2 * FAREWELL_WITHIN, async { while self.accepting.join_next().await.is_some() {} }).await;
        self.accepting.shutdown().await;
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let (Some(broker), Some(lock)) = (self.broker.take(), self.lock.take()) else { return };
        self.status.send_replace(Status::Closing);
        self.accepting.abort_all();
        // Closing blocks, and a runtime's thread must not; the lock goes after it.
        let closing = move || {
            if let Err(error) = broker.log().close(CLOSE_WITHIN) {
                tracing::warn!(%error, "the log did not close in order; the next open recovers it");
            }
            drop(lock);
        };
        if let Err(error) = std::thread::Builder::new().name("tidemill-close".into()).spawn(closing) {
            tracing::warn!(%error, "no thread to close the log; the next open recovers it");
        }
    }
}

/// An error with what caused it: the peer only gets one line.
fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// A listening socket under its name.
fn listen(dir: &DataDir) -> Result<UnixListener, DirError> {
    let io = |what, error: io::Error| dir.io(what, SOCKET_NEW, error);
    // Left by an owner that died between bind and rename.
    dir.unlink(SOCKET_NEW)?;
    let address = SocketAddrUnix::new(dir.socket_path(SOCKET_NEW)).map_err(|e| io("bind", e.into()))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|e| io("make a socket for", e.into()))?;
    rustix::net::bind(&socket, &address).map_err(|e| io("bind", e.into()))?;
    dir.chmod_owner_only(SOCKET_NEW)?;
    rustix::net::listen(&socket, BACKLOG).map_err(|e| io("listen at", e.into()))?;
    dir.rename(SOCKET_NEW, SOCKET)?;
    UnixListener::from_std(socket.into()).map_err(|e| io("listen at", e))
}

/// What an attempt to reach the owner's socket met.
pub(crate) enum Reached {
    /// Somebody listens.
    Connected(UnixStream),
    /// Somebody listens but does not accept: the backlog is full.
    Busy,
    /// Nobody listens.
    Nobody,
}

/// Connects without waiting.
pub(crate) fn reach(dir: &DataDir) -> Result<Reached, DirError> {
    let io = |what, error: io::Error| dir.io(what, SOCKET, error);
    let address = SocketAddrUnix::new(dir.socket_path(SOCKET)).map_err(|e| io("connect to", e.into()))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|e| io("make a socket for", e.into()))?;
    use rustix::io::Errno;
    match rustix::net::connect(&socket, &address) {
        Ok(()) => {
            let stream = UnixStream::from_std(socket.into()).map_err(|e| io("connect to", e))?;
            Ok(Reached::Connected(stream))
        }
        Err(Errno::AGAIN | Errno::INPROGRESS | Errno::INTR) => Ok(Reached::Busy),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(Reached::Nobody),
        Err(e) => Err(io("connect to", e.into())),
    }
}

/// The user this process runs as; its peers must run as the same.
pub(crate) fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

async fn accept(
    listener: UnixListener,
    mut status: watch::Receiver<Status>,
    broker: watch::Receiver<Option<LocalBroker>>,
    sessions: Sessions,
) {
    // Dropped with this task: then every connection's task ends.
    let mut connections = JoinSet::new();
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        while connections.try_join_next().is_some() {}
        let stream = tokio::select! {
            accepted = next_peer(&listener, &room) => accepted,
            _ = status.wait_for(Status::is_last) => break,
        };
        let Some((stream, permit)) = stream else { continue };
        let (status, broker, sessions) = (status.clone(), broker.clone(), sessions.clone());
        connections.spawn(async move {
            let _permit = permit;
            if let Err(error) = converse(stream, status, broker, sessions).await {
                tracing::debug!(%error, "a connection ended");
            }
        });
    }
    drop(listener);
    let _ = timeout(FAREWELL_WITHIN, async { while connections.join_next().await.is_some() {} }).await;
}

/// The next connection of this user, and its place among the connections; none where it was refused.
async fn next_peer(
    listener: &UnixListener,
    room: &Arc<Semaphore>,
) -> Option<(UnixStream, OwnedSemaphorePermit)> {
    let permit = room.clone().acquire_owned().await.expect("the semaphore is never closed");
    let stream = match listener.accept().await {
        Ok((stream, _)) => stream,
        Err(error) => {
            // Out of descriptors, most likely: waiting lets connections end, a tight loop would not.
            tracing::warn!(%error, "cannot accept a connection");
            tokio::time::sleep(TICK).await;
            return None;
        }
    };
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == own_uid() => Some((stream, permit)),
        Ok(peer) => {
            tracing::warn!(uid = peer.uid(), "refused a peer of another user");
            None
        }
        Err(error) => {
            tracing::warn!(%error, "refused a peer without credentials");
            None
        }
    }
}

/// One connection, from its hello to its end.
async fn converse(
    mut stream: UnixStream,
    mut status: watch::Receiver<Status>,
    broker: watch::Receiver<Option<LocalBroker>>,
    sessions: Sessions,
) -> io::Result<()> {
    let mut said = status.borrow_and_update().clone();
    said.write(&mut stream).await?;
    if said.is_last() {
        return Ok(());
    }
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no hello");
    let Some(hello) = timeout(HELLO_WITHIN, Hello::read(&mut stream)).await.map_err(late)?? else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a hello"));
    };
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick.tick().await;
    while hello == Hello::Watch || said != Status::Serving {
        let mut probe = [0; 1];
        tokio::select! {
            changed = status.changed() => if changed.is_err() { return Ok(()) },
            _ = tick.tick() => {}
            // A watcher says nothing more; what comes is its end of file.
            read = stream.read(&mut probe), if hello == Hello::Watch => {
                read?;
                return Ok(());
            }
        }
        said = status.borrow_and_update().clone();
        said.write(&mut stream).await?;
        if said.is_last() {
            return Ok(());
        }
    }
    let Some(broker) = broker.borrow().clone() else { return Ok(()) };
    // None: it closes just now, and the client hears that from its watch or the end of the file.
    let Some(session) = sessions.begin(&broker) else { return Ok(()) };
    session.server.serve_stream(stream).await.map_err(|e| io::Error::other(e.to_string()))
}

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use tokio::time::Instant;

    use super::*;
    use crate::directory::Intent;

    /// Waits, within a generous deadline, until the condition gives something.
    async fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(found) = condition() {
                return found;
            }
            assert!(Instant::now() < deadline, "waited for {what}");
            tokio::task::yield_now().await;
        }
    }

    /// A takeover that is cancelled (Ctrl-C) in the middle of an open: the open goes on, so the lock has to stay.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_cancelled_open_keeps_the_directory_locked_until_it_is_over() {
        let temp = tempfile::tempdir().unwrap();
        // The open reads `format` first. As a pipe without a writer it holds the open just there.
        let format = temp.path().join("format");
        mknodat(CWD, &format, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let dir = Arc::new(DataDir::open(temp.path(), Intent::Use).unwrap());
        let lock = dir.try_lock().unwrap().expect("free");
        let starting = tokio::spawn(Owner::start(dir.clone(), lock, Config::default()));
        let listens = || matches!(reach(&dir), Ok(Reached::Connected(_))).then_some(());
        until("the owner to listen", listens).await;
        starting.abort();
        assert!(starting.await.is_err_and(|e| e.is_cancelled()), "it was held in the open");
        let taken = dir.try_lock().unwrap();

        // An empty `format` is refused: the open is over.
        drop(std::fs::OpenOptions::new().write(true).open(&format).unwrap());
        assert!(taken.is_none(), "an open was going on in the directory");
        until("the lock to be freed", || dir.try_lock().unwrap()).await;
    }
}
