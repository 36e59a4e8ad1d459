use tidemill_rpc::{Attachment, RpcError, service};

#[service(name = "a.v1")]
trait A: Send + Sync + 'static {
    async fn nothing(&self);
    async fn value(&self) -> u64;
    async fn alias(&self) -> std::io::Result<u64>;
}

fn main() {
    let _: Option<Attachment> = None;
    let _: Option<RpcError> = None;
}
