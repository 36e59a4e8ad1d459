//! HELLO: what each side can, said once each way before anything else (docs/wire.md, H1).
//!
//! ```text
//! magic u32 = "TMRP", version_min u16, version_max u16, frame_bytes_max u32, in_flight u32,
//! codecs u8 + one byte each, methods u32, each: id u64, signature u64, name u16 + UTF-8
//! ```
//!
//! The client speaks first and lists no methods. The server answers with the version it chose (twice),
//! its own limits, the codecs both know, and every method it serves. Each side sends frames no larger
//! than the other's `frame_bytes_max`; the client keeps to the smaller `in_flight`.

use std::collections::HashMap;

use bytes::{Buf, Bytes};

use crate::codec;
use crate::error::{Code, RpcError};
use crate::fate::Fate;
use crate::frame::{HELLO_BYTES_MAX, Header, Kind, Violation};
use crate::method::Method;

const MAGIC: u32 = u32::from_le_bytes(*b"TMRP");
/// The one version there is.
pub const VERSION: u16 = 1;
/// The least `frame_bytes_max` a peer may ask for: smaller ones could not carry a HELLO.
const FRAME_BYTES_LEAST: u32 = HELLO_BYTES_MAX;

/// One side's HELLO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Versions spoken, inclusive.
    pub version_min: u16,
    /// See `version_min`.
    pub version_max: u16,
    /// The largest frame this side takes, header included.
    pub frame_bytes_max: u32,
    /// Requests in flight at most.
    pub in_flight: u32,
    /// Codec bytes.
    pub codecs: Vec<u8>,
    /// What the server serves; empty from a client.
    pub methods: Vec<Served>,
}

/// A method as a server announces it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    /// FNV-1a 64 of the name.
    pub id: u64,
    /// The folded schemas.
    pub signature: u64,
    /// `service.method`.
    pub name: String,
}

impl Hello {
    /// The frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend_from_slice(&MAGIC.to_le_bytes());
        body.extend_from_slice(&self.version_min.to_le_bytes());
        body.extend_from_slice(&self.version_max.to_le_bytes());
        body.extend_from_slice(&self.frame_bytes_max.to_le_bytes());
        body.extend_from_slice(&self.in_flight.to_le_bytes());
        body.push(u8::try_from(self.codecs.len()).unwrap_or(u8::MAX));
        body.extend(self.codecs.iter().take(u8::MAX.into()));
        body.extend_from_slice(&u32::try_from(self.methods.len()).unwrap_or(u32::MAX).to_le_bytes());
        for method in &self.methods {
            body.extend_from_slice(&method.id.to_le_bytes());
            body.extend_from_slice(&method.signature.to_le_bytes());
            // Wire names are at most 200 + 1 + 200 bytes: checked by the macro.
            body.extend_from_slice(&u16::try_from(method.name.len()).unwrap_or(u16::MAX).to_le_bytes());
            body.extend_from_slice(method.name.as_bytes());
        }
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let mut frame = Header { body: length, ..Header::new(Kind::Hello) }.encode().to_vec();
        frame.append(&mut body);
        frame
    }

    /// The body of a HELLO frame; consumes it exactly.
    pub fn decode(mut body: Bytes) -> Result<Self, Violation> {
        let malformed = |_| Violation::Malformed("HELLO");
        if body.try_get_u32_le().map_err(malformed)? != MAGIC {
            return Err(Violation::Malformed("HELLO: not this protocol"));
        }
        let version_min = body.try_get_u16_le().map_err(malformed)?;
        let version_max = body.try_get_u16_le().map_err(malformed)?;
        let frame_bytes_max = body.try_get_u32_le().map_err(malformed)?;
        let in_flight = body.try_get_u32_le().map_err(malformed)?;
        let count = usize::from(body.try_get_u8().map_err(malformed)?);
        let codecs = take(&mut body, count)?.to_vec();
        // Grows with what is there: the count is only what was said.
        let mut methods = Vec::new();
        for _ in 0..body.try_get_u32_le().map_err(malformed)? {
            let id = body.try_get_u64_le().map_err(malformed)?;
            let signature = body.try_get_u64_le().map_err(malformed)?;
            let length = usize::from(body.try_get_u16_le().map_err(malformed)?);
            let name = String::from_utf8(take(&mut body, length)?.to_vec());
            let name = name.map_err(|_| Violation::Malformed("HELLO: a method's name"))?;
            methods.push(Served { id, signature, name });
        }
        if !body.is_empty()
            || version_min > version_max
            || in_flight == 0
            || frame_bytes_max < FRAME_BYTES_LEAST
        {
            return Err(Violation::Malformed("HELLO"));
        }
        Ok(Self { version_min, version_max, frame_bytes_max, in_flight, codecs, methods })
    }

    /// Whether this build can speak with a side that said this.
    pub(crate) fn is_compatible(&self) -> bool {
        (self.version_min..=self.version_max).contains(&VERSION) && self.codecs.contains(&codec::BINCODE)
    }
}

fn take(body: &mut Bytes, count: usize) -> Result<Bytes, Violation> {
    if body.len() < count {
        return Err(Violation::Malformed("HELLO"));
    }
    Ok(body.split_to(count))
}

/// The server's methods, as the client keeps them to check its own against.
#[derive(Debug, Default)]
pub(crate) struct Methods(HashMap<u64, Served>);

impl Methods {
    pub(crate) fn new(methods: Vec<Served>) -> Self {
        Self(methods.into_iter().map(|method| (method.id, method)).collect())
    }

    /// Whether `method` means the same at the server.
    pub(crate) fn check(&self, method: &Method) -> Result<(), RpcError> {
        let Some(served) = self.0.get(&method.id) else {
            let message = format!("the server has no method {method}");
            return Err(RpcError::new(Code::Unimplemented, Fate::NotSent, message));
        };
        if served.signature != method.signature {
            let message = format!(
                "{method}: arguments or result differ between client (signature {:016x}) and server ({:016x}); \
                 build both from the same trait",
                method.signature, served.signature
            );
            return Err(RpcError::new(Code::Skew, Fate::NotSent, message));
        }
        Ok(())
    }
}
