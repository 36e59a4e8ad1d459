use tidemill_rpc::{Attachment, RpcError, service};

#[service(name = "a.v1")]
trait A: Send + Sync + 'static {
    async fn mutable(&mut self) -> Result<(), RpcError>;
    async fn owned(self) -> Result<(), RpcError>;
    async fn none() -> Result<(), RpcError>;
    async fn argument(n: u64) -> Result<(), RpcError>;
}

fn main() {
    let _: Option<Attachment> = None;
    let _: Option<RpcError> = None;
}
