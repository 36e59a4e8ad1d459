//! A running job on a terminal: four lines that stay at the bottom, drawn a few times a second.
//!
//! ```text
//! ip-count  running  0:12  1,234,567 rows  98,765 rows/s  lag 4,321
//! event time 2015-05-17T10:05:03.000Z  late 12  dead letters 3
//! 61 commits, every 0.21 s  the last took 3.1 ms and held tasks for 0.4 ms
//! output 12,345 + 32 open  state 12 MiB  start 0.12 s
//! ```
//!
//! Only where standard error is a terminal: pipes and files get the plain lines of `run` and nothing more. Whatever
//! else is said meanwhile goes above ([`around`]).

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tidemill::runtime::{Monitor, Progress, Stop};
use tidemill::stream::Timestamp;
use tidemill_broker::{Access, Broker};

use crate::units::{Count, Size};

/// The pace of drawing.
const FRAME: Duration = Duration::from_millis(250);
/// The pace at which the ends of the input are asked for.
const ENDS: Duration = Duration::from_secs(1);
/// Rates are of this long: short enough to follow, long enough to be read.
const RATE_OVER: Duration = Duration::from_secs(5);

/// What is drawn now; what else is said goes above it.
static DRAWN: OnceLock<ProgressBar> = OnceLock::new();

/// Runs something that writes to the terminal, with the lines of the view out of its way.
pub fn around<T>(write: impl FnOnce() -> T) -> T {
    match DRAWN.get() {
        Some(drawn) if !drawn.is_finished() => drawn.suspend(write),
        _ => write(),
    }
}

/// Standard error for what is written as it comes, such as traces.
#[derive(Debug)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        around(|| io::stderr().lock().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().lock().flush()
    }
}

/// Stable ends of the input's partitions, as last told.
type Ends = Arc<Mutex<Vec<i64>>>;

/// Whether there is a terminal to draw on.
pub fn is_wanted() -> bool {
    io::stderr().is_terminal()
}

/// Keeps the ends of a topic up to date until the task is aborted. An answer that fails leaves them as they are.
pub fn follow(access: Access, topic: String) -> (Ends, tokio::task::JoinHandle<()>) {
    let ends = Ends::default();
    let told = Arc::clone(&ends);
    let task = tokio::spawn(async move {
        loop {
            if let Ok(described) = access.describe(topic.clone()).await {
                let stable = described.offsets.iter().map(|offsets| offsets.last_stable).collect();
                *told.lock().unwrap_or_else(PoisonError::into_inner) = stable;
            }
            tokio::time::sleep(ENDS).await;
        }
    });
    (ends, task)
}

/// Draws the run until it is over or stopped at once, and clears the lines. Blocks.
pub fn show(monitor: &Monitor, name: &str, ends: &Ends) {
    let drawn = DRAWN.get_or_init(|| {
        let style = ProgressStyle::with_template("{msg}").expect("a template of one known key");
        let target = ProgressDrawTarget::stderr();
        ProgressBar::with_draw_target(None, target).with_style(style)
    });
    let (began, mut rates) = (Instant::now(), Rates::default());
    while monitor.asked() != Stop::AtOnce {
        let now = monitor.progress();
        rates.note(began.elapsed(), now.counters.rows_in, now.commits);
        let ends = ends.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // Cut at the terminal's width, which may change: a line that wraps would be left behind by the next frame.
        let width = usize::from(console::Term::stderr().size().1);
        let lines = frame(name, &now, &rates, &ends, began.elapsed());
        let lines = lines.map(|line| line.chars().take(width).collect::<String>());
        drawn.set_message(lines.join("\n"));
        drawn.tick();
        // Returns early only where the run is being stopped at once.
        let until = Instant::now() + FRAME;
        while monitor.asked() != Stop::AtOnce && Instant::now() < until {
            monitor.wait_until(until - Instant::now(), |_| monitor.asked() == Stop::AtOnce);
        }
    }
    drawn.finish_and_clear();
}

/// What was counted in the last seconds.
#[derive(Debug, Default)]
struct Rates(VecDeque<(Duration, u64, u64)>);

impl Rates {
    fn note(&mut self, at: Duration, rows: u64, commits: u64) {
        self.0.push_back((at, rows, commits));
        while self.0.len() > 2 && self.0.front().is_some_and(|(first, ..)| at - *first > RATE_OVER) {
            self.0.pop_front();
        }
    }

    /// Rows per second, and seconds per commit.
    fn now(&self) -> (u64, Option<f64>) {
        let (Some(first), Some(last)) = (self.0.front(), self.0.back()) else { return (0, None) };
        let seconds = (last.0 - first.0).as_secs_f64();
        if seconds <= 0.0 {
            return (0, None);
        }
        let rows = last.1.saturating_sub(first.1) as f64 / seconds;
        let commits = last.2.saturating_sub(first.2);
        (rows.round() as u64, (commits > 0).then(|| seconds / commits as f64))
    }
}

fn frame(name: &str, now: &Progress, rates: &Rates, ends: &[i64], ran: Duration) -> [String; 4] {
    let (rows, every) = rates.now();
    let phase = match now.phase {
        "starting" | "" => "recovering",
        // Steps of a commit come and go within milliseconds.
        _ if monitorable(now) => "running",
        phase => phase,
    };
    let lag: i64 = now
        .committed
        .iter()
        .filter_map(|(partition, at)| Some(ends.get(*partition as usize)?.saturating_sub(*at).max(0)))
        .sum();
    let lag = match (ends.is_empty(), now.committed.is_empty()) {
        (false, false) => Count(lag.unsigned_abs()).to_string(),
        _ => "-".to_owned(),
    };
    let c = &now.counters;
    // As it is now, where the run says; else as of the last commit.
    let time = now.partitions.iter().flatten().min().copied().or(now.event_time);
    let time = match time {
        None | Some(i64::MIN) => "-".to_owned(),
        Some(at) => Timestamp(at).to_string(),
    };
    let pace = match (now.commits, every) {
        (0, _) => "no commit yet".to_owned(),
        (n, Some(every)) => format!("{} commits, every {every:.2} s", Count(n)),
        (n, None) => format!("{} commits, none just now", Count(n)),
    };
    let took = match now.commits {
        0 => String::new(),
        _ => format!(
            "  the last took {} and held tasks for {}",
            Millis(now.committed_in),
            Millis(now.aligned_in)
        ),
    };
    let state = match now.state_bytes {
        // The store is written a few commits later; until then all of it is in the tasks.
        0 => "in memory".to_owned(),
        bytes => Size(bytes).to_string(),
    };
    let replayed = match now.replayed {
        0 => String::new(),
        n => format!(", {} replayed", Count(n)),
    };
    [
        format!(
            "{name}  {phase}  {}:{:02}  {} rows  {} rows/s  lag {lag}",
            ran.as_secs() / 60,
            ran.as_secs() % 60,
            Count(c.rows_in),
            Count(rows)
        ),
        format!("event time {time}  late {}  dead letters {}", Count(c.late), Count(c.dead)),
        format!("{pace}{took}"),
        format!(
            "output {} + {} open  state {state}  start {:.2} s{replayed}",
            Count(now.output_committed),
            Count(now.open_rows),
            now.recovery.as_secs_f64()
        ),
    ]
}

fn monitorable(now: &Progress) -> bool {
    now.running && now.phase != "over"
}

struct Millis(Duration);

impl std::fmt::Display for Millis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} ms", self.0.as_secs_f64() * 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_fits_eighty_columns_and_tells_what_is_known() {
        let mut rates = Rates::default();
        let mut now = Progress::default();
        let first = frame("ip-count", &now, &rates, &[], Duration::ZERO);
        assert_eq!(first[0], "ip-count  recovering  0:00  0 rows  0 rows/s  lag -");
        for second in 0..20u64 {
            rates.note(Duration::from_secs(second), second * 1_234_567, second * 5);
        }
        now.counters.rows_in = 1_234_567_890;
        now.counters.late = 12_345;
        (now.commits, now.running, now.phase) = (61, true, "aligning");
        now.committed = [(0, 1_000_000), (1, 2_000_000)].into();
        now.event_time = Some(1_431_857_100_000);
        (now.output_committed, now.open_rows, now.state_bytes) = (12_345_678, 9_999, 300 << 20);
        now.replayed = 250_000;
        now.committed_in = Duration::from_micros(3_140);
        let shown = frame("ip-count", &now, &rates, &[1_500_000, 2_000_001], Duration::from_secs(132));
        assert_eq!(shown[0], "ip-count  running  2:12  1,234,567,890 rows  1,234,567 rows/s  lag 500,001");
        assert!(shown[1].starts_with("event time 2015-05-17T10:05:00.000Z  late 12,345"), "{shown:?}");
        assert_eq!(shown[2], "61 commits, every 0.20 s  the last took 3.1 ms and held tasks for 0.0 ms");
        assert!(shown.iter().all(|line| line.len() <= 80), "{shown:#?}");
    }
}
