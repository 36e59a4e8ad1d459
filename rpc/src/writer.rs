//! The write buffer: small frames are copied together, large pieces are written where they lie.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::AsyncWrite;
use tokio::time::Instant;

use crate::attachment::Attachment;

/// Pieces up to this size are copied: cheaper than an entry of the vectored write.
const COPIED_MAX: usize = 1 << 10;
/// Slices of one vectored write.
const SLICES: usize = 64;

/// Bytes to write, in order. What is queued counts until the socket took it.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    pieces: VecDeque<Bytes>,
    /// Follows the pieces.
    tail: BytesMut,
    queued: usize,
    written: u64,
    /// The last progress of what waits now.
    stalled_since: Option<Instant>,
}

impl Writer {
    /// Bytes not yet written.
    pub(crate) fn queued(&self) -> usize {
        self.queued
    }

    /// Bytes written since the beginning.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// The position of the next byte put, counted like [`written`](Self::written).
    pub(crate) fn end(&self) -> u64 {
        self.written + self.queued as u64
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.queued += bytes.len();
        self.tail.extend_from_slice(bytes);
    }

    pub(crate) fn put_vec(&mut self, bytes: Vec<u8>) {
        if bytes.len() <= COPIED_MAX { self.put(&bytes) } else { self.put_piece(bytes.into()) }
    }

    pub(crate) fn put_attachment(&mut self, attachment: &Attachment) {
        for piece in attachment.pieces() {
            if piece.len() <= COPIED_MAX { self.put(piece) } else { self.put_piece(piece.clone()) }
        }
    }

    fn put_piece(&mut self, piece: Bytes) {
        if !self.tail.is_empty() {
            self.pieces.push_back(self.tail.split().freeze());
        }
        self.queued += piece.len();
        self.pieces.push_back(piece);
    }

    /// Since when the socket has taken nothing of what waits.
    pub(crate) fn stalled_since(&self) -> Option<Instant> {
        self.stalled_since
    }

    /// Writes what the socket takes; ready when nothing is left.
    pub(crate) fn poll_write<Io: AsyncWrite + ?Sized + Unpin>(
        &mut self,
        io: &mut Io,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        let before = self.written;
        let polled = self.poll_all(io, cx);
        if polled.is_ready() {
            self.stalled_since = None;
        } else if self.written > before || self.stalled_since.is_none() {
            self.stalled_since = Some(Instant::now());
        }
        polled
    }

    fn poll_all<Io: AsyncWrite + ?Sized + Unpin>(
        &mut self,
        io: &mut Io,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while self.queued > 0 {
            let count = if self.pieces.is_empty() {
                ready!(Pin::new(&mut *io).poll_write(cx, &self.tail))?
            } else {
                let mut slices = [IoSlice::new(&[]); SLICES];
                let tail = std::iter::once(&self.tail[..]).filter(|tail| !tail.is_empty());
                let pieces = self.pieces.iter().map(|piece| &piece[..]).chain(tail);
                let mut count = 0;
                for (slice, piece) in slices.iter_mut().zip(pieces) {
                    *slice = IoSlice::new(piece);
                    count += 1;
                }
                ready!(Pin::new(&mut *io).poll_write_vectored(cx, &slices[..count]))?
            };
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(count);
        }
        Pin::new(io).poll_flush(cx)
    }

    fn advance(&mut self, mut count: usize) {
        self.queued -= count;
        self.written += count as u64;
        while count > 0 {
            let Some(front) = self.pieces.front_mut() else {
                self.tail.advance(count);
                return;
            };
            if front.len() > count {
                front.advance(count);
                return;
            }
            count -= front.len();
            self.pieces.pop_front();
        }
    }
}
