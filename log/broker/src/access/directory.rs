//! The link to a data directory: to its owner through the Unix socket, or as the owner, whichever it turns out to be.
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
//! Invariants
//! * Silence is counted per holder, and only while this process runs: a stop of its own counts as one second.
//! * A holder is identified again, by `/proc/locks` (or LOCK's text, where the table does not have it) and its start time,
//!   before it is named in an error.
//! * Both ends check that the other runs as the same user.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tidemill_log::Config;
use tidemill_rpc::{Client, ClientConfig, Code};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::{AccessError, AccessEvent, FRAME_BYTES_MAX, Link, Place, Shared};
use crate::api::{AnyBroker, BrokerClient};
use crate::directory::{DataDir, DirError, Holder, Intent};
use crate::owner::{Owner, Reached, own_uid, reach};
use crate::silence::Silence;
use crate::status::{Hello, STATUS_BYTES, Status};

/// The pause before connecting again: between these, at random.
const PAUSE_MS: std::ops::RangeInclusive<u64> = 10..=50;
/// After a failure the keeper tries again this much later; calls fail meanwhile.
const RETRY: Duration = Duration::from_millis(500);
/// How often silence is counted.
const TICK: Duration = Duration::from_millis(100);
/// An owner that said it is closing ends the connection within this time.
const CLOSING_WITHIN: Duration = Duration::from_secs(15);

/// Keeps the link to a directory.
pub(super) struct Keeper {
    pub(super) shared: Arc<Shared>,
    pub(super) dir: Arc<DataDir>,
    pub(super) intent: Intent,
    pub(super) config: Config,
}

/// What establishing a link came to.
pub(super) enum Established {
    Remote { stub: BrokerClient, watch: UnixStream, holder: Holder },
    Owner(Box<Owner>),
}

impl Keeper {
    /// The task.
    pub(super) async fn keep(self, first: Established) {
        let shared = self.shared.clone();
        let mut closing = shared.closing.subscribe();
        let mut next = Some(first);
        let mut before: Option<u32> = None;
        for number in 1.. {
            let established = match next.take() {
                Some(established) => Ok(established),
                None => tokio::select! {
                    established = self.establish() => established,
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
                        () = self.listen(&stub, watch, holder, &link) => {}
                        _ = closing.wait_for(|closing| *closing) => break,
                    }
                    // Calls made from here on wait for the next link.
                    shared.link.send_replace(Link::Opening);
                }
            }
        }
        shared.link.send_replace(Link::Closed);
    }

    /// Fails where one holder has been silent for long enough, once it is identified again.
    fn check(&self, silence: &mut Silence, holder: Option<Holder>) -> Result<(), AccessError> {
        match silence.count(Instant::now(), holder) {
            Some(silent) if self.dir.holder() == Some(silent) => Err(AccessError::Silent {
                pid: silent.pid,
                elsewhere: silent.elsewhere,
                path: self.dir.path().to_owned(),
            }),
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

    /// Reaches the owner or becomes it.
    pub(super) async fn establish(&self) -> Result<Established, AccessError> {
        let dir = &self.dir;
        let mut silence = Silence::new(Instant::now());
        loop {
            match reach(dir)? {
                Reached::Connected(stream) => {
                    let pid = self.peer(&stream)?;
                    if let Some(stream) = self.greet(stream, pid, &mut silence).await? {
                        let config =
                            ClientConfig { frame_bytes_max: FRAME_BYTES_MAX, ..ClientConfig::default() };
                        // The watch comes first: a holder that stops in the middle of the handshake is noticed by it.
                        if let Some(watch) = self.watch().await? {
                            match timeout(Silence::MOST, Client::connect(stream, config)).await {
                                Ok(Ok(client)) => {
                                    let holder = dir.holder().filter(|holder| is(holder, pid));
                                    let holder =
                                        holder.unwrap_or(Holder { pid, elsewhere: false, started: 0 });
                                    return Ok(Established::Remote {
                                        stub: BrokerClient::new(client),
                                        watch,
                                        holder,
                                    });
                                }
                                Ok(Err(error)) if error.code != Code::Unavailable => {
                                    let path = dir.path().to_owned();
                                    return Err(AccessError::OwnerFailed {
                                        pid,
                                        path,
                                        why: error.to_string(),
                                    });
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
                        if self.intent == Intent::Use && !dir.is_made()? {
                            return Err(DirError::Missing { path: dir.path().to_owned() }.into());
                        }
                        let owner = Owner::start(dir.clone(), lock, self.config.clone()).await?;
                        return Ok(Established::Owner(Box::new(owner)));
                    }
                }
            }
            self.check(&mut silence, dir.holder())?;
            tokio::time::sleep(Duration::from_millis(rand::random_range(PAUSE_MS))).await;
        }
    }

    /// A connection that hears the owner's state every second.
    async fn watch(&self) -> Result<Option<UnixStream>, AccessError> {
        match reach(&self.dir)? {
            Reached::Connected(mut stream) => {
                self.peer(&stream)?;
                // A fresh socket's buffer takes a hello whole: this does not wait.
                Ok(stream.write_all(&Hello::Watch.encode()).await.is_ok().then_some(stream))
            }
            Reached::Busy | Reached::Nobody => Ok(None),
        }
    }

    /// Says hello and waits until the owner serves; none where the connection ended first.
    async fn greet(
        &self,
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
                    return Err(AccessError::OwnerFailed { pid, path: self.dir.path().to_owned(), why });
                }
                Heard::Line(Status::Closing) | Heard::End => return Ok(None),
                Heard::Nothing => {
                    let holder = self.dir.holder().filter(|holder| is(holder, pid));
                    self.check(silence, holder)?;
                }
            }
        }
    }

    /// Watches the owner until its connection ends; while it is silent the link shows as failed.
    async fn listen(&self, stub: &BrokerClient, mut watch: UnixStream, holder: Holder, up: &Link) {
        let shared = &self.shared;
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
                    if let Err(error) = self.check(&mut silence, Some(holder)) {
                        silent = true;
                        shared.tell(&AccessEvent::Lost { why: error.to_string() });
                        shared.link.send_replace(Link::Failed(Arc::new(error)));
                    }
                }
            }
        }
    }
}

/// Whether that holder is the process at the other end of a connection. Credentials of a peer in another pid namespace have
/// no number; what holds the directory then is the peer.
fn is(holder: &Holder, peer: u32) -> bool {
    peer == 0 || holder.pid == peer
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
