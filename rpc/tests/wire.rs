//! The rules of docs/wire.md, against real peers: raw bytes on one side, the framework on the other.

use std::fmt::Write as _;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tidemill_rpc::frame::{BODY_BYTES_MAX, Frame, Header, Kind, Reader, Status, Violation};
use tidemill_rpc::hello::{Hello, Served};
use tidemill_rpc::{
    Attachment, Client, ClientConfig, Code, Fate, RpcError, Server, ServerConfig, Wire, WireError, service,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

#[derive(Debug, PartialEq, Serialize, Deserialize, Wire)]
struct Range {
    from: u64,
    to: Option<u32>,
}

#[derive(Debug, PartialEq, thiserror::Error, WireError)]
enum DemoError {
    #[error("no such thing: {name}")]
    #[wire(code = 7)]
    Missing { name: String },
    #[error(transparent)]
    #[wire(rpc)]
    Rpc(#[from] RpcError),
}

#[service(name = "demo.v1")]
trait Demo: Send + Sync + 'static {
    #[rpc(timeout = "2s")]
    async fn put(&self, name: String, range: Range, body: Attachment) -> Result<u64, DemoError>;
    async fn get(&self, name: String) -> Result<(Range, Attachment), DemoError>;
    async fn hang(&self) -> Result<(), DemoError>;
}

struct Local;

impl Demo for Local {
    async fn put(&self, _name: String, _range: Range, body: Attachment) -> Result<u64, DemoError> {
        Ok(body.len() as u64)
    }

    async fn get(&self, name: String) -> Result<(Range, Attachment), DemoError> {
        match name.parse::<usize>() {
            Ok(bytes) => Ok((Range { from: 1, to: None }, vec![0xee; bytes].into())),
            Err(_) => Err(DemoError::Missing { name }),
        }
    }

    async fn hang(&self) -> Result<(), DemoError> {
        std::future::pending().await
    }
}

fn method(name: &str) -> u64 {
    DemoClient::METHODS.iter().find(|method| method.name == name).unwrap().id
}

fn hello() -> Hello {
    Hello {
        version_min: 1,
        version_max: 1,
        frame_bytes_max: 1 << 20,
        in_flight: 8,
        codecs: vec![1],
        methods: Vec::new(),
    }
}

/// A peer that speaks bytes.
struct Raw {
    io: DuplexStream,
    reader: Reader,
}

impl Raw {
    fn new(io: DuplexStream) -> Self {
        Self { io, reader: Reader::new(16 << 20) }
    }

    async fn send(&mut self, header: Header, body: &[u8], attachment: &[u8]) {
        let lengths = [body, attachment].map(|part| u32::try_from(part.len()).unwrap());
        let header = Header { body: lengths[0], attachment: lengths[1], ..header };
        self.bytes(&[&header.encode()[..], body, attachment].concat()).await;
    }

    async fn bytes(&mut self, bytes: &[u8]) {
        self.io.write_all(bytes).await.unwrap();
    }

    /// The next frame; `None` at the end of the stream.
    async fn next(&mut self) -> Option<Frame> {
        let next = async {
            loop {
                if let Some(frame) = self.reader.next_frame().unwrap() {
                    return Some(frame);
                }
                if self.io.read_buf(self.reader.space()).await.unwrap_or(0) == 0 {
                    return None;
                }
            }
        };
        timeout(Duration::from_secs(400), next).await.expect("a frame or the end")
    }
}

type Serving = JoinHandle<Result<(), RpcError>>;

/// A server and a raw client, before HELLO.
fn raw_client(config: ServerConfig) -> (Server, Serving, Raw) {
    let server = Server::builder().service(DemoServer::new(Local)).config(config).build();
    let (near, far) = duplex(64 << 10);
    let serving = tokio::spawn({
        let server = server.clone();
        async move { server.serve_stream(far).await }
    });
    (server, serving, Raw::new(near))
}

/// The same after HELLO.
async fn greeted(config: ServerConfig) -> (Server, Serving, Raw) {
    let (server, serving, mut raw) = raw_client(config);
    raw.bytes(&hello().encode()).await;
    assert_eq!(raw.next().await.unwrap().header.kind, Kind::Hello);
    (server, serving, raw)
}

/// A client of a raw server, after HELLO, and the client's own HELLO.
async fn raw_server(config: ClientConfig) -> (DemoClient, Raw, Frame) {
    let (near, far) = duplex(64 << 10);
    let connecting = tokio::spawn(Client::connect(near, config));
    let mut raw = Raw::new(far);
    let greeting = raw.next().await.unwrap();
    let served = |method: &tidemill_rpc::Method| Served {
        id: method.id,
        signature: method.signature,
        name: method.to_string(),
    };
    let theirs = Hello { methods: DemoClient::METHODS.iter().map(served).collect(), ..hello() };
    raw.bytes(&theirs.encode()).await;
    (DemoClient::new(connecting.await.unwrap().unwrap()), raw, greeting)
}

fn request(slot: u32, generation: u32, name: &str) -> Header {
    Header {
        codec: 1,
        slot,
        generation,
        method: method(name),
        budget_us: 1_000_000,
        ..Header::new(Kind::Req)
    }
}

/// The codec's encoding of one string.
fn text(text: &str) -> Vec<u8> {
    let mut out = vec![u8::try_from(text.len()).unwrap()];
    out.extend_from_slice(text.as_bytes());
    out
}

async fn violation(serving: Serving) -> RpcError {
    let error = timeout(Duration::from_secs(400), serving).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.code, Code::Protocol, "{error}");
    error
}

fn dump(out: &mut String, claim: &str, frame: &Frame) {
    writeln!(out, "# {claim}").unwrap();
    let head = frame.header.encode();
    for (name, part) in
        [("header", &head[..]), ("body", &frame.body[..]), ("attachment", &frame.attachment[..])]
    {
        for (index, line) in part.chunks(12).enumerate() {
            let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
            let plain: String = line
                .iter()
                .map(|&byte| if byte.is_ascii_graphic() { char::from(byte) } else { '.' })
                .collect();
            writeln!(out, "{:<11}{:<36} {plain}", if index == 0 { name } else { "" }, hex.join(" ")).unwrap();
        }
    }
    out.push('\n');
}

/// F1, H1, H2, C1, C5, C6, C7, E1: every kind, as real peers send it. `TIDEMILL_GOLDEN=write` writes the file anew.
#[tokio::test(start_paused = true)]
async fn golden_bytes_of_every_kind() {
    let mut out = String::new();

    let (demo, mut raw, greeting) = raw_server(ClientConfig::default()).await;
    dump(
        &mut out,
        "HELLO of a client: versions 1 to 1, 16 MiB frames, 1024 in flight, codec 1, no methods",
        &greeting,
    );
    let call = tokio::spawn({
        let demo = demo.clone();
        async move { demo.put("log".into(), Range { from: 300, to: Some(5) }, b"batch".to_vec().into()).await }
    });
    let frame = raw.next().await.unwrap();
    dump(
        &mut out,
        "REQ demo.v1.put(\"log\", Range { from: 300, to: Some(5) }, 5 bytes attached), 2 s left",
        &frame,
    );
    call.abort();
    dump(&mut out, "CANCEL of it", &raw.next().await.unwrap());
    dump(&mut out, "PING of a client that has heard nothing for 10 s", &raw.next().await.unwrap());

    let (server, serving, mut raw) = raw_client(ServerConfig::default());
    raw.bytes(&hello().encode()).await;
    let answer = raw.next().await.unwrap();
    dump(&mut out, "HELLO of a server: its methods are demo.v1.put, demo.v1.get, demo.v1.hang", &answer);
    raw.send(request(0, 0, "get"), &text("4"), &[]).await;
    dump(
        &mut out,
        "RESP of demo.v1.get(\"4\"): Range { from: 1, to: None }, 4 bytes attached",
        &raw.next().await.unwrap(),
    );
    raw.send(request(0, 1, "get"), &text("x"), &[]).await;
    dump(&mut out, "RESP: the application error Missing { name: \"x\" }, code 7", &raw.next().await.unwrap());
    raw.send(Header { method: 1, ..request(1, 0, "get") }, &[], &[]).await;
    dump(&mut out, "RESP: no such method", &raw.next().await.unwrap());
    raw.send(Header { slot: 3, generation: 9, ..Header::new(Kind::Ping) }, &[], &[]).await;
    dump(&mut out, "PONG to a PING with call id 3.9", &raw.next().await.unwrap());
    server.drain(Duration::ZERO).await;
    dump(&mut out, "GOAWAY after three requests", &raw.next().await.unwrap());
    serving.await.unwrap().unwrap();

    for kind in [Kind::Item, Kind::End, Kind::Credit] {
        let frame = Frame { header: Header::new(kind), body: Bytes::new(), attachment: Bytes::new() };
        dump(&mut out, &format!("{kind:?}: reserved"), &frame);
    }

    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/frames.txt");
    if std::env::var_os("TIDEMILL_GOLDEN").is_some_and(|how| how == "write") {
        std::fs::write(path, &out).unwrap();
    }
    let golden = std::fs::read_to_string(path).unwrap();
    assert!(out == golden, "frames changed on the wire:\n{out}");
}

/// F2, F3, F4, F6, C2, L2: what closes a connection at the server.
#[tokio::test]
async fn a_server_closes_on_violations() {
    let plain = Header::new(Kind::Ping).encode();
    let with = |at: usize, bytes: &[u8]| {
        let mut frame = plain;
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame.to_vec()
    };
    let hang = request(2, 0, "hang").encode();
    let cases: Vec<(&str, Vec<u8>, Violation)> = vec![
        ("F2 short", with(0, &31_u32.to_le_bytes()), Violation::ShortFrame { length: 31 }),
        ("F2 zero", with(0, &[0; 4]), Violation::ShortFrame { length: 0 }),
        (
            "H3 long",
            with(0, &u32::MAX.to_le_bytes()),
            Violation::FrameLength { length: u32::MAX, limit: 16 << 20 },
        ),
        ("F2 body", with(28, &[1]), Violation::Lengths { length: 32, body: 1, metadata: 0 }),
        ("F2 metadata", with(32, &[1]), Violation::Lengths { length: 32, body: 0, metadata: 1 }),
        ("L2", with(28, &(BODY_BYTES_MAX + 1).to_le_bytes()), Violation::BodyLength(BODY_BYTES_MAX + 1)),
        ("F3 zero", with(4, &[0]), Violation::Kind(0)),
        ("F3 above", with(4, &[11]), Violation::Kind(11)),
        ("F4 MORE", with(5, &[1]), Violation::Flags(1)),
        ("F6 ITEM", with(4, &[4]), Violation::Unexpected(Kind::Item)),
        ("F6 RESP", with(4, &[3]), Violation::Unexpected(Kind::Resp)),
        ("F6 GOAWAY", with(4, &[10]), Violation::Unexpected(Kind::GoAway)),
        ("H1 again", hello().encode(), Violation::Unexpected(Kind::Hello)),
        ("C2 busy", [hang, hang].concat(), Violation::Slot { slot: 2 }),
        ("C2 beyond", request(1024, 0, "hang").encode().to_vec(), Violation::Slot { slot: 1024 }),
        ("codec", Header { codec: 2, ..request(0, 0, "hang") }.encode().to_vec(), Violation::Codec(2)),
    ];
    for (rule, bytes, expected) in cases {
        let (_server, serving, mut raw) = greeted(ServerConfig::default()).await;
        raw.bytes(&bytes).await;
        let error = violation(serving).await;
        assert_eq!(error.message, format!("connection: {expected}"), "{rule}");
    }
}

/// F4, F5: what a receiver skips.
#[tokio::test]
async fn a_server_skips_what_is_not_critical() {
    let (_server, _serving, mut raw) = greeted(ServerConfig::default()).await;
    let body = text("2");
    let header = Header { flags: 0xf0, metadata: 3, body: 2, ..request(0, 0, "get") };
    raw.bytes(&[&header.encode()[..], b"abc", &body].concat()).await;
    let frame = raw.next().await.unwrap();
    assert_eq!(frame.header.status, Status::Ok.number());
    assert_eq!(frame.attachment, Bytes::from_static(&[0xee; 2]));
}

/// C1, C4, C5, E5: exactly one answer each, whatever the request.
#[tokio::test(start_paused = true)]
async fn every_request_is_answered_once() {
    let (_server, serving, mut raw) = greeted(ServerConfig::default()).await;
    // Expired before the first poll; trailing byte; missing byte; unexpected attachment; then a deadline and a cancel.
    raw.send(Header { budget_us: 0, ..request(0, 0, "hang") }, &[], &[]).await;
    raw.send(request(1, 0, "get"), &[&text("2")[..], &[0]].concat(), &[]).await;
    raw.send(request(2, 0, "get"), &[9, b'x'], &[]).await;
    raw.send(request(3, 0, "hang"), &[], b"no").await;
    raw.send(Header { budget_us: 50_000, ..request(4, 0, "hang") }, &[], &[]).await;
    raw.send(request(5, 0, "hang"), &[], &[]).await;
    raw.send(Header { slot: 5, generation: 1, ..Header::new(Kind::Cancel) }, &[], &[]).await;
    raw.send(Header { slot: 77, ..Header::new(Kind::Cancel) }, &[], &[]).await;
    raw.send(Header { slot: 5, ..Header::new(Kind::Cancel) }, &[], &[]).await;
    let mut answers = Vec::new();
    for _ in 0..6 {
        let header = raw.next().await.unwrap().header;
        assert_eq!((header.kind, header.generation), (Kind::Resp, 0));
        answers.push((header.slot, Status::from_number(header.status).unwrap()));
    }
    let expected = [
        (0, Status::Expired),
        (1, Status::InvalidRequest),
        (2, Status::InvalidRequest),
        (3, Status::InvalidRequest),
        (5, Status::Cancelled),
        (4, Status::Deadline),
    ];
    assert_eq!(answers, expected);
    // The slots are free for their next generation.
    raw.send(request(4, 1, "get"), &text("0"), &[]).await;
    assert_eq!(raw.next().await.unwrap().header.status, 0);
    drop(raw);
    serving.await.unwrap().unwrap();
}

/// C3, F6: what closes a connection at the client; the calls in flight end at once.
#[tokio::test]
async fn a_client_closes_on_violations() {
    let stale = Header { slot: 0, generation: 1, codec: 1, ..Header::new(Kind::Resp) };
    let cases = [
        ("C3 generation", stale, "answer to 0.1, which is not in flight"),
        ("C3 slot", Header { slot: 9, generation: 0, ..stale }, "answer to 9.0, which is not in flight"),
        ("status", Header { generation: 0, status: 99, ..stale }, "unknown status 99"),
        ("codec", Header { generation: 0, codec: 9, ..stale }, "unknown codec 9"),
        ("F6 REQ", Header::new(Kind::Req), "unexpected Req frame"),
        ("C6 GOAWAY", Header::new(Kind::GoAway), "malformed GOAWAY"),
    ];
    for (rule, header, message) in cases {
        let (demo, mut raw, _) = raw_server(ClientConfig::default()).await;
        let call = tokio::spawn({
            let demo = demo.clone();
            async move { demo.hang().await }
        });
        assert_eq!(raw.next().await.unwrap().header.kind, Kind::Req);
        raw.send(header, &[], &[]).await;
        let Err(DemoError::Rpc(error)) = call.await.unwrap() else { panic!("{rule}") };
        assert_eq!((error.code, error.fate), (Code::Protocol, Fate::Unknown), "{rule}");
        assert_eq!(error.message, format!("connection: {message}"), "{rule}");
        assert!(raw.next().await.is_none(), "{rule}: the client hangs up");
    }
}

/// E1, E2, E5: answers that do not decode were executed all the same.
#[tokio::test]
async fn a_client_reads_answers_exactly() {
    let ok = Header { codec: 1, ..Header::new(Kind::Resp) };
    let application = Header { status: 1, ..ok };
    let unknown = [&9_u32.to_le_bytes()[..], &[0; 4]].concat();
    let lying = [&7_u32.to_le_bytes()[..], &[200, 0, 0, 0], &text("x")].concat();
    type Case = (Header, Vec<u8>, &'static [u8], Code, Fate);
    let cases: Vec<Case> = vec![
        (ok, vec![], b"", Code::InvalidReply, Fate::Executed),
        (ok, vec![1, 2], b"", Code::InvalidReply, Fate::Executed),
        (ok, vec![1], b"what", Code::InvalidReply, Fate::Executed),
        (application, vec![1, 2, 3], b"", Code::InvalidReply, Fate::Executed),
        (application, lying, b"", Code::InvalidReply, Fate::Executed),
        (application, unknown, b"", Code::UnknownError, Fate::Executed),
    ];
    for (header, body, attachment, code, fate) in cases {
        let (demo, mut raw, _) = raw_server(ClientConfig::default()).await;
        let call = tokio::spawn(async move {
            demo.put("a".into(), Range { from: 0, to: None }, Attachment::default()).await
        });
        raw.next().await.unwrap();
        raw.send(header, &body, attachment).await;
        let Err(DemoError::Rpc(error)) = call.await.unwrap() else { panic!("{body:?}") };
        assert_eq!((error.code, error.fate), (code, fate), "{body:?} {error}");
    }
    for status in Status::ALL.iter().filter(|status| !matches!(status, Status::Ok | Status::Application)) {
        let (demo, mut raw, _) = raw_server(ClientConfig::default()).await;
        let call = tokio::spawn(async move { demo.hang().await });
        raw.next().await.unwrap();
        raw.send(Header { status: status.number(), ..ok }, b"why", &[]).await;
        let Err(DemoError::Rpc(error)) = call.await.unwrap() else { panic!("{status:?}") };
        assert_eq!((error.code, error.fate), status.meaning());
        assert_eq!(error.message, "why");
    }
}

/// C6: calls beyond the count were not executed, those within it are answered.
#[tokio::test]
async fn goaway_rejects_what_lies_beyond_its_count() {
    let (demo, mut raw, _) = raw_server(ClientConfig::default()).await;
    let spawn = || {
        let demo = demo.clone();
        tokio::spawn(async move { demo.hang().await })
    };
    let first = spawn();
    let taken = raw.next().await.unwrap().header;
    let second = spawn();
    assert_eq!(raw.next().await.unwrap().header.kind, Kind::Req);
    raw.send(Header::new(Kind::GoAway), &1_u64.to_le_bytes(), &[]).await;
    let Err(DemoError::Rpc(error)) = second.await.unwrap() else { panic!("beyond the count") };
    assert_eq!((error.code, error.fate), (Code::Draining, Fate::Rejected));
    let answer = Header { kind: Kind::Resp, budget_us: 0, method: 0, ..taken };
    raw.send(answer, &[], &[]).await;
    assert_eq!(first.await.unwrap(), Ok(()));
}

/// H3: the client keeps to the server's limits.
#[tokio::test(start_paused = true)]
async fn a_client_keeps_to_the_servers_limits() {
    let (demo, mut raw, _) = raw_server(ClientConfig::default()).await;
    let calls: Vec<_> = (0..9)
        .map(|_| {
            let demo = demo.clone();
            tokio::spawn(async move { demo.hang().await })
        })
        .collect();
    for slot in 0..8 {
        assert_eq!(raw.next().await.unwrap().header.slot, slot);
    }
    let ninth = timeout(Duration::from_millis(50), raw.next()).await;
    assert!(ninth.is_err(), "the ninth waits for a slot");
    raw.send(Header { codec: 1, slot: 3, ..Header::new(Kind::Resp) }, &[], &[]).await;
    let header = raw.next().await.unwrap().header;
    assert_eq!((header.slot, header.generation), (3, 1));
    calls.iter().for_each(JoinHandle::abort);
    let body = vec![0; 1 << 20];
    let error = demo.put("x".into(), Range { from: 0, to: None }, body.into()).await.unwrap_err();
    let DemoError::Rpc(error) = error else { panic!("{error}") };
    assert_eq!((error.code, error.fate), (Code::TooLarge, Fate::NotSent));
}

/// H4: versions and codecs that do not meet.
#[tokio::test]
async fn another_version_is_a_precise_error() {
    for other in [Hello { version_min: 2, version_max: 3, ..hello() }, Hello { codecs: vec![7], ..hello() }] {
        let (_server, serving, mut raw) = raw_client(ServerConfig::default());
        raw.bytes(&other.encode()).await;
        assert_eq!(raw.next().await.unwrap().header.kind, Kind::Hello, "it says what it speaks");
        assert!(raw.next().await.is_none());
        assert_eq!(serving.await.unwrap().unwrap_err().code, Code::Skew);

        let (near, far) = duplex(1 << 10);
        let mut raw = Raw::new(far);
        raw.bytes(&other.encode()).await;
        let error = Client::connect(near, ClientConfig::default()).await.unwrap_err();
        assert_eq!((error.code, error.fate), (Code::Skew, Fate::NotSent));
        assert!(error.message.contains("this build speaks version 1"), "{error}");
    }
}

/// L1: before HELLO.
#[tokio::test(start_paused = true)]
async fn limits_before_hello() {
    let (_server, serving, mut raw) = raw_client(ServerConfig::default());
    raw.bytes(&((64 << 10) - 3_u32).to_le_bytes()).await;
    let error = violation(serving).await;
    assert!(error.message.contains("the limit is 65536"), "{error}");

    let (_server, serving, mut raw) = raw_client(ServerConfig::default());
    raw.bytes(&Header::new(Kind::Ping).encode()).await;
    assert!(violation(serving).await.message.contains("unexpected Ping"));

    let begun = Instant::now();
    let (_server, serving, mut raw) = raw_client(ServerConfig::default());
    for byte in &hello().encode()[..8] {
        // The last ones find it closed.
        let _ = raw.io.write_all(&[*byte]).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    let error = serving.await.unwrap().unwrap_err();
    assert!(error.message.contains("no HELLO within 10 s"), "{error}");
    assert!(begun.elapsed() <= Duration::from_secs(17));

    let (near, _far) = duplex(1 << 10);
    let begun = Instant::now();
    let error = Client::connect(near, ClientConfig::default()).await.unwrap_err();
    assert_eq!((error.code, error.fate), (Code::Unavailable, Fate::NotSent));
    assert_eq!(begun.elapsed().as_secs(), 10);
}

/// L5: a client that does not read stops its own requests, then is closed.
#[tokio::test(start_paused = true)]
async fn a_server_stops_reading_while_replies_wait() {
    let (server, serving, mut raw) = greeted(ServerConfig::default()).await;
    let bytes = 300_000;
    for slot in 0..8 {
        raw.send(request(slot, 0, "get"), &text(&bytes.to_string()), &[]).await;
    }
    // Far more PINGs than the stream holds: they wait in it, for the server does not read them.
    let ping = Header::new(Kind::Ping).encode();
    let pings = ping.repeat(10_000);
    let stuck = timeout(Duration::from_secs(5), raw.io.write_all(&pings)).await;
    assert!(stuck.is_err(), "the server took 360 KB while it could not write");
    assert_eq!(server.connections(), 1);
    let begun = Instant::now();
    let error = serving.await.unwrap().unwrap_err();
    assert!(error.message.contains("took no bytes for 30 s"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
}

/// L6: a frame that never ends.
#[tokio::test(start_paused = true)]
async fn a_half_frame_times_out() {
    let (_server, serving, mut raw) = greeted(ServerConfig::default()).await;
    let frame = Header { attachment: 1000, ..request(0, 0, "put") }.encode();
    raw.bytes(&frame).await;
    let begun = Instant::now();
    let error = loop {
        if serving.is_finished() {
            break serving.await.unwrap().unwrap_err();
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        let _ = raw.io.write_all(&[0]).await;
    };
    assert!(error.message.contains("not whole after 60 s"), "{error}");
    assert!((60..=67).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
}
