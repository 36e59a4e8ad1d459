//! The rules for producers, idempotence and transactions, under random schedules: the twin, over the real State,
//! journal and recovery, of the executable model of transactions.
//!
//! One seed is one schedule. A plain idempotent producer writes inputs; workers of two transactional ids read them,
//! write outputs and commit offsets and outputs together, fenced by who joined last; a writer of a third id commits over several partitions.
//! Requests are delayed, lost, resent over other connections, and arrive after their sender died; replies come in any
//! order or never. Workers are paused, replaced and woken; the process is killed or loses power between any two steps
//! of writer, segment writer and checkpointer; transactions time out; ids run out.
//!
//! What is checked:
//! * every input is there once, in order; acked ones are there, where the topic is durable or no power was cut;
//! * every input is handled once: the visible outputs are the inputs;
//! * what a read-committed reader saw stays; a transaction is visible wholly or not at all;
//! * who is told that a transaction committed finds it, who is told that it aborted does not;
//! * replaced producer ids leave State; nothing stays open for ever.

use crate::Clock;
use crate::batch::{
    BatchBuilder, BatchOptions, Batches, OpenBatch, ProducerStamp, RecordParts, advance_sequence,
};
use crate::config::{Config, Create};
use crate::error::{ReadError, Refusal, WriteError};
#[cfg(feature = "faults")]
use crate::fault;
use crate::fs::sim::{Crash, SimFs};
use crate::live::{create_topic, read};
use crate::open::{Machine, open};
use crate::plan::AppendBatch;
use crate::segment_writer;
use crate::ticket::Ticket;
use crate::types::*;
use crate::writer::Seal;
use bytes::Bytes;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use uuid::Uuid;

const STEPS: usize = 500;
const GROUP: &str = "workers";
/// Transactions may be open for so long, by the clock that `Act::Timeout` moves.
const TIMEOUT_MS: u32 = 1_000;

struct Violation(String);

fn violation(what: String) -> ! {
    resume_unwind(Box::new(Violation(what)))
}

macro_rules! must {
    ($holds:expr, $($what:tt)*) => { if !$holds { violation(format!($($what)*)) } };
}

#[derive(Default)]
struct ManualClock(AtomicU64);

impl Clock for ManualClock {
    fn wall_ms(&self) -> i64 {
        1_700_000_000_000 + i64::try_from(self.0.load(Ordering::Relaxed)).unwrap()
    }

    fn monotonic(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

#[derive(Clone, Debug)]
enum Ask {
    Init { id: Option<String>, local: bool, carried: Option<Producer> },
    Batch { to: TopicPartition, batch: Bytes },
    Join { member: u64 },
    Offset { producer: Producer, position: Position, member: u64 },
    End { id: String, producer: Producer, outcome: Outcome },
    Offsets,
    Fetch { position: Position },
}

#[derive(Clone, Debug)]
enum Told {
    Producer(Producer),
    Done,
    Ended(Ended),
    Offset(Position),
    Wait,
    Fetched(Vec<String>, Position),
    /// Try again.
    Busy,
    OutOfOrder,
    /// Fenced, unknown, on an old connection, a position that does not hold: why, for the trace.
    Refused(#[expect(dead_code, reason = "shown by Debug")] String),
}

impl From<WriteError> for Told {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Busy | WriteError::DiskFull { .. } => Told::Busy,
            WriteError::Refused(Refusal::OutOfOrder { .. }) => Told::OutOfOrder,
            other => Told::Refused(other.to_string()),
        }
    }
}

/// A reply that waits for the release of what it rests on.
type Waiting = Box<dyn FnMut() -> Option<Told>>;

fn waiting<T: 'static>(ticket: Ticket<T>, told: impl Fn(T) -> Told + 'static) -> Waiting {
    Box::new(move || ticket.try_take().map(|answer| answer.map_or_else(Told::from, &told)))
}

struct Conn {
    number: u64,
    requests: VecDeque<(u64, Ask)>,
    waiting: Vec<(u64, Waiting)>,
    replies: Vec<(u64, Told)>,
    dead: bool,
    frozen: u32,
}

/// A client's end of the network; its program is a future that is polled when it is its turn.
struct Client {
    id: String,
    local: bool,
    conn: RefCell<Rc<RefCell<Conn>>>,
    inbox: RefCell<HashMap<u64, Told>>,
    calls: Cell<u64>,
    paused: Cell<u32>,
    done: Cell<bool>,
}

type Program = Pin<Box<dyn Future<Output = ()>>>;

#[derive(Clone, Copy, PartialEq)]
enum Act {
    Network,
    Disk,
    Plain,
    Worker,
    Read,
    Timeout,
    Pause,
    Spawn,
    Crash,
    Input,
}

/// A transaction: its client and its number there.
type Key = (String, u64);

struct World {
    rng: ChaCha8Rng,
    trace: Option<Vec<String>>,
    fs: SimFs,
    clock: Arc<ManualClock>,
    machine: Machine,
    last_epoch: Option<i16>,
    input: TopicPartition,
    outputs: [TopicPartition; 2],
    input_is_durable: bool,
    conns: Vec<Rc<RefCell<Conn>>>,
    conns_made: u64,
    clients_made: u64,
    locals: BTreeMap<&'static str, bool>,
    inputs: u64,
    /// Who reads the inputs: the last who joined; nobody after a crash. Members are never used again.
    member: Arc<AtomicU64>,
    members: u64,
    acked: BTreeSet<u64>,
    budget: u64,
    plain_is_idle: bool,
    faults: f64,
    impatience: f64,
    transactions: BTreeMap<Key, Vec<String>>,
    told: BTreeMap<Key, Outcome>,
    seen: BTreeMap<(usize, i64), String>,
    at: [Position; 2],
    power_cuts: u32,
    crashes: u32,
}

type Shared = Rc<RefCell<World>>;

fn config(clock: &Arc<ManualClock>, last_epoch: Option<i16>) -> Config {
    Config {
        create: Create::IfMissing,
        clock: clock.clone(),
        seed: Some(7),
        journal_file_bytes: 64 * 4096,
        journal_files_max: 4,
        last_epoch,
        ..Config::default()
    }
}

impl World {
    fn new(seed: u64, trace: bool) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (fs, clock) = (SimFs::new(), Arc::new(ManualClock::default()));
        let last_epoch = *[Some(1), Some(2), Some(3), None].choose(&mut rng).unwrap();
        let mut machine = open(Arc::new(fs.clone()), config(&clock, last_epoch)).unwrap();
        assert!(machine.drain());
        // Only durable topics can be created so far; the model's other modes come with them.
        let modes = [Mode::Durable; 3];
        let topics: Vec<TopicPartition> = (0..3)
            .map(|n| {
                let topic = NewTopic { mode: modes[n], ..NewTopic::new(["in", "o0", "o1"][n], 1) };
                let made = create_topic(&machine.shared, topic, Uuid::from_u128(n as u128 + 1));
                assert!(machine.drain());
                TopicPartition { topic: made.try_take().unwrap().unwrap().uuid, partition: 0 }
            })
            .collect();
        let locals = [("A", rng.random_bool(0.3)), ("B", false), ("C", false)];
        let impatience = *[0.01, 0.05, 0.15].choose(&mut rng).unwrap();
        let mut world = World {
            budget: rng.random_range(4..=12),
            rng,
            trace: trace.then(Vec::new),
            fs,
            clock,
            machine,
            last_epoch,
            input: topics[0],
            outputs: [topics[1], topics[2]],
            input_is_durable: modes[0] == Mode::Durable,
            conns: Vec::new(),
            conns_made: 0,
            clients_made: 0,
            locals: locals.into(),
            inputs: 0,
            member: Arc::default(),
            members: 0,
            acked: BTreeSet::new(),
            plain_is_idle: true,
            faults: 1.0,
            impatience,
            transactions: BTreeMap::new(),
            told: BTreeMap::new(),
            seen: BTreeMap::new(),
            at: [Position::START; 2],
            power_cuts: 0,
            crashes: 0,
        };
        world.say(|| format!("modes {modes:?}, last epoch {last_epoch:?}, local {locals:?}"));
        world
    }

    fn say(&mut self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(what());
        }
    }

    fn chance(&mut self, p: f64) -> bool {
        self.rng.random_bool(p.clamp(0.0, 1.0))
    }

    fn connection(&mut self) -> Rc<RefCell<Conn>> {
        self.conns_made += 1;
        let conn = Conn {
            number: self.conns_made,
            requests: VecDeque::new(),
            waiting: Vec::new(),
            replies: Vec::new(),
            dead: false,
            frozen: 0,
        };
        let conn = Rc::new(RefCell::new(conn));
        self.conns.push(conn.clone());
        conn
    }

    /// The broker reads one request of a connection.
    fn serve(&mut self, conn: &Rc<RefCell<Conn>>) {
        let (call, ask) = conn.borrow_mut().requests.pop_front().expect("has requests");
        let (number, shared) = (Connection(conn.borrow().number), self.machine.shared.clone());
        self.say(|| format!("  broker: conn {} call {call} {ask:?}", number.0));
        let reply: Waiting = match ask {
            Ask::Init { id, local, carried } => {
                let init = InitProducer { transactional_id: id, local, timeout_ms: TIMEOUT_MS, carried };
                waiting(shared.submit(init), Told::Producer)
            }
            Ask::Batch { to, batch } => {
                let append = AppendBatch { to, batch, connection: number };
                waiting(shared.submit(append), |_| Told::Done)
            }
            Ask::Join { member } => {
                self.member.store(member, Ordering::Relaxed);
                Box::new(|| Some(Told::Done))
            }
            Ask::Offset { producer, position, member } => {
                let current = self.member.clone();
                let offset = OffsetCommit { partition: self.input, position, metadata: Bytes::new() };
                let add = AddOffsets {
                    producer,
                    group: GROUP.into(),
                    offsets: vec![offset],
                    guard: Some(Arc::new(move || current.load(Ordering::Relaxed) == member)),
                    connection: number,
                };
                waiting(shared.submit(add), |()| Told::Done)
            }
            Ask::End { id, producer, outcome } => {
                let end = EndTxn { transactional_id: id, producer, outcome, connection: number };
                waiting(shared.submit(end), Told::Ended)
            }
            Ask::Offsets => {
                let told = self.group_offset();
                Box::new(move || told.clone())
            }
            Ask::Fetch { position } => {
                let told = match read(&shared, self.input, position, 1, Isolation::ReadUncommitted) {
                    Ok(got) => {
                        let values = values(got.batches, position.offset, |_| true);
                        Told::Fetched(values.into_iter().map(|(_, v)| v).collect(), got.next)
                    }
                    Err(error @ (ReadError::PositionLost { .. } | ReadError::OutOfRange { .. })) => {
                        Told::Refused(error.to_string())
                    }
                    Err(error) => violation(format!("reading inputs: {error}")),
                };
                Box::new(move || Some(told.clone()))
            }
        };
        conn.borrow_mut().waiting.push((call, reply));
    }

    fn group_offset(&self) -> Option<Told> {
        let released = self.machine.shared.released.read();
        let open = |o: &crate::state::Owner| o.txn.as_ref().is_some_and(|t| t.offsets.contains_key(GROUP));
        if released.owners.values().any(open) {
            return Some(Told::Wait);
        }
        let at = released.groups.get(GROUP).and_then(|group| group.get(&self.input));
        Some(Told::Offset(at.map_or(Position::START, |o| o.position)))
    }

    fn network(&mut self, clients: &[Rc<Client>]) {
        for conn in &self.conns {
            let mut conn = conn.borrow_mut();
            let ready: Vec<(u64, Told)> = {
                let mut ready = Vec::new();
                conn.waiting.retain_mut(|(call, reply)| match reply() {
                    Some(told) => {
                        ready.push((*call, told));
                        false
                    }
                    None => true,
                });
                ready
            };
            conn.replies.extend(ready);
        }
        self.conns.retain(|c| {
            let used = clients.iter().any(|client| Rc::ptr_eq(&client.conn.borrow(), c));
            let conn = c.borrow();
            used || !conn.requests.is_empty() || !conn.replies.is_empty() || !conn.waiting.is_empty()
        });
        let busy = |c: &&Rc<RefCell<Conn>>| !c.borrow().requests.is_empty() || !c.borrow().replies.is_empty();
        let ready: Vec<_> = self.conns.iter().filter(busy).cloned().collect();
        let Some(conn) = ready.choose(&mut self.rng).cloned() else { return };
        if conn.borrow().frozen > 0 {
            conn.borrow_mut().frozen -= 1;
            return;
        }
        if !conn.borrow().requests.is_empty() && self.chance(0.6) {
            self.serve(&conn);
        } else if !conn.borrow().replies.is_empty() {
            let n = self.rng.random_range(0..conn.borrow().replies.len());
            let (call, told) = conn.borrow_mut().replies.remove(n);
            self.say(|| format!("    answer to conn {} call {call}: {told:?}", conn.borrow().number));
            for client in clients.iter().filter(|client| Rc::ptr_eq(&client.conn.borrow(), &conn)) {
                client.inbox.borrow_mut().insert(call, told.clone());
            }
        }
    }

    fn disk(&mut self) {
        match self.rng.random_range(0..7) {
            0..=3 => drop(self.machine.writer.step(&self.machine.shared, Seal::No)),
            4..=5 => drop(segment_writer::step(&self.machine.shared, 2)),
            _ => drop(self.machine.checkpointer.step(&self.machine.shared)),
        }
        if let Some(why) = &self.machine.shared.core.lock().stopped {
            violation(format!("the log stopped: {why}"));
        }
    }

    fn crash(&mut self, clients: &[Rc<Client>]) {
        let how =
            *[Crash::Kill, Crash::None, Crash::All, Crash::Any, Crash::Any].choose(&mut self.rng).unwrap();
        self.say(|| format!("-- crash {how:?}"));
        self.crashes += 1;
        self.power_cuts += u32::from(how != Crash::Kill);
        self.member.store(0, Ordering::Relaxed);
        self.fs = self.fs.crash(how, &mut self.rng);
        match open(Arc::new(self.fs.clone()), config(&self.clock, self.last_epoch)) {
            Ok(machine) => self.machine = machine,
            Err(error) => violation(format!("does not open: {error:?}")),
        }
        must!(self.machine.drain(), "the open does not get to its end");
        for conn in std::mem::take(&mut self.conns) {
            let mut conn = conn.borrow_mut();
            conn.dead = true;
            conn.requests.clear();
            conn.waiting.clear();
            conn.replies.clear();
        }
        for client in clients.iter().filter(|client| client.local) {
            client.done.set(true);
        }
    }

    /// A read-committed reader of the outputs.
    fn look(&mut self, part: usize) -> bool {
        let at = self.at[part];
        let (committed, next) = self.committed(part, at);
        for (offset, value) in committed {
            self.say(|| format!("   reader o{part} {offset} {value}"));
            self.seen.insert((part, offset), value);
        }
        self.at[part] = next;
        next != at
    }

    /// One read: what is committed from a position on.
    fn committed(&self, part: usize, from: Position) -> (Vec<(i64, String)>, Position) {
        let got =
            match read(&self.machine.shared, self.outputs[part], from, 1 << 20, Isolation::ReadCommitted) {
                Ok(got) => got,
                Err(error) => violation(format!("reading outputs: {error}")),
            };
        let aborted = got.aborted;
        let hidden = |h: &crate::batch::BatchHeader| {
            aborted
                .iter()
                .any(|r| r.producer_id == h.producer_id && (r.first..=r.last).contains(&h.base_offset))
        };
        (values(got.batches, from.offset, |h| !hidden(h)), got.next)
    }

    fn all_committed(&self, part: usize) -> Vec<(i64, String)> {
        let (mut all, mut at) = (Vec::new(), Position::START);
        loop {
            let (some, next) = self.committed(part, at);
            all.extend(some);
            if next == at {
                return all;
            }
            at = next;
        }
    }

    fn all_inputs(&self) -> Vec<u64> {
        let (mut all, mut at) = (Vec::new(), Position::START);
        loop {
            let got =
                read(&self.machine.shared, self.input, at, 1 << 20, Isolation::ReadUncommitted).unwrap();
            all.extend(
                values(got.batches, at.offset, |_| true).iter().map(|(_, v)| v.parse::<u64>().unwrap()),
            );
            if got.next == at {
                return all;
            }
            at = got.next;
        }
    }

    fn check(&mut self) {
        let inputs = self.all_inputs();
        must!(inputs.is_sorted_by(|a, b| a < b), "inputs are twice or out of order: {inputs:?}");
        let there: BTreeSet<u64> = inputs.iter().copied().collect();
        let lost: Vec<_> = self.acked.difference(&there).collect();
        if self.input_is_durable || self.power_cuts == 0 {
            must!(lost.is_empty(), "acked inputs are lost: {lost:?}");
        }
        let finals: [Vec<(i64, String)>; 2] = [self.all_committed(0), self.all_committed(1)];
        for ((part, offset), value) in &self.seen {
            let now = finals[*part].iter().find(|(at, _)| at == offset).map(|(_, v)| v);
            must!(now == Some(value), "a reader saw {value} at o{part}/{offset}, now it is {now:?}");
        }
        let mut visible: Vec<&String> = finals.iter().flatten().map(|(_, v)| v).collect();
        visible.sort();
        for (key, tokens) in &self.transactions {
            let mark = format!(" {} {}", key.0, key.1);
            let mut mine: Vec<&String> = visible.iter().filter(|v| v.ends_with(&mark)).copied().collect();
            let mut all: Vec<&String> = tokens.iter().collect();
            mine.sort();
            all.sort();
            let told = self.told.get(key);
            must!(
                mine.is_empty() || mine == all,
                "{key:?}, told {told:?}, is visible in part: {mine:?} of {all:?}"
            );
            if told == Some(&Outcome::Committed) {
                must!(all.is_empty() || !mine.is_empty(), "{key:?} was told committed and is not visible");
            }
            must!(
                told != Some(&Outcome::Aborted) || mine.is_empty(),
                "{key:?} was told aborted and is visible"
            );
        }
        let number = |v: &String| v.split(' ').next().unwrap().parse::<u64>().unwrap();
        let mut handled: Vec<u64> =
            visible.iter().filter(|v| !v.contains(" C.")).map(|v| number(v)).collect();
        handled.sort_unstable();
        must!(handled == inputs, "inputs {inputs:?} were handled as {handled:?}");
        let state = self.machine.shared.released.read();
        let of_owners = state.producers.values().filter(|p| p.transactional_id.is_some()).count();
        must!(
            of_owners == state.owners.len(),
            "State grows: {of_owners} ids of {} owners",
            state.owners.len()
        );
    }
}

/// Offsets and values of what counts in a fetched buffer, from an offset on.
fn values(
    fetched: Bytes,
    from: i64,
    counts: impl Fn(&crate::batch::BatchHeader) -> bool,
) -> Vec<(i64, String)> {
    let mut all = Vec::new();
    for batch in Batches::new(fetched) {
        let (header, bytes) = batch.expect("whole batches");
        if header.is_control() || !counts(&header) {
            continue;
        }
        for record in &OpenBatch::open(&bytes, 1 << 20).expect("an intact batch") {
            let record = record.expect("a record");
            if record.offset >= from {
                all.push((record.offset, String::from_utf8(record.value.unwrap().to_vec()).unwrap()));
            }
        }
    }
    all
}

/// Gives the turn back.
async fn turn() {
    let mut given = false;
    std::future::poll_fn(
        move |_| {
            if std::mem::replace(&mut given, true) { Poll::Ready(()) } else { Poll::Pending }
        },
    )
    .await;
}

impl Client {
    fn new(world: &Shared, name: &str, local: bool) -> Rc<Client> {
        let mut w = world.borrow_mut();
        w.clients_made += 1;
        let (id, conn) = (format!("{name}.{}", w.clients_made), w.connection());
        Rc::new(Client {
            id,
            local,
            conn: RefCell::new(conn),
            inbox: RefCell::default(),
            calls: Cell::new(0),
            paused: Cell::new(0),
            done: Cell::new(false),
        })
    }

    fn send(&self, world: &Shared, ask: Ask) -> u64 {
        self.calls.set(self.calls.get() + 1);
        let (call, conn) = (self.calls.get(), self.conn.borrow().clone());
        world.borrow_mut().say(|| format!("{}: conn {} call {call} {ask:?}", self.id, conn.borrow().number));
        conn.borrow_mut().requests.push_back((call, ask));
        call
    }

    /// A deadline passed or the connection died: goes on, on this or another connection.
    fn gives_up(&self, world: &Shared) -> bool {
        let mut w = world.borrow_mut();
        let dead = self.conn.borrow().borrow().dead;
        let p = w.faults * w.impatience;
        if !dead && !w.chance(p) {
            return false;
        }
        if dead || w.chance(0.7) {
            let old = self.conn.borrow().clone();
            if w.chance(0.4) {
                // What the broker has not read may be lost; the rest arrives late.
                old.borrow_mut().requests.clear();
            }
            old.borrow_mut().frozen = *[0, 5, 20, 60].choose(&mut w.rng).unwrap();
            let new = w.connection();
            self.conn.replace(new);
            self.inbox.borrow_mut().clear();
        }
        true
    }

    async fn call(&self, world: &Shared, ask: Ask) -> Told {
        let mut call = self.send(world, ask.clone());
        loop {
            turn().await;
            if let Some(told) = self.inbox.borrow_mut().remove(&call) {
                return told;
            }
            if self.gives_up(world) {
                call = self.send(world, ask.clone());
            }
        }
    }

    async fn producer(&self, world: &Shared, ask: Ask) -> Option<Producer> {
        loop {
            match self.call(world, ask.clone()).await {
                Told::Producer(producer) => return Some(producer),
                Told::Busy => turn().await,
                _ => return None,
            }
        }
    }
}

/// A batch on its way.
struct Sent {
    to: TopicPartition,
    values: Vec<String>,
    batch: Bytes,
    state: SentState,
    out_of_order: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum SentState {
    Idle,
    Call(u64),
    Refused,
    Acked,
}

enum Sending {
    Acked,
    /// Refused for its sequence again and again: what is not acked.
    Lost(Vec<Vec<String>>),
    Failed,
}

/// Sends batches, at most five a partition from the first unacked, again from there where one is refused.
async fn produce(
    me: &Client,
    world: &Shared,
    who: Producer,
    sequences: &mut BTreeMap<TopicPartition, i32>,
    items: Vec<(TopicPartition, Vec<String>)>,
    transactional: bool,
) -> Sending {
    let mut lanes: BTreeMap<TopicPartition, Vec<Sent>> = BTreeMap::new();
    for (to, values) in items {
        let sequence = sequences.entry(to).or_insert(0);
        let mut builder = BatchBuilder::new(BatchOptions { transactional, ..BatchOptions::default() });
        for value in &values {
            assert!(builder.push(RecordParts { value: Some(value.as_bytes()), ..RecordParts::default() }));
        }
        let batch = builder.build(ProducerStamp { id: who.id, epoch: who.epoch, sequence: *sequence });
        *sequence = advance_sequence(*sequence, values.len() as i32);
        let sent = Sent { to, values, batch, state: SentState::Idle, out_of_order: false };
        lanes.entry(to).or_default().push(sent);
    }
    let mut refusals: BTreeMap<TopicPartition, u32> = BTreeMap::new();
    loop {
        for lane in lanes.values_mut() {
            let first = lane.iter().position(|s| s.state != SentState::Acked).unwrap_or(lane.len());
            for sent in lane.iter_mut().skip(first).take(5) {
                if sent.state == SentState::Idle {
                    let ask = Ask::Batch { to: sent.to, batch: sent.batch.clone() };
                    sent.state = SentState::Call(me.send(world, ask));
                }
            }
        }
        if lanes.values().flatten().all(|s| s.state == SentState::Acked) {
            return Sending::Acked;
        }
        turn().await;
        let faults = world.borrow().faults;
        if transactional && world.borrow_mut().chance(faults * 0.01) {
            return Sending::Failed;
        }
        if me.gives_up(world) {
            for sent in lanes.values_mut().flatten().filter(|s| s.state != SentState::Acked) {
                sent.state = SentState::Idle;
            }
            continue;
        }
        for (tp, lane) in &mut lanes {
            for sent in lane.iter_mut() {
                let SentState::Call(call) = sent.state else { continue };
                let Some(told) = me.inbox.borrow_mut().remove(&call) else { continue };
                match told {
                    Told::Done => {
                        sent.state = SentState::Acked;
                        if !transactional {
                            let values = sent.values.iter().map(|v| v.parse::<u64>().unwrap());
                            world.borrow_mut().acked.extend(values);
                        }
                    }
                    Told::Busy | Told::OutOfOrder => {
                        sent.state = SentState::Refused;
                        sent.out_of_order = matches!(told, Told::OutOfOrder);
                    }
                    _ => return Sending::Failed,
                }
            }
            let first = lane.iter().position(|s| s.state != SentState::Acked);
            if let Some(first) = first.filter(|n| lane[*n].state == SentState::Refused) {
                let count = refusals.entry(*tp).or_default();
                *count += u32::from(lane[first].out_of_order);
                if *count > 3 {
                    let rest = lane.iter().filter(|s| s.state != SentState::Acked);
                    return Sending::Lost(rest.map(|s| s.values.clone()).collect());
                }
                for sent in lane.iter_mut().filter(|s| s.state != SentState::Acked) {
                    sent.state = SentState::Idle;
                }
            }
        }
    }
}

/// Writes the inputs 1, 2, 3, ...
async fn plain(me: Rc<Client>, world: Shared) {
    let input = world.borrow().input;
    loop {
        let init = |carried| Ask::Init { id: None, local: false, carried };
        let Some(mut who) = me.producer(&world, init(None)).await else { continue };
        let mut sequences = BTreeMap::new();
        let mut pending: Vec<Vec<String>> = Vec::new();
        loop {
            if pending.is_empty() {
                world.borrow_mut().plain_is_idle = true;
                while world.borrow().inputs >= world.borrow().budget {
                    turn().await;
                }
                let mut w = world.borrow_mut();
                w.plain_is_idle = false;
                for _ in 0..w.rng.random_range(1..=8) {
                    let count = w.rng.random_range(1..=2);
                    pending.push((w.inputs + 1..=w.inputs + count).map(|n| n.to_string()).collect());
                    w.inputs += count;
                }
            }
            let items = pending.drain(..).map(|values| (input, values)).collect();
            match produce(&me, &world, who, &mut sequences, items, false).await {
                Sending::Acked => {}
                Sending::Lost(rest) => {
                    let Some(next) = me.producer(&world, init(Some(who))).await else { break };
                    (who, pending) = (next, rest);
                    sequences.clear();
                }
                // Those sends end in an error and are never sent again.
                Sending::Failed => break,
            }
        }
    }
}

/// Reads inputs, writes one output each, commits outputs and offset in one transaction.
async fn worker(me: Rc<Client>, world: Shared, name: &'static str) {
    let init = Ask::Init { id: Some(name.into()), local: me.local, carried: None };
    let Some(mut who) = me.producer(&world, init).await else { return };
    let mut made = 0;
    loop {
        let member = {
            let mut w = world.borrow_mut();
            w.members += 1;
            w.members
        };
        me.call(&world, Ask::Join { member }).await;
        let mut position = loop {
            match me.call(&world, Ask::Offsets).await {
                Told::Offset(position) => break position,
                _ => turn().await,
            }
        };
        loop {
            made += 1;
            let key = (me.id.clone(), made);
            let (mut sequences, mut done, mut trouble) = (BTreeMap::new(), 0, false);
            world.borrow_mut().transactions.insert(key.clone(), Vec::new());
            let rounds = world.borrow_mut().rng.random_range(1..=3);
            for _ in 0..rounds {
                let (inputs, next) = match me.call(&world, Ask::Fetch { position }).await {
                    Told::Fetched(inputs, next) => (inputs, next),
                    _ => {
                        trouble = true;
                        break;
                    }
                };
                if inputs.is_empty() {
                    turn().await;
                    continue;
                }
                position = next;
                let mut items = Vec::new();
                for input in inputs {
                    let token = format!("{input} {} {}", key.0, key.1);
                    let mut w = world.borrow_mut();
                    let out = w.outputs[input.parse::<usize>().unwrap() % 2];
                    w.transactions.get_mut(&key).unwrap().push(token.clone());
                    items.push((out, vec![token]));
                    done += 1;
                }
                if !matches!(produce(&me, &world, who, &mut sequences, items, true).await, Sending::Acked) {
                    trouble = true;
                    break;
                }
                match me.call(&world, Ask::Offset { producer: who, position, member }).await {
                    Told::Done => {}
                    _ => {
                        trouble = true;
                        break;
                    }
                }
            }
            if done == 0 && !trouble {
                turn().await;
                continue;
            }
            let commit = !trouble && world.borrow_mut().chance(0.85);
            let Some(ended) = end(&me, &world, name, who, commit, &key).await else { return };
            who = ended.next;
            if ended.outcome == Outcome::Aborted {
                break;
            }
        }
    }
}

/// Transactions without offsets, over random partitions.
async fn writer(me: Rc<Client>, world: Shared, name: &'static str) {
    let init = Ask::Init { id: Some(name.into()), local: me.local, carried: None };
    let Some(mut who) = me.producer(&world, init).await else { return };
    for made in 1.. {
        let key = (me.id.clone(), made);
        let items: Vec<_> = {
            let mut w = world.borrow_mut();
            let count = w.rng.random_range(1..=3);
            let pick = |w: &mut World, n| {
                let out = w.rng.random_range(0..2);
                (w.outputs[out], vec![format!("{} {} {}", made * 100 + n, key.0, key.1)])
            };
            (0..count).map(|n| pick(&mut w, n)).collect()
        };
        let tokens = items.iter().flat_map(|(_, values)| values.clone()).collect();
        world.borrow_mut().transactions.insert(key.clone(), tokens);
        let sent = produce(&me, &world, who, &mut BTreeMap::new(), items, true).await;
        let commit = matches!(sent, Sending::Acked);
        let Some(ended) = end(&me, &world, name, who, commit, &key).await else { return };
        who = ended.next;
    }
}

/// Ends a transaction, and notes what was told.
async fn end(
    me: &Client,
    world: &Shared,
    name: &'static str,
    who: Producer,
    commit: bool,
    key: &Key,
) -> Option<Ended> {
    let outcome = if commit { Outcome::Committed } else { Outcome::Aborted };
    loop {
        match me.call(world, Ask::End { id: name.into(), producer: who, outcome }).await {
            Told::Ended(ended) => {
                let mut w = world.borrow_mut();
                w.told.insert(key.clone(), ended.outcome);
                w.say(|| format!("{key:?} told {ended:?}"));
                let asked_to_abort = !commit && ended.outcome == Outcome::Committed;
                must!(!asked_to_abort, "{key:?} asked for an abort and is told committed");
                return Some(ended);
            }
            Told::Busy => turn().await,
            _ => return None,
        }
    }
}

struct Simulation {
    world: Shared,
    plain: (Rc<Client>, Program),
    workers: Vec<(Rc<Client>, Program)>,
}

impl Simulation {
    fn new(seed: u64, trace: bool) -> Self {
        let world = Rc::new(RefCell::new(World::new(seed, trace)));
        let client = Client::new(&world, "P", false);
        let program = Box::pin(plain(client.clone(), world.clone()));
        let mut simulation = Simulation { plain: (client, program), workers: Vec::new(), world };
        simulation.spawn("A");
        simulation
    }

    fn spawn(&mut self, name: &'static str) {
        let local = self.world.borrow().locals[name];
        let client = Client::new(&self.world, name, local);
        let (me, world) = (client.clone(), self.world.clone());
        let program: Program =
            if name == "C" { Box::pin(writer(me, world, name)) } else { Box::pin(worker(me, world, name)) };
        self.workers.push((client, program));
    }

    fn clients(&self) -> Vec<Rc<Client>> {
        std::iter::once(&self.plain).chain(&self.workers).map(|(client, _)| client.clone()).collect()
    }

    fn step(&mut self, rates: &[(Act, u32)]) {
        let total: u32 = rates.iter().map(|(_, rate)| rate).sum();
        let mut pick = self.world.borrow_mut().rng.random_range(0..total);
        let found = rates.iter().find(|(_, rate)| match pick.checked_sub(*rate) {
            Some(rest) => {
                pick = rest;
                false
            }
            None => true,
        });
        let act = found.expect("within the total").0;
        let faults = self.world.borrow().faults > 0.0;
        let mut cx = Context::from_waker(Waker::noop());
        match act {
            Act::Network => {
                let clients = self.clients();
                self.world.borrow_mut().network(&clients);
            }
            Act::Disk => self.world.borrow_mut().disk(),
            Act::Plain => drop(self.plain.1.as_mut().poll(&mut cx)),
            Act::Worker => {
                if self.workers.is_empty() {
                    return;
                }
                let n = self.world.borrow_mut().rng.random_range(0..self.workers.len());
                let (client, program) = &mut self.workers[n];
                if client.paused.get() > 0 {
                    client.paused.set(client.paused.get() - 1);
                } else if !client.done.get() && program.as_mut().poll(&mut cx).is_ready() {
                    client.done.set(true);
                }
            }
            Act::Read => {
                let mut world = self.world.borrow_mut();
                let part = world.rng.random_range(0..2);
                world.look(part);
            }
            Act::Timeout => {
                let mut world = self.world.borrow_mut();
                let ms = world.rng.random_range(0..u64::from(TIMEOUT_MS));
                world.clock.0.fetch_add(ms, Ordering::Relaxed);
                world.say(|| format!("-- {ms} ms pass"));
                world.machine.shared.expire_transactions();
            }
            Act::Pause => {
                let mut world = self.world.borrow_mut();
                let paused = *[5, 20, 80].choose(&mut world.rng).unwrap();
                if let Some((client, _)) = self.workers.choose(&mut world.rng) {
                    client.paused.set(paused);
                }
            }
            Act::Crash => {
                let clients = self.clients();
                self.world.borrow_mut().crash(&clients);
            }
            Act::Input => {
                let mut world = self.world.borrow_mut();
                world.budget += world.rng.random_range(1..=6);
            }
            Act::Spawn => {
                let all_done = self.workers.iter().all(|(client, _)| client.done.get());
                if all_done || faults && self.workers.len() < 4 {
                    self.workers.retain(|(client, _)| !client.done.get());
                    let names: &[&'static str] =
                        if faults { &["A", "A", "B", "B", "C"] } else { &["A", "B"] };
                    let name = *names.choose(&mut self.world.borrow_mut().rng).unwrap();
                    self.spawn(name);
                }
            }
        }
    }

    fn run(&mut self, steps: usize) {
        let mut rates = {
            let rng = &mut self.world.borrow_mut().rng;
            [
                (Act::Network, 450),
                (Act::Disk, *[60, 160, 340].choose(rng).unwrap()),
                (Act::Plain, 50),
                (Act::Worker, 230),
                (Act::Read, 40),
                (Act::Timeout, *[1, 4, 10].choose(rng).unwrap()),
                (Act::Pause, 15),
                (Act::Spawn, 12),
                (Act::Crash, *[0, 3, 8, 15].choose(rng).unwrap()),
                (Act::Input, 12),
            ]
        };
        for _ in 0..steps {
            self.step(&rates);
        }
        {
            let mut world = self.world.borrow_mut();
            world.say(|| "-- no more faults".into());
            world.faults = 0.0;
        }
        for (client, _) in &self.workers {
            client.done.set(true);
        }
        for (act, rate) in &mut rates {
            match act {
                Act::Disk => *rate = 340,
                Act::Timeout | Act::Pause | Act::Crash | Act::Input => *rate = 0,
                _ => {}
            }
        }
        for n in 0..40_000 {
            self.step(&rates);
            if n == 8_000 {
                // Whatever is still open has nobody left.
                let world = self.world.borrow();
                world.clock.0.fetch_add(2 * u64::from(TIMEOUT_MS), Ordering::Relaxed);
                world.machine.shared.expire_transactions();
            }
            if self.is_finished() {
                let mut world = self.world.borrow_mut();
                for part in 0..2 {
                    while world.look(part) {}
                }
                world.check();
                return;
            }
        }
        violation("the loop does not end".into());
    }

    fn is_finished(&self) -> bool {
        let world = self.world.borrow();
        let shared = &world.machine.shared;
        {
            let core = shared.core.lock();
            if core.released_n != core.seq.n || !core.is_quiet() {
                return false;
            }
        }
        let state = shared.released.read();
        let end = state.partition(world.input).map_or(0, |p| p.offsets().high_watermark);
        let group =
            state.groups.get(GROUP).and_then(|g| g.get(&world.input)).map_or(0, |o| o.position.offset);
        world.plain_is_idle
            && world.inputs >= world.budget
            && group == end
            && state.owners.values().all(|o| o.txn.is_none())
    }
}

#[derive(Default, Debug)]
struct Totals {
    transactions: usize,
    committed: usize,
    aborted: usize,
    crashes: u32,
}

fn run_seed(seed: u64, steps: usize, trace: bool, totals: &mut Totals) -> Option<(String, Vec<String>)> {
    let simulation = Rc::new(RefCell::new(Simulation::new(seed, trace)));
    let failed = catch_unwind(AssertUnwindSafe(|| simulation.borrow_mut().run(steps))).err();
    let simulation = simulation.borrow();
    let what = failed.map(|cause| match cause.downcast::<Violation>() {
        Ok(violation) => violation.0,
        Err(other) => other.downcast::<String>().map_or_else(|_| "panic".into(), |s| format!("panic: {s}")),
    });
    // A panic may have left the world borrowed; then there is no trace to tell.
    if let Ok(mut world) = simulation.world.try_borrow_mut() {
        totals.transactions += world.transactions.len();
        totals.committed += world.told.values().filter(|o| **o == Outcome::Committed).count();
        totals.aborted += world.told.values().filter(|o| **o == Outcome::Aborted).count();
        totals.crashes += world.crashes;
        return what.map(|what| (what, world.trace.take().unwrap_or_default()));
    }
    what.map(|what| (what, Vec::new()))
}

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

/// `TXN_FROM` and `TXN_SEEDS` choose another range.
#[test]
fn no_schedule_loses_tears_or_doubles_anything() {
    let (from, seeds) = (env("TXN_FROM").unwrap_or(0), env("TXN_SEEDS").unwrap_or(150));
    let mut totals = Totals::default();
    for seed in from..from + seeds {
        if let Some((what, _)) = run_seed(seed, STEPS, false, &mut totals) {
            let mut short = (5..=STEPS).step_by(5);
            let steps = short.find(|n| run_seed(seed, *n, false, &mut Totals::default()).is_some());
            let steps = steps.unwrap_or(STEPS);
            let (what, trace) =
                run_seed(seed, steps, true, &mut Totals::default()).unwrap_or((what, Vec::new()));
            panic!("seed {seed}, {steps} steps: {what}\n{}", trace.join("\n"));
        }
    }
    // A schedule in which nothing happens proves nothing.
    let n = seeds as usize;
    assert!(totals.committed > n && totals.aborted > n && u64::from(totals.crashes) > seeds, "{totals:?}");
    if let Ok(path) = std::env::var("TXN_REPORT") {
        std::fs::write(path, format!("{totals:?}\n")).expect("the report is written");
    }
}

/// Sends sequence numbers 0, 5 and 1 of one producer; which of them were taken.
fn taken_around_a_gap() -> [bool; 3] {
    let mut world = World::new(0, false);
    let init = InitProducer { transactional_id: None, local: false, timeout_ms: TIMEOUT_MS, carried: None };
    let given = world.machine.shared.submit(init);
    assert!(world.machine.drain());
    let who = given.try_take().unwrap().unwrap();
    [0, 5, 1].map(|sequence| {
        let mut batch = BatchBuilder::new(BatchOptions::default());
        assert!(batch.push(RecordParts { value: Some(b"1"), ..RecordParts::default() }));
        let batch = batch.build(ProducerStamp { id: who.id, epoch: who.epoch, sequence });
        let append = AppendBatch { to: world.input, batch, connection: Connection::LOCAL };
        let answer = world.machine.shared.submit(append);
        assert!(world.machine.drain());
        answer.try_take().unwrap().is_ok()
    })
}

#[test]
fn a_refused_batch_moves_no_sequence() {
    assert_eq!(taken_around_a_gap(), [true, false, true]);
}

/// A transaction ends, another client takes the transactional id over, and the end is asked for again: is the first
/// client given what it was given before, rather than the other one's producer?
fn a_repeated_end_gives_the_same() -> bool {
    let mut world = World::new(0, false);
    fn done<T: Send + 'static>(
        world: &mut World,
        request: impl crate::plan::Request<Answer = T> + 'static,
    ) -> T {
        let answer = world.machine.shared.submit(request);
        assert!(world.machine.drain());
        answer.try_take().unwrap().unwrap()
    }
    let id = || "X".to_owned();
    let init =
        || InitProducer { transactional_id: Some(id()), local: false, timeout_ms: TIMEOUT_MS, carried: None };
    let first = done(&mut world, init());
    let (group, guard) = (GROUP.to_owned(), None);
    let offset = OffsetCommit { partition: world.input, position: Position::START, metadata: Bytes::new() };
    let (offsets, connection) = (vec![offset], Connection::LOCAL);
    done(&mut world, AddOffsets { producer: first, group, offsets, guard, connection });
    let end = || EndTxn { transactional_id: id(), producer: first, outcome: Outcome::Committed, connection };
    let ended = done(&mut world, end());
    let other = done(&mut world, init());
    assert_ne!(other, ended.next);
    done(&mut world, end()) == ended
}

#[test]
fn a_repeated_end_gives_what_the_first_one_gave() {
    assert!(a_repeated_end_gives_the_same());
}

#[cfg(feature = "faults")]
#[test]
fn a_repeated_end_that_gives_what_is_current_is_noticed() {
    fault::set(Some("retry-gives-current"));
    let same = a_repeated_end_gives_the_same();
    fault::set(None);
    assert!(!same);
}

#[cfg(feature = "faults")]
#[test]
fn a_sequence_that_a_refused_batch_moves_is_noticed() {
    fault::set(Some("sequence-on-reject"));
    let taken = taken_around_a_gap();
    fault::set(None);
    assert_ne!(taken, [true, false, true]);
}

#[cfg(feature = "faults")]
#[test]
fn each_broken_rule_is_noticed() {
    let only = std::env::var("TXN_FAULT").ok();
    let (mut report, mut missed) = (Vec::new(), Vec::new());
    for (name, _) in fault::PROTOCOL {
        // They have tests of their own. Clients that are refused long enough take another producer id, and go on; and
        // no schedule of thousands repeats an end across a take-over and still has the client to misuse the answer.
        if matches!(*name, "sequence-on-reject" | "retry-gives-current") {
            continue;
        }
        if only.as_ref().is_some_and(|only| only != name) {
            continue;
        }
        fault::set(Some(name));
        let seeds = 0..env("TXN_SEEDS").unwrap_or(3_000);
        let found = seeds
            .into_iter()
            .find_map(|seed| Some((seed, run_seed(seed, STEPS, false, &mut Totals::default())?.0)));
        fault::set(None);
        match found {
            Some((seed, what)) => report.push(format!("{name:24} seed {seed}: {what}")),
            None => missed.push(*name),
        }
    }
    if let Ok(path) = std::env::var("TXN_REPORT") {
        std::fs::write(path, report.join("\n") + "\n").expect("the report is written");
    }
    assert!(missed.is_empty(), "not noticed: {missed:?}\nnoticed:\n{}", report.join("\n"));
}
