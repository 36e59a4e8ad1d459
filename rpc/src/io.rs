//! What a connection runs over, and the read step both sides share.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::error::{Code, RpcError};
use crate::fate::Fate;
use crate::frame::{Frame, Kind, Reader, Violation};
use crate::hello::Hello;

/// A stream of bytes both ways: TCP, a Unix socket, an in-memory pair, TLS.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// The handshake takes at most this long.
pub(crate) const HANDSHAKE: Duration = Duration::from_secs(10);
/// How often a connection looks at its slow clocks.
pub(crate) const TICK: Duration = Duration::from_secs(5);
/// A frame that began must be whole within this time.
pub(crate) const FRAME_TIME: Duration = Duration::from_secs(60);
/// Bytes that wait to be written must move within this time.
pub(crate) const WRITE_STALL: Duration = Duration::from_secs(30);
/// Above this much unwritten, nothing is added that can wait.
pub(crate) const UNWRITTEN_MAX: usize = 1 << 20;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    #[error("closed by the peer")]
    Eof,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Violation(#[from] Violation),
    #[error("{0}")]
    Stalled(&'static str),
}

impl Ended {
    pub(crate) fn to_error(&self) -> RpcError {
        let code = match self {
            Ended::Violation(_) => Code::Protocol,
            _ => Code::Unavailable,
        };
        RpcError::new(code, Fate::Unknown, format!("connection: {self}"))
    }
}

/// Reads once into the reader's space. Ready with the number of bytes, at least one.
pub(crate) fn poll_fill(
    io: &mut dyn Io,
    reader: &mut Reader,
    cx: &mut Context<'_>,
) -> Poll<Result<usize, Ended>> {
    let read = pin!(io.read_buf(reader.space())).poll(cx);
    match read {
        Poll::Pending => Poll::Pending,
        Poll::Ready(Err(error)) => Poll::Ready(Err(error.into())),
        Poll::Ready(Ok(0)) => Poll::Ready(Err(Ended::Eof)),
        Poll::Ready(Ok(count)) => {
            reader.filled(count);
            Poll::Ready(Ok(count))
        }
    }
}

/// Reads the peer's HELLO. The caller bounds the time.
pub(crate) async fn read_hello(io: &mut dyn Io, reader: &mut Reader) -> Result<Hello, Ended> {
    loop {
        if let Some(Frame { header, body, .. }) = reader.next_frame()? {
            if header.kind != Kind::Hello {
                return Err(Violation::Unexpected(header.kind).into());
            }
            return Ok(Hello::decode(body)?);
        }
        std::future::poll_fn(|cx| poll_fill(io, reader, cx)).await?;
    }
}

/// Writes this side's HELLO. The caller bounds the time.
pub(crate) async fn write_hello(io: &mut dyn Io, hello: &Hello) -> Result<(), Ended> {
    io.write_all(&hello.encode()).await?;
    io.flush().await?;
    Ok(())
}
