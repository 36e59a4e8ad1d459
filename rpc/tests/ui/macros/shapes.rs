use tidemill_rpc::{Attachment, RpcError, service};

#[service(name = "a.v1")]
trait A: Send + Sync + 'static {
    const N: u64;
    type T;
    async fn generic<T>(&self, t: T) -> Result<(), RpcError>;
    async fn body(&self) -> Result<(), RpcError> {
        Ok(())
    }
    async fn reference(&self, name: &str) -> Result<(), RpcError>;
    async fn pattern(&self, (a, b): (u8, u8)) -> Result<(), RpcError>;
    async fn attribute(&self, #[cfg(unix)] a: u8) -> Result<(), RpcError>;
}

#[service(name = "b.v1")]
trait B: Send + 'static {
    async fn good(&self) -> Result<(), RpcError>;
}

#[service(name = "c.v1")]
struct C;

fn main() {
    let _: Option<Attachment> = None;
    let _: Option<RpcError> = None;
}
