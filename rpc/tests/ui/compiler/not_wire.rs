use tidemill_rpc::{Attachment, RpcError, service};

struct Plain;

#[service(name = "a.v1")]
trait A: Send + Sync + 'static {
    async fn bad(&self, plain: Plain) -> Result<(), RpcError>;
    async fn worse(&self) -> Result<Plain, RpcError>;
}

fn main() {
    let _: Option<Attachment> = None;
    let _: Option<RpcError> = None;
}
