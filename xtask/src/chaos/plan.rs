//! What a cycle does, drawn from the seed: whom it hits, when and how.

use std::collections::VecDeque;
use std::time::Duration;

use super::random::Random;

/// Who owns the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum)]
pub enum Layout {
    /// The job's process; now and then the producer's, when the job was killed beside it.
    Job,
    /// `streamctl serve`; job and producer reach it over TCP.
    Serve,
}

/// Who is hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Victim {
    /// The job.
    Job,
    /// Whoever owns the log, where that is another process.
    Owner,
    /// Both at once.
    Both,
}

/// How.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Blow {
    /// SIGKILL after this long.
    Kill(Duration),
    /// SIGTERM after this long, then SIGKILL after that long.
    WhileClosing(Duration, Duration),
    /// SIGSTOP after this long, for that long, then SIGKILL, or SIGCONT and SIGKILL another while later.
    Stop(Duration, Duration, Option<Duration>),
    /// The process kills itself at a step.
    Crash(CrashPoint),
}

/// A step of the production binary, and which time it is reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CrashPoint {
    /// Its name.
    pub step: String,
    /// Counted from 1.
    pub nth: u64,
}

/// What happens to the job's state directory while the job is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateDir {
    /// Nothing.
    Kept,
    /// A copy is put aside.
    Copied,
    /// It is deleted.
    Deleted,
    /// The copy takes its place.
    Stale,
}

/// One cycle.
#[derive(Debug, Clone)]
pub struct Cycle {
    /// Whom it hits.
    pub victim: Victim,
    /// How.
    pub blow: Blow,
    /// Tasks of the job, where it is started.
    pub tasks: u64,
    /// Its commit interval in milliseconds.
    pub commit_ms: u64,
    /// Its state memory.
    pub memory: &'static str,
    /// The state directory, where the job is down.
    pub state: StateDir,
    /// In the layout in which the job owns the log: the producer is left alive and takes the log over.
    pub orphaned: bool,
    /// The producer is killed beside the victim.
    pub producer_too: bool,
    /// The time of the blow counts from the job's first output behind its first commit; otherwise from when the cycle
    /// starts what is dead.
    pub from_output: bool,
    /// The kill waits until output is in the transaction: it is one that makes up for others.
    pub aimed: bool,
}

/// Draws cycles.
#[derive(Debug)]
pub struct Plan {
    random: Random,
    layout: Layout,
    number: u32,
    /// Stops that found nobody to stop.
    owed: u32,
    /// Crash points that are left to be hit.
    left: VecDeque<(Victim, CrashPoint)>,
}

impl Plan {
    /// The cycles of a seed, with these crash points among them.
    pub fn new(seed: u64, layout: Layout, crash_points: Vec<(Victim, CrashPoint)>) -> Self {
        let mut random = Random::new(seed);
        let mut left = crash_points;
        random.shuffle(&mut left);
        Plan { random, layout, number: 0, owed: 0, left: left.into() }
    }

    /// How many crash points are left, and stops that found nobody.
    pub fn left(&self) -> usize {
        self.left.len() + self.owed as usize
    }

    /// A crash point that was not reached comes back, for its first time.
    pub fn again(&mut self, victim: Victim, step: &str) {
        self.left.push_back((victim, CrashPoint { step: step.to_owned(), nth: 1 }));
    }

    /// How many stops there must have been so far: one in every tenth cycle.
    pub fn stops_due(&self) -> u32 {
        self.number / 10
    }

    /// A stop found nobody: the next cycle is one.
    pub fn stop_again(&mut self) {
        self.owed += 1;
    }

    /// A kill that waits for an open transaction, in place of one that missed; every tenth is a stop here, too.
    pub fn retry(&mut self) -> Cycle {
        let mut cycle = self.next(1);
        if !matches!(cycle.blow, Blow::Stop(..)) {
            cycle.blow = Blow::Kill(Duration::from_millis(self.random.between(20, 1500)));
            cycle.aimed = true;
        }
        cycle.state = StateDir::Kept;
        cycle
    }

    /// The next cycle, of which `remaining` are left with it.
    pub fn next(&mut self, remaining: u32) -> Cycle {
        self.number += 1;
        let random = &mut self.random;
        let ms = Duration::from_millis;
        let mut cycle = Cycle {
            victim: Victim::Job,
            blow: Blow::Kill(ms(random.between(20, 1500))),
            tasks: random.between(1, 4),
            // Long ones, so that most kills come between two commits; short ones, so that some come into one.
            commit_ms: if random.percent(60) { random.between(800, 2_500) } else { random.between(100, 600) },
            memory: if random.percent(30) { "1MiB" } else { "64MiB" },
            state: match random.below(100) {
                0..12 => StateDir::Deleted,
                12..30 => StateDir::Stale,
                30..50 => StateDir::Copied,
                _ => StateDir::Kept,
            },
            orphaned: self.layout == Layout::Job && random.percent(20),
            producer_too: random.percent(30),
            from_output: random.percent(75),
            aimed: false,
        };
        let other = self.layout == Layout::Serve || cycle.orphaned;
        if other {
            cycle.victim = match random.below(100) {
                0..45 => Victim::Job,
                45..85 => Victim::Owner,
                _ => Victim::Both,
            };
        }
        // Every tenth is a stop; of the others as many are crash points as it takes to get through them.
        let stops_left = (self.number - 1 + remaining) / 10 - (self.number - 1) / 10;
        if self.number.is_multiple_of(10) || self.owed > 0 {
            self.owed -= u32::from(!self.number.is_multiple_of(10));
            let then = random.percent(50).then(|| ms(random.between(20, 500)));
            let (after, length) = (ms(random.between(300, 1200)), ms(random.between(1_000, 10_000)));
            cycle.blow = Blow::Stop(after, length, then);
        } else if !self.left.is_empty()
            && (self.left.len() as u32 + stops_left >= remaining || random.percent(60))
            && let Some((victim, point)) = self.left.pop_front()
        {
            cycle.orphaned = false;
            cycle.victim = victim;
            if point.step.starts_with("replay") {
                cycle.state = StateDir::Deleted;
            }
            // Its step comes with the second commit, or the sixth.
            cycle.commit_ms = random.between(100, 500);
            cycle.blow = Blow::Crash(point);
        } else if random.percent(15) {
            cycle.blow = Blow::WhileClosing(ms(random.between(300, 1000)), ms(random.between(0, 60)));
        }
        cycle
    }
}

/// Steps that come once a process, by its start or its end, or once in a long while.
const RARE: [&str; 17] = [
    "log-open",
    "log-decided",
    "log-redone",
    "log-other-slot",
    "log-both-slots",
    "log-serving",
    "log-recycle",
    "log-recycled",
    "log-checkpoint",
    "log-slot",
    "log-slot-written",
    "log-slot-synced",
    "log-close",
    "log-closed",
    "closing",
    "closed",
    "flush",
];

/// A time at which a step can be expected to be reached within a second of running.
pub fn crash_point(step: &str, random: &mut Random) -> CrashPoint {
    let often = ["log-round", "log-written", "log-synced", "log-acked", "log-segments"];
    let recovery = ["recover", "fence", "committed", "restore", "replay-marks", "replay", "running", "write"];
    let nth = if RARE.contains(&step) || recovery.contains(&step) {
        1
    } else if often.contains(&step) {
        random.between(1, 60)
    } else {
        random.between(1, 6)
    };
    CrashPoint { step: step.to_owned(), nth }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(n: u64) -> Vec<(Victim, CrashPoint)> {
        (0..n).map(|i| (Victim::Job, CrashPoint { step: format!("s{i}"), nth: 1 })).collect()
    }

    #[test]
    fn a_seed_decides_the_cycles() {
        let draw = |seed| {
            let mut plan = Plan::new(seed, Layout::Serve, points(5));
            (0..40).map(|i| format!("{:?}", plan.next(40 - i))).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn every_crash_point_and_every_tenth_stop_is_among_them() {
        for seed in 0..20 {
            let mut plan = Plan::new(seed, Layout::Job, points(38));
            let (mut crashes, mut stops) = (0, 0);
            for i in 0..50 {
                match plan.next(50 - i).blow {
                    Blow::Crash(_) => crashes += 1,
                    Blow::Stop(_, length, _) => {
                        stops += 1;
                        assert!((1..=10).contains(&length.as_secs()));
                    }
                    Blow::Kill(after) => assert!((20..=1500).contains(&after.as_millis())),
                    Blow::WhileClosing(..) => {}
                }
            }
            assert_eq!((crashes, stops, plan.left()), (38, 5, 0));
            assert_eq!(plan.stops_due(), 5);
        }
    }

    /// Kills that make up for others are aimed and say so, no other is; and a tenth cycle among them is still a stop.
    #[test]
    fn only_retries_are_aimed_and_a_stop_among_them_stays_one() {
        let mut plan = Plan::new(3, Layout::Serve, Vec::new());
        assert!((0..25).all(|i| !plan.next(25 - i).aimed));
        let retries: Vec<_> = (25..45).map(|_| plan.retry()).collect();
        for (number, cycle) in (26..).zip(&retries) {
            let stop = matches!(cycle.blow, Blow::Stop(..));
            assert_eq!((stop, cycle.aimed), (number % 10 == 0, number % 10 != 0), "cycle {number}");
        }
        assert_eq!(plan.stops_due(), 4);
    }

    #[test]
    fn a_stop_that_found_nobody_comes_again() {
        let mut plan = Plan::new(3, Layout::Job, Vec::new());
        (0..10).for_each(|i| drop(plan.next(40 - i)));
        plan.stop_again();
        let stops: Vec<_> =
            (10..30).filter(|i| matches!(plan.next(40 - i).blow, Blow::Stop(..))).map(|i| i + 1).collect();
        assert_eq!(stops, [11, 20, 30]);
    }
}
