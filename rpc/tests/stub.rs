//! The stub is the trait: local, `Arc`, `Any` and the client are interchangeable.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tidemill_rpc::{
    Attachment, Client, ClientConfig, Code, Peer, RpcError, Server, Wire, WireError, service,
};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Wire)]
enum Mode {
    Plain,
    Times { n: u32 },
}

#[derive(Debug, PartialEq, thiserror::Error, WireError)]
enum EchoError {
    #[error("nothing to say")]
    #[wire(code = 1)]
    Empty,
    #[error("{have} bytes, at most {most}")]
    #[wire(code = 2)]
    TooLong { have: u64, most: u64 },
    #[error(transparent)]
    #[wire(rpc)]
    Rpc(#[from] RpcError),
}

#[service(name = "echo.v1")]
trait Echo: Send + Sync + 'static {
    /// Safe to resend.
    #[rpc(idempotent, timeout = "2s")]
    async fn say(&self, text: String, r#mode: Mode) -> Result<String, EchoError>;
    async fn upload(&self, name: String, body: Attachment) -> Result<u64, EchoError>;
    async fn r#loop(&self, body: Attachment) -> Result<((), Attachment), EchoError>;
    #[cfg(any())]
    async fn gone(&self, what: NoSuchType) -> Result<(), EchoError>;
}

struct Local;

impl Echo for Local {
    async fn say(&self, text: String, mode: Mode) -> Result<String, EchoError> {
        match mode {
            _ if text.is_empty() => Err(EchoError::Empty),
            Mode::Plain => Ok(text),
            Mode::Times { n } => Ok(text.repeat(n as usize)),
        }
    }

    async fn upload(&self, _name: String, body: Attachment) -> Result<u64, EchoError> {
        Ok(body.len() as u64)
    }

    async fn r#loop(&self, body: Attachment) -> Result<((), Attachment), EchoError> {
        Ok(((), body))
    }
}

async fn suite(echo: impl Echo) {
    assert_eq!(echo.say("a".into(), Mode::Times { n: 3 }).await, Ok("aaa".into()));
    assert_eq!(echo.say(String::new(), Mode::Plain).await, Err(EchoError::Empty));
    assert_eq!(echo.upload("x".into(), vec![7; 10].into()).await, Ok(10));
    let pieces: Attachment = [&b"ab"[..], b"", b"c"].map(bytes::Bytes::from_static).into_iter().collect();
    assert_eq!(echo.r#loop(pieces).await.unwrap().1, Attachment::from(b"abc".to_vec()));
}

#[tokio::test]
async fn local_arc_and_any_are_the_trait() {
    suite(Local).await;
    suite(Arc::new(Local)).await;
    suite(AnyEcho::new(Arc::new(Local))).await;
}

#[tokio::test]
async fn the_client_is_the_trait_in_memory() {
    let server = Server::new(EchoServer::new(Local));
    let client = server.connect_in_memory(ClientConfig::default()).await.unwrap();
    client.check(EchoClient::METHODS).unwrap();
    suite(EchoClient::new(client.clone())).await;
    suite(AnyEcho::new(EchoClient::new(client.clone()))).await;
    assert_eq!(client.in_flight(), 0);
}

#[tokio::test]
async fn the_client_is_the_trait_over_tcp() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::new(EchoServer::new(Arc::new(Local)));
    let serving = tokio::spawn({
        let server = server.clone();
        async move { server.serve_tcp(listener).await }
    });
    let client = Client::connect_tcp(address, ClientConfig::default()).await.unwrap();
    assert_eq!(client.peer(), Peer::Tcp(address));
    suite(EchoClient::new(client.clone())).await;
    server.drain(Duration::from_secs(5)).await;
    serving.await.unwrap().unwrap();
    assert_eq!(client.closed().await.code, Code::Unavailable);
}

#[tokio::test]
async fn the_client_is_the_trait_over_a_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let server = Server::new(EchoServer::new(Local));
    let serving = tokio::spawn({
        let server = server.clone();
        async move { server.serve_unix(listener).await }
    });
    let client = Client::connect_unix(&path, ClientConfig::default()).await.unwrap();
    let Peer::Unix { pid, .. } = client.peer() else { panic!("a Unix peer") };
    assert_eq!(pid, Some(std::process::id() as i32));
    suite(EchoClient::new(client.clone())).await;
    drop(client);
    server.drain(Duration::from_secs(5)).await;
    serving.await.unwrap().unwrap();
}
