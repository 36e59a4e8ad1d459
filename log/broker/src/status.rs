//! What is said on the owner's socket before RPC bytes flow.
//!
//! ```text
//!   client → owner, once, 32 bytes         owner → client, on accept and every second, 256 bytes
//!   0   "tidemill-client/1 "               0    "tidemill-owner/1 "
//!   18  "rpc" or "watch", spaces           17   "opening", "serving", "closing" or "failed", spaces
//!   31  '\n'                               25   why, UTF-8, spaces
//!                                          255  '\n'
//! ```
//!
//! On an `rpc` connection the first `serving` line is the last one: RPC bytes follow it both ways. A `watch` connection
//! carries a line every second for as long as the owner lives, so silence there means that the owner does not run.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Length of a status line.
pub(crate) const STATUS_BYTES: usize = 256;
/// Length of a client's line.
pub(crate) const HELLO_BYTES: usize = 32;
const OWNER: &str = "tidemill-owner/1 ";
const CLIENT: &str = "tidemill-client/1 ";
const STATE_BYTES: usize = 8;
const WHY_AT: usize = OWNER.len() + STATE_BYTES;

/// What the owner says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// It recovers the log.
    Opening,
    /// It answers requests.
    Serving,
    /// It drains and goes; the directory will be free.
    Closing,
    /// It could not open the log, and why.
    Failed(String),
}

/// What a client wants of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hello {
    /// Requests.
    Rpc,
    /// Status lines only.
    Watch,
}

impl Status {
    /// Whether the owner says nothing after it.
    pub(crate) fn is_last(&self) -> bool {
        matches!(self, Status::Closing | Status::Failed(_))
    }

    pub(crate) fn encode(&self) -> [u8; STATUS_BYTES] {
        let (word, why) = match self {
            Status::Opening => ("opening", ""),
            Status::Serving => ("serving", ""),
            Status::Closing => ("closing", ""),
            Status::Failed(why) => ("failed", why.as_str()),
        };
        let mut line = [b' '; STATUS_BYTES];
        line[..OWNER.len()].copy_from_slice(OWNER.as_bytes());
        line[OWNER.len()..OWNER.len() + word.len()].copy_from_slice(word.as_bytes());
        let why = why.replace('\n', " ");
        let mut end = why.len().min(STATUS_BYTES - 1 - WHY_AT);
        while !why.is_char_boundary(end) {
            end -= 1;
        }
        line[WHY_AT..WHY_AT + end].copy_from_slice(&why.as_bytes()[..end]);
        line[STATUS_BYTES - 1] = b'\n';
        line
    }

    pub(crate) fn decode(line: &[u8; STATUS_BYTES]) -> Option<Status> {
        let text = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
        let (word, why) = text.strip_prefix(OWNER)?.split_at_checked(STATE_BYTES)?;
        Some(match word.trim_end() {
            "opening" => Status::Opening,
            "serving" => Status::Serving,
            "closing" => Status::Closing,
            "failed" => Status::Failed(why.trim_end().to_owned()),
            _ => return None,
        })
    }

    pub(crate) async fn write(&self, to: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
        to.write_all(&self.encode()).await
    }
}

impl Hello {
    pub(crate) fn encode(self) -> [u8; HELLO_BYTES] {
        let word = match self {
            Hello::Rpc => "rpc",
            Hello::Watch => "watch",
        };
        let mut line = [b' '; HELLO_BYTES];
        line[..CLIENT.len()].copy_from_slice(CLIENT.as_bytes());
        line[CLIENT.len()..CLIENT.len() + word.len()].copy_from_slice(word.as_bytes());
        line[HELLO_BYTES - 1] = b'\n';
        line
    }

    fn decode(line: &[u8; HELLO_BYTES]) -> Option<Hello> {
        let text = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
        match text.strip_prefix(CLIENT)?.trim_end() {
            "rpc" => Some(Hello::Rpc),
            "watch" => Some(Hello::Watch),
            _ => None,
        }
    }

    /// None where the bytes are no hello. The caller holds a deadline over it.
    pub(crate) async fn read(from: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Option<Hello>> {
        let mut line = [0; HELLO_BYTES];
        from.read_exact(&mut line).await?;
        Ok(Hello::decode(&line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_documented() {
        let line = Status::Failed("disk gone".into()).encode();
        assert_eq!(&line[..40], b"tidemill-owner/1 failed  disk gone      ");
        assert_eq!(line[255], b'\n');
        assert_eq!(&Hello::Watch.encode(), b"tidemill-client/1 watch        \n");
        for status in [Status::Opening, Status::Serving, Status::Closing, Status::Failed("a b".into())] {
            assert_eq!(Status::decode(&status.encode()), Some(status));
        }
        for hello in [Hello::Rpc, Hello::Watch] {
            assert_eq!(Hello::decode(&hello.encode()), Some(hello));
        }
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character() {
        let why = "ü".repeat(300);
        let Some(Status::Failed(got)) = Status::decode(&Status::Failed(why.clone()).encode()) else {
            panic!("does not decode");
        };
        assert!(why.starts_with(&got) && got.len() >= 228);
    }

    #[test]
    fn strange_bytes_are_no_line() {
        assert_eq!(Status::decode(&[0xff; STATUS_BYTES]), None);
        assert_eq!(Status::decode(&[b' '; STATUS_BYTES]), None);
        assert_eq!(Hello::decode(&[b'G'; HELLO_BYTES]), None);
    }
}
