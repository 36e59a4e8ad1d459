//! The broker over TCP: each connection is a session of its own.

use std::io;

use tidemill_rpc::{Server, ServerConfig};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::access::FRAME_BYTES_MAX;
use crate::api::BrokerServer;
use crate::local::LocalBroker;

/// Connections at one time.
const CONNECTIONS_MAX: usize = 512;

/// A server for one connection.
pub(crate) fn session_server(broker: &LocalBroker) -> Server {
    let config = ServerConfig { frame_bytes_max: FRAME_BYTES_MAX, ..ServerConfig::default() };
    Server::builder().config(config).service(BrokerServer::new(broker.session())).build()
}

/// Serves `broker` to whoever connects, until dropped; connections end with it. There is no authentication yet, so an
/// address that is not loopback is refused.
pub async fn serve_tcp(listener: TcpListener, broker: LocalBroker) -> io::Result<()> {
    let address = listener.local_addr()?;
    if !address.ip().is_loopback() {
        let what = format!("{address} is not loopback, and there is no authentication yet");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let mut connections: JoinSet<()> = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let (stream, peer) = accepted?;
        // Requests are small and answers are waited for: Nagle's delay would only slow them.
        stream.set_nodelay(true)?;
        let server = session_server(&broker);
        connections.spawn(async move {
            if let Err(error) = server.serve_stream(stream).await {
                tracing::debug!(%peer, %error, "a connection ended");
            }
        });
    }
}
