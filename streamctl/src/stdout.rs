//! Standard output: data only. A reader that goes away (`| head`) ends the command quietly.

use std::fmt;
use std::io::{self, BufWriter, Stdout, Write};
use std::os::fd::AsFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Nobody reads standard output any more. Not an error for the user: the command ends with exit 0.
#[derive(Debug)]
pub struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("standard output is closed")
    }
}

impl std::error::Error for Closed {}

/// Turns the failure of a write to standard output into [`Closed`] or a message.
pub trait OrClosed<T> {
    /// The value, [`Closed`], or what failed.
    fn or_closed(self) -> anyhow::Result<T>;
}

impl<T> OrClosed<T> for io::Result<T> {
    fn or_closed(self) -> anyhow::Result<T> {
        self.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => anyhow::Error::new(Closed),
            _ => anyhow::Error::new(error).context("cannot write to standard output"),
        })
    }
}

/// Standard output behind a buffer; the caller flushes it whenever it is about to wait.
pub fn buffered() -> BufWriter<Stdout> {
    BufWriter::with_capacity(1 << 16, io::stdout())
}

/// Writes one line of data, at once.
pub fn line(text: fmt::Arguments<'_>) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_fmt(text).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()).or_closed()
}

/// Returns once nobody reads standard output any more; never where that does not show (a file). Cancel safe.
#[allow(
    deprecated,
    reason = "its successor is an unsafe function; an owned descriptor keeps what that one asks for"
)]
pub async fn gone() {
    if let Ok(fd) = io::stdout().as_fd().try_clone_to_owned()
        && let Ok(watched) = AsyncFd::with_interest(fd, Interest::ERROR)
        && watched.ready(Interest::ERROR).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}
