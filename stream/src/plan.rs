//! The plan: what a job's DSL calls came to, checked, and able to make the chains of any number of tasks.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::chain::{HeadFactory, OnMalformed, TaskEnv};
use crate::codec;
use crate::dsl::Flow;
use crate::engine::window::StepFactory;
use crate::error::{PlanError, Result};
use crate::guarantee::Guarantee;
use crate::names::{GUARANTEE, JobRecord, StoreRecord, check_topic};
use crate::state::StoreId;
use crate::time::{EventTime, Tumbling};

/// A job: a name, and the pipeline that it builds.
///
/// See the [crate's front page](crate) for an example.
pub trait Job {
    /// Its name in the registry, and its identity unless a run says otherwise.
    const NAME: &'static str;

    /// Builds the pipeline.
    ///
    /// # Errors
    ///
    /// Whatever the job finds wrong with its own arguments; mistakes in the pipeline are found by [`Plan::of`].
    fn build(&self, flow: &Flow) -> Result<()>;
}

/// A sink's number in the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SinkId(pub(crate) u16);

impl SinkId {
    /// Index into [`Plan::sinks`].
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// What a sink's topic is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Results.
    Output,
    /// Source records of late rows.
    Late,
    /// Source records that cannot be read.
    DeadLetter,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Output => "as output",
            Self::Late => "for late rows",
            Self::DeadLetter => "for dead letters",
        }
    }

    /// As a job's record says it.
    fn purpose(self) -> &'static str {
        match self {
            Self::Output => "output",
            Self::Late => "late rows",
            Self::DeadLetter => "dead letters",
        }
    }
}

/// A sink of the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SinkSpec {
    /// Its topic.
    pub topic: String,
    /// What for.
    pub role: Role,
}

/// The source of the plan.
#[derive(Clone, Debug)]
pub struct SourceSpec {
    /// Its topic.
    pub topic: String,
    /// Its event-time settings.
    pub event_time: Option<EventTime>,
}

/// The keyed step of the plan.
#[derive(Clone)]
pub struct StepSpec {
    /// The name its state keeps.
    pub name: String,
    /// Its windows.
    pub windows: Tumbling,
    /// Its store.
    pub store: StoreId,
    /// `count` or `fold`.
    pub aggregate: &'static str,
    /// The type of its keys, as the compiler names it.
    pub key_type: &'static str,
    /// A stored value as JSON; `None` for bytes that are none of its.
    pub show_value: fn(&[u8]) -> Option<serde_json::Value>,
    pub(crate) factory: StepFactory,
}

/// A checked job. Cheap to clone; every task's chain is made from it.
#[derive(Clone)]
pub struct Plan {
    job: String,
    source: SourceSpec,
    head: HeadFactory,
    step: Option<StepSpec>,
    sinks: Vec<SinkSpec>,
    guarantee: Guarantee,
    malformed: OnMalformed,
    operators: Vec<String>,
}

/// What the DSL's handles write into.
#[derive(Default)]
pub(crate) struct Graph {
    pub(crate) source: Option<SourceSpec>,
    pub(crate) malformed: Option<OnMalformed>,
    pub(crate) head: Option<HeadFactory>,
    pub(crate) step: Option<StepSpec>,
    pub(crate) sinks: Vec<SinkSpec>,
    pub(crate) guarantee: Guarantee,
    /// Operators in the order in which rows pass them.
    pub(crate) operators: Vec<String>,
    /// Ends of streams that have no sink yet, by number.
    pub(crate) open: BTreeMap<usize, String>,
    pub(crate) opened: usize,
    pub(crate) error: Option<PlanError>,
}

pub(crate) type SharedGraph = Rc<RefCell<Graph>>;

impl Graph {
    pub(crate) fn fail(&mut self, error: PlanError) {
        // The first mistake is the one to report: later ones often follow from it.
        self.error.get_or_insert(error);
    }

    pub(crate) fn open_end(&mut self, step: String) -> usize {
        self.opened += 1;
        self.open.insert(self.opened, step);
        self.opened
    }

    pub(crate) fn add_sink(&mut self, topic: &str, role: Role) -> SinkId {
        if let Err(e) = check_topic(topic) {
            self.fail(e.into());
        }
        let source = self.source.as_ref().filter(|s| s.topic == topic).map(|_| "as input");
        let sink = self.sinks.iter().find(|s| s.topic == topic && (s.role != role || role == Role::Output));
        if let Some(first) = source.or(sink.map(|s| s.role.name())) {
            self.fail(PlanError::TopicUsedTwice { topic: topic.to_owned(), first, second: role.name() });
        }
        self.sinks.push(SinkSpec { topic: topic.to_owned(), role });
        SinkId((self.sinks.len() - 1) as u16)
    }
}

impl Plan {
    /// Builds and checks a job's plan.
    ///
    /// # Errors
    ///
    /// The first mistake found, naming the step.
    pub fn of<J: Job>(job: &J) -> Result<Self> {
        let flow = Flow::new();
        job.build(&flow)?;
        Self::checked(J::NAME, flow)
    }

    fn checked(name: &str, flow: Flow) -> Result<Self> {
        check_topic(name)?;
        let mut graph = flow.graph().borrow_mut();
        if let Some(error) = graph.error.take() {
            return Err(error);
        }
        let source = graph.source.take().ok_or(PlanError::NoSource)?;
        if let Some((_, step)) = graph.open.pop_first() {
            return Err(PlanError::NoSink { step });
        }
        let step = graph.step.take();
        if let Some(step) = &step {
            let (size, offset, name) = (step.windows.size, step.windows.offset, step.name.clone());
            check_topic(&step.name)?;
            if size < 1 || !(0..size).contains(&offset) {
                return Err(PlanError::BadWindow { step: name });
            }
            if source.event_time.is_none() {
                return Err(PlanError::NoEventTime { step: name, topic: source.topic });
            }
        }
        // A head is installed by whatever closes the source's stream, and no end is open.
        let head = graph
            .head
            .take()
            .ok_or_else(|| PlanError::NoSink { step: format!("source `{}`", source.topic) })?;
        Ok(Self {
            job: name.to_owned(),
            source,
            head,
            step,
            sinks: std::mem::take(&mut graph.sinks),
            malformed: graph.malformed.unwrap_or(OnMalformed::Stop),
            guarantee: graph.guarantee,
            operators: std::mem::take(&mut graph.operators),
        })
    }

    /// The job's name.
    pub fn job(&self) -> &str {
        &self.job
    }

    /// The source.
    pub fn source(&self) -> &SourceSpec {
        &self.source
    }

    /// The keyed step, if there is one.
    pub fn step(&self) -> Option<&StepSpec> {
        self.step.as_ref()
    }

    /// The sinks, by [`SinkId::index`].
    pub fn sinks(&self) -> &[SinkSpec] {
        &self.sinks
    }

    /// The sink of dead letters, if it has one.
    pub(crate) fn dead_letters(&self) -> Option<SinkId> {
        let at = self.sinks.iter().position(|s| s.role == Role::DeadLetter)?;
        Some(SinkId(at as u16))
    }

    /// What a crash may do to its output.
    pub fn guarantee(&self) -> Guarantee {
        self.guarantee
    }

    /// The same plan with another guarantee than the job's own: what a run asked for.
    #[must_use]
    pub fn with_guarantee(self, guarantee: Guarantee) -> Self {
        Self { guarantee, ..self }
    }

    /// The operators between source and sinks, in the order in which rows pass them; those from `window` on belong to
    /// the keyed step.
    pub fn operators(&self) -> &[String] {
        &self.operators
    }

    /// What becomes of records that cannot be read: the number of their sink, or the word for what else happens.
    pub fn malformed(&self) -> Result<SinkId, &'static str> {
        match self.malformed {
            OnMalformed::DeadLetter(sink) => Ok(sink),
            OnMalformed::Skip => Err("skipped and counted"),
            OnMalformed::Stop => Err("stop the job"),
        }
    }

    pub(crate) fn head(&self, env: &TaskEnv) -> Box<dyn crate::chain::Head> {
        (self.head)(env)
    }

    /// What a run of this plan commits itself to.
    pub fn record(&self, shards: u16) -> JobRecord {
        let mut guarded = BTreeMap::from([("input".to_owned(), self.source.topic.clone())]);
        let outputs = self.sinks.iter().filter(|s| s.role == Role::Output);
        let outputs: Vec<_> = outputs.map(|s| s.topic.as_str()).collect();
        guarded.insert("output".to_owned(), outputs.join(", "));
        let show = |millis: i64| {
            let duration = std::time::Duration::from_millis(millis.unsigned_abs());
            humantime::format_duration(duration).to_string()
        };
        if let Some(time) = self.source.event_time {
            guarded.insert("out_of_order".to_owned(), show(time.bound));
        }
        guarded.insert(GUARANTEE.to_owned(), self.guarantee.to_string());
        let mut stores = BTreeMap::new();
        if let Some(step) = &self.step {
            guarded.insert("window".to_owned(), show(step.windows.size));
            if step.windows.offset != 0 {
                guarded.insert("window offset".to_owned(), show(step.windows.offset));
            }
            let store = StoreRecord { id: step.store.0, layout: 'T', codec: codec::state::VERSION };
            stores.insert(step.name.clone(), store);
        }
        let sinks = self.sinks.iter().map(|s| (s.topic.clone(), s.role.purpose().to_owned())).collect();
        JobRecord { job: self.job.clone(), guarded, shards, stores, sinks, resetting: false }
    }
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plan")
            .field("job", &self.job)
            .field("source", &self.source)
            .field("step", &self.step.as_ref().map(|s| &s.name))
            .field("sinks", &self.sinks)
            .field("guarantee", &self.guarantee)
            .finish_non_exhaustive()
    }
}
