//! The source: a server that pushes lines to whoever connects, as a device or a log shipper would.
//!
//! ```text
//!   line i is due 0 to 99 ms after line i - 1 (about 20 a second), from one of four addresses; every 250th is damaged
//! ```
//!
//! The same seed gives the same lines. A source like this keeps nothing: what it pushed into a connection that broke is
//! gone. So the ingester's topic is where the promise of exactly once begins.

use std::io::{BufWriter, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};

use crate::job::time_of_day;

/// Every so many lines one cannot be read.
const DAMAGED_EVERY: usize = 250;
const DAMAGED: [&str; 4] =
    ["hello", "25:61:00 192.168.1.1", "192.168.1.1 00:00:00", "00:00:00 192.168.1.256"];

/// A line, and what it stands for: none if it is damaged.
#[derive(Debug)]
pub(crate) struct Pushed {
    /// Milliseconds since 1970.
    pub(crate) due: i64,
    pub(crate) text: String,
    pub(crate) ip: Option<IpAddr>,
}

/// The first `count` lines of a seed, from `start` (milliseconds since 1970) on.
pub(crate) fn lines(seed: u64, start: i64, count: usize) -> Vec<Pushed> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut due = start;
    let line = |i: usize| {
        if i > 0 {
            due += (rng.next_u64() % 100) as i64;
        }
        let ip = Ipv4Addr::new(192, 168, 1, 1 + (rng.next_u64() % 4) as u8);
        if i % DAMAGED_EVERY == DAMAGED_EVERY - 1 {
            let text = DAMAGED[i / DAMAGED_EVERY % DAMAGED.len()].to_owned();
            return Pushed { due, text, ip: None };
        }
        Pushed { due, text: format!("{} {ip}", time_of_day(due)), ip: Some(ip.into()) }
    };
    (0..count).map(line).collect()
}

/// Gives each part to one connection after the other, `speed` times as fast as the lines' clock says.
pub(crate) fn serve(listener: &TcpListener, parts: &[&[Pushed]], speed: f64) -> Result<()> {
    for part in parts {
        let (connection, _) = listener.accept().context("nobody connects to the source")?;
        let mut out = BufWriter::new(connection);
        let (began, first) = (Instant::now(), part.first().map_or(0, |line| line.due));
        for line in *part {
            let due = Duration::from_millis((line.due - first).unsigned_abs()).div_f64(speed);
            let early = due.saturating_sub(began.elapsed());
            if !early.is_zero() {
                out.flush()?;
                std::thread::sleep(early);
            }
            writeln!(out, "{}", line.text)?;
        }
        out.flush()?;
    }
    Ok(())
}
