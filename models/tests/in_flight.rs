//! The RPC client's in-flight table under every interleaving (of up to two preemptions): insert, complete,
//! cancel, close, drain, expire.
//!
//! The table is the file that `tidemill-rpc` compiles, over loom's lock. An expired call is a cancelled one whose
//! caller polled before, so both are `poll_end` then `cancel`. What each model shows stands above it; all of
//! them end with the permits counted.

#[path = "../../rpc/src/fate.rs"]
#[allow(dead_code, unreachable_pub, missing_docs, reason = "compiled here as a part of the table")]
mod fate;
mod sync {
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
            self.0.lock().expect("no model panics while it holds the lock")
        }
    }
}
#[path = "../../rpc/src/table.rs"]
#[allow(dead_code, reason = "each model uses a part")]
mod table;

use std::future::poll_fn;
use std::task::{Poll, Waker};

use fate::Fate;
use loom::future::block_on;
use loom::sync::Arc;
use loom::thread;
use table::{Begin, CallId, Cancelled, End, NotInFlight, Outgoing, Table};

/// Requests carry the number of their call, answers the number of the request they answer.
type Model = Table<u8, u8>;

/// Every schedule with up to this many preemptions: bugs need few, and each one more multiplies the time.
const PREEMPTIONS: usize = 2;

fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(model);
}

fn begin(table: &Model, call: u8) -> CallId {
    match table.begin(&mut None, &mut Some(call), Waker::noop()) {
        Begin::Started(id) => id,
        other => panic!("a slot was free, but: {other:?}"),
    }
}

fn requests(table: &Model) -> Vec<(CallId, u8)> {
    let mut taken = Vec::new();
    table.take(Waker::noop(), true, |outgoing| {
        if let Outgoing::Request(id, call) = outgoing {
            taken.push((id, call));
        }
        true
    });
    taken
}

/// The connection: takes one request, writes it, answers it.
fn serve_what_is_there(table: &Model) {
    for (id, call) in requests(table) {
        table.written([id]);
        assert_eq!(table.complete(id, call), Ok(()), "the call is in flight until it is answered");
    }
}

/// One whole call, as a caller awaits it.
fn call(table: &Model, number: u8) -> End<u8> {
    let mut ticket = None;
    let mut request = Some(number);
    let id = block_on(poll_fn(|cx| match table.begin(&mut ticket, &mut request, cx.waker()) {
        Begin::Started(id) => Poll::Ready(Ok(id)),
        Begin::Waiting => Poll::Pending,
        Begin::Closed => Poll::Ready(Err(End::Died(Fate::NotSent))),
        Begin::Draining => Poll::Ready(Err(End::Drained(Fate::NotSent))),
    }));
    match id {
        Ok(id) => block_on(poll_fn(|cx| table.poll_end(id, cx.waker()))),
        Err(end) => end,
    }
}

/// A cancelled or expired call ends once: with its answer or with its cancellation; its slot comes back when
/// the peer has answered, not before.
#[test]
fn cancel_races_the_answer() {
    explore(|| {
        let table = Arc::new(Model::new(1));
        let id = begin(&table, 7);
        let connection = thread::spawn({
            let table = Arc::clone(&table);
            move || serve_what_is_there(&table)
        });
        let ended = match table.poll_end(id, Waker::noop()) {
            Poll::Ready(end) => Cancelled::Ended(end),
            Poll::Pending => table.cancel(id),
        };
        connection.join().unwrap();
        match ended {
            Cancelled::Ended(end) => assert_eq!(end, End::Answer(7)),
            Cancelled::NotSent | Cancelled::Told => {}
        }
        assert_eq!(table.occupied(), 0, "answered, cancelled or never sent: the permit is back");
        assert!(requests(&table).is_empty());
    });
}

/// Close against answer: the caller learns one of them, at once, and `NotSent` only of a frame not fully written.
#[test]
fn close_races_the_answer() {
    explore(|| {
        let table = Arc::new(Model::new(1));
        let connection = thread::spawn({
            let table = Arc::clone(&table);
            move || {
                let mut written = false;
                for (id, call) in requests(&table) {
                    table.written([id]);
                    written = true;
                    // After a close nothing is in flight.
                    let _ = table.complete(id, call);
                }
                written
            }
        });
        let closer = thread::spawn({
            let table = Arc::clone(&table);
            move || table.close()
        });
        let end = call(&table, 7);
        let written = connection.join().unwrap();
        closer.join().unwrap();
        match end {
            End::Answer(answer) => assert!(answer == 7 && written),
            End::Died(Fate::NotSent) => {}
            End::Died(Fate::Unknown) => assert!(written),
            other => panic!("{other:?}"),
        }
        assert_eq!(table.occupied(), 0);
        assert_eq!(call(&table, 8), End::Died(Fate::NotSent), "nobody is let in after a close");
    });
}

/// Close against cancel: exactly one end, and the permit comes back though nobody answers.
#[test]
fn close_races_cancel() {
    explore(|| {
        let table = Arc::new(Model::new(1));
        let id = begin(&table, 7);
        let taken = requests(&table);
        table.written(taken.iter().map(|taken| taken.0));
        let closer = thread::spawn({
            let table = Arc::clone(&table);
            move || table.close()
        });
        match table.cancel(id) {
            Cancelled::Told => {}
            Cancelled::Ended(end) => assert_eq!(end, End::Died(Fate::Unknown)),
            Cancelled::NotSent => panic!("it was written"),
        }
        closer.join().unwrap();
        assert_eq!(table.occupied(), 0);
    });
}

/// One slot, two callers, a connection that sleeps until it is woken: no wake-up is lost, both are answered.
#[test]
fn waiting_callers_are_all_served() {
    explore(|| {
        let table = Arc::new(Model::new(1));
        let callers: Vec<_> = [1, 2]
            .map(|number| {
                let table = Arc::clone(&table);
                thread::spawn(move || assert_eq!(call(&table, number), End::Answer(number)))
            })
            .into();
        let mut answered = 0;
        block_on(poll_fn(|cx| {
            let mut taken = Vec::new();
            table.take(cx.waker(), true, |outgoing| {
                if let Outgoing::Request(id, call) = outgoing {
                    taken.push((id, call));
                }
                true
            });
            for (id, call) in taken {
                table.written([id]);
                assert_eq!(table.complete(id, call), Ok(()));
                answered += 1;
            }
            if answered == 2 { Poll::Ready(()) } else { Poll::Pending }
        }));
        callers.into_iter().for_each(|caller| caller.join().unwrap());
        assert_eq!(table.occupied(), 0);
    });
}

/// A waiter that leaves passes its permit on, whether or not it was handed over already.
#[test]
fn a_leaving_waiter_passes_its_permit_on() {
    explore(|| {
        let table = Arc::new(Model::new(1));
        let first = begin(&table, 1);
        serve_what_is_there(&table);
        let (mut second, mut third) = (None, None);
        assert_eq!(table.begin(&mut second, &mut Some(2), Waker::noop()), Begin::Waiting);
        assert_eq!(table.begin(&mut third, &mut Some(3), Waker::noop()), Begin::Waiting);
        let leaver = thread::spawn({
            let table = Arc::clone(&table);
            let second = second.expect("in line");
            move || table.forget(second)
        });
        let first_caller = thread::spawn({
            let table = Arc::clone(&table);
            move || assert_eq!(table.poll_end(first, Waker::noop()), Poll::Ready(End::Answer(1)))
        });
        let id = block_on(poll_fn(|cx| match table.begin(&mut third, &mut Some(3), cx.waker()) {
            Begin::Started(id) => Poll::Ready(id),
            _ => Poll::Pending,
        }));
        leaver.join().unwrap();
        first_caller.join().unwrap();
        assert_eq!(table.cancel(id), Cancelled::NotSent);
        assert_eq!(table.occupied(), 0);
    });
}

/// A peer that answers twice never reaches the next call in the recycled slot.
#[test]
fn a_recycled_slot_gets_no_stale_answer() {
    explore(|| {
        let table = Arc::new(Model::new(1));
        let first = begin(&table, 1);
        let taken = requests(&table);
        table.written(taken.iter().map(|taken| taken.0));
        assert_eq!(table.cancel(first), Cancelled::Told);
        let next = thread::spawn({
            let table = Arc::clone(&table);
            move || call(&table, 2)
        });
        assert_eq!(table.complete(first, 1), Ok(()), "an abandoned call waits for its answer");
        assert_eq!(
            table.complete(first, 1),
            Err(NotInFlight),
            "there is no second, whoever has the slot now"
        );
        block_on(poll_fn(|cx| {
            let mut served = false;
            let mut taken = Vec::new();
            table.take(cx.waker(), true, |outgoing| {
                if let Outgoing::Request(id, call) = outgoing {
                    taken.push((id, call));
                }
                true
            });
            for (id, call) in taken {
                assert_ne!(id, first, "a recycled slot has another generation");
                assert_eq!(table.complete(id, call), Ok(()));
                served = true;
            }
            if served { Poll::Ready(()) } else { Poll::Pending }
        }));
        assert_eq!(next.join().unwrap(), End::Answer(2));
        assert_eq!(table.occupied(), 0);
    });
}

/// Drain against a caller: what the peer accepted is answered, what lies beyond its count is rejected, what was not
/// sent says so; a caller that comes later is not let in.
#[test]
fn drain_races_begin_and_answer() {
    explore(|| {
        let table = Arc::new(Model::new(2));
        let accepted = begin(&table, 1);
        let taken = requests(&table);
        table.written(taken.iter().map(|taken| taken.0));
        let caller = thread::spawn({
            let table = Arc::clone(&table);
            move || call(&table, 2)
        });
        // The second call may be written before the GOAWAY, which does not count it.
        let second = requests(&table);
        table.written(second.iter().map(|taken| taken.0));
        table.drain(1);
        assert_eq!(table.complete(accepted, 1), Ok(()));
        assert_eq!(table.poll_end(accepted, Waker::noop()), Poll::Ready(End::Answer(1)));
        let fate = if second.is_empty() { Fate::NotSent } else { Fate::Rejected };
        assert_eq!(caller.join().unwrap(), End::Drained(fate));
        assert_eq!(table.occupied(), 0);
    });
}
