use tidemill_rpc::{Attachment, RpcError, service};

#[service(name = "a.v1")]
trait A: Send + Sync + 'static {
    async fn say(&self) -> Result<(), RpcError>;
    #[rpc(name = "say")]
    async fn tell(&self) -> Result<(), RpcError>;
}

fn main() {
    let _: Option<Attachment> = None;
    let _: Option<RpcError> = None;
}
