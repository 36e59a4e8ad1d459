//! One connection at the server: a task that owns the socket, both buffers and the running handlers.
//!
//! ```text
//!  read ──▶ frame ──▶ box the handler, poll it once ──ready──▶ encode into the write buffer ──▶ write
//!                                │ not ready                        ▲
//!                                ▼                                  │ ready
//!                          parked in its slot ──woken──▶ polled again
//! ```
//!
//! Invariants:
//! * handlers are first polled in the order in which their requests arrived, and never awaited;
//! * every accepted request is answered exactly once, a cancelled or expired one too, unless the connection dies,
//!   which drops its handlers;
//! * above 1 MiB of unwritten replies nothing is read and no handler polled: a client that does not
//!   read stops its own requests, and 30 s without progress closes the connection;
//! * a panicking handler fails its own call only.
//!
//! A slot is the client's: at most `in_flight` of them, and a request for a busy one is a violation.

use std::collections::BTreeSet;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use futures::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep, sleep_until};

use super::Shared;
use crate::codec;
use crate::deadline::enter;
use crate::frame::{BODY_BYTES_MAX, Frame, HEADER, Header, Kind, Reader, Status, Violation};
use crate::hello::Hello;
use crate::io::{Ended, FRAME_TIME, Io, TICK, UNWRITTEN_MAX, WRITE_STALL, poll_fill};
use crate::method::{Handler, Reply, Request};
use crate::writer::Writer;

/// Clients PING an idle connection every 10 s; without a byte for this long, the client is gone.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Frames dispatched before replies are written.
const FRAMES_PER_ROUND: usize = 64;
/// Rounds before the task lets others run.
const ROUNDS_PER_POLL: usize = 16;
/// A poll may take this long; longer ones are counted per method.
const POLL_MAX: Duration = Duration::from_micros(100);
/// A message of the framework's own is cut to this.
const MESSAGE_BYTES_MAX: usize = 4 << 10;

/// How other threads reach a connection: woken handlers, and the drain.
#[derive(Default)]
pub(super) struct Signals {
    waker: AtomicWaker,
    /// Slots whose handlers were woken, each once.
    ready: Mutex<Vec<u32>>,
    draining: AtomicBool,
    killed: AtomicBool,
}

impl Signals {
    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        self.waker.wake();
    }

    pub(super) fn kill(&self) {
        self.killed.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// Wakes one slot's handler. It belongs to the slot, not to a call: a late wake-up of an earlier call
/// costs the next one a poll.
struct SlotWaker {
    signals: Arc<Signals>,
    slot: u32,
    queued: AtomicBool,
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.signals.ready.lock().push(self.slot);
            self.signals.waker.wake();
        }
    }
}

struct Slot {
    flag: Arc<SlotWaker>,
    waker: Waker,
    running: Option<Running>,
}

struct Running {
    generation: u32,
    /// Of the method.
    entry: usize,
    handler: Handler,
    deadline: Instant,
}

/// The connection task; resolves when the connection has ended.
pub(super) struct Connection {
    io: Box<dyn Io>,
    reader: Reader,
    writer: Writer,
    shared: Arc<Shared>,
    signals: Arc<Signals>,
    peer_frame_bytes_max: u32,
    /// Indexed by the client's slot; as long as the highest one used.
    slots: Vec<Slot>,
    running: usize,
    /// Of parked handlers.
    deadlines: BTreeSet<(Instant, u32)>,
    /// Requests received; what GOAWAY says.
    accepted: u64,
    told_goaway: bool,
    /// Nothing is written any more.
    shut: bool,
    woken: Vec<u32>,
    read_at: Instant,
    partial_since: Option<Instant>,
    tick: Pin<Box<Sleep>>,
    /// Set to the earliest of `deadlines`.
    expiry: Pin<Box<Sleep>>,
}

impl Connection {
    pub(super) fn new(
        io: Box<dyn Io>,
        reader: Reader,
        theirs: &Hello,
        shared: Arc<Shared>,
        signals: Arc<Signals>,
    ) -> Self {
        let now = Instant::now();
        Self {
            io,
            reader,
            writer: Writer::default(),
            shared,
            signals,
            peer_frame_bytes_max: theirs.frame_bytes_max,
            slots: Vec::new(),
            running: 0,
            deadlines: BTreeSet::new(),
            accepted: 0,
            told_goaway: false,
            shut: false,
            woken: Vec::new(),
            read_at: now,
            partial_since: None,
            tick: Box::pin(sleep_until(now + TICK)),
            expiry: Box::pin(sleep_until(now + TICK)),
        }
    }
}

impl Future for Connection {
    type Output = Result<(), Ended>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Ended>> {
        let connection = &mut *self;
        connection.signals.waker.register(cx.waker());
        for _ in 0..ROUNDS_PER_POLL {
            if connection.stop(cx)? {
                return Poll::Ready(Ok(()));
            }
            let mut more = false;
            if connection.writer.queued() < UNWRITTEN_MAX {
                more |= connection.poll_woken();
                more |= connection.read(cx)?;
            }
            // After the reads: it sets the timer for what they parked.
            connection.expire(cx);
            let full = connection.writer.queued() >= UNWRITTEN_MAX;
            connection.write(cx)?;
            more |= full && connection.writer.queued() < UNWRITTEN_MAX;
            more |= connection.is_drained() && !connection.shut;
            connection.watch(cx)?;
            if !more {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Connection {
    fn is_drained(&self) -> bool {
        self.told_goaway && self.running == 0 && self.writer.queued() == 0
    }

    /// The drain: GOAWAY once, an end when everything is answered, or now. True where the connection is over.
    fn stop(&mut self, cx: &mut Context<'_>) -> Result<bool, Ended> {
        if !self.signals.draining.load(Ordering::Acquire) {
            return Ok(false);
        }
        if !self.told_goaway {
            self.told_goaway = true;
            let header = Header { body: 8, ..Header::new(Kind::GoAway) };
            self.writer.put(&header.encode());
            self.writer.put(&self.accepted.to_le_bytes());
            self.write(cx)?;
        }
        if self.signals.killed.load(Ordering::Acquire) {
            for slot in 0..self.slots.len() {
                if self.end(slot, Status::Cancelled, "the server's drain ran out of time") {
                    self.shared.cancelled.fetch_add(1, Ordering::Relaxed);
                }
            }
            // What the socket takes at once; nobody waits for a client that does not read.
            self.write(cx)?;
            let _ = Pin::new(&mut *self.io).poll_shutdown(cx);
            return Ok(true);
        }
        if self.is_drained() && !self.shut {
            // Reading goes on until the client hangs up: closing with bytes unread would reset the
            // connection and could take the last answers with it.
            self.shut = true;
            let _ = Pin::new(&mut *self.io).poll_shutdown(cx);
        }
        Ok(false)
    }

    /// Polls the handlers that were woken. True where some are left for the next round.
    fn poll_woken(&mut self) -> bool {
        let mut woken = std::mem::take(&mut self.woken);
        if woken.is_empty() {
            std::mem::swap(&mut woken, &mut *self.signals.ready.lock());
        }
        let mut polled = 0;
        for &slot in &woken {
            if self.writer.queued() >= UNWRITTEN_MAX {
                break;
            }
            polled += 1;
            let index = slot as usize;
            // Before the poll, so that a wake-up during it counts.
            self.slots[index].flag.queued.store(false, Ordering::Release);
            self.poll_handler(index);
        }
        woken.drain(..polled);
        let left = !woken.is_empty();
        self.woken = woken;
        left
    }

    /// Dispatches the requests that have arrived. True where there may be more.
    fn read(&mut self, cx: &mut Context<'_>) -> Result<bool, Ended> {
        let mut frames = 0;
        while frames < FRAMES_PER_ROUND && self.writer.queued() < UNWRITTEN_MAX {
            if let Some(frame) = self.reader.next_frame()? {
                self.partial_since = None;
                self.dispatch(frame)?;
                frames += 1;
                continue;
            }
            match poll_fill(&mut *self.io, &mut self.reader, cx) {
                Poll::Pending => return Ok(false),
                Poll::Ready(filled) => filled?,
            };
            self.read_at = Instant::now();
            self.partial_since.get_or_insert(self.read_at);
        }
        Ok(true)
    }

    fn dispatch(&mut self, frame: Frame) -> Result<(), Violation> {
        let Frame { header, body, attachment } = frame;
        match header.kind {
            Kind::Req => self.request(header, Request { body, attachment }),
            Kind::Cancel => {
                // Of a call that is answered already: the answer is on its way.
                let slot = header.slot as usize;
                let running = self.slots.get(slot).and_then(|slot| slot.running.as_ref());
                if running.is_some_and(|running| running.generation == header.generation) {
                    self.end(slot, Status::Cancelled, "cancelled by the caller");
                }
                Ok(())
            }
            Kind::Ping if self.shut => Ok(()),
            Kind::Ping => {
                self.writer.put(
                    &Header { kind: Kind::Pong, body: 0, metadata: 0, attachment: 0, ..header }.encode(),
                );
                Ok(())
            }
            Kind::Pong => Ok(()),
            Kind::Hello | Kind::Resp | Kind::Item | Kind::End | Kind::Credit | Kind::GoAway => {
                Err(Violation::Unexpected(header.kind))
            }
        }
    }

    fn request(&mut self, header: Header, request: Request) -> Result<(), Violation> {
        if self.told_goaway {
            // Beyond the count the client was told: it knows.
            return Ok(());
        }
        let index = header.slot as usize;
        let busy = self.slots.get(index).is_some_and(|slot| slot.running.is_some());
        if header.slot >= self.shared.hello.in_flight || busy {
            return Err(Violation::Slot { slot: header.slot });
        }
        if header.codec != codec::BINCODE {
            return Err(Violation::Codec(header.codec));
        }
        self.accepted += 1;
        let budget = Duration::from_micros(header.budget_us.into()).min(self.shared.config.deadline_max);
        let deadline = self.read_at + budget;
        if Instant::now() >= deadline {
            self.answer(
                header.slot,
                header.generation,
                Reply::refused(Status::Expired, "expired before it began"),
            );
            return Ok(());
        }
        let methods = &self.shared.methods;
        let entry = methods.binary_search_by_key(&header.method, |entry| entry.method.id).ok();
        let handler = entry.and_then(|entry| {
            let handler = self.shared.services[methods[entry].service].handle(header.method, request)?;
            Some((entry, handler))
        });
        let Some((entry, handler)) = handler else {
            let message = format!("no method with id {:#018x}", header.method);
            self.answer(header.slot, header.generation, Reply::refused(Status::Unimplemented, &message));
            return Ok(());
        };
        while self.slots.len() <= index {
            let slot = u32::try_from(self.slots.len()).map_err(|_| Violation::Slot { slot: header.slot })?;
            let flag = Arc::new(SlotWaker {
                signals: Arc::clone(&self.signals),
                slot,
                queued: AtomicBool::new(false),
            });
            self.slots.push(Slot { waker: Waker::from(Arc::clone(&flag)), flag, running: None });
        }
        self.slots[index].running = Some(Running { generation: header.generation, entry, handler, deadline });
        self.running += 1;
        if !self.poll_handler(index) {
            self.deadlines.insert((deadline, header.slot));
        }
        Ok(())
    }

    /// Polls a slot's handler, if it has one, and queues its answer. True where there is none any more.
    fn poll_handler(&mut self, index: usize) -> bool {
        let slot = &mut self.slots[index];
        let Some(running) = &mut slot.running else { return true };
        let mut cx = Context::from_waker(&slot.waker);
        let begun = std::time::Instant::now();
        let polled = {
            let _entered = enter(running.deadline);
            catch_unwind(AssertUnwindSafe(|| running.handler.as_mut().poll(&mut cx)))
        };
        if begun.elapsed() > POLL_MAX {
            self.shared.methods[running.entry].slow_polls.fetch_add(1, Ordering::Relaxed);
        }
        let reply = match polled {
            Ok(Poll::Pending) => return false,
            Ok(Poll::Ready(reply)) => reply,
            Err(panic) => {
                let what = panic_text(&*panic);
                tracing::error!(panic = what, "a handler panicked; its call fails, the others go on");
                Reply::refused(Status::Panicked, what)
            }
        };
        if let Some(generation) = self.remove(index) {
            self.answer(self.slots[index].flag.slot, generation, reply);
        }
        true
    }

    /// Drops a slot's handler and answers for it. False where there was none.
    fn end(&mut self, index: usize, status: Status, message: &str) -> bool {
        let Some(generation) = self.remove(index) else { return false };
        self.answer(self.slots[index].flag.slot, generation, Reply::refused(status, message));
        true
    }

    /// Takes a handler out of its slot and drops it; a panic in its drop is its own affair too.
    fn remove(&mut self, index: usize) -> Option<u32> {
        let slot = &mut self.slots[index];
        let running = slot.running.take()?;
        self.running -= 1;
        self.deadlines.remove(&(running.deadline, slot.flag.slot));
        let Running { generation, handler, .. } = running;
        if catch_unwind(AssertUnwindSafe(move || drop(handler))).is_err() {
            tracing::error!("a handler panicked while it was dropped");
        }
        Some(generation)
    }

    fn answer(&mut self, slot: u32, generation: u32, reply: Reply) {
        let mut reply = reply;
        if !matches!(reply.status, Status::Ok | Status::Application) {
            reply.body.truncate(MESSAGE_BYTES_MAX);
        }
        let total = HEADER + reply.body.len() + reply.attachment.len();
        if reply.body.len() > BODY_BYTES_MAX as usize || total > self.peer_frame_bytes_max as usize {
            let message = format!(
                "answer of {} bytes (at most {BODY_BYTES_MAX}), {total} in all (at most {})",
                reply.body.len(),
                self.peer_frame_bytes_max
            );
            reply = Reply::refused(Status::TooLarge, &message);
        }
        let header = Header {
            codec: codec::BINCODE,
            status: reply.status.number(),
            slot,
            generation,
            body: u32::try_from(reply.body.len()).unwrap_or(u32::MAX),
            attachment: u32::try_from(reply.attachment.len()).unwrap_or(u32::MAX),
            ..Header::new(Kind::Resp)
        };
        if self.told_goaway && reply.status != Status::Cancelled {
            self.shared.completed.fetch_add(1, Ordering::Relaxed);
        }
        self.writer.put(&header.encode());
        self.writer.put_vec(reply.body);
        self.writer.put_attachment(&reply.attachment);
    }

    /// Drops the handlers whose deadline has passed, and sets the timer to the next.
    fn expire(&mut self, cx: &mut Context<'_>) {
        while let Some(&(earliest, _)) = self.deadlines.first() {
            if self.expiry.deadline() != earliest {
                self.expiry.as_mut().reset(earliest);
            }
            if self.expiry.as_mut().poll(cx).is_pending() {
                return;
            }
            let now = Instant::now();
            while let Some(&(deadline, slot)) = self.deadlines.first().filter(|first| first.0 <= now) {
                self.deadlines.remove(&(deadline, slot));
                self.end(slot as usize, Status::Deadline, "the deadline passed while the handler ran");
            }
        }
    }

    fn write(&mut self, cx: &mut Context<'_>) -> Result<(), Ended> {
        if self.writer.queued() == 0 {
            return Ok(());
        }
        match self.writer.poll_write(&mut *self.io, cx) {
            Poll::Ready(Err(error)) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// The slow clocks: silence, stalled writes, frames that never end.
    fn watch(&mut self, cx: &mut Context<'_>) -> Result<(), Ended> {
        while self.tick.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            self.tick.as_mut().reset(now + TICK);
            if let Some(since) = self.writer.stalled_since() {
                if now >= since + WRITE_STALL {
                    return Err(Ended::Stalled("the client took no bytes for 30 s"));
                }
            } else if now >= self.read_at + SILENCE_MAX {
                return Err(Ended::Stalled("nothing from the client for 60 s"));
            }
            if self.reader.is_partial() && self.partial_since.is_some_and(|since| now >= since + FRAME_TIME) {
                return Err(Ended::Stalled("a frame was not whole after 60 s"));
            }
        }
        Ok(())
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&'static str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
