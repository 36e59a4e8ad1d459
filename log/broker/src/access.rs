//! A command's way into a data directory: through its owner, or as its owner, whichever it turns out to be.
//!
//! ```text
//!                    ┌────────────── the connection ends ◀──────────────┐
//!                    ▼                                                   │
//!   connect ──accepted──▶ opening ... serving ──▶ RPC beside a watch ────┘
//!     │  ▲                   │                         │
//!     │  └──10-50 ms─────────┴──closing, end of file   └──5 s silent──▶ calls fail, naming the pid
//!     │ refused, absent                                                  (bytes again: goes on)
//!     ▼
//!   try LOCK ──held──▶ 10-50 ms, connect again
//!     └──taken──▶ recover the log, serve others, and call it directly
//! ```
//!
//! One task keeps the link; calls wait for it. A call whose connection dies is asked again of the next owner, which
//! may be this process. Asking again is safe for every method but `produce`, which is left to the producer: it
//! resends by sequence.
//!
//! Invariants
//! * Silence is counted per holder, and only while this process runs: a stop of its own counts as one second.
//! * A holder is identified again, by `/proc/locks` and its start time, before it is named in an error.
//! * Five connections that die under one request fail it: a request that kills its owner must not kill them all.
//! * Both ends check that the other runs as the same user.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidemill_log::{Config, Create};
use tidemill_rpc::{Attachment, Client, ClientConfig, Code};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::api::*;
use crate::directory::{DataDir, DirError, Holder, Intent};
use crate::error::BrokerError;
use crate::owner::{Owner, OwnerError, Reached, own_uid, reach};
use crate::silence::Silence;
use crate::status::{Hello, STATUS_BYTES, Status};

/// The pause before connecting again: between these, at random.
const PAUSE_MS: std::ops::RangeInclusive<u64> = 10..=50;
/// After a failure the keeper tries again this much later; calls fail meanwhile.
const RETRY: Duration = Duration::from_millis(500);
/// How often silence is counted.
const TICK: Duration = Duration::from_millis(100);
/// Connections that may die under one request.
const DEATHS_MAX: u32 = 5;
/// An owner that said it is closing ends the connection within this time.
const CLOSING_WITHIN: Duration = Duration::from_secs(15);
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
    /// There is no owner that answers, and why.
    Lost {
        /// What is known.
        why: String,
    },
}

impl std::fmt::Display for AccessEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            AccessEvent::Moved { from, to: Place::Here } => {
                write!(f, "process {from}, which owned the data directory, is gone; this process owns it now")
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
        "process {pid} owns {} and has said nothing for {} s; if it is stopped, `kill -CONT {pid}` lets it go on",
        path.display(), Silence::MOST.as_secs()
    )]
    Silent {
        /// The process.
        pid: u32,
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
    /// It was closed.
    #[error("the access to {} is closed", path.display())]
    Closed {
        /// The data directory.
        path: PathBuf,
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

/// A data directory, wherever its owner is. Clones share the link; the directory is given up when [`Access::close`]
/// returns or, less orderly, when the last clone is dropped.
#[derive(Clone)]
pub struct Access {
    shared: Arc<Shared>,
    _keeper: Arc<Keeper>,
}

struct Shared {
    dir: Arc<DataDir>,
    options: AccessOptions,
    link: watch::Sender<Link>,
    closing: watch::Sender<bool>,
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
        f.debug_struct("Access").field("path", &self.path()).field("place", &self.place()).finish()
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
        options.log.create = match options.intent {
            Intent::Use => Create::Never,
            Intent::Create => Create::IfMissing,
        };
        let shared = Arc::new(Shared {
            dir,
            options,
            link: watch::Sender::new(Link::Opening),
            closing: watch::Sender::new(false),
        });
        let first = establish(&shared).await?;
        let task = tokio::spawn(keep(shared.clone(), first));
        let access = Access { shared, _keeper: Arc::new(Keeper(task)) };
        // The keeper shows the first link at its first poll.
        let _ = access.up().await;
        Ok(access)
    }

    /// The service, for code that takes any broker.
    pub fn broker(&self) -> AnyBroker {
        AnyBroker::new(self.clone())
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.shared.dir.path()
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
        let path = self.path().to_owned();
        BrokerError::Unavailable { what: AccessError::Closed { path }.to_string() }
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

/// What establishing a link came to.
enum Established {
    Remote { stub: BrokerClient, watch: UnixStream, holder: Holder },
    Owner(Box<Owner>),
}

/// The task that keeps the link.
async fn keep(shared: Arc<Shared>, first: Established) {
    let mut closing = shared.closing.subscribe();
    let mut next = Some(first);
    let mut before: Option<u32> = None;
    for number in 1.. {
        let established = match next.take() {
            Some(established) => Ok(established),
            None => tokio::select! {
                established = establish(&shared) => established,
                _ = closing.wait_for(|closing| *closing) => break,
            },
        };
        let (established, place, broker) = match established {
            Ok(Established::Owner(owner)) => {
                let broker = AnyBroker::new(owner.broker());
                (Established::Owner(owner), Place::Here, broker)
            }
            Ok(Established::Remote { stub, watch, holder }) => {
                let broker = AnyBroker::new(stub.clone());
                (Established::Remote { stub, watch, holder }, Place::Process(holder.pid), broker)
            }
            Err(error) => {
                shared.tell(&AccessEvent::Lost { why: error.to_string() });
                shared.link.send_replace(Link::Failed(Arc::new(error)));
                tokio::select! {
                    () = tokio::time::sleep(RETRY) => continue,
                    _ = closing.wait_for(|closing| *closing) => break,
                }
            }
        };
        if let Some(from) = before {
            shared.tell(&AccessEvent::Moved { from, to: place });
        }
        let link = Link::Up { number, broker, place };
        shared.link.send_replace(link.clone());
        match established {
            Established::Owner(owner) => {
                let _ = closing.wait_for(|closing| *closing).await;
                if let Err(error) = owner.close().await {
                    tracing::warn!(%error, "the next open recovers the log");
                }
                break;
            }
            Established::Remote { stub, watch, holder } => {
                before = Some(holder.pid);
                tokio::select! {
                    () = listen(&shared, &stub, watch, holder, &link) => {}
                    _ = closing.wait_for(|closing| *closing) => break,
                }
                // Calls made from here on wait for the next link.
                shared.link.send_replace(Link::Opening);
            }
        }
    }
    shared.link.send_replace(Link::Closed);
}

impl Shared {
    fn tell(&self, event: &AccessEvent) {
        tracing::info!(%event, directory = %self.dir.path().display(), "access");
        if let Some(listener) = &self.options.on_event {
            listener(event);
        }
    }

    /// Fails where one holder has been silent for long enough, once it is identified again.
    fn check(&self, silence: &mut Silence, holder: Option<Holder>) -> Result<(), AccessError> {
        match silence.count(Instant::now(), holder) {
            Some(silent) if self.dir.holder() == Some(silent) => {
                Err(AccessError::Silent { pid: silent.pid, path: self.dir.path().to_owned() })
            }
            Some(_) => {
                silence.heard();
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// A peer of this user, or an error.
    fn peer(&self, stream: &UnixStream) -> Result<u32, AccessError> {
        let path = self.dir.path().to_owned();
        let peer = stream.peer_cred().map_err(|source| {
            AccessError::Dir(DirError::Io {
                what: "read the credentials of the owner of",
                path: path.clone(),
                source,
            })
        })?;
        if peer.uid() != own_uid() {
            return Err(AccessError::OtherUser { path, uid: peer.uid(), own: own_uid() });
        }
        Ok(peer.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0))
    }
}

async fn pause() {
    tokio::time::sleep(Duration::from_millis(rand::random_range(PAUSE_MS))).await;
}

/// Reaches the owner or becomes it.
async fn establish(shared: &Shared) -> Result<Established, AccessError> {
    let dir = &shared.dir;
    let mut silence = Silence::new(Instant::now());
    loop {
        match reach(dir)? {
            Reached::Connected(stream) => {
                let pid = shared.peer(&stream)?;
                if let Some(stream) = greet(shared, stream, pid, &mut silence).await? {
                    let config = ClientConfig { frame_bytes_max: FRAME_BYTES_MAX, ..ClientConfig::default() };
                    // The watch comes first: a holder that stops in the middle of the handshake is noticed by it.
                    if let Some(watch) = watch(shared).await? {
                        match timeout(Silence::MOST, Client::connect(stream, config)).await {
                            Ok(Ok(client)) => {
                                let holder = dir.holder().filter(|holder| holder.pid == pid);
                                let holder = holder.unwrap_or(Holder { pid, started: 0 });
                                return Ok(Established::Remote {
                                    stub: BrokerClient::new(client),
                                    watch,
                                    holder,
                                });
                            }
                            Ok(Err(error)) if error.code != Code::Unavailable => {
                                let path = dir.path().to_owned();
                                return Err(AccessError::OwnerFailed { pid, path, why: error.to_string() });
                            }
                            // It ended in between, or stopped: the silence counts on.
                            Ok(Err(_)) | Err(_) => {}
                        }
                    }
                }
            }
            Reached::Busy => {}
            Reached::Nobody => {
                if let Some(lock) = dir.try_lock()? {
                    if shared.options.intent == Intent::Use && !dir.is_made()? {
                        return Err(DirError::Missing { path: dir.path().to_owned() }.into());
                    }
                    let owner = Owner::start(dir.clone(), lock, shared.options.log.clone()).await?;
                    return Ok(Established::Owner(Box::new(owner)));
                }
            }
        }
        shared.check(&mut silence, dir.holder())?;
        pause().await;
    }
}

/// A connection that hears the owner's state every second.
async fn watch(shared: &Shared) -> Result<Option<UnixStream>, AccessError> {
    match reach(&shared.dir)? {
        Reached::Connected(mut stream) => {
            shared.peer(&stream)?;
            // A fresh socket's buffer takes a hello whole: this does not wait.
            Ok(stream.write_all(&Hello::Watch.encode()).await.is_ok().then_some(stream))
        }
        Reached::Busy | Reached::Nobody => Ok(None),
    }
}

/// Says hello and waits until the owner serves; none where the connection ended first.
async fn greet(
    shared: &Shared,
    mut stream: UnixStream,
    pid: u32,
    silence: &mut Silence,
) -> Result<Option<UnixStream>, AccessError> {
    if stream.write_all(&Hello::Rpc.encode()).await.is_err() {
        return Ok(None);
    }
    let mut lines = Lines::default();
    loop {
        match lines.next(&mut stream).await {
            Heard::Line(Status::Serving) => {
                silence.heard();
                return Ok(Some(stream));
            }
            Heard::Line(Status::Opening) => silence.heard(),
            Heard::Line(Status::Failed(why)) => {
                return Err(AccessError::OwnerFailed { pid, path: shared.dir.path().to_owned(), why });
            }
            Heard::Line(Status::Closing) | Heard::End => return Ok(None),
            Heard::Nothing => {
                let holder = shared.dir.holder().filter(|holder| holder.pid == pid);
                shared.check(silence, holder)?;
            }
        }
    }
}

/// Watches the owner until its connection ends; while it is silent the link shows as failed.
async fn listen(shared: &Shared, stub: &BrokerClient, mut watch: UnixStream, holder: Holder, up: &Link) {
    let mut silence = Silence::new(Instant::now());
    let mut lines = Lines::default();
    let mut silent = false;
    let mut link = shared.link.subscribe();
    loop {
        let heard = tokio::select! {
            heard = lines.next(&mut watch) => heard,
            _ = stub.client().closed() => return,
            // A call found it dead, or draining.
            _ = link.wait_for(|link| matches!(link, Link::Opening)) => return,
        };
        match heard {
            Heard::Line(Status::Serving | Status::Opening) => {
                silence.heard();
                if std::mem::take(&mut silent) {
                    shared.link.send_replace(up.clone());
                    shared.tell(&AccessEvent::Back { pid: holder.pid });
                }
            }
            Heard::Line(Status::Closing | Status::Failed(_)) | Heard::End => {
                // Calls in flight are still answered; new ones are refused as draining and go to the next owner.
                tokio::select! {
                    _ = stub.client().closed() => {}
                    _ = link.wait_for(|link| matches!(link, Link::Opening)) => {}
                    () = tokio::time::sleep(CLOSING_WITHIN) => {}
                }
                return;
            }
            Heard::Nothing if silent => {}
            Heard::Nothing => {
                if let Err(error) = shared.check(&mut silence, Some(holder)) {
                    silent = true;
                    shared.tell(&AccessEvent::Lost { why: error.to_string() });
                    shared.link.send_replace(Link::Failed(Arc::new(error)));
                }
            }
        }
    }
}

/// Reads status lines piecemeal; cancel safe.
struct Lines {
    line: [u8; STATUS_BYTES],
    have: usize,
}

impl Default for Lines {
    fn default() -> Self {
        Lines { line: [0; STATUS_BYTES], have: 0 }
    }
}

enum Heard {
    Line(Status),
    /// Not a byte within a tick.
    Nothing,
    /// The end of the file, an error, or bytes that are no line.
    End,
}

impl Lines {
    async fn next(&mut self, stream: &mut UnixStream) -> Heard {
        loop {
            match timeout(TICK, stream.read(&mut self.line[self.have..])).await {
                Err(_) => return Heard::Nothing,
                Ok(Ok(0) | Err(_)) => return Heard::End,
                Ok(Ok(read)) => self.have += read,
            }
            if self.have == STATUS_BYTES {
                self.have = 0;
                return Status::decode(&self.line).map_or(Heard::End, Heard::Line);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use tidemill_rpc::Server;
    use tokio::net::UnixListener;
    use tokio::sync::Notify;

    use super::*;

    /// A broker that takes a request and never answers.
    struct Mute {
        asked: Arc<Notify>,
        died: Arc<AtomicU32>,
    }

    impl Mute {
        async fn mute<T>(&self) -> T {
            self.died.fetch_add(1, Ordering::Relaxed);
            self.asked.notify_one();
            std::future::pending().await
        }
    }

    impl Broker for Mute {
        async fn create_topic(&self, _: NewTopic) -> Result<Topic, BrokerError> {
            self.mute().await
        }
        async fn topics(&self) -> Result<Vec<Topic>, BrokerError> {
            self.mute().await
        }
        async fn describe(&self, _: String) -> Result<TopicDescription, BrokerError> {
            self.mute().await
        }
        async fn init_producer(&self, _: InitProducer) -> Result<ProducerIdentity, BrokerError> {
            self.mute().await
        }
        async fn produce(&self, _: Produce, _: Attachment) -> Result<Produced, BrokerError> {
            self.mute().await
        }
        async fn fetch(&self, _: Fetch) -> Result<(Fetched, Attachment), BrokerError> {
            self.mute().await
        }
        async fn list_offsets(&self, _: ListOffsets) -> Result<ListedOffsets, BrokerError> {
            self.mute().await
        }
        async fn commit_offsets(&self, _: CommitOffsets) -> Result<(), BrokerError> {
            self.mute().await
        }
        async fn fetch_offsets(&self, _: FetchOffsets) -> Result<FetchedOffsets, BrokerError> {
            self.mute().await
        }
        async fn end_transaction(&self, _: EndTransaction) -> Result<Ended, BrokerError> {
            self.mute().await
        }
    }

    /// One connection of an owner that dies of every request: watchers hear a line a second, requests the end of file.
    async fn fatal(mut stream: UnixStream, died: Arc<AtomicU32>) {
        if Status::Serving.write(&mut stream).await.is_err() {
            return;
        }
        match Hello::read(&mut stream).await {
            Ok(Some(Hello::Rpc)) => {
                let asked = Arc::new(Notify::new());
                let server = Server::new(BrokerServer::new(Mute { asked: asked.clone(), died }));
                tokio::select! {
                    _ = server.serve_stream(stream) => {}
                    () = asked.notified() => {}
                }
            }
            Ok(Some(Hello::Watch)) => {
                while Status::Serving.write(&mut stream).await.is_ok() {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
            _ => {}
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_request_that_kills_five_owners_fails() {
        let temp = tempfile::tempdir().unwrap();
        let dir = DataDir::open(temp.path(), Intent::Create).unwrap();
        let _lock = dir.try_lock().unwrap().expect("free");
        let listener = UnixListener::bind(temp.path().join("sock")).unwrap();
        let died = Arc::new(AtomicU32::new(0));
        let count = died.clone();
        let owner = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(fatal(stream, count.clone()));
            }
        });
        let access = Access::open(temp.path(), AccessOptions::new(Intent::Use)).await.unwrap();
        let failed = timeout(Duration::from_secs(20), access.topics()).await.expect("bounded");
        let Err(BrokerError::Unavailable { what }) = failed else { panic!("{failed:?}") };
        assert!(what.contains("5 owners"), "{what}");
        assert_eq!(died.load(Ordering::Relaxed), DEATHS_MAX);
        // A produce is the producer's to repeat: it dies once.
        let produce = Produce { producer: ProducerIdentity { id: 1, epoch: 0 }, batches: Vec::new() };
        let once = timeout(Duration::from_secs(20), access.produce(produce, Attachment::default())).await;
        assert!(once.expect("bounded").is_err_and(|e| e.is_dead_connection()));
        assert_eq!(died.load(Ordering::Relaxed), DEATHS_MAX + 1);
        owner.abort();
    }
}
