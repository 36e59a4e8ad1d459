//! The client's in-flight table: a generational slab, one state per slot, under one lock.
//!
//! ```text
//!                    begin                take            written
//!  Free ──────────────────────▶ Queued ────────▶ Writing ────────▶ Sent
//!   ▲  │ freed while a caller     │ cancel          │ cancel         │ cancel
//!   │  ▼ waits: handed over       ▼                 ▼                ▼
//!   │ Granted ──▶ (begin)        Free            Abandoned ◀─────────┘
//!   │                                               │ answer, drain or death
//!   └──── the caller took its end ◀── Ended         ▼
//!                                       ▲          Free
//!         answer, drain or death of Queued, Writing, Sent
//! ```
//!
//! A call is named by (slot, slot generation); the generation grows when the slot is freed. A
//! permit to call is a free slot. Callers take part by polling; the connection task takes frames out and
//! reports what happened. Its waker lies under the same lock, so no wake-up is lost.
//!
//! Invariants (checked by the loom model in `models/` and by a reference model in the tests):
//! * every call that began ends exactly once: answered, drained, died, or cancelled by its caller;
//! * an answer reaches the call that asked or nobody: never the next call in a recycled slot;
//! * an abandoned call keeps its slot until the peer answers or dies, so its id cannot be reused under way;
//! * free + granted + occupied slots are the limit at all times; a free slot and a waiter never coexist;
//! * waiting callers are served in the order in which they came.
//!
//! This file depends on nothing but a lock and [`Fate`]: the models compile it over loom's.

use std::collections::VecDeque;
use std::task::{Poll, Waker};

use crate::fate::Fate;
use crate::sync::Mutex;

/// Names a call on its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct CallId {
    pub(crate) slot: u32,
    pub(crate) generation: u32,
}

/// How a call ended, where its caller did not cancel it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum End<R> {
    /// The peer answered.
    Answer(R),
    /// The peer stops, and did not take or will not take the call.
    Drained(Fate),
    /// The connection died.
    Died(Fate),
}

/// What became of an attempt to begin.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Begin {
    Started(CallId),
    /// No slot is free; the waker is kept.
    Waiting,
    /// The peer stops.
    Draining,
    /// The connection is gone.
    Closed,
}

/// What a cancellation found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Cancelled<R> {
    /// The frame had not left the queue, and never will.
    NotSent,
    /// The frame is on its way or sent; the peer is told.
    Told,
    /// The end was there first.
    Ended(End<R>),
}

/// What the connection task is to write.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outgoing<F> {
    Request(CallId, F),
    Cancel(CallId),
}

/// The peer answered a call that is not in flight.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NotInFlight;

enum State<F, R> {
    Free,
    /// Handed to a waiter (see `granted`), who has not come for it yet.
    Granted,
    Queued(F, Waker),
    Writing(u64, Waker),
    Sent(u64, Waker),
    Ended(End<R>),
    Abandoned(u64),
}

struct Slot<F, R> {
    generation: u32,
    state: State<F, R>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    Draining,
    Closed,
}

/// See the module. `F` is what a request carries, `R` an answer.
pub(crate) struct Table<F, R> {
    inner: Mutex<Inner<F, R>>,
}

struct Inner<F, R> {
    phase: Phase,
    limit: u32,
    /// Grows up to the limit; slots are reused last in, first out.
    slots: Vec<Slot<F, R>>,
    free: Vec<u32>,
    waiters: VecDeque<(u64, Waker)>,
    /// Ticket and slot.
    granted: Vec<(u64, u32)>,
    next_ticket: u64,
    /// In state Queued, in the order of begin.
    queue: VecDeque<CallId>,
    cancels: VecDeque<CallId>,
    /// Requests taken so far: the next one's ordinal.
    taken: u64,
    /// Of the connection task, when it waits.
    driver: Option<Waker>,
}

impl<F, R> Table<F, R> {
    pub(crate) fn new(limit: u32) -> Self {
        Self {
            inner: Mutex::new(Inner {
                phase: Phase::Open,
                limit,
                slots: Vec::new(),
                free: Vec::new(),
                waiters: VecDeque::new(),
                granted: Vec::new(),
                next_ticket: 0,
                queue: VecDeque::new(),
                cancels: VecDeque::new(),
                taken: 0,
                driver: None,
            }),
        }
    }

    /// Takes a slot and queues the frame, or waits in line. `ticket` is the caller's place in it and
    /// must be given back with [`forget`](Self::forget) where the caller stops waiting.
    pub(crate) fn begin(&self, ticket: &mut Option<u64>, frame: &mut Option<F>, waker: &Waker) -> Begin {
        let mut inner = self.inner.lock();
        match inner.phase {
            Phase::Open => {}
            Phase::Draining => return Begin::Draining,
            Phase::Closed => return Begin::Closed,
        }
        let slot = match *ticket {
            None => inner.take_free(),
            Some(ticket) => inner.take_granted(ticket),
        };
        let Some(slot) = slot else {
            match *ticket {
                None => {
                    let number = inner.next_ticket;
                    inner.next_ticket += 1;
                    inner.waiters.push_back((number, waker.clone()));
                    *ticket = Some(number);
                }
                Some(ticket) => inner.rewait(ticket, waker),
            }
            return Begin::Waiting;
        };
        *ticket = None;
        let Some(frame) = frame.take() else {
            // Polled again after it started: the caller's mistake, not the peer's.
            inner.release(slot);
            return Begin::Closed;
        };
        let entry = &mut inner.slots[slot as usize];
        entry.state = State::Queued(frame, waker.clone());
        let id = CallId { slot, generation: entry.generation };
        inner.queue.push_back(id);
        let driver = inner.driver.take();
        drop(inner);
        wake(driver);
        Begin::Started(id)
    }

    /// Leaves the line; a slot already handed over goes to the next one.
    pub(crate) fn forget(&self, ticket: u64) {
        let mut inner = self.inner.lock();
        let mut next = None;
        if let Some(slot) = inner.take_granted(ticket) {
            next = inner.release(slot);
        } else if let Ok(index) = inner.waiters.binary_search_by_key(&ticket, |waiter| waiter.0) {
            inner.waiters.remove(index);
        }
        drop(inner);
        wake(next);
    }

    /// The end of a call that began; frees its slot. Ask again only while it is pending.
    pub(crate) fn poll_end(&self, id: CallId, waker: &Waker) -> Poll<End<R>> {
        let mut inner = self.inner.lock();
        let Some(entry) = inner.entry(id) else {
            debug_assert!(false, "{id:?} was polled after its end");
            return Poll::Ready(End::Died(Fate::Unknown));
        };
        match &mut entry.state {
            State::Queued(_, kept) | State::Writing(_, kept) | State::Sent(_, kept) => {
                kept.clone_from(waker);
                Poll::Pending
            }
            State::Ended(_) => {
                let State::Ended(end) = std::mem::replace(&mut entry.state, State::Free) else {
                    unreachable!()
                };
                let next = inner.release(id.slot);
                drop(inner);
                wake(next);
                Poll::Ready(end)
            }
            State::Free | State::Granted | State::Abandoned(_) => {
                debug_assert!(false, "{id:?} was polled after it was cancelled");
                Poll::Ready(End::Died(Fate::Unknown))
            }
        }
    }

    /// The caller gives up: it will not poll this call again.
    pub(crate) fn cancel(&self, id: CallId) -> Cancelled<R> {
        let mut inner = self.inner.lock();
        let Some(entry) = inner.entry(id) else {
            debug_assert!(false, "{id:?} was cancelled after its end");
            return Cancelled::Ended(End::Died(Fate::Unknown));
        };
        let (found, wakes) = match std::mem::replace(&mut entry.state, State::Free) {
            State::Queued(..) => {
                // Rare, and the queue is no longer than the limit.
                inner.queue.retain(|queued| *queued != id);
                (Cancelled::NotSent, inner.release(id.slot))
            }
            State::Writing(ordinal, _) | State::Sent(ordinal, _) => {
                entry.state = State::Abandoned(ordinal);
                inner.cancels.push_back(id);
                (Cancelled::Told, inner.driver.take())
            }
            State::Ended(end) => (Cancelled::Ended(end), inner.release(id.slot)),
            other @ (State::Free | State::Granted | State::Abandoned(_)) => {
                debug_assert!(false, "{id:?} was cancelled twice");
                entry.state = other;
                (Cancelled::NotSent, None)
            }
        };
        drop(inner);
        wake(wakes);
        found
    }

    /// What is to be written, in order, as long as `out` says there is room for more; `room` says whether
    /// there is any to begin with (cancellations are small and always leave). `driver` is woken by the
    /// next request or cancellation.
    pub(crate) fn take(&self, driver: &Waker, mut room: bool, mut out: impl FnMut(Outgoing<F>) -> bool) {
        let mut inner = self.inner.lock();
        while let Some(id) = inner.cancels.pop_front() {
            // Answered meanwhile: nothing to cancel.
            if inner.entry(id).is_some_and(|entry| matches!(entry.state, State::Abandoned(_))) {
                room &= out(Outgoing::Cancel(id));
            }
        }
        while room {
            let Some(id) = inner.queue.pop_front() else { break };
            let ordinal = inner.taken;
            let entry = &mut inner.slots[id.slot as usize];
            debug_assert_eq!(entry.generation, id.generation, "the queue holds calls in state Queued only");
            let State::Queued(frame, waker) = std::mem::replace(&mut entry.state, State::Free) else {
                unreachable!("the queue holds calls in state Queued only");
            };
            entry.state = State::Writing(ordinal, waker);
            inner.taken += 1;
            room = out(Outgoing::Request(id, frame));
        }
        match &mut inner.driver {
            Some(kept) => kept.clone_from(driver),
            kept => *kept = Some(driver.clone()),
        }
    }

    /// Wakes the connection task.
    pub(crate) fn nudge(&self) {
        let driver = self.inner.lock().driver.take();
        wake(driver);
    }

    /// These frames are written fully.
    pub(crate) fn written(&self, ids: impl IntoIterator<Item = CallId>) {
        let mut inner = self.inner.lock();
        for id in ids {
            let Some(entry) = inner.entry(id) else { continue };
            match std::mem::replace(&mut entry.state, State::Free) {
                State::Writing(ordinal, waker) => entry.state = State::Sent(ordinal, waker),
                other => entry.state = other,
            }
        }
    }

    /// The peer answered.
    pub(crate) fn complete(&self, id: CallId, answer: R) -> Result<(), NotInFlight> {
        let mut inner = self.inner.lock();
        let entry = inner.entry(id).ok_or(NotInFlight)?;
        let wakes = match std::mem::replace(&mut entry.state, State::Free) {
            State::Writing(_, waker) | State::Sent(_, waker) => {
                entry.state = State::Ended(End::Answer(answer));
                Some(waker)
            }
            State::Abandoned(_) => inner.release(id.slot),
            other => {
                entry.state = other;
                return Err(NotInFlight);
            }
        };
        drop(inner);
        wake(wakes);
        Ok(())
    }

    /// The peer stops and took the first `accepted` requests only. What it took is still answered.
    pub(crate) fn drain(&self, accepted: u64) {
        self.end_all(Phase::Draining, |state| match state {
            State::Queued(..) => Some(End::Drained(Fate::NotSent)),
            State::Writing(ordinal, _) | State::Sent(ordinal, _) if *ordinal >= accepted => {
                Some(End::Drained(Fate::Rejected))
            }
            State::Abandoned(ordinal) if *ordinal >= accepted => Some(End::Drained(Fate::Rejected)),
            _ => None,
        });
    }

    /// The connection is gone: every call ends at once.
    pub(crate) fn close(&self) {
        self.end_all(Phase::Closed, |state| match state {
            State::Queued(..) | State::Writing(..) => Some(End::Died(Fate::NotSent)),
            State::Sent(..) | State::Abandoned(_) => Some(End::Died(Fate::Unknown)),
            State::Free | State::Granted | State::Ended(_) => None,
        });
    }

    fn end_all(&self, phase: Phase, ends: impl Fn(&State<F, R>) -> Option<End<R>>) {
        let mut wakers = Vec::new();
        let mut inner = self.inner.lock();
        if inner.phase != Phase::Closed {
            inner.phase = phase;
        }
        // Nobody is let in any more: those in line learn it when they ask.
        wakers.extend(std::mem::take(&mut inner.waiters).into_iter().map(|waiter| waiter.1));
        for (_, slot) in std::mem::take(&mut inner.granted) {
            inner.release(slot);
        }
        inner.queue.clear();
        for slot in 0..inner.slots.len() {
            let entry = &mut inner.slots[slot];
            let Some(end) = ends(&entry.state) else { continue };
            match std::mem::replace(&mut entry.state, State::Ended(end)) {
                State::Queued(_, waker) | State::Writing(_, waker) | State::Sent(_, waker) => {
                    wakers.push(waker)
                }
                // Its caller is gone: nobody will come for the end.
                _ => wakers.extend(inner.release(u32::try_from(slot).unwrap_or(u32::MAX))),
            }
        }
        drop(inner);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Slots that are not free.
    pub(crate) fn occupied(&self) -> usize {
        let inner = self.inner.lock();
        inner.slots.len() - inner.free.len()
    }
}

impl<F, R> Inner<F, R> {
    fn entry(&mut self, id: CallId) -> Option<&mut Slot<F, R>> {
        self.slots.get_mut(id.slot as usize).filter(|entry| entry.generation == id.generation)
    }

    fn take_free(&mut self) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            debug_assert!(self.waiters.is_empty(), "a free slot and a waiter");
            return Some(slot);
        }
        let slot = u32::try_from(self.slots.len()).ok().filter(|next| *next < self.limit)?;
        self.slots.push(Slot { generation: 0, state: State::Free });
        Some(slot)
    }

    fn take_granted(&mut self, ticket: u64) -> Option<u32> {
        let index = self.granted.iter().position(|granted| granted.0 == ticket)?;
        Some(self.granted.swap_remove(index).1)
    }

    fn rewait(&mut self, ticket: u64, waker: &Waker) {
        if let Ok(index) = self.waiters.binary_search_by_key(&ticket, |waiter| waiter.0) {
            self.waiters[index].1.clone_from(waker);
        }
    }

    /// Ends a slot's use; hands it to the first in line, whose waker is returned.
    fn release(&mut self, slot: u32) -> Option<Waker> {
        let entry = &mut self.slots[slot as usize];
        entry.generation = entry.generation.wrapping_add(1);
        match self.waiters.pop_front() {
            Some((ticket, waker)) => {
                entry.state = State::Granted;
                self.granted.push((ticket, slot));
                Some(waker)
            }
            None => {
                entry.state = State::Free;
                self.free.push(slot);
                None
            }
        }
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}
