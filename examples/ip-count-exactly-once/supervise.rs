//! The supervisor: producer and job run, and are killed, until there is something to show.
//!
//! ```text
//!   start them ─▶ wait until the victim has done something ─▶ (a random while) ─▶ SIGKILL ─▶ start it again
//!        ▲                                                                                  │
//!        └────────────────────────────── not enough kills yet ◀─────────────────────────────┘
//!   then: the producer fills its window and ends, the job is killed once more and run to the end, and the sink is read
//! ```
//!
//! Whoever of the two owned the log when it died, the other takes it over. Every second kill of the job comes as soon
//! as it reports rows in its open transaction, so that there is something uncommitted to lose or to repeat.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use tidemill::{Directory, Guarantee};
use tidemill_examples::say;

use crate::children::{Process, Role};
use crate::producer::Schedule;
use crate::verdict::Verdict;

/// Longest random wait before a kill, in milliseconds: about as long as a commit interval and a half.
const WAIT_MS_MAX: u64 = 300;
/// So many kills more than were asked for, while they have left nothing to see.
const MORE_KILLS: u32 = 10;

/// What is killed, and how often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) guarantee: Guarantee,
    pub(crate) kills: u32,
    pub(crate) seed: u64,
    pub(crate) schedule: Schedule,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) verdict: Verdict,
    pub(crate) kills: u32,
}

/// Runs producer and job on a data directory of their own, under kills.
pub(crate) fn run(data: &Path, plan: Plan) -> Result<Outcome> {
    let Schedule { start, speed, seconds } = plan.schedule;
    let start = jiff::Timestamp::from_millisecond(start)?.to_string();
    let (speed, seconds, guarantee) = (speed.to_string(), seconds.to_string(), plan.guarantee.name());
    let producer =
        Role::new("producer", data, &["--start", &start, "--speed", &speed, "--seconds", &seconds])?;
    let job = Role::new("job", data, &["--guarantee", guarantee])?;
    let to_end = Role::new("job", data, &["--guarantee", guarantee, "--until-end"])?;

    let mut rng = ChaCha8Rng::seed_from_u64(plan.seed);
    let writing = producer.start()?;
    // The topic is the producer's to make.
    writing.says("written")?;
    let mut running = (writing, job.start()?);
    let mut kills = 0;
    while kills < plan.kills
        || plan.kills > 0 && kills < plan.kills + MORE_KILLS && !shows(data, plan.guarantee)?
    {
        running = kill_one(&producer, &job, running, plan.guarantee, kills, &mut rng)?;
        kills += 1;
    }
    let (writing, counting) = running;
    writing.end(Duration::from_secs(plan.schedule.seconds.into()).div_f64(plan.schedule.speed))?;
    if plan.kills > 0 {
        counting.kill()?;
        kills += 1;
    } else {
        counting.end(Duration::ZERO)?;
    }
    to_end.start()?.end(Duration::ZERO)?;
    let verdict = Verdict::of(&Directory::open(data)?)?;
    Ok(Outcome { verdict, kills })
}

/// Kills the job, the producer, or both, and starts them again.
fn kill_one(
    producer: &Role,
    job: &Role,
    (writing, counting): (Process, Process),
    guarantee: Guarantee,
    number: u32,
    rng: &mut ChaCha8Rng,
) -> Result<(Process, Process)> {
    // The weaker guarantees are the job's: there its death is what counts.
    let dice = if guarantee == Guarantee::ExactlyOnce { rng.next_u64() % 4 } else { 0 };
    let (both, only_producer) = (dice == 2, dice == 3);
    let aimed = number.is_multiple_of(2);
    writing.says("written")?;
    let open = if only_producer { None } else { Some(counting.says("open")?) };
    let wait = if aimed { 0 } else { rng.next_u64() % WAIT_MS_MAX };
    std::thread::sleep(Duration::from_millis(wait));
    let (victim, running) = if only_producer {
        writing.kill()?;
        ("the producer", (producer.start()?, counting))
    } else if both {
        counting.kill()?;
        writing.kill()?;
        ("producer and job", (producer.start()?, job.start()?))
    } else {
        counting.kill()?;
        ("the job", (writing, job.start()?))
    };
    let open = match open {
        Some(rows) if aimed => format!("; {rows} rows were in the job's open transaction"),
        _ => String::new(),
    };
    say(format_args!("  kill {:>2}: {victim}{open}", number + 1));
    Ok(running)
}

/// Whether the kills so far left something to see. The log is read through its owner, which is alive.
fn shows(data: &Path, guarantee: Guarantee) -> Result<bool> {
    let verdict = Verdict::of(&Directory::open(data)?)?;
    Ok(match guarantee {
        Guarantee::ExactlyOnce => verdict.uncommitted_rows > verdict.committed_rows,
        Guarantee::AtLeastOnce => verdict.above > 0,
        Guarantee::AtMostOnce => verdict.lost > 0,
    })
}

/// The result must be what the guarantee says.
pub(crate) fn judge(plan: Plan, outcome: &Outcome) -> Result<()> {
    let Verdict { windows, exact, above, below, committed_rows, uncommitted_rows, .. } = outcome.verdict;
    let wrong = || format!("{}: {:?}", plan.guarantee, outcome.verdict);
    ensure!(windows > 0, "no window is complete: {}", wrong());
    match plan.guarantee {
        Guarantee::ExactlyOnce => {
            ensure!(exact == windows, "not every complete window is 5: {}", wrong());
            ensure!(committed_rows >= windows, "rows are missing: {}", wrong());
            ensure!(
                plan.kills == 0 || uncommitted_rows > committed_rows,
                "no kill hit a transaction with rows in it, so nothing was shown: {}",
                wrong()
            );
        }
        _ if plan.kills == 0 => {
            ensure!(exact == windows, "undisturbed, every guarantee is exact: {}", wrong())
        }
        Guarantee::AtLeastOnce => {
            ensure!(above > 0, "no count is above 5, so nothing was shown: {}", wrong());
            ensure!(below == 0, "at least once, and yet something is missing: {}", wrong());
        }
        Guarantee::AtMostOnce => {
            ensure!(below > 0, "no count is below 5, so nothing was shown: {}", wrong());
            ensure!(above == 0, "at most once, and yet something came twice: {}", wrong());
        }
    }
    Ok(())
}
