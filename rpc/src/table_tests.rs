//! The in-flight table against a small reference: random operations of callers, connection and peer.
//!
//! The reference knows nothing of slots or generations: it keeps, per call, how far it got, and says what each operation
//! must return. A stale answer, a lost permit or a second end shows as a difference.

use std::collections::{BTreeMap, VecDeque};
use std::task::{Poll, Waker};

use proptest::prelude::*;

use crate::fate::Fate;
use crate::table::{Begin, CallId, Cancelled, End, NotInFlight, Outgoing, Table};

const LIMIT: u32 = 3;

#[derive(Debug, Clone, Copy)]
enum Step {
    /// A new caller asks for a slot.
    Begin,
    /// A waiting caller asks again.
    Retry(usize),
    /// A waiting caller leaves.
    Forget(usize),
    /// A caller looks for its end.
    Poll(usize),
    /// A caller gives up.
    Cancel(usize),
    /// The connection takes up to this many requests.
    Take(usize),
    /// The oldest frame under way is written.
    Written,
    /// The peer answers one it has seen.
    Answer(usize),
    /// The peer answers one it answered before.
    AnswerAgain(usize),
    /// The peer stops, having seen all that was written.
    Drain,
    Close,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => Just(Step::Begin),
        4 => any::<usize>().prop_map(Step::Retry),
        1 => any::<usize>().prop_map(Step::Forget),
        5 => any::<usize>().prop_map(Step::Poll),
        3 => any::<usize>().prop_map(Step::Cancel),
        5 => (1..4_usize).prop_map(Step::Take),
        5 => Just(Step::Written),
        5 => any::<usize>().prop_map(Step::Answer),
        1 => any::<usize>().prop_map(Step::AnswerAgain),
    ];
    let last = prop_oneof![2 => Just(None), 1 => Just(Some(Step::Drain)), 1 => Just(Some(Step::Close))];
    (prop::collection::vec(step.clone(), 0..120), last, prop::collection::vec(step, 0..40)).prop_map(
        |(mut steps, last, more)| {
            steps.extend(last);
            steps.extend(more);
            steps
        },
    )
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum At {
    Queued,
    Writing,
    Sent,
    /// Its caller is gone; the peer will still answer.
    Abandoned,
}

#[derive(Debug)]
struct Call {
    id: CallId,
    at: At,
    ordinal: u64,
    /// Waits for its caller.
    end: Option<End<u32>>,
}

/// What must be true, in the plainest terms.
#[derive(Default)]
struct Reference {
    /// In line, in order; `true` where a permit was handed over.
    line: VecDeque<(u32, bool)>,
    calls: BTreeMap<u32, Call>,
    queue: VecDeque<u32>,
    under_way: VecDeque<u32>,
    taken: u64,
    draining: bool,
    closed: bool,
}

impl Reference {
    fn used(&self) -> usize {
        self.calls.len() + self.line.iter().filter(|waiter| waiter.1).count()
    }

    /// Hands free permits to the first in line.
    fn settle(&mut self) {
        if self.draining || self.closed {
            return;
        }
        while self.used() < LIMIT as usize {
            let Some(waiter) = self.line.iter_mut().find(|waiter| !waiter.1) else { return };
            waiter.1 = true;
        }
    }

    fn end_all(&mut self, end: impl Fn(&Call) -> Option<End<u32>>) {
        self.line.clear();
        self.queue.clear();
        self.calls.retain(|_, call| {
            if call.end.is_some() {
                return true;
            }
            let Some(end) = end(call) else { return true };
            call.end = Some(end);
            call.at != At::Abandoned
        });
    }
}

fn pick<T: Copy>(from: &[T], index: usize) -> Option<T> {
    (!from.is_empty()).then(|| from[index % from.len()])
}

fn run(steps: &[Step]) {
    let table: Table<u32, u32> = Table::new(LIMIT);
    let mut reference = Reference::default();
    let mut tickets: BTreeMap<u32, Option<u64>> = BTreeMap::new();
    let mut answered: Vec<CallId> = Vec::new();
    let mut next = 0_u32;
    for step in steps {
        match *step {
            Step::Begin => {
                let number = next;
                next += 1;
                tickets.insert(number, None);
                ask(&table, &mut reference, &mut tickets, number);
            }
            Step::Retry(index) => {
                let waiting: Vec<u32> = tickets.keys().copied().collect();
                if let Some(number) = pick(&waiting, index) {
                    ask(&table, &mut reference, &mut tickets, number);
                }
            }
            Step::Forget(index) => {
                let waiting: Vec<u32> = tickets.keys().copied().collect();
                if let Some(number) = pick(&waiting, index) {
                    if let Some(Some(ticket)) = tickets.remove(&number) {
                        table.forget(ticket);
                    }
                    reference.line.retain(|waiter| waiter.0 != number);
                }
            }
            Step::Poll(index) => {
                let Some((number, id)) = pick(&owned(&reference), index) else { continue };
                let ended = reference.calls.get(&number).is_some_and(|call| call.end.is_some());
                match table.poll_end(id, Waker::noop()) {
                    Poll::Pending => assert!(!ended, "{number} has ended"),
                    Poll::Ready(end) => {
                        assert_eq!(Some(end), reference.calls.remove(&number).and_then(|call| call.end));
                    }
                }
            }
            Step::Cancel(index) => {
                let Some((number, id)) = pick(&owned(&reference), index) else { continue };
                let call = reference.calls.get_mut(&number).unwrap();
                let expected = match (call.end.take(), call.at) {
                    (Some(end), _) => Cancelled::Ended(end),
                    (None, At::Queued) => Cancelled::NotSent,
                    (None, _) => Cancelled::Told,
                };
                if expected == Cancelled::Told {
                    call.at = At::Abandoned;
                } else {
                    reference.calls.remove(&number);
                    reference.queue.retain(|queued| *queued != number);
                }
                assert_eq!(table.cancel(id), expected);
            }
            Step::Take(most) => take(&table, &mut reference, most),
            Step::Written => {
                let Some(number) = reference.under_way.pop_front() else { continue };
                if let Some(call) = reference.calls.get_mut(&number) {
                    if call.at == At::Writing {
                        call.at = At::Sent;
                    }
                    table.written([call.id]);
                }
            }
            Step::Answer(index) => {
                let seen = |call: &&Call| call.end.is_none() && matches!(call.at, At::Sent | At::Abandoned);
                let seen: Vec<u32> = reference
                    .calls
                    .iter()
                    .filter(|(_, call)| seen(call))
                    .map(|(number, _)| *number)
                    .collect();
                let Some(number) = pick(&seen, index) else { continue };
                let call = reference.calls.get_mut(&number).unwrap();
                let id = call.id;
                call.end = Some(End::Answer(number));
                if call.at == At::Abandoned {
                    reference.calls.remove(&number);
                }
                assert_eq!(table.complete(id, number), Ok(()));
                answered.push(id);
            }
            Step::AnswerAgain(index) => {
                if let Some(id) = pick(&answered, index) {
                    assert_eq!(table.complete(id, u32::MAX), Err(NotInFlight), "{id:?} was answered before");
                }
            }
            Step::Drain if !reference.closed => {
                let accepted = reference.taken - reference.under_way.len() as u64;
                reference.draining = true;
                reference.end_all(|call| match call.at {
                    At::Queued => Some(End::Drained(Fate::NotSent)),
                    _ if call.ordinal >= accepted => Some(End::Drained(Fate::Rejected)),
                    _ => None,
                });
                table.drain(accepted);
            }
            Step::Drain => {}
            Step::Close => {
                reference.closed = true;
                reference.end_all(|call| {
                    let not_sent = matches!(call.at, At::Queued | At::Writing);
                    Some(End::Died(if not_sent { Fate::NotSent } else { Fate::Unknown }))
                });
                table.close();
            }
        }
        reference.settle();
        assert_eq!(table.occupied(), reference.used(), "permits after {step:?}");
    }
}

/// Calls whose callers still hold them.
fn owned(reference: &Reference) -> Vec<(u32, CallId)> {
    let held = reference.calls.iter().filter(|(_, call)| call.at != At::Abandoned);
    held.map(|(number, call)| (*number, call.id)).collect()
}

fn ask(
    table: &Table<u32, u32>,
    reference: &mut Reference,
    tickets: &mut BTreeMap<u32, Option<u64>>,
    number: u32,
) {
    let ticket = tickets.get_mut(&number).unwrap();
    let begun = table.begin(ticket, &mut Some(number), Waker::noop());
    if reference.closed || reference.draining {
        assert_eq!(begun, if reference.closed { Begin::Closed } else { Begin::Draining });
        tickets.remove(&number);
        return;
    }
    let place = reference.line.iter().position(|waiter| waiter.0 == number);
    let admitted = match place {
        Some(place) => reference.line[place].1,
        None => reference.used() < LIMIT as usize && reference.line.iter().all(|waiter| waiter.1),
    };
    match begun {
        Begin::Started(id) => {
            assert!(admitted, "{number} was let in before its turn");
            assert!(reference.calls.values().all(|call| call.id != id), "{id:?} is in use");
            reference.line.retain(|waiter| waiter.0 != number);
            reference.calls.insert(number, Call { id, at: At::Queued, ordinal: u64::MAX, end: None });
            reference.queue.push_back(number);
            tickets.remove(&number);
        }
        Begin::Waiting => {
            assert!(!admitted, "{number} had a permit");
            if place.is_none() {
                reference.line.push_back((number, false));
            }
        }
        other => panic!("{other:?}"),
    }
}

fn take(table: &Table<u32, u32>, reference: &mut Reference, most: usize) {
    let mut count = 0;
    let mut taken = Vec::new();
    table.take(Waker::noop(), true, |outgoing| match outgoing {
        Outgoing::Request(id, number) => {
            taken.push((id, number));
            count += 1;
            count < most
        }
        Outgoing::Cancel(id) => {
            let call = reference.calls.values().find(|call| call.id == id);
            assert!(call.is_some_and(|call| call.at == At::Abandoned), "cancels what is abandoned only");
            true
        }
    });
    let expected: Vec<u32> = reference.queue.drain(..most.min(reference.queue.len())).collect();
    assert_eq!(taken.iter().map(|taken| taken.1).collect::<Vec<_>>(), expected, "in the order of begin");
    for (id, number) in taken {
        let call = reference.calls.get_mut(&number).unwrap();
        assert_eq!(call.id, id);
        call.at = At::Writing;
        call.ordinal = reference.taken;
        reference.taken += 1;
        reference.under_way.push_back(number);
    }
}

/// 2000 cases, or as many as `PROPTEST_CASES` says.
fn config() -> ProptestConfig {
    let told = std::env::var_os("PROPTEST_CASES").is_some();
    let config = ProptestConfig::default();
    if told { config } else { ProptestConfig { cases: 2000, ..config } }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn agrees_with_the_reference(steps in steps()) {
        run(&steps);
    }
}
