//! A command's way to a broker: through the owner of a data directory, as its owner, or over TCP.
//!
//! ```text
//!                        ┌─ keeper of a directory (access/directory.rs): the owner's Unix socket, or this process
//!   calls ──wait──▶ Link ┤
//!     ▲               │  └─ keeper of an address (access/address.rs): a served broker, connected again when it is lost
//!     └──the next one─┴──the connection died
//! ```
//!
//! One task, the keeper, keeps the link; calls wait for it. A call whose connection dies is asked again of the next
//! one, which may be this process. Asking again is safe for every method but `produce`, which is left to the
//! producer: it resends by sequence.
//!
//! Invariants
//! * Five connections that die under one request fail it: a request that kills its owner must not kill them all.
//! * No call waits for a link without end: a keeper that finds nobody shows why, and calls fail with that.

mod address;
mod directory;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidemill_log::Config;
use tidemill_rpc::Attachment;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::api::*;
use crate::directory::{DataDir, DirError, Intent};
use crate::error::BrokerError;
use crate::owner::OwnerError;
use crate::silence::Silence;

/// Connections that may die under one request.
const DEATHS_MAX: u32 = 5;
/// The largest frame: an entry's largest batch and room beside it.
pub(crate) const FRAME_BYTES_MAX: u32 = 32 << 20;

/// Told what happens to a link.
pub type Listener = Arc<dyn Fn(&AccessEvent) + Send + Sync>;

/// How a data directory is accessed.
#[derive(Clone)]
pub struct AccessOptions {
    /// Whether the directory is made where it is missing.
    pub intent: Intent,
    /// The log's settings where this process becomes the owner; [`Config::create`] follows the intent.
    pub log: Config,
    /// Told what an operator may want to read: one line each.
    pub on_event: Option<Listener>,
}

impl AccessOptions {
    /// Defaults for an intent.
    pub fn new(intent: Intent) -> Self {
        AccessOptions { intent, log: Config::default(), on_event: None }
    }

    /// With a listener for events.
    pub fn on_event(mut self, listener: impl Fn(&AccessEvent) + Send + Sync + 'static) -> Self {
        self.on_event = Some(Arc::new(listener));
        self
    }
}

impl std::fmt::Debug for AccessOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AccessOptions").field("intent", &self.intent).field("log", &self.log).finish()
    }
}

/// Who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// This process owns the directory.
    Here,
    /// The process with this pid.
    Process(u32),
    /// The broker served at this address.
    Address(std::net::SocketAddr),
}

/// What happened to the link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessEvent {
    /// The owner went away; requests go on at another place.
    Moved {
        /// Who owned the directory.
        from: u32,
        /// Who answers now.
        to: Place,
    },
    /// A silent owner answers again.
    Back {
        /// Its pid.
        pid: u32,
    },
    /// There is nobody that answers, and why.
    Lost {
        /// What is known.
        why: String,
    },
    /// A served broker went away; it is looked for, and requests wait.
    Searching {
        /// Its address.
        address: String,
        /// What ended, or prevents, the connection.
        why: String,
    },
    /// A served broker is there again.
    Reconnected {
        /// Its address.
        address: String,
    },
}

impl std::fmt::Display for AccessEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            AccessEvent::Moved { from, to: Place::Here } => {
                write!(f, "process {from}, which owned the data directory, is gone; this process owns it now")
            }
            AccessEvent::Moved { from, to: Place::Address(to) } => {
                write!(f, "process {from} is gone; the broker at {to} answers now")
            }
            AccessEvent::Moved { from, to: Place::Process(to) } if from == to => {
                write!(f, "the connection to process {to} broke; connected again")
            }
            AccessEvent::Moved { from, to: Place::Process(to) } => {
                write!(f, "process {from}, which owned the data directory, is gone; process {to} owns it now")
            }
            AccessEvent::Back { pid } => {
                write!(f, "process {pid}, which owns the data directory, answers again")
            }
            AccessEvent::Lost { why } => f.write_str(why),
            AccessEvent::Searching { address, why } => {
                write!(f, "lost the broker at {address} ({why}); looking for it")
            }
            AccessEvent::Reconnected { address } => {
                write!(f, "the connection to the broker at {address} broke; connected again")
            }
        }
    }
}

/// Why a data directory cannot be accessed.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The directory cannot be used.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// This process took the directory and could not serve it.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// Another process took the directory and does not serve it, or not to this build.
    #[error("process {pid}, which owns {}, does not serve: {why}", path.display())]
    OwnerFailed {
        /// The process.
        pid: u32,
        /// The data directory.
        path: PathBuf,
        /// What it says.
        why: String,
    },
    /// The holder of the directory says nothing.
    #[error(
        "process {pid}{} owns {} and has said nothing for {} s; if it is stopped, {} lets it go on",
        if *elsewhere { " of another pid namespace" } else { "" },
        path.display(),
        Silence::MOST.as_secs(),
        if *elsewhere { "SIGCONT, sent from there,".to_owned() } else { format!("`kill -CONT {pid}`") }
    )]
    Silent {
        /// The process.
        pid: u32,
        /// Its number is one of another pid namespace.
        elsewhere: bool,
        /// The data directory.
        path: PathBuf,
    },
    /// The owner runs as another user.
    #[error("{} is owned by a process of user {uid}; this is user {own}", path.display())]
    OtherUser {
        /// The data directory.
        path: PathBuf,
        /// The owner's user.
        uid: u32,
        /// This process's user.
        own: u32,
    },
    /// Nobody listens at the address.
    #[error("nobody listens at {address}; `streamctl serve --listen {address}` starts a broker there")]
    NobodyListens {
        /// The address.
        address: String,
    },
    /// The address cannot be reached, or what is there does not answer.
    #[error("cannot reach a broker at {address}: {why}; is it `streamctl serve` that listens there?")]
    Unreachable {
        /// The address.
        address: String,
        /// What is known.
        why: String,
    },
    /// What is there speaks something else.
    #[error("what listens at {address} is not a Tidemill broker of this version: {why}")]
    NotABroker {
        /// The address.
        address: String,
        /// What it did.
        why: String,
    },
    /// It was closed.
    #[error("the access to {place} is closed")]
    Closed {
        /// The data directory or the address.
        place: String,
    },
}

/// Where calls go.
#[derive(Clone)]
enum Link {
    Opening,
    Up { number: u64, broker: AnyBroker, place: Place },
    Failed(Arc<AccessError>),
    Closed,
}

/// A broker, wherever it is. Clones share the link; it is given up, and with it a directory that this process owns,
/// when [`Access::close`] returns or, less orderly, when the last clone is dropped.
#[derive(Clone)]
pub struct Access {
    shared: Arc<Shared>,
    _keeper: Arc<Keeper>,
}

/// What the handles and the keeper share.
struct Shared {
    target: Target,
    on_event: Option<Listener>,
    link: watch::Sender<Link>,
    closing: watch::Sender<bool>,
}

/// What is accessed.
enum Target {
    Directory(Arc<DataDir>),
    Address(String),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Directory(dir) => dir.path().display().fmt(f),
            Target::Address(address) => write!(f, "the broker at {address}"),
        }
    }
}

impl Shared {
    fn new(target: Target, on_event: Option<Listener>) -> Arc<Self> {
        let (link, closing) = (watch::Sender::new(Link::Opening), watch::Sender::new(false));
        Arc::new(Shared { target, on_event, link, closing })
    }

    fn tell(&self, event: &AccessEvent) {
        tracing::info!(%event, target = %self.target, "access");
        if let Some(listener) = &self.on_event {
            listener(event);
        }
    }
}

/// Ends the task with the last handle.
struct Keeper(JoinHandle<()>);

impl Drop for Keeper {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Access")
            .field("target", &self.shared.target.to_string())
            .field("place", &self.place())
            .finish()
    }
}

/// The entrance.
#[derive(Debug)]
pub struct Data;

impl Data {
    /// [`Access::open`] with the defaults of an intent.
    pub async fn open(path: impl AsRef<Path>, intent: Intent) -> Result<Access, AccessError> {
        Access::open(path, AccessOptions::new(intent)).await
    }
}

impl Access {
    /// Reaches the directory's owner, or becomes it. Returns once requests are served, or with the reason why they
    /// are not. Must be called on a tokio runtime, which runs the tasks behind it.
    pub async fn open(path: impl AsRef<Path>, mut options: AccessOptions) -> Result<Access, AccessError> {
        let dir = Arc::new(DataDir::open(path.as_ref(), options.intent)?);
        options.log.create = options.intent.create();
        let shared = Shared::new(Target::Directory(dir.clone()), options.on_event);
        let keeper =
            directory::Keeper { shared: shared.clone(), dir, intent: options.intent, config: options.log };
        let first = keeper.establish().await?;
        Ok(Self::kept(shared, keeper.keep(first)).await)
    }

    /// Connects to a broker that is served at `address`, written `HOST:PORT`. Returns once it answers, or with the
    /// reason why it does not; a connection that is lost later is made again, and calls wait meanwhile for at most
    /// [`Access::OUTAGE_MAX`]. Must be called on a tokio runtime, which runs the tasks behind it.
    pub async fn connect(
        address: impl Into<String>,
        on_event: Option<Listener>,
    ) -> Result<Access, AccessError> {
        let address = address.into();
        let shared = Shared::new(Target::Address(address.clone()), on_event);
        let keeper = address::Keeper { shared: shared.clone(), address };
        let first = keeper.connect().await?;
        Ok(Self::kept(shared, keeper.keep(first)).await)
    }

    /// How long calls wait for a served broker that went away before they fail.
    pub const OUTAGE_MAX: std::time::Duration = address::OUTAGE_MAX;

    async fn kept(shared: Arc<Shared>, keeper: impl Future<Output = ()> + Send + 'static) -> Access {
        let access = Access { shared, _keeper: Arc::new(Keeper(tokio::spawn(keeper))) };
        // The keeper shows the first link at its first poll.
        let _ = access.up().await;
        access
    }

    /// The service, for code that takes any broker.
    pub fn broker(&self) -> AnyBroker {
        AnyBroker::new(self.clone())
    }

    /// The data directory; none where the broker is reached by its address.
    pub fn path(&self) -> Option<&Path> {
        match &self.shared.target {
            Target::Directory(dir) => Some(dir.path()),
            Target::Address(_) => None,
        }
    }

    /// The data directory or the broker's address, as a user reads it.
    pub fn target(&self) -> String {
        self.shared.target.to_string()
    }

    /// Who answers now; none while there is nobody.
    pub fn place(&self) -> Option<Place> {
        match &*self.shared.link.borrow() {
            Link::Up { place, .. } => Some(*place),
            _ => None,
        }
    }

    /// Ends the link; an owner answers what is in flight, closes the log in order and frees the directory.
    pub async fn close(&self) {
        self.shared.closing.send_replace(true);
        let mut link = self.shared.link.subscribe();
        // The keeper's steps are bounded; it shows Closed at the end, or is gone.
        let _ = link.wait_for(|link| matches!(link, Link::Closed)).await;
    }

    /// The link once it is up.
    async fn up(&self) -> Result<(u64, AnyBroker), BrokerError> {
        let mut link = self.shared.link.subscribe();
        let settled = link.wait_for(|link| !matches!(link, Link::Opening)).await;
        match settled.as_deref() {
            Ok(Link::Up { number, broker, .. }) => Ok((*number, broker.clone())),
            Ok(Link::Failed(why)) => Err(BrokerError::Unavailable { what: why.to_string() }),
            _ => Err(self.closed()),
        }
    }

    fn closed(&self) -> BrokerError {
        BrokerError::Unavailable { what: AccessError::Closed { place: self.target() }.to_string() }
    }

    /// Resolves when link `number` no longer answers though its connection stands.
    async fn given_up(&self, number: u64) -> BrokerError {
        let mut link = self.shared.link.subscribe();
        let gone = |link: &Link| match link {
            Link::Up { number: current, .. } => *current < number,
            Link::Opening => false,
            Link::Failed(_) | Link::Closed => true,
        };
        match link.wait_for(gone).await.as_deref() {
            Ok(Link::Failed(why)) => BrokerError::Unavailable { what: why.to_string() },
            _ => self.closed(),
        }
    }

    /// Link `number` is dead: later calls wait for the next one instead of dying on it too.
    fn mark_dead(&self, number: u64) {
        self.shared.link.send_if_modified(|link| match link {
            Link::Up { number: current, .. } if *current == number => {
                *link = Link::Opening;
                true
            }
            _ => false,
        });
    }

    /// One attempt.
    async fn once<T, F>(&self, call: impl FnOnce(AnyBroker) -> F) -> Result<T, BrokerError>
    where
        F: Future<Output = Result<T, BrokerError>>,
    {
        let (number, broker) = self.up().await?;
        let answer = tokio::select! {
            biased;
            answer = call(broker) => answer,
            error = self.given_up(number) => Err(error),
        };
        if let Err(error) = &answer
            && error.is_dead_connection()
        {
            self.mark_dead(number);
        }
        answer
    }

    /// Asks the next owner where the connection died.
    async fn call<T, F>(&self, mut call: impl FnMut(AnyBroker) -> F) -> Result<T, BrokerError>
    where
        F: Future<Output = Result<T, BrokerError>>,
    {
        let mut deaths = 0;
        loop {
            match self.once(&mut call).await {
                Err(error) if error.is_dead_connection() => {
                    deaths += 1;
                    if deaths >= DEATHS_MAX {
                        let what =
                            format!("{DEATHS_MAX} owners of the directory died under this request: {error}");
                        return Err(BrokerError::Unavailable { what });
                    }
                }
                answer => return answer,
            }
        }
    }
}

impl Broker for Access {
    async fn create_topic(&self, topic: NewTopic) -> Result<Topic, BrokerError> {
        self.call(|broker| {
            let topic = topic.clone();
            async move { broker.create_topic(topic).await }
        })
        .await
    }

    async fn delete_topic(&self, request: DeleteTopic) -> Result<(), BrokerError> {
        self.call(|broker| async move { broker.delete_topic(request).await }).await
    }

    async fn alter_topic(&self, request: AlterTopic) -> Result<Topic, BrokerError> {
        self.call(|broker| async move { broker.alter_topic(request).await }).await
    }

    async fn topics(&self) -> Result<Vec<Topic>, BrokerError> {
        self.call(|broker| async move { broker.topics().await }).await
    }

    async fn describe(&self, name: String) -> Result<TopicDescription, BrokerError> {
        self.call(|broker| {
            let name = name.clone();
            async move { broker.describe(name).await }
        })
        .await
    }

    async fn init_producer(&self, request: InitProducer) -> Result<ProducerIdentity, BrokerError> {
        self.call(|broker| {
            let request = request.clone();
            async move { broker.init_producer(request).await }
        })
        .await
    }

    async fn produce(&self, request: Produce, batches: Attachment) -> Result<Produced, BrokerError> {
        self.once(|broker| async move { broker.produce(request, batches).await }).await
    }

    async fn fetch(&self, request: Fetch) -> Result<(Fetched, Attachment), BrokerError> {
        self.call(|broker| {
            let request = request.clone();
            async move { broker.fetch(request).await }
        })
        .await
    }

    async fn list_offsets(&self, request: ListOffsets) -> Result<ListedOffsets, BrokerError> {
        self.call(|broker| {
            let request = request.clone();
            async move { broker.list_offsets(request).await }
        })
        .await
    }

    async fn commit_offsets(&self, request: CommitOffsets) -> Result<(), BrokerError> {
        self.call(|broker| {
            let request = request.clone();
            async move { broker.commit_offsets(request).await }
        })
        .await
    }

    async fn fetch_offsets(&self, request: FetchOffsets) -> Result<FetchedOffsets, BrokerError> {
        self.call(|broker| {
            let request = request.clone();
            async move { broker.fetch_offsets(request).await }
        })
        .await
    }

    async fn end_transaction(&self, request: EndTransaction) -> Result<Ended, BrokerError> {
        self.call(|broker| {
            let request = request.clone();
            async move { broker.end_transaction(request).await }
        })
        .await
    }
}
