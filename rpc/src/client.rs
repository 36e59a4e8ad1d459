//! The calling side: a connection task that owns the socket and both buffers, and the handle that
//! stubs and callers share.
//!
//! ```text
//!  caller: encode, take a slot (or wait for one), queue the frame ──▶ Table ◀── connection task:
//!  caller: woken with its end, decodes                                         take, write, read, complete
//! ```
//!
//! * A call ends exactly once: answer, deadline, cancellation (dropping the future), or the connection's
//!   death, which ends every call at once.
//! * The deadline covers the wait for a slot, the queue, the write and the answer. The budget in the frame is what is
//!   left when the frame is put into the write buffer.
//! * The task always reads, whatever waits to be written.
//!
//! Left out so far: reconnecting, retries, pools. They belong above this handle, which is one connection.

use std::borrow::Cow;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes};
use std::collections::VecDeque;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep_until, timeout, timeout_at};

use crate::attachment::Attachment;
use crate::codec;
use crate::deadline::{deadline, nearer};
use crate::error::{Code, ErrorBody, RpcError, WireError};
use crate::fate::Fate;
use crate::frame::{BODY_BYTES_MAX, Frame, HEADER, HELLO_BYTES_MAX, Header, Kind, Reader, Status, Violation};
use crate::hello::{Hello, Methods, VERSION};
use crate::io::{
    Ended, FRAME_TIME, HANDSHAKE, Io, TICK, UNWRITTEN_MAX, WRITE_STALL, poll_fill, read_hello, write_hello,
};
use crate::method::{Method, invalid_reply, refusal};
use crate::table::{Begin, CallId, Cancelled, End, Outgoing, Table};
use crate::wire::Wire;
use crate::writer::Writer;

/// A PING is sent after this long without a byte from the server.
const PING_AFTER: Duration = Duration::from_secs(10);
/// Without a byte for this long, the server is dead.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Frames handled before the task writes again.
const FRAMES_PER_ROUND: usize = 64;
/// Rounds before the task lets others run.
const ROUNDS_PER_POLL: usize = 16;

/// Limits and times of a client's connection.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// The time of a call whose method names none and whose caller gave no nearer deadline.
    pub timeout: Duration,
    /// Connecting and the handshake take at most this long.
    pub connect_timeout: Duration,
    /// Calls in flight at most; the server's limit applies too. Further callers wait in line.
    pub in_flight: u32,
    /// The largest frame this side takes.
    pub frame_bytes_max: u32,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(30),
            connect_timeout: HANDSHAKE,
            in_flight: 1024,
            frame_bytes_max: 16 << 20,
        }
    }
}

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// A TCP address.
    Tcp(SocketAddr),
    /// The process that listens on a Unix socket, as the kernel knows it.
    Unix {
        /// Its user.
        uid: u32,
        /// Its process id, where the system says it.
        pid: Option<i32>,
    },
    /// A stream given by the caller.
    Other,
}

/// A request that waits to be written: header and body, the attachment beside them.
struct Request {
    method: u64,
    body: Vec<u8>,
    attachment: Attachment,
    deadline: Instant,
}

/// An answer as it arrived.
struct Answer {
    status: Status,
    body: Bytes,
    attachment: Bytes,
}

struct Shared {
    table: Table<Request, Answer>,
    methods: Methods,
    timeout: Duration,
    peer: Peer,
    peer_frame_bytes_max: u32,
    /// The last handle was dropped, or `close` was called.
    closing: AtomicBool,
    /// Filled before the table is closed.
    reason: watch::Receiver<Option<RpcError>>,
}

/// Its drop, after the last clone of a [`Client`], closes the connection.
struct Handle(Arc<Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.closing.store(true, Ordering::Release);
        self.0.table.nudge();
    }
}

/// One connection to a server, shared by any number of stubs and callers.
///
/// A clone is a handle; the connection closes when the last one is dropped. It does not reconnect: once
/// [`closed`](Self::closed) resolves, every call fails with `Unavailable`, fate `NotSent`.
#[derive(Clone)]
pub struct Client {
    handle: Arc<Handle>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("peer", &self.shared().peer)
            .field("closed", &self.is_closed())
            .finish()
    }
}

impl Client {
    /// Connects over TCP, with `TCP_NODELAY`.
    pub async fn connect_tcp(address: SocketAddr, config: ClientConfig) -> Result<Self, RpcError> {
        let stream = in_time(config.connect_timeout, TcpStream::connect(address)).await?;
        stream.set_nodelay(true).map_err(|error| unavailable(error.to_string()))?;
        Self::open(Box::new(stream), Peer::Tcp(address), config).await
    }

    /// Connects to a Unix socket.
    pub async fn connect_unix(path: impl AsRef<Path>, config: ClientConfig) -> Result<Self, RpcError> {
        let stream = in_time(config.connect_timeout, UnixStream::connect(path)).await?;
        Self::connect_unix_stream(stream, config).await
    }

    /// Speaks over a Unix stream that is already connected.
    pub async fn connect_unix_stream(stream: UnixStream, config: ClientConfig) -> Result<Self, RpcError> {
        let peer = match stream.peer_cred() {
            Ok(cred) => Peer::Unix { uid: cred.uid(), pid: cred.pid() },
            Err(error) => return Err(unavailable(error.to_string())),
        };
        Self::open(Box::new(stream), peer, config).await
    }

    /// Speaks over any stream: an in-memory pair, TLS.
    pub async fn connect<S>(stream: S, config: ClientConfig) -> Result<Self, RpcError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        Self::open(Box::new(stream), Peer::Other, config).await
    }

    async fn open(mut io: Box<dyn Io>, peer: Peer, config: ClientConfig) -> Result<Self, RpcError> {
        let mine = Hello {
            version_min: VERSION,
            version_max: VERSION,
            frame_bytes_max: config.frame_bytes_max.max(HELLO_BYTES_MAX),
            in_flight: config.in_flight.max(1),
            codecs: vec![codec::BINCODE],
            methods: Vec::new(),
        };
        let mut reader = Reader::new(HELLO_BYTES_MAX);
        let exchange = async {
            write_hello(&mut *io, &mine).await?;
            read_hello(&mut *io, &mut reader).await
        };
        let theirs = match timeout(config.connect_timeout, exchange).await {
            Ok(Ok(hello)) => hello,
            Ok(Err(ended)) => return Err(RpcError { fate: Fate::NotSent, ..ended.to_error() }),
            Err(_) => return Err(unavailable("no HELLO from the server in time")),
        };
        if !theirs.is_compatible() {
            let message = format!(
                "the server speaks versions {} to {} and codecs {:?}; this build speaks version {VERSION} and codec {}",
                theirs.version_min,
                theirs.version_max,
                theirs.codecs,
                codec::BINCODE
            );
            return Err(RpcError::new(Code::Skew, Fate::NotSent, message));
        }
        reader.set_limit(mine.frame_bytes_max);
        let (reason, reason_seen) = watch::channel(None);
        let shared = Arc::new(Shared {
            table: Table::new(mine.in_flight.min(theirs.in_flight)),
            methods: Methods::new(theirs.methods),
            timeout: config.timeout,
            peer,
            peer_frame_bytes_max: theirs.frame_bytes_max,
            closing: AtomicBool::new(false),
            reason: reason_seen,
        });
        let now = Instant::now();
        // The task ends with the connection, which ends with the last handle.
        tokio::spawn(Connection {
            io,
            reader,
            writer: Writer::default(),
            shared: Arc::clone(&shared),
            reason,
            unsent: VecDeque::new(),
            clocks: Clocks { read: now, partial: None, pinged: false },
            tick: Box::pin(sleep_until(now + TICK)),
        });
        Ok(Self { handle: Arc::new(Handle(shared)) })
    }

    fn shared(&self) -> &Shared {
        &self.handle.0
    }

    /// Who is at the other end.
    pub fn peer(&self) -> Peer {
        self.shared().peer
    }

    /// Whether the connection is gone.
    pub fn is_closed(&self) -> bool {
        self.shared().reason.borrow().is_some()
    }

    /// Resolves when the connection is gone, with the reason. Dropping it changes nothing.
    pub async fn closed(&self) -> RpcError {
        let mut reason = self.shared().reason.clone();
        match reason.wait_for(Option::is_some).await.map(|seen| seen.clone()) {
            Ok(Some(error)) => error,
            _ => unavailable("the connection's task was dropped"),
        }
    }

    /// Closes the connection for every handle, and waits until it is gone. Calls in flight fail.
    pub async fn close(self) {
        self.shared().closing.store(true, Ordering::Release);
        self.shared().table.nudge();
        self.closed().await;
    }

    /// Whether the server serves these methods with these signatures; the first that differs is named. Each
    /// call checks its own method anyway: this is for failing early, with `XClient::METHODS`.
    pub fn check(&self, methods: &[Method]) -> Result<(), RpcError> {
        methods.iter().try_for_each(|method| self.shared().methods.check(method))
    }

    /// Calls that hold a slot: in flight, or cancelled and not yet answered.
    pub fn in_flight(&self) -> usize {
        self.shared().table.occupied()
    }

    /// One exchange: exactly one answer or error. Dropping the future cancels the call at the server.
    async fn exchange(
        &self,
        method: &Method,
        body: Vec<u8>,
        attachment: Attachment,
    ) -> Result<Answer, RpcError> {
        let shared = self.shared();
        shared.methods.check(method)?;
        let total = HEADER + body.len() + attachment.len();
        if body.len() > BODY_BYTES_MAX as usize || total > shared.peer_frame_bytes_max as usize {
            let message = format!(
                "{method}: {} bytes of arguments (at most {BODY_BYTES_MAX}), {total} in all (at most {})",
                body.len(),
                shared.peer_frame_bytes_max
            );
            return Err(RpcError::new(Code::TooLarge, Fate::NotSent, message));
        }
        let now = Instant::now();
        let deadline = nearer(now + method.timeout.unwrap_or(shared.timeout), deadline());
        if deadline <= now {
            return Err(late(method, Fate::NotSent));
        }
        let request = Request { method: method.id, body, attachment, deadline };
        let mut call =
            Call { table: &shared.table, stage: Stage::Begin { ticket: None, request: Some(request) } };
        let end = match timeout_at(deadline, poll_fn(|cx| call.poll(cx))).await {
            Ok(end) => end,
            Err(_) => match call.give_up() {
                Cancelled::NotSent => return Err(late(method, Fate::NotSent)),
                Cancelled::Told => return Err(late(method, Fate::Unknown)),
                Cancelled::Ended(end) => end,
            },
        };
        match end {
            End::Answer(answer) => Ok(answer),
            End::Drained(fate) => Err(RpcError::new(Code::Draining, fate, "the server is stopping")),
            End::Died(fate) => {
                let reason = shared.reason.borrow().clone();
                Err(RpcError { fate, ..reason.unwrap_or_else(|| unavailable("the connection is gone")) })
            }
        }
    }
}

fn late(method: &Method, fate: Fate) -> RpcError {
    RpcError::new(Code::DeadlineExceeded, fate, method.to_string())
}

fn unavailable(message: impl Into<Cow<'static, str>>) -> RpcError {
    RpcError::new(Code::Unavailable, Fate::NotSent, message)
}

async fn in_time<T>(
    limit: Duration,
    connect: impl Future<Output = std::io::Result<T>>,
) -> Result<T, RpcError> {
    match timeout(limit, connect).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(unavailable(format!("connect: {error}"))),
        Err(_) => Err(unavailable(format!("connect: nothing within {limit:?}"))),
    }
}

/// A call whose answer has no attachment. Used by generated code.
pub async fn call<A: Wire, R: Wire, E: WireError>(
    client: &Client,
    method: Method,
    arguments: A,
    attachment: Attachment,
) -> Result<R, E> {
    let (value, attachment) = call_attached::<A, R, E>(client, method, arguments, attachment).await?;
    if !attachment.is_empty() {
        return Err(invalid_reply(&method, "an attachment where none belongs").into());
    }
    Ok(value)
}

/// A call whose answer has an attachment. Used by generated code.
pub async fn call_attached<A: Wire, R: Wire, E: WireError>(
    client: &Client,
    method: Method,
    arguments: A,
    attachment: Attachment,
) -> Result<(R, Attachment), E> {
    let mut body = Vec::new();
    if let Err(error) = codec::encode(&arguments, &mut body) {
        return Err(RpcError::new(Code::InvalidRequest, Fate::NotSent, format!("{method}: {error}")).into());
    }
    drop(arguments);
    let answer = client.exchange(&method, body, attachment).await?;
    match answer.status {
        Status::Ok => match codec::decode(&answer.body) {
            Ok(value) => Ok((value, Attachment::new(answer.attachment))),
            Err(error) => Err(invalid_reply(&method, error).into()),
        },
        Status::Application => match ErrorBody::read(answer.body) {
            Some(body) => Err(E::decode(&body).unwrap_or_else(E::from)),
            None => Err(invalid_reply(&method, "malformed application error").into()),
        },
        status => Err(refusal(status, &answer.body).into()),
    }
}

/// One call's way through the table. Dropped anywhere, it leaves nothing behind.
struct Call<'a> {
    table: &'a Table<Request, Answer>,
    stage: Stage,
}

enum Stage {
    Begin { ticket: Option<u64>, request: Option<Request> },
    Flying(CallId),
    Over,
}

impl Call<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End<Answer>> {
        if let Stage::Begin { ticket, request } = &mut self.stage {
            match self.table.begin(ticket, request, cx.waker()) {
                Begin::Started(id) => self.stage = Stage::Flying(id),
                Begin::Waiting => {}
                Begin::Draining => return Poll::Ready(End::Drained(Fate::NotSent)),
                Begin::Closed => return Poll::Ready(End::Died(Fate::NotSent)),
            }
            // Nothing can have happened to it yet that would not wake us.
            return Poll::Pending;
        }
        let Stage::Flying(id) = self.stage else { return Poll::Pending };
        let end = self.table.poll_end(id, cx.waker());
        if end.is_ready() {
            self.stage = Stage::Over;
        }
        end
    }

    fn give_up(&mut self) -> Cancelled<Answer> {
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Begin { ticket, .. } => {
                if let Some(ticket) = ticket {
                    self.table.forget(ticket);
                }
                Cancelled::NotSent
            }
            Stage::Flying(id) => self.table.cancel(id),
            Stage::Over => Cancelled::NotSent,
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// What the connection task watches besides its socket.
struct Clocks {
    read: Instant,
    partial: Option<Instant>,
    pinged: bool,
}

/// The connection task. Its drop, for whatever reason, ends every call.
struct Connection {
    io: Box<dyn Io>,
    reader: Reader,
    writer: Writer,
    shared: Arc<Shared>,
    reason: watch::Sender<Option<RpcError>>,
    /// Requests in the write buffer, each with the position of its last byte.
    unsent: VecDeque<(u64, CallId)>,
    clocks: Clocks,
    tick: Pin<Box<Sleep>>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reason.send_if_modified(|reason| {
            reason.is_none() && reason.replace(unavailable("the connection's task was dropped")).is_none()
        });
        self.shared.table.close();
    }
}

impl Future for Connection {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let connection = &mut *self;
        let error = match connection.drive(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Ok(())) => unavailable("closed by this side"),
            Poll::Ready(Err(ended)) => ended.to_error(),
        };
        tracing::debug!(peer = ?connection.shared.peer, %error, "connection ended");
        connection.reason.send_replace(Some(error));
        connection.shared.table.close();
        Poll::Ready(())
    }
}

impl Connection {
    fn drive(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Ended>> {
        for _ in 0..ROUNDS_PER_POLL {
            self.take(cx);
            let had_room = self.writer.queued() < UNWRITTEN_MAX;
            if let Err(ended) = self.write(cx) {
                // Answers, and a GOAWAY, that arrived before the socket broke still count.
                let _ = self.read(cx);
                return Poll::Ready(Err(ended));
            }
            let closing = self.shared.closing.load(Ordering::Acquire);
            if closing {
                // Nobody waits any more. The CANCELs had their chance.
                let _ = Pin::new(&mut *self.io).poll_shutdown(cx);
                return Poll::Ready(Ok(()));
            }
            let read = self.read(cx)?;
            self.watch(cx)?;
            let room_again = !had_room && self.writer.queued() < UNWRITTEN_MAX;
            if !read && !room_again {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Moves requests and cancellations from the table into the write buffer.
    fn take(&mut self, cx: &mut Context<'_>) {
        let Self { writer, unsent, shared, .. } = self;
        let room = writer.queued() < UNWRITTEN_MAX;
        let mut now = None;
        shared.table.take(cx.waker(), room, |outgoing| {
            match outgoing {
                Outgoing::Cancel(id) => {
                    let header =
                        Header { slot: id.slot, generation: id.generation, ..Header::new(Kind::Cancel) };
                    writer.put(&header.encode());
                }
                Outgoing::Request(id, request) => {
                    let now = *now.get_or_insert_with(Instant::now);
                    put_request(writer, id, request, now);
                    unsent.push_back((writer.end(), id));
                }
            }
            writer.queued() < UNWRITTEN_MAX
        });
    }

    fn write(&mut self, cx: &mut Context<'_>) -> Result<(), Ended> {
        if self.writer.queued() == 0 {
            return Ok(());
        }
        let polled = self.writer.poll_write(&mut *self.io, cx);
        // Also where the write failed: what went out before may have arrived whole.
        let written = self.writer.written();
        let whole = self.unsent.partition_point(|(end, _)| *end <= written);
        if whole > 0 {
            self.shared.table.written(self.unsent.drain(..whole).map(|(_, id)| id));
        }
        match polled {
            Poll::Ready(Err(error)) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Handles frames, then reads until the socket has nothing. True where there may be more.
    fn read(&mut self, cx: &mut Context<'_>) -> Result<bool, Ended> {
        let mut frames = 0;
        while frames < FRAMES_PER_ROUND {
            if let Some(frame) = self.reader.next_frame()? {
                self.handle(frame)?;
                self.clocks.partial = None;
                frames += 1;
                continue;
            }
            match poll_fill(&mut *self.io, &mut self.reader, cx) {
                Poll::Pending => return Ok(frames > 0),
                Poll::Ready(filled) => filled?,
            };
            self.clocks.read = Instant::now();
            self.clocks.pinged = false;
            if self.clocks.partial.is_none() {
                self.clocks.partial = Some(self.clocks.read);
            }
        }
        Ok(true)
    }

    fn handle(&mut self, frame: Frame) -> Result<(), Violation> {
        let Frame { header, body, attachment } = frame;
        let id = CallId { slot: header.slot, generation: header.generation };
        match header.kind {
            Kind::Resp => {
                let status = Status::from_number(header.status).ok_or(Violation::Status(header.status))?;
                if status == Status::Ok && header.codec != codec::BINCODE {
                    return Err(Violation::Codec(header.codec));
                }
                let answer = Answer { status, body, attachment };
                let unknown = Violation::NotInFlight { slot: id.slot, generation: id.generation };
                self.shared.table.complete(id, answer).map_err(|_| unknown)
            }
            Kind::Ping => {
                // One that finds the socket this far behind is not answered: the backlog is the answer.
                if self.writer.queued() < UNWRITTEN_MAX {
                    self.writer.put(
                        &Header { kind: Kind::Pong, body: 0, metadata: 0, attachment: 0, ..header }.encode(),
                    );
                }
                Ok(())
            }
            Kind::Pong => Ok(()),
            Kind::GoAway => {
                let accepted = (&body[..]).try_get_u64_le().map_err(|_| Violation::Malformed("GOAWAY"))?;
                tracing::debug!(peer = ?self.shared.peer, accepted, "the server is stopping");
                self.shared.table.drain(accepted);
                Ok(())
            }
            Kind::Hello | Kind::Req | Kind::Item | Kind::End | Kind::Cancel | Kind::Credit => {
                Err(Violation::Unexpected(header.kind))
            }
        }
    }

    /// The slow clocks: silence, stalled writes, frames that never end.
    fn watch(&mut self, cx: &mut Context<'_>) -> Result<(), Ended> {
        while self.tick.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            self.tick.as_mut().reset(now + TICK);
            if self.writer.stalled_since().is_some_and(|since| now >= since + WRITE_STALL) {
                return Err(Ended::Stalled("the server took no bytes for 30 s"));
            }
            if self.reader.is_partial() && self.clocks.partial.is_some_and(|since| now >= since + FRAME_TIME)
            {
                return Err(Ended::Stalled("a frame was not whole after 60 s"));
            }
            if now >= self.clocks.read + SILENCE_MAX {
                return Err(Ended::Stalled("nothing from the server for 30 s"));
            }
            if now >= self.clocks.read + PING_AFTER && !self.clocks.pinged {
                self.clocks.pinged = true;
                self.writer.put(&Header::new(Kind::Ping).encode());
                self.write(cx)?;
            }
        }
        Ok(())
    }
}

fn put_request(writer: &mut Writer, id: CallId, request: Request, now: Instant) {
    let Request { method, body, attachment, deadline } = request;
    let left_us = deadline.saturating_duration_since(now).as_micros();
    let header = Header {
        codec: codec::BINCODE,
        slot: id.slot,
        generation: id.generation,
        method,
        budget_us: u32::try_from(left_us).unwrap_or(u32::MAX),
        // Both were checked against the limits when the call began.
        body: u32::try_from(body.len()).unwrap_or(u32::MAX),
        attachment: u32::try_from(attachment.len()).unwrap_or(u32::MAX),
        ..Header::new(Kind::Req)
    };
    writer.put(&header.encode());
    writer.put_vec(body);
    writer.put_attachment(&attachment);
}
