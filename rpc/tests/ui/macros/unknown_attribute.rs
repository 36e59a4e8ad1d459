use tidemill_rpc::{Attachment, RpcError, service};

#[service(name = "a.v1")]
trait A: Send + Sync + 'static {
    #[rpc(idempotant)]
    async fn a(&self) -> Result<(), RpcError>;
    #[rpc(timeout = "2 s")]
    async fn b(&self) -> Result<(), RpcError>;
    #[rpc(name = "a b")]
    async fn c(&self) -> Result<(), RpcError>;
}

#[service(nome = "b.v1")]
trait B: Send + Sync + 'static {}

#[service]
trait C: Send + Sync + 'static {}

fn main() {
    let _: Option<Attachment> = None;
    let _: Option<RpcError> = None;
}
