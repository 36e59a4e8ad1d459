use tidemill_rpc::{Attachment, RpcError, service};

#[derive(Debug)]
enum Mine {
    Failed,
}

#[service(name = "a.v1")]
trait A: Send + Sync + 'static {
    async fn bad(&self) -> Result<(), Mine>;
}

#[derive(Debug, tidemill_rpc::WireError)]
enum Numbered {
    #[wire(code = 1)]
    Failed,
}

#[service(name = "b.v1")]
trait B: Send + Sync + 'static {
    async fn bad(&self) -> Result<(), Numbered>;
}

fn main() {
    let _: Option<Attachment> = None;
    let _: Option<RpcError> = None;
}
