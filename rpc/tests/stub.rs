//! The stub is the trait: local, `Arc`, `Any` and the client are interchangeable.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tidemill_rpc::{Attachment, RpcError, Wire, WireError, service};

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
