//! The serving side.
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};

use crate::error::RpcError;
use crate::method::Service;

/// Services and limits, shared by any number of listeners and connections. A clone is a handle.
#[derive(Clone)]
pub struct Server {
    services: Arc<Vec<Box<dyn Service>>>,
}

/// What a drain came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Drained {
    /// Calls that were answered after the drain began.
    pub completed: u64,
    /// Calls dropped at its deadline.
    pub cancelled: u64,
}

impl Server {
    /// A server of one service.
    pub fn new(service: impl Service) -> Self {
        Self { services: Arc::new(vec![Box::new(service)]) }
    }

    /// Accepts connections until drained.
    pub async fn serve_tcp(&self, listener: TcpListener) -> std::io::Result<()> {
        let _ = (&self.services, listener);
        Ok(())
    }

    /// Accepts connections until drained.
    pub async fn serve_unix(&self, listener: UnixListener) -> std::io::Result<()> {
        let _ = listener;
        Ok(())
    }

    /// Serves one stream that was already accepted, until either side closes it.
    pub async fn serve_stream<Io>(&self, io: Io) -> Result<(), RpcError>
    where
        Io: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let _ = io;
        Ok(())
    }

    /// Stops accepting, answers what is in flight, and closes every connection.
    pub async fn drain(&self, deadline: Duration) -> Drained {
        let _ = deadline;
        Drained::default()
    }
}
