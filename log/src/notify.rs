//! Tells subscribers that something happened, without saying what.

use parking_lot::{Condvar, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
pub(crate) struct Notify {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    version: u64,
    wakers: Vec<Waker>,
    sleepers: usize,
}

impl Notify {
    pub(crate) fn version(&self) -> u64 {
        self.inner.lock().version
    }

    pub(crate) fn notify(&self) {
        let wakers = {
            let mut inner = self.inner.lock();
            inner.version += 1;
            if inner.sleepers > 0 {
                self.changed.notify_all();
            }
            std::mem::take(&mut inner.wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Ready with the version once it is above `seen`.
    pub(crate) fn poll(&self, seen: u64, cx: &Context<'_>) -> Poll<u64> {
        let mut inner = self.inner.lock();
        if inner.version > seen {
            return Poll::Ready(inner.version);
        }
        if !inner.wakers.iter().any(|w| w.will_wake(cx.waker())) {
            inner.wakers.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// The version, once it is above `seen`, or at the latest after this time.
    pub(crate) fn wait(&self, seen: u64, at_most: Duration) -> u64 {
        let end = Instant::now() + at_most;
        let mut inner = self.inner.lock();
        inner.sleepers += 1;
        while inner.version <= seen && !self.changed.wait_until(&mut inner, end).timed_out() {}
        inner.sleepers -= 1;
        inner.version
    }
}
