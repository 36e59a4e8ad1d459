//! The calling side.
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::attachment::Attachment;
use crate::error::{Code, RpcError, WireError};
use crate::fate::Fate;
use crate::method::Method;
use crate::wire::Wire;

/// Limits and times of a client's connection.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// The time of a call whose method names none.
    pub timeout: Duration,
    /// Calls in flight at most; the server's limit applies too.
    pub in_flight: u32,
    /// The largest frame this side takes.
    pub frame_bytes_max: u32,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(30), in_flight: 1024, frame_bytes_max: 16 << 20 }
    }
}

/// A connection to a server, shared by any number of stubs and callers. A clone is a handle; the
/// connection closes when the last one is dropped.
#[derive(Debug, Clone)]
pub struct Client {}

impl Client {
    /// Connects over TCP.
    pub async fn connect_tcp(address: SocketAddr, config: ClientConfig) -> Result<Self, RpcError> {
        let _ = (address, config);
        Err(unavailable("no transport yet"))
    }

    /// Connects to a Unix socket.
    pub async fn connect_unix(path: impl AsRef<Path>, config: ClientConfig) -> Result<Self, RpcError> {
        let _ = (path.as_ref(), config);
        Err(unavailable("no transport yet"))
    }

    /// Speaks over any stream: an accepted socket, an in-memory pair, TLS.
    pub async fn connect<Io>(io: Io, config: ClientConfig) -> Result<Self, RpcError>
    where
        Io: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let _ = (io, config);
        Err(unavailable("no transport yet"))
    }

    /// Resolves when the connection is gone, with the reason.
    pub async fn closed(&self) -> RpcError {
        unavailable("no transport yet")
    }

    /// Whether the connection is gone.
    pub fn is_closed(&self) -> bool {
        true
    }
}

fn unavailable(what: &'static str) -> RpcError {
    RpcError::new(Code::Unavailable, Fate::NotSent, what)
}

/// A call whose answer has no attachment. Used by generated code.
pub async fn call<A: Wire, R: Wire, E: WireError>(
    client: &Client,
    method: Method,
    arguments: A,
    attachment: Attachment,
) -> Result<R, E> {
    call_attached::<A, R, E>(client, method, arguments, attachment).await.map(|(value, _)| value)
}

/// A call whose answer has an attachment. Used by generated code.
pub async fn call_attached<A: Wire, R: Wire, E: WireError>(
    client: &Client,
    method: Method,
    arguments: A,
    attachment: Attachment,
) -> Result<(R, Attachment), E> {
    let _ = (client, method, arguments, attachment);
    Err(E::from(unavailable("no transport yet")))
}

/// What a connection attempt over a socket met.
pub(crate) fn refused(error: io::Error) -> RpcError {
    RpcError::new(Code::Unavailable, Fate::NotSent, error.to_string())
}
