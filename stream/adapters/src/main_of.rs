//! The `main` of a program that is one job.
//!
//! ```text
//!   my-job [--data DIR | --broker HOST:PORT] [--state DIR] [--until-end] [--name NAME] [--tasks N] [--commit-interval 200ms] [--state-memory 256MiB]
//!          [--guarantee exactly-once|at-least-once|at-most-once] [--poison-tries N] [key=value ...]
//! ```
//!
//! Exit codes are those of `streamctl`: 0 done, 1 failed, 2 wrong usage. The first Ctrl-C stops after a commit, a second
//! one at once.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use tidemill_broker::{Access, AccessOptions, Intent};
use tidemill_stream::args::{ArgSpec, ArgValue, JobArgs};
use tidemill_stream::engine::Mode;
use tidemill_stream::runtime::Monitor;
use tidemill_stream::{Job, NotAGuarantee};

use crate::{JobSpec, RunOptions, run};

struct Line {
    data: Option<PathBuf>,
    broker: Option<String>,
    options: RunOptions,
}

enum Asked {
    Run(Box<Line>),
    Help,
}

/// Runs a job with the arguments of the command line: `fn main() -> ExitCode { tidemill::main::<MyJob>() }`.
pub fn main<J: Job + JobArgs>() -> ExitCode {
    let job = JobSpec::of::<J>("");
    let say = |text: &str| {
        // Where stderr is gone there is nobody to tell.
        let _ = writeln!(std::io::stderr(), "{text}");
    };
    match parse(std::env::args().skip(1)) {
        Ok(Asked::Help) => {
            say(&help(&job));
            ExitCode::SUCCESS
        }
        Ok(Asked::Run(line)) => match execute(&job, *line, &say) {
            Ok(()) => ExitCode::SUCCESS,
            Err((code, text)) => {
                say(&format!("{}: {text}", job.name));
                ExitCode::from(code)
            }
        },
        Err(text) => {
            say(&format!("{}: {text}\n\n{}", job.name, help(&job)));
            ExitCode::from(2)
        }
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Asked, String> {
    let mut line = Line { data: None, broker: None, options: RunOptions::default() };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("`{word}` needs a value"));
        let of = |e: String| format!("`{word}`: {e}");
        match word.as_str() {
            "--help" | "-h" => return Ok(Asked::Help),
            "--data" => line.data = Some(value()?.into()),
            "--broker" => line.broker = Some(value()?),
            "--state" => line.options.state = Some(value()?.into()),
            "--until-end" => line.options.mode = Mode::UntilEnd,
            "--name" => line.options.name = Some(value()?),
            "--tasks" => line.options.tasks = Some(usize::parse(&value()?).map_err(of)?),
            "--commit-interval" => line.options.commit_interval = ArgValue::parse(&value()?).map_err(of)?,
            "--poison-tries" => line.options.poison_tries = u32::parse(&value()?).map_err(of)?,
            "--guarantee" => {
                line.options.guarantee =
                    Some(value()?.parse().map_err(|e: NotAGuarantee| of(e.to_string()))?);
            }
            "--state-memory" => line.options.state_memory = ArgValue::parse(&value()?).map_err(of)?,
            pair if !pair.starts_with('-') && pair.contains('=') => line.options.sets.push(pair.to_owned()),
            other => return Err(format!("`{other}` is neither an option nor of the form key=value")),
        }
    }
    // An option counts before the environment, which is looked at only where there is none.
    if line.data.is_none() && line.broker.is_none() {
        line.data = std::env::var_os("TIDEMILL_DATA").map(PathBuf::from);
        line.broker = std::env::var("TIDEMILL_BROKER").ok();
    }
    if line.data.is_some() && line.broker.is_some() {
        return Err("both a data directory and a broker are named: keep one".to_owned());
    }
    Ok(Asked::Run(Box::new(line)))
}

fn help(job: &JobSpec) -> String {
    let mut text = format!(
        "usage: {} [--data DIR | --broker HOST:PORT] [--state DIR] [--until-end] [--name NAME] [--tasks N] [--commit-interval 200ms] [--state-memory 256MiB]\n       [--guarantee exactly-once|at-least-once|at-most-once] [--poison-tries N] [key=value ...]\n",
        job.name
    );
    for ArgSpec { name, kind, help, default, .. } in job.args {
        let default = default.map_or_else(|| "required".to_owned(), |d| format!("default {d}"));
        text.push_str(&format!("\n  {name}=<{kind}>  {help} ({default})"));
    }
    text
}

fn execute(job: &JobSpec, line: Line, say: &impl Fn(&str)) -> Result<(), (u8, String)> {
    // Wrong arguments are found before anything is opened.
    job.build(&line.options.sets).map_err(|e| (2, e.to_string()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.map_err(|e| (1, e.to_string()))?;
    let data = line.data.unwrap_or_else(|| PathBuf::from("./tidemill-data"));
    let opened = match line.broker {
        Some(address) => runtime.block_on(Access::connect(address, None)),
        None => runtime.block_on(Access::open(data, AccessOptions::new(Intent::Use))),
    };
    let access = opened.map_err(|e| (1, e.to_string()))?;
    let monitor = Monitor::new();
    let stopper = monitor.clone();
    runtime.spawn(async move {
        while tokio::signal::ctrl_c().await.is_ok() {
            stopper.stop();
        }
    });
    let ended = run(job, &access, &line.options, runtime.handle(), &monitor);
    runtime.block_on(access.close());
    match ended {
        Ok(report) => {
            let counters = report.counters;
            say(&format!(
                "{} read {} rows, committed {} output rows; {} late, {} unreadable, {} windows closed before their time",
                job.name,
                counters.rows_in,
                report.summary.committed_rows,
                counters.late,
                counters.dead,
                report.summary.closed_early.len()
            ));
            Ok(())
        }
        Err(error) => Err((if error.is_usage() { 2 } else { 1 }, error.chain().join(": "))),
    }
}
