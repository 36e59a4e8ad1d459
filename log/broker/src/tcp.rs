//! The owner's TCP listener. There is no authentication yet, so it listens on loopback unless it is told otherwise.
//!
//! ```text
//!   bound (the port is taken, nobody is accepted) ──log open──▶ listening ──closing──▶ gone
//! ```

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::local::LocalBroker;
use crate::sessions::Sessions;
use crate::status::Status;

/// Connections at one time; more wait in the backlog.
const CONNECTIONS_MAX: usize = 512;
/// How many may wait to be accepted.
const BACKLOG: u32 = 1024;
/// The pause after an accept that failed: out of descriptors, most likely.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);
/// Drained connections have this long to end.
const FAREWELL_WITHIN: Duration = Duration::from_secs(1);

/// A socket bound to `address`, which is a port's only use until it listens: clients are refused, not left waiting.
pub(crate) fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A broker that is started again takes its port while the old connections still linger.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// Begins to listen.
pub(crate) fn listen(socket: TcpSocket) -> io::Result<TcpListener> {
    socket.listen(BACKLOG)
}

/// Accepts and serves connections until the owner closes; then waits a moment for those that were drained.
pub(crate) async fn accept(
    listener: TcpListener,
    mut status: watch::Receiver<Status>,
    broker: LocalBroker,
    sessions: Sessions,
) {
    // Dropped with this task: then every connection's task ends.
    let mut connections: JoinSet<()> = JoinSet::new();
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = async {
            let permit = room.clone().acquire_owned().await.expect("the semaphore is never closed");
            (listener.accept().await, permit)
        };
        let (accepted, permit) = tokio::select! {
            accepted = accepted => accepted,
            _ = status.wait_for(Status::is_last) => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        // Requests are small and answers are waited for: Nagle's delay would only slow them.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%peer, %error, "a connection without TCP_NODELAY");
        }
        let Some(session) = sessions.begin(&broker) else { break };
        connections.spawn(async move {
            let _permit = permit;
            if let Err(error) = session.server.serve_stream(stream).await {
                tracing::debug!(%peer, %error, "a connection ended");
            }
        });
    }
    drop(listener);
    let _ = timeout(FAREWELL_WITHIN, async { while connections.join_next().await.is_some() {} }).await;
}
