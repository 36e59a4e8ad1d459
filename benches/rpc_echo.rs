//! What does one unary call cost, and how does that change with the number in flight?
//!
//! * Workload: one client and one server, each on a runtime of its own with one thread, one connection; `callers` tasks
//!   each send their next call when the last was answered (closed loop). The payload is an attachment of
//!   pseudo-random bytes, echoed.
//! * Seed: 7, for the payloads. Durability: none, nothing touches a disk.
//! * Checked: every answer equals what was sent (length and content), and the server counted every call.
//!
//! `./x bench rpc_echo [-- seconds per cell]`; CI runs it with 0, which makes 200 calls per cell.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tidemill_rpc::{Attachment, Client, ClientConfig, RpcError, Server, service};

#[service(name = "bench.echo.v1")]
trait Echo: Send + Sync + 'static {
    async fn echo(&self, n: u64, body: Attachment) -> Result<(u64, Attachment), RpcError>;
}

#[derive(Default)]
struct Local {
    calls: AtomicU64,
}

impl Echo for Local {
    async fn echo(&self, n: u64, body: Attachment) -> Result<(u64, Attachment), RpcError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        Ok((n, body))
    }
}

#[derive(Clone, Copy)]
enum Transport {
    Tcp,
    Unix,
}

struct Cell {
    transport: Transport,
    bytes: usize,
    callers: usize,
}

fn main() -> anyhow::Result<()> {
    let seconds: f64 = std::env::args()
        .skip(1)
        .find(|arg| arg != "--bench")
        .map_or(Ok(2.0), |text| text.parse())
        .context("seconds per cell")?;
    let mut cells = Vec::new();
    for transport in [Transport::Tcp, Transport::Unix] {
        for (bytes, callers) in [
            (100, 1),
            (100, 8),
            (100, 64),
            (100, 512),
            (1024, 64),
            (64 << 10, 1),
            (64 << 10, 8),
            (1 << 20, 1),
            (1 << 20, 8),
        ] {
            cells.push(Cell { transport, bytes, callers });
        }
    }
    report("| transport | bytes | in flight | calls/s | MB/s each way | p50 µs | p99 µs | max µs |");
    report("|---|---|---|---|---|---|---|---|");
    for cell in cells {
        run(&cell, seconds)?;
    }
    Ok(())
}

#[allow(clippy::print_stdout, reason = "a bench prints its table")]
fn report(line: &str) {
    println!("{line}");
}

fn run(cell: &Cell, seconds: f64) -> anyhow::Result<()> {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let (serving, calling) = (runtime()?, runtime()?);
    let local = Arc::new(Local::default());
    let server = Server::new(EchoServer::new(Arc::clone(&local)));
    let folder = std::env::temp_dir().join(format!("rpc_echo-{}", std::process::id()));
    let client = match cell.transport {
        Transport::Tcp => {
            let listener = serving.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
            let address = listener.local_addr()?;
            let server = server.clone();
            serving.spawn(async move { server.serve_tcp(listener).await });
            calling.block_on(Client::connect_tcp(address, ClientConfig::default()))?
        }
        Transport::Unix => {
            std::fs::create_dir_all(&folder)?;
            let path = folder.join("sock");
            let _ = std::fs::remove_file(&path);
            let guard = serving.enter();
            let listener = tokio::net::UnixListener::bind(&path)?;
            drop(guard);
            let server = server.clone();
            serving.spawn(async move { server.serve_unix(listener).await });
            calling.block_on(Client::connect_unix(&path, ClientConfig::default()))?
        }
    };
    // A warm-up grows tables and buffers; it is checked but not timed.
    let warm = calling.block_on(load(&client, cell, Duration::ZERO))?;
    let begun = Instant::now();
    let mut taken = calling.block_on(load(&client, cell, Duration::from_secs_f64(seconds)))?;
    let elapsed = begun.elapsed().as_secs_f64();
    let calls = taken.len();
    ensure!(
        local.calls.load(Ordering::Relaxed) == (warm.len() + calls) as u64,
        "the server counted other calls"
    );
    taken.sort_unstable();
    let at = |share: f64| taken[((calls - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
    let rate = calls as f64 / elapsed;
    report(&format!(
        "| {} | {} | {} | {:.0} | {:.1} | {:.0} | {:.0} | {:.0} |",
        match cell.transport {
            Transport::Tcp => "TCP",
            Transport::Unix => "Unix",
        },
        cell.bytes,
        cell.callers,
        rate,
        rate * cell.bytes as f64 / 1e6,
        at(0.50),
        at(0.99),
        at(1.0)
    ));
    calling.block_on(client.close());
    serving.block_on(server.drain(Duration::from_secs(5)));
    let _ = std::fs::remove_dir_all(folder);
    Ok(())
}

/// Runs the callers for this long, at least 200 calls in all; each call's time.
async fn load(client: &Client, cell: &Cell, time: Duration) -> anyhow::Result<Vec<Duration>> {
    let until = Instant::now() + time;
    let least = 200_usize.div_ceil(cell.callers);
    let callers: Vec<_> = (0..cell.callers)
        .map(|caller| {
            let echo = EchoClient::new(client.clone());
            let body = bytes::Bytes::from(payload(caller as u64 + 7, cell.bytes));
            tokio::spawn(async move {
                let mut taken = Vec::new();
                while taken.len() < least || Instant::now() < until {
                    let n = taken.len() as u64;
                    let begun = Instant::now();
                    let (back, answer) = echo.echo(n, Attachment::new(body.clone())).await?;
                    taken.push(begun.elapsed());
                    ensure!(back == n && answer.into_bytes() == body, "another answer than was sent");
                }
                Ok(taken)
            })
        })
        .collect();
    let mut all = Vec::new();
    for caller in callers {
        all.append(&mut caller.await??);
    }
    Ok(all)
}

/// xorshift64*: the bytes only have to differ.
fn payload(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..bytes)
        .map(|_| {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
        })
        .collect()
}
