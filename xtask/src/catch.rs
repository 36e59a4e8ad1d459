//! A SIGKILL that proves something: it comes while output rows are in the job's open transaction.
//!
//! What a run says is old when it is read: on a loaded machine the transaction it spoke of may be committed by then, and
//! a kill on the word alone comes too late and costs the input that was processed meanwhile. So the run is held first:
//!
//! ```text
//! listening ── rows are open ──▶ SIGSTOP, read what it had said ──┬─ still open ──▶ SIGKILL
//!     ▲                                                           │
//!     └───────────────────────────── SIGCONT ◀── committed by now ┘
//! ```
//!
//! Rows are open from the report after the one that they were handed to the log, for by then the first of them have
//! mostly arrived, until the step that ends their transaction, which a run says before it takes it. Some may be on their
//! way all the same, so whoever kills asks a reader of uncommitted data afterwards.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::streamctl::{Polled, Run, Status};

/// What a run has said so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Heard {
    /// Input records that were committed when the run started; none before it said so.
    pub began: Option<u64>,
    /// Commits of the run.
    pub commits: u64,
    /// Input records that are committed.
    pub records: u64,
    /// Output rows of the open transaction.
    pub open_rows: u64,
    /// Something was heard of the open transaction after its first rows.
    and_more: bool,
    /// The open transaction is about to be ended, or has been.
    ending: bool,
    /// The run is done.
    done: bool,
}

impl Heard {
    /// Takes in the next thing it says.
    pub fn hear(&mut self, status: &Status) {
        match status {
            Status::Started { committed_records, .. } => {
                (self.began, self.records) = (Some(*committed_records), *committed_records);
            }
            Status::Committed { commits, committed_records } => {
                (self.commits, self.records) = (*commits, *committed_records);
                (self.open_rows, self.and_more, self.ending) = (0, false, false);
            }
            Status::Open { output_rows } => {
                self.and_more = self.open_rows > 0;
                self.open_rows = *output_rows;
            }
            Status::Phase { step, .. } if step == "end" => self.ending = true,
            // The state is written once the outputs of the transaction are on their way.
            Status::Phase { step, .. } if step == "state" => self.and_more = self.open_rows > 0,
            Status::Phase { .. } | Status::Durable { .. } => {}
            Status::Done { .. } => self.done = true,
        }
    }

    /// Whether a kill now would find output rows in a transaction that is not going to be committed.
    pub fn rows_are_open(&self) -> bool {
        self.open_rows > 0 && self.and_more && !self.ending && !self.done
    }
}

/// Kills `run` once rows are open and `ready` says that it may be killed. Everything it says goes through `told`.
///
/// None where it ended, or said that it is done, before there was such a moment. An error if it says nothing for
/// `patience`.
pub fn kill_with_rows_open(
    mut run: Run,
    patience: Duration,
    ready: impl Fn(&Heard) -> bool,
    mut told: impl FnMut(&Status),
) -> Result<Option<Heard>> {
    let mut heard = Heard::default();
    let mut take = |heard: &mut Heard, status: &Status| {
        heard.hear(status);
        told(status);
    };
    loop {
        match run.next(patience)? {
            Some(status) => take(&mut heard, &status),
            None => {
                let done = heard.done;
                let (status, said) = run.wait()?;
                if !done || !status.success() {
                    bail!("the run ended with {status}: {said}");
                }
                return Ok(None);
            }
        }
        if !(heard.rows_are_open() && ready(&heard)) {
            continue;
        }
        if !run.freeze()? {
            continue;
        }
        // What a held process had said is in the pipe or on its way through the reader. Should some of it come later
        // still, the kill is one that proves nothing, and its caller sees that.
        while let Polled::Said(status) = run.poll(Duration::from_millis(20))? {
            take(&mut heard, &status);
        }
        if heard.rows_are_open() && ready(&heard) {
            run.kill()?;
            return Ok(Some(heard));
        }
        run.thaw()?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(step: &str) -> Status {
        Status::Phase { phase: None, step: step.to_owned() }
    }

    #[test]
    fn rows_are_open_from_their_report_to_the_end_of_their_transaction() {
        let mut heard = Heard::default();
        let mut open = |status| {
            heard.hear(&status);
            heard.rows_are_open()
        };
        assert!(!open(Status::Started { recovery_ms: 1, replayed: 0, committed_records: 7 }));
        assert!(!open(Status::Open { output_rows: 3 }) && !open(phase("barrier")));
        assert!(open(phase("state")) && open(phase("offsets")));
        assert!(!open(phase("end")));
        // A report that was under way when the transaction ended speaks of rows that are being committed.
        assert!(!open(Status::Open { output_rows: 5 }));
        assert!(!open(Status::Committed { commits: 1, committed_records: 9 }));
        assert!(!open(Status::Open { output_rows: 1 }));
        assert!(open(Status::Open { output_rows: 4 }));
        assert!(!open(Status::Done { windows_closed_early: 0, records: 2 }));
        assert_eq!((heard.began, heard.records, heard.commits), (Some(7), 9, 1));
    }
}
