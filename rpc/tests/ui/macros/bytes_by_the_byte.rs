use tidemill_rpc::{Attachment, RpcError, service};

#[service(name = "a.v1")]
trait A: Send + Sync + 'static {
    async fn put(&self, name: String, body: Vec<u8>) -> Result<(), RpcError>;
    async fn get(&self) -> Result<std::vec::Vec<u8>, RpcError>;
}

fn main() {
    let _: Option<Attachment> = None;
    let _: Option<RpcError> = None;
}
