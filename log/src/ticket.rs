//! A ticket is the answer to a request that waits for the release of the entry it rests on.
//!
//! ```text
//! waiting ──decided(answer)──▶ waiting for release ──released──▶ Ok(answer)
//!    └──────────refused(error)──────────┴───────the log stops───▶ Err
//! ```
//!
//! Dropping a ticket never takes back the request.

use crate::error::WriteError;
use parking_lot::{Condvar, Mutex};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// The answer to a request, once everything it rests on is as durable as its mode says.
///
/// A future, and, for threads, [`Ticket::wait`]. Dropping it does not take back the request.
#[must_use = "a request is acknowledged only by its ticket"]
#[derive(Debug)]
pub struct Ticket<T> {
    slot: Arc<Slot<T>>,
}

/// The other end of a [`Ticket`].
#[derive(Debug)]
pub(crate) struct Slot<T> {
    state: Mutex<State<T>>,
    ready: Condvar,
}

#[derive(Debug)]
struct State<T> {
    decided: Option<Result<T, WriteError>>,
    done: bool,
    waker: Option<Waker>,
}

/// What the release queue holds: it does not care for the type of the answer.
pub(crate) trait Pending: Send + Sync {
    /// The entry this rests on is released.
    fn release(&self);
    /// The log stopped before that.
    fn fail(&self, error: WriteError);
}

impl<T> Ticket<T> {
    pub(crate) fn new() -> (Self, Arc<Slot<T>>) {
        let slot = Arc::new(Slot {
            state: Mutex::new(State { decided: None, done: false, waker: None }),
            ready: Condvar::new(),
        });
        (Self { slot: slot.clone() }, slot)
    }

    /// A ticket that is answered already.
    pub(crate) fn ready(answer: Result<T, WriteError>) -> Self {
        let (ticket, slot) = Self::new();
        slot.decide(answer);
        slot.finish();
        ticket
    }

    /// Blocks this thread until the answer is there; [`WriteError::Deadline`] after `at_most`.
    pub fn wait(self, at_most: Duration) -> Result<T, WriteError> {
        let end = Instant::now() + at_most;
        let mut state = self.slot.state.lock();
        while !state.done {
            if self.slot.ready.wait_until(&mut state, end).timed_out() && !state.done {
                return Err(WriteError::Deadline);
            }
        }
        state.decided.take().expect("an answer is taken once")
    }

    /// The answer, where it is there already.
    pub fn try_take(&self) -> Option<Result<T, WriteError>> {
        let mut state = self.slot.state.lock();
        if state.done { state.decided.take() } else { None }
    }
}

impl<T> Future for Ticket<T> {
    type Output = Result<T, WriteError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.slot.state.lock();
        if state.done {
            return Poll::Ready(state.decided.take().expect("a ticket is not polled after its answer"));
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            None => state.waker = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}

impl<T> Slot<T> {
    /// Sets the answer; it is given out by [`Pending::release`].
    pub(crate) fn decide(&self, answer: Result<T, WriteError>) {
        self.state.lock().decided = Some(answer);
    }

    pub(crate) fn finish(&self) {
        let waker = {
            let mut state = self.state.lock();
            debug_assert!(state.decided.is_some(), "released without an answer");
            state.done = true;
            self.ready.notify_all();
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T: Send> Pending for Slot<T> {
    fn release(&self) {
        self.finish();
    }

    fn fail(&self, error: WriteError) {
        self.decide(Err(error));
        self.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_leaves_only_after_its_release() {
        let (ticket, slot) = Ticket::new();
        slot.decide(Ok(7));
        assert_eq!(ticket.try_take(), None);
        slot.release();
        assert_eq!(ticket.wait(Duration::ZERO), Ok(7));
    }

    #[test]
    fn a_stopped_log_takes_back_a_decided_answer() {
        let (ticket, slot) = Ticket::new();
        slot.decide(Ok(7));
        slot.fail(WriteError::Busy);
        assert_eq!(ticket.wait(Duration::ZERO), Err(WriteError::Busy));
    }
}
