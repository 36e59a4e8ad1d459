//! The DSL: handles on the way from a source to its sinks.
//!
//! ```text
//!   Flow ─source─▶ Source<T> ─map…─▶ Stream<T> ─key_by─▶ Keyed<K, T> ─window─▶ Windows<K, T>
//!                                        │                   ▲ │                    │ count, fold
//!                                        └─to              to─┘ └ map, filter…   Windowed<K, V, T> ─late_to, drop_late─▶ Keyed<K, Window<K, V>>
//! ```
//!
//! Mistakes in the order of calls do not compile, and the message names the call that is missing: a window without a key
//! (`key_by`), results whose late rows are not settled (`late_to`).
//!
//! ```compile_fail,E0277
//! # use tidemill_stream::*;
//! fn build(flow: &Flow) {
//!     let windows = flow.source(topic("a"), Text).window(Tumbling::of(std::time::Duration::from_secs(5)));
//! }
//! ```
//!
//! ```compile_fail,E0277
//! # use tidemill_stream::*;
//! fn build(flow: &Flow) {
//!     let counts = flow
//!         .source(topic("a"), Text)
//!         .key_by(String::clone)
//!         .window(Tumbling::of(std::time::Duration::from_secs(5)))
//!         .count("counts")
//!         .map(|w| w.value);
//! }
//! ```
//!
//! A handle is consumed by the next call; there are no closure types in it, so error messages name the user's types
//! only. Inside, a handle is a function that waits for everything behind it and then installs the whole chain.

use std::marker::PhantomData;
use std::rc::Rc;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::chain::{
    ByKey, DecodeRows, Decoding, Filter, FlatMap, Keyless, Map, OnMalformed, Rows, Sink, SourceHead,
    StageFactory, TimesOf, TryMap,
};
use crate::codec::{Decoder, Encoder, state};
use crate::engine::window::{Aggregation, Counting, Edge, EdgeSpec, Folding, TumblingStep};
use crate::error::PlanError;
use crate::guarantee::Guarantee;
use crate::key::Key;
use crate::plan::{Graph, Role, SharedGraph, SourceSpec, StepSpec};
use crate::state::StoreId;
use crate::time::{EventTime, Timestamp, Tumbling, Window};

/// A topic, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topic(String);

/// A topic, by name.
pub fn topic(name: impl Into<String>) -> Topic {
    Topic(name.into())
}

/// Where a job's pipeline begins.
#[derive(Default)]
pub struct Flow {
    graph: SharedGraph,
}

impl Flow {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn graph(&self) -> &SharedGraph {
        &self.graph
    }

    /// What a crash may do to the job's output; exactly once where nothing is said. A run may ask for another one.
    pub fn guarantee(&self, guarantee: Guarantee) {
        self.graph.borrow_mut().guarantee = guarantee;
    }

    /// Reads a topic, a row per record.
    pub fn source<D: Decoder>(&self, topic: Topic, decoder: D) -> Source<D::Item> {
        let mut graph = self.graph.borrow_mut();
        if let Err(e) = crate::names::check_topic(&topic.0) {
            graph.fail(e.into());
        }
        if graph.source.is_some() {
            graph.fail(PlanError::SecondSource { topic: topic.0.clone() });
        }
        let open = graph.open_end(format!("source `{}`", topic.0));
        graph.source.get_or_insert(SourceSpec { topic: topic.0, event_time: None });
        Source {
            graph: Rc::clone(&self.graph),
            decoder: Arc::new(Decoding(decoder)),
            times: None,
            bound: 0,
            open,
        }
    }
}

/// Closes a stream: waits for the chain behind it.
type Connect<T> = Box<dyn FnOnce(StageFactory<T>)>;

/// The rows of a topic. Only here are event time and malformed records settled.
#[must_use = "a stream without a sink is refused: end it with `.to(..)`"]
pub struct Source<T> {
    graph: SharedGraph,
    decoder: Arc<dyn DecodeRows<T>>,
    times: Option<TimesOf<T>>,
    bound: i64,
    open: usize,
}

impl<T: Send + 'static> Source<T> {
    /// Which moment a row belongs to, and how event time advances. A window needs it; without it a row's time is its
    /// record's timestamp.
    pub fn event_time<E, F>(self, at: F, settings: EventTime) -> Self
    where
        E: Into<Timestamp>,
        F: Fn(&T) -> E + Send + Sync + 'static,
    {
        if let Some(source) = &mut self.graph.borrow_mut().source {
            source.event_time = Some(settings);
        }
        let times: TimesOf<T> =
            Arc::new(move |values, times| times.extend(values.iter().map(|v| at(v).into().millis())));
        Self { times: Some(times), bound: settings.bound, ..self }
    }

    /// Writes records that cannot be read to a topic: key, value, headers and timestamp as they were, a header
    /// `reason`, in the partition number they came from.
    pub fn dead_letter_to(self, topic: Topic) -> Self {
        let mut graph = self.graph.borrow_mut();
        let sink = graph.add_sink(&topic.0, Role::DeadLetter);
        graph.malformed = Some(OnMalformed::DeadLetter(sink));
        drop(graph);
        self
    }

    /// Counts and drops records that cannot be read.
    pub fn skip_malformed(self) -> Self {
        self.graph.borrow_mut().malformed = Some(OnMalformed::Skip);
        self
    }

    /// The rows, with time and malformed records settled. The operators of [`Stream`] do this by themselves.
    pub fn stream(self) -> Stream<T> {
        let Self { graph, decoder, times, bound, open } = self;
        let malformed = graph.borrow().malformed.unwrap_or(OnMalformed::Stop);
        let shared = Rc::clone(&graph);
        let connect: Connect<T> = Box::new(move |next| {
            shared.borrow_mut().head = Some(Arc::new(move |env| {
                Box::new(SourceHead {
                    decoder: Arc::clone(&decoder),
                    times: times.clone(),
                    bound,
                    malformed,
                    env: env.clone(),
                    rows: Rows::default(),
                    next: next(env),
                })
            }));
        });
        Stream { graph, connect, malformed, open }
    }

    /// See [`Stream::map`].
    pub fn map<U: Send + 'static>(self, f: impl Fn(T) -> U + Send + Sync + 'static) -> Stream<U> {
        self.stream().map(f)
    }

    /// See [`Stream::try_map`].
    pub fn try_map<U, E>(self, f: impl Fn(T) -> Result<U, E> + Send + Sync + 'static) -> Stream<U>
    where
        U: Send + 'static,
        E: std::fmt::Display + 'static,
    {
        self.stream().try_map(f)
    }

    /// See [`Stream::filter`].
    pub fn filter(self, f: impl Fn(&T) -> bool + Send + Sync + 'static) -> Stream<T> {
        self.stream().filter(f)
    }

    /// See [`Stream::flat_map`].
    pub fn flat_map<U, I>(self, f: impl Fn(T) -> I + Send + Sync + 'static) -> Stream<U>
    where
        U: Send + 'static,
        I: IntoIterator<Item = U> + 'static,
    {
        self.stream().flat_map(f)
    }

    /// See [`Stream::key_by`].
    pub fn key_by<K: Key>(self, f: impl Fn(&T) -> K + Send + Sync + 'static) -> Keyed<K, T> {
        self.stream().key_by(f)
    }

    /// See [`Stream::to`].
    pub fn to(self, topic: Topic, encoder: impl Encoder<T>) {
        self.stream().to(topic, encoder);
    }

    /// See [`Keyed::window`]: it needs a key.
    pub fn window(
        self,
        windows: Tumbling,
    ) -> Windows<<Stream<T> as IsKeyed>::Key, <Stream<T> as IsKeyed>::Row>
    where
        Stream<T>: IsKeyed,
    {
        self.stream().into_keyed().window(windows)
    }
}

/// Rows without a key.
#[must_use = "a stream without a sink is refused: end it with `.to(..)`"]
pub struct Stream<T> {
    graph: SharedGraph,
    connect: Connect<T>,
    malformed: OnMalformed,
    open: usize,
}

/// Notes an operator, which is now the end of the stream.
fn operator(graph: &SharedGraph, open: usize, name: &str) {
    graph.borrow_mut().operators.push(name.to_owned());
    rename(graph, open, &format!("`{name}`"));
}

fn rename(graph: &SharedGraph, open: usize, step: &str) {
    if let Some(name) = graph.borrow_mut().open.get_mut(&open) {
        step.clone_into(name);
    }
}

impl<T: Send + 'static> Stream<T> {
    fn then<U>(self, step: &str, connect: impl FnOnce(Connect<T>) -> Connect<U>) -> Stream<U> {
        operator(&self.graph, self.open, step);
        Stream {
            connect: connect(self.connect),
            graph: self.graph,
            malformed: self.malformed,
            open: self.open,
        }
    }

    /// A row for each row.
    pub fn map<U: Send + 'static>(self, f: impl Fn(T) -> U + Send + Sync + 'static) -> Stream<U> {
        self.then("map", |connect| mapped(connect, f))
    }

    /// A row for each row, or an error, which goes where the source's malformed records go.
    pub fn try_map<U, E>(self, f: impl Fn(T) -> Result<U, E> + Send + Sync + 'static) -> Stream<U>
    where
        U: Send + 'static,
        E: std::fmt::Display + 'static,
    {
        let (f, malformed) = (Arc::new(f), self.malformed);
        self.then("try_map", |connect| {
            Box::new(move |next| {
                connect(Arc::new(move |env| {
                    let (f, env_of_task) = (Arc::clone(&f), env.clone());
                    Box::new(TryMap { f, malformed, env: env_of_task, out: Rows::default(), next: next(env) })
                }));
            })
        })
    }

    /// The rows for which `f` holds.
    pub fn filter(self, f: impl Fn(&T) -> bool + Send + Sync + 'static) -> Self {
        self.then("filter", |connect| filtered(connect, f))
    }

    /// Any number of rows for each row.
    pub fn flat_map<U, I>(self, f: impl Fn(T) -> I + Send + Sync + 'static) -> Stream<U>
    where
        U: Send + 'static,
        I: IntoIterator<Item = U> + 'static,
    {
        self.then("flat_map", |connect| flat_mapped(connect, f))
    }

    /// Gives every row a key: what windows group by, and what `to` writes as the record's key.
    pub fn key_by<K: Key>(self, f: impl Fn(&T) -> K + Send + Sync + 'static) -> Keyed<K, T> {
        operator(&self.graph, self.open, "key_by");
        let connect = mapped(self.connect, move |value| (f(&value), value));
        Keyed { graph: self.graph, connect, open: self.open }
    }

    /// Writes the rows to a topic, without a key, each to the partition number it came from.
    pub fn to(self, topic: Topic, encoder: impl Encoder<T>) {
        let sink = {
            let mut graph = self.graph.borrow_mut();
            graph.open.remove(&self.open);
            graph.add_sink(&topic.0, Role::Output)
        };
        let encoder = Arc::new(encoder);
        (self.connect)(Arc::new(move |env| {
            Box::new(Sink::<_, Keyless>::new(sink, Arc::clone(&encoder), env))
        }));
    }

    /// Groups by key and window: it needs a key, so this exists only behind `key_by`.
    pub fn window(self, windows: Tumbling) -> Windows<<Self as IsKeyed>::Key, <Self as IsKeyed>::Row>
    where
        Self: IsKeyed,
    {
        self.into_keyed().window(windows)
    }
}

fn mapped<T: Send + 'static, U: Send + 'static>(
    connect: Connect<T>,
    f: impl Fn(T) -> U + Send + Sync + 'static,
) -> Connect<U> {
    let f = Arc::new(f);
    Box::new(move |next| {
        connect(Arc::new(move |env| {
            Box::new(Map { f: Arc::clone(&f), out: Rows::default(), next: next(env) })
        }));
    })
}

fn flat_mapped<T, U, I>(connect: Connect<T>, f: impl Fn(T) -> I + Send + Sync + 'static) -> Connect<U>
where
    T: Send + 'static,
    U: Send + 'static,
    I: IntoIterator<Item = U> + 'static,
{
    let f = Arc::new(f);
    Box::new(move |next| {
        connect(Arc::new(move |env| {
            Box::new(FlatMap { f: Arc::clone(&f), out: Rows::default(), next: next(env) })
        }));
    })
}

fn filtered<T: Send + 'static>(
    connect: Connect<T>,
    f: impl Fn(&T) -> bool + Send + Sync + 'static,
) -> Connect<T> {
    let f = Arc::new(f);
    Box::new(move |next| {
        connect(Arc::new(move |env| {
            Box::new(Filter { f: Arc::clone(&f), out: Rows::default(), next: next(env) })
        }));
    })
}

/// A stream whose rows have a key.
#[diagnostic::on_unimplemented(
    message = "a window needs a key",
    label = "these rows have no key",
    note = "call `.key_by(|row| ...)` before `.window(...)`"
)]
pub trait IsKeyed: Sized {
    /// The key.
    type Key: Key;
    /// The row.
    type Row: Send + 'static;
    /// The same stream.
    fn into_keyed(self) -> Keyed<Self::Key, Self::Row>;
}

/// Rows with a key, which they keep through `map` and which `to` writes.
#[must_use = "a stream without a sink is refused: end it with `.to(..)`"]
pub struct Keyed<K, T> {
    graph: SharedGraph,
    connect: Connect<(K, T)>,
    open: usize,
}

impl<K: Key, T: Send + 'static> IsKeyed for Keyed<K, T> {
    type Key = K;
    type Row = T;
    fn into_keyed(self) -> Self {
        self
    }
}

impl<K: Key, T: Send + 'static> Keyed<K, T> {
    /// A row for each row; the key stays.
    pub fn map<U: Send + 'static>(self, f: impl Fn(T) -> U + Send + Sync + 'static) -> Keyed<K, U> {
        operator(&self.graph, self.open, "map");
        let connect = mapped(self.connect, move |(key, value)| (key, f(value)));
        Keyed { graph: self.graph, connect, open: self.open }
    }

    /// Any number of rows for each row; each keeps the key.
    pub fn flat_map<U, I>(self, f: impl Fn(T) -> I + Send + Sync + 'static) -> Keyed<K, U>
    where
        U: Send + 'static,
        I: IntoIterator<Item = U> + 'static,
    {
        operator(&self.graph, self.open, "flat_map");
        let connect = flat_mapped(self.connect, move |(key, value): (K, T)| {
            let made: Vec<_> = f(value).into_iter().map(|value| (key.clone(), value)).collect();
            made
        });
        Keyed { graph: self.graph, connect, open: self.open }
    }

    /// The rows for which `f` holds.
    pub fn filter(self, f: impl Fn(&T) -> bool + Send + Sync + 'static) -> Self {
        operator(&self.graph, self.open, "filter");
        let connect = filtered(self.connect, move |(_, value): &(K, T)| f(value));
        Self { connect, ..self }
    }

    /// Writes the rows to a topic. The record's key is the row's key and decides the partition (murmur2, as Kafka's
    /// clients do); the record's time is the row's event time, for a window's result window end - 1 ms.
    pub fn to(self, topic: Topic, encoder: impl Encoder<T>) {
        let sink = {
            let mut graph = self.graph.borrow_mut();
            graph.open.remove(&self.open);
            graph.add_sink(&topic.0, Role::Output)
        };
        let encoder = Arc::new(encoder);
        (self.connect)(Arc::new(move |env| Box::new(Sink::<_, ByKey>::new(sink, Arc::clone(&encoder), env))));
    }

    /// Groups the rows by key and window.
    pub fn window(self, windows: Tumbling) -> Windows<K, T> {
        operator(&self.graph, self.open, "window");
        Windows { keyed: self, windows }
    }
}

/// Rows grouped by key and window, to be aggregated.
#[must_use = "windows need an aggregate: `count` or `fold`"]
pub struct Windows<K, T> {
    keyed: Keyed<K, T>,
    windows: Tumbling,
}

impl<K: Key, T: Send + 'static> Windows<K, T> {
    /// Counts the rows. `name` is the name its state keeps across versions of the job.
    pub fn count(self, name: &str) -> Windowed<K, u64, T> {
        self.aggregate("count", name, Counting)
    }

    /// Folds the rows into an accumulator that starts at `init`.
    ///
    /// Rows of different partitions are folded in no particular order: the result is a function of the input only if
    /// the order does not matter to `f`, or if all rows of a key are in one partition.
    pub fn fold<A, F>(self, name: &str, init: A, f: F) -> Windowed<K, A, T>
    where
        A: Serialize + DeserializeOwned + Clone + Send + Sync + 'static,
        F: Fn(&mut A, T) + Send + Sync + 'static,
    {
        self.aggregate("fold", name, Folding { init, f, row: PhantomData })
    }

    fn aggregate<G: Aggregation<T>>(
        self,
        aggregate: &'static str,
        name: &str,
        aggregation: G,
    ) -> Windowed<K, G::Acc, T> {
        let Keyed { graph, connect, open } = self.keyed;
        rename(&graph, open, &format!("window step `{name}` (say `late_to` or `drop_late`)"));
        if graph.borrow().step.is_some() {
            graph.borrow_mut().fail(PlanError::SecondKeyedStep { step: name.to_owned() });
        }
        let (windows, name) = (self.windows, name.to_owned());
        let aggregation = Arc::new(aggregation);
        let finish = Box::new(move |graph: &SharedGraph, late| {
            let edge = EdgeSpec { windows, late };
            let upstream = Arc::clone(&aggregation);
            connect(Arc::new(move |env| Box::new(Edge::new(Arc::clone(&upstream), edge, env))));
            rename(graph, open, &format!("window step `{name}`"));
            let shared = Rc::clone(graph);
            let connect: Connect<(K, Window<K, G::Acc>)> = Box::new(move |next| {
                let step = name.clone();
                let factory = Arc::new(move |env: &crate::chain::TaskEnv, setup| {
                    let (step, aggregation) = (step.clone(), Arc::clone(&aggregation));
                    let step = TumblingStep::new(step, windows, aggregation, next(env), setup)?;
                    Ok(Box::new(step) as Box<dyn crate::engine::window::KeyedStep>)
                });
                let spec = StepSpec {
                    name,
                    windows,
                    store: StoreId(1),
                    aggregate,
                    key_type: std::any::type_name::<K>(),
                    show_value: |bytes| serde_json::to_value(state::decode::<G::Acc>(bytes).ok()?).ok(),
                    factory,
                };
                let graph: &mut Graph = &mut shared.borrow_mut();
                graph.step.get_or_insert(spec);
            });
            connect
        });
        Windowed { graph, finish, open, row: PhantomData }
    }
}

type Finish<K, V> = Box<dyn FnOnce(&SharedGraph, Option<crate::plan::SinkId>) -> Connect<(K, Window<K, V>)>>;

/// Results of windows whose late rows are not settled yet: `late_to` or `drop_late` makes them a stream.
#[must_use = "say what becomes of late rows: `.late_to(topic)` or `.drop_late()`"]
pub struct Windowed<K, V, R> {
    graph: SharedGraph,
    finish: Finish<K, V>,
    open: usize,
    row: PhantomData<fn() -> R>,
}

/// Results whose late rows are settled.
#[diagnostic::on_unimplemented(
    message = "say first what becomes of the rows that are too late for their window",
    label = "late rows are not settled here",
    note = "call `.late_to(topic)` or `.drop_late()` right after the aggregate"
)]
pub trait LateSettled {}

impl<K: Key, V: Send + 'static, R> Windowed<K, V, R> {
    /// Writes the source record of every late row to a topic: key, value, headers and timestamp as they were, in the
    /// partition number it came from.
    pub fn late_to(self, topic: Topic) -> Keyed<K, Window<K, V>> {
        let sink = self.graph.borrow_mut().add_sink(&topic.0, Role::Late);
        self.settle(Some(sink))
    }

    /// Counts and drops late rows.
    pub fn drop_late(self) -> Keyed<K, Window<K, V>> {
        self.settle(None)
    }

    fn settle(self, late: Option<crate::plan::SinkId>) -> Keyed<K, Window<K, V>> {
        let connect = (self.finish)(&self.graph, late);
        Keyed { graph: self.graph, connect, open: self.open }
    }

    /// Exists behind `late_to` and `drop_late` only.
    pub fn map<U>(self, _: impl Fn(Window<K, V>) -> U) -> Keyed<K, U>
    where
        Self: LateSettled,
    {
        unreachable!("LateSettled is implemented by nothing")
    }

    /// Exists behind `late_to` and `drop_late` only.
    pub fn filter(self, _: impl Fn(&Window<K, V>) -> bool) -> Keyed<K, Window<K, V>>
    where
        Self: LateSettled,
    {
        unreachable!("LateSettled is implemented by nothing")
    }

    /// Exists behind `late_to` and `drop_late` only.
    pub fn to(self, _: Topic, _: impl Encoder<Window<K, V>>)
    where
        Self: LateSettled,
    {
        unreachable!("LateSettled is implemented by nothing")
    }
}
