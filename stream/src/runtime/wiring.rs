//! What connects the threads of one start: queues, commands, wake-ups, and the one flag that ends them all.
//!
//! ```text
//!   feeder ──Inbox──▶ task i ══Channel (SPSC)══▶ task j ──events (bounded)──▶ coordinator
//!                       ▲──────────── commands ───────────────────────────────┘
//! ```
//!
//! Invariants
//! * The coordinator never waits for a task: commands are few (one barrier and one commit at a time) and unbounded.
//! * A task never waits inside a step: what finds its channel full stays with the sender, who then reads no input but
//!   goes on receiving, so opposing full channels cannot stop each other.
//! * Whoever sets `down` wakes everyone.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;

use crossbeam_utils::sync::{Parker, Unparker};
use parking_lot::Mutex;

use super::error::RunError;
use crate::engine::Last;
use crate::engine::{Counters, Event, Message};
use crate::io::{Fetched, Position};

/// Messages a channel holds.
const CHANNEL_MESSAGES: usize = 64;

/// Bytes of rows at which a channel counts as full: a few flushed local tables.
const CHANNEL_BYTES: usize = 4 << 20;

/// What the coordinator tells a task.
#[derive(Clone, Copy, Debug)]
pub(super) enum Command {
    Barrier(Last),
    Committed(u64),
    Applied(u64),
}

/// What the feeder hands to a task.
pub(super) enum Fed {
    Fetched(Fetched),
    /// A fetch waited in vain for this partition.
    Nothing {
        partition: u32,
        caught_up: bool,
        now: i64,
    },
}

impl Fed {
    /// Where the partition is read on, if this says so.
    pub(super) fn next(&self) -> Option<Position> {
        match self {
            Self::Fetched(fetched) => Some(fetched.next),
            Self::Nothing { .. } => None,
        }
    }
}

/// What a task is fed with, per partition.
#[derive(Default)]
pub(super) struct Inbox {
    pub(super) parts: Vec<(u32, VecDeque<Fed>)>,
}

/// What one thread can do to another.
pub(super) struct Port {
    pub(super) commands: Mutex<Vec<Command>>,
    pub(super) inbox: Mutex<Inbox>,
    pub(super) counters: Mutex<Counters>,
    pub(super) waker: Unparker,
}

/// Shared by all threads of one start.
pub(super) struct Wiring {
    pub(super) ports: Vec<Port>,
    pub(super) down: AtomicBool,
    /// Bytes fed and not yet processed, by partition.
    pub(super) fed_bytes: Vec<AtomicUsize>,
    /// Bytes of output on the way to the coordinator or held by it.
    pub(super) held_bytes: AtomicUsize,
    /// Until when (milliseconds of the run's clock) tasks read no input, because an overlay is over its limit.
    pub(super) pressed_until: AtomicI64,
    pub(super) feeder: Unparker,
    failure: Mutex<Option<RunError>>,
    events: SyncSender<Told>,
}

/// What reaches the coordinator.
pub(super) enum Told {
    Event(Event),
    /// Wake up: something failed or a stop was asked for.
    Look,
}

impl Wiring {
    /// For `tasks` threads and `partitions` partitions; the parkers belong to the threads and the feeder.
    pub(super) fn new(
        tasks: usize,
        partitions: &[u32],
        events: SyncSender<Told>,
    ) -> (Arc<Self>, Vec<Parker>, Parker) {
        let parkers: Vec<_> = (0..tasks).map(|_| Parker::new()).collect();
        let feeder = Parker::new();
        let port = |(task, parker): (usize, &Parker)| {
            let own = partitions.iter().filter(|p| **p as usize % tasks == task);
            let parts = own.map(|p| (*p, VecDeque::new())).collect();
            Port {
                commands: Mutex::default(),
                inbox: Mutex::new(Inbox { parts }),
                counters: Mutex::default(),
                waker: parker.unparker().clone(),
            }
        };
        let count = partitions.iter().map(|p| *p as usize + 1).max().unwrap_or(0);
        let wiring = Self {
            ports: parkers.iter().enumerate().map(port).collect(),
            down: AtomicBool::new(false),
            fed_bytes: (0..count).map(|_| AtomicUsize::new(0)).collect(),
            held_bytes: AtomicUsize::new(0),
            pressed_until: AtomicI64::new(0),
            feeder: feeder.unparker().clone(),
            failure: Mutex::new(None),
            events,
        };
        (Arc::new(wiring), parkers, feeder)
    }

    pub(super) fn is_down(&self) -> bool {
        self.down.load(Ordering::Acquire)
    }

    /// Ends all threads.
    pub(super) fn shut_down(&self) {
        self.down.store(true, Ordering::Release);
        for port in &self.ports {
            port.waker.unpark();
        }
        self.feeder.unpark();
        // The coordinator looks at the flag at every tick; this only makes it sooner.
        let _ = self.events.try_send(Told::Look);
    }

    /// The first failure is the one that is reported; it ends all threads.
    pub(super) fn fail(&self, error: RunError) {
        self.failure.lock().get_or_insert(error);
        self.shut_down();
    }

    pub(super) fn failure(&self) -> Option<RunError> {
        self.failure.lock().take()
    }

    pub(super) fn command(&self, task: usize, command: Command) {
        let port = &self.ports[task];
        port.commands.lock().push(command);
        port.waker.unpark();
    }

    /// Tells the coordinator; waits while its queue is full. False once everything ends.
    pub(super) fn tell(&self, event: Event) -> bool {
        let mut told = Told::Event(event);
        loop {
            if self.is_down() {
                return false;
            }
            match self.events.try_send(told) {
                Ok(()) => return true,
                Err(std::sync::mpsc::TrySendError::Disconnected(_)) => return false,
                Err(std::sync::mpsc::TrySendError::Full(back)) => {
                    told = back;
                    std::thread::park_timeout(std::time::Duration::from_micros(500));
                }
            }
        }
    }
}

/// The sending end of a channel between two tasks.
pub(super) struct Outlet {
    queue: rtrb::Producer<Message>,
    bytes: Arc<AtomicUsize>,
    /// What found the channel full, in order.
    over: VecDeque<Message>,
    /// How many messages found it full.
    pub(super) waited: u64,
    waker: Unparker,
}

/// The receiving end.
pub(super) struct Inlet {
    queue: rtrb::Consumer<Message>,
    bytes: Arc<AtomicUsize>,
    waker: Unparker,
}

fn bytes_of(message: &Message) -> usize {
    match message {
        Message::Rows(groups) => groups.bytes(),
        Message::Time(_) | Message::Barrier(_) => 0,
    }
}

/// A channel from one task to another (or to itself).
pub(super) fn channel(sender: &Unparker, receiver: &Unparker) -> (Outlet, Inlet) {
    let (producer, consumer) = rtrb::RingBuffer::new(CHANNEL_MESSAGES);
    let bytes = Arc::new(AtomicUsize::new(0));
    let outlet = Outlet {
        queue: producer,
        bytes: Arc::clone(&bytes),
        over: VecDeque::new(),
        waited: 0,
        waker: receiver.clone(),
    };
    (outlet, Inlet { queue: consumer, bytes, waker: sender.clone() })
}

impl Outlet {
    /// Sends, or keeps what finds no room.
    pub(super) fn send(&mut self, message: Message) {
        self.over.push_back(message);
        self.flush();
        self.waited += u64::from(!self.over.is_empty());
    }

    /// Sends what was kept, as far as there is room. True if nothing is left.
    pub(super) fn flush(&mut self) -> bool {
        let mut sent = false;
        while let Some(message) = self.over.front() {
            let bytes = bytes_of(message);
            if bytes > 0 && self.bytes.load(Ordering::Relaxed) > CHANNEL_BYTES {
                break;
            }
            if self.queue.is_full() {
                break;
            }
            let Some(message) = self.over.pop_front() else { break };
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
            if let Err(rtrb::PushError::Full(message)) = self.queue.push(message) {
                self.bytes.fetch_sub(bytes, Ordering::Relaxed);
                self.over.push_front(message);
                break;
            }
            sent = true;
        }
        if sent {
            self.waker.unpark();
        }
        self.over.is_empty()
    }
}

impl Inlet {
    pub(super) fn receive(&mut self) -> Option<Message> {
        // A sender waits only where the channel was full or heavy: below half it can go on.
        let was_full =
            self.queue.slots() == CHANNEL_MESSAGES || self.bytes.load(Ordering::Relaxed) > CHANNEL_BYTES;
        let message = self.queue.pop().ok()?;
        self.bytes.fetch_sub(bytes_of(&message), Ordering::Relaxed);
        if was_full {
            self.waker.unpark();
        }
        Some(message)
    }
}
