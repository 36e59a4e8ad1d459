use tidemill_rpc::{Attachment, RpcError, service};

#[service(name = "a.v1")]
trait A: Send + Sync + 'static {
    async fn first(&self, body: Attachment, name: String) -> Result<(), RpcError>;
    async fn alone(&self) -> Result<Attachment, RpcError>;
}

fn main() {
    let _: Option<Attachment> = None;
    let _: Option<RpcError> = None;
}
