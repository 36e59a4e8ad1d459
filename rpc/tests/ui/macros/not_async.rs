use tidemill_rpc::{Attachment, RpcError, service};

#[service(name = "a.v1")]
trait A: Send + Sync + 'static {
    async fn good(&self) -> Result<(), RpcError>;
    fn bad(&self) -> Result<(), RpcError>;
}

fn main() {
    let _: Option<Attachment> = None;
    let _: Option<RpcError> = None;
}
