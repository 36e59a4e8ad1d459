//! The write buffer over a socket that takes what it likes: every byte once, in order, across pieces.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use proptest::prelude::*;
use tokio::io::AsyncWrite;

use crate::attachment::Attachment;
use crate::writer::Writer;

/// Takes at most so many bytes per write, vectored writes across slices; zero means not now.
struct Socket {
    takes: Vec<usize>,
    calls: usize,
    taken: Vec<u8>,
}

impl Socket {
    fn take(&mut self, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let most = self.takes[self.calls % self.takes.len()];
        self.calls += 1;
        if most == 0 {
            return Poll::Pending;
        }
        let offered: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).take(most).collect();
        self.taken.extend_from_slice(&offered);
        Poll::Ready(Ok(offered.len()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.take(&[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.take(slices)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[derive(Debug, Clone)]
enum Put {
    Small(usize),
    Vec(usize),
    Attachment(Vec<usize>),
    Write,
}

fn put() -> impl Strategy<Value = Put> {
    prop_oneof![
        (0..60_usize).prop_map(Put::Small),
        (0..3000_usize).prop_map(Put::Vec),
        prop::collection::vec(0..3000_usize, 0..90).prop_map(Put::Attachment),
        Just(Put::Write),
    ]
}

proptest! {
    #[test]
    fn every_byte_once_in_order(
        puts in prop::collection::vec(put(), 1..12),
        takes in prop::collection::vec(prop_oneof![0..40_usize, 0..5000_usize], 1..8),
    ) {
        prop_assume!(takes.iter().any(|most| *most > 0));
        let mut writer = Writer::default();
        let mut socket = Socket { takes, calls: 0, taken: Vec::new() };
        let mut expected: Vec<u8> = Vec::new();
        let mut salt = 0_u8;
        let mut bytes = |length: usize| -> Vec<u8> {
            salt = salt.wrapping_add(41);
            (0..length).map(|index| (index as u8).wrapping_mul(7).wrapping_add(salt)).collect()
        };
        let mut cx = Context::from_waker(Waker::noop());
        // The clock of stalls is tokio's.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let _entered = runtime.enter();
        for put in puts {
            match put {
                Put::Small(length) => {
                    let part = bytes(length);
                    writer.put(&part);
                    expected.extend(part);
                }
                Put::Vec(length) => {
                    let part = bytes(length);
                    expected.extend(&part);
                    writer.put_vec(part);
                }
                Put::Attachment(lengths) => {
                    let parts: Vec<Bytes> = lengths.into_iter().map(|length| bytes(length).into()).collect();
                    parts.iter().for_each(|part| expected.extend_from_slice(part));
                    writer.put_attachment(&Attachment::from_iter(parts));
                }
                Put::Write => {
                    let waits = writer.poll_write(&mut socket, &mut cx).is_pending();
                    prop_assert_eq!(waits, writer.queued() > 0);
                    prop_assert_eq!(waits, writer.stalled_since().is_some());
                }
            }
            prop_assert_eq!(writer.end(), expected.len() as u64);
            prop_assert_eq!(writer.written(), socket.taken.len() as u64);
        }
        while writer.poll_write(&mut socket, &mut cx).is_pending() {}
        prop_assert!(socket.taken == expected);
        prop_assert_eq!(writer.written(), expected.len() as u64);
    }
}
