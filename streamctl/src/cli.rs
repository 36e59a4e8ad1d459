//! What `streamctl` accepts: the clap commands, their help and the parsers of their values.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use jiff::Timestamp;
use tidemill::Guarantee;

use crate::completions::Completions;
use crate::du::Du;
use crate::explain::ExplainCommand;
use crate::identity::StateAt;
use crate::log_dump::LogCommand;
use crate::new::New;
use crate::reset::Reset;
use crate::state::StateCommand;

/// What this process was called with; ends it with exit code 2 where that cannot be, or 0 after `--help`.
pub fn parse() -> Cli {
    let words = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>();
    Cli::try_parse().unwrap_or_else(|error| tipped(error, &words).exit())
}

/// The error, with the way to give a job an argument where an unknown option of `run` or `explain plan` looks like one.
fn tipped(mut error: clap::Error, words: &[String]) -> clap::Error {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    let of_job = words.iter().any(|word| word == "run" || word == "plan");
    let option = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(option)) => option.split('=').next().unwrap_or_default(),
        _ => return error,
    };
    let Some(name) = option.strip_prefix("--").filter(|name| !name.is_empty()) else { return error };
    let known = error.get(ContextKind::SuggestedArg).is_some();
    if error.kind() == ErrorKind::UnknownArgument && of_job && !known {
        let tip = format!("an argument of the job is set with '--set {name}=VALUE'");
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    }
    error
}

/// The default of `produce --create --partitions`.
pub const PARTITIONS: u32 = 4;

/// The default of `--data`.
pub const DEFAULT_DATA: &str = "./tidemill-data";

/// Tidemill: exactly-once stream jobs over a message log.
///
/// Topics, their records and the state of jobs live in one data directory. Any number of commands may use a directory
/// at the same time: the first one owns it, the others reach it through a Unix socket inside it. `streamctl serve` owns
/// one for others to reach over TCP (`--broker`).
#[derive(Debug, Parser)]
#[command(
    version,
    name = "streamctl",
    after_help = "\
Examples:
  streamctl gen access-log --lines 100000 --seed 1 --file access.log
  streamctl produce access-log --create --key-regex '^([^ ]+)' --file access.log
  streamctl run ip-count --until-end
  streamctl consume ip-counts --until-end --max 5

Exit codes:
  0  done; also after Ctrl-C or SIGTERM, once what was begun is committed, and where the reader of the output went away
  1  failed: standard error says what, and what to do about it
  2  wrong usage: an unknown command, option, job or argument, a value that cannot be read, or one that differs from
     what the job committed to; nothing was changed
  130, 143  ended at once by a second Ctrl-C or SIGTERM"
)]
pub struct Cli {
    /// The data directory. [env: TIDEMILL_DATA] [default: ./tidemill-data]
    #[arg(long, global = true, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Work with the broker that `streamctl serve` runs at this address, not with a data directory. [env: TIDEMILL_BROKER]
    #[arg(long, global = true, value_name = "HOST:PORT")]
    pub broker: Option<String>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create, list, describe, alter and delete topics.
    #[command(
        subcommand,
        after_help = "\
Example:
  streamctl topic create access-log --partitions 4"
    )]
    Topic(TopicCommand),
    /// Append lines to a topic, one record a line.
    ///
    /// Every line is acknowledged once it is durable. When the command is stopped or fails it says how many leading
    /// lines are durable and how many more are in doubt; `--skip-lines` continues from there.
    #[command(after_help = "\
Examples:
  streamctl produce access-log --create --key-regex '^([^ ]+)' --file access.log
  tail -f access.log | streamctl produce access-log --key-regex '^([^ ]+)'
  printf 'k,v\\n' | streamctl produce pairs --create --key-delimiter ,")]
    Produce(Produce),
    /// Print the records of a topic.
    ///
    /// Reads all partitions from the start and follows them until Ctrl-C. Only committed records are shown unless
    /// `--isolation read-uncommitted` is given. Records of one partition come in their order.
    #[command(after_help = "\
Examples:
  streamctl consume ip-counts --until-end --format json
  streamctl consume access-log --from -5 --until-end
  streamctl consume access-log --from @-1h
  streamctl consume access-log --partition 0 --from 1000 --max 10")]
    Consume(Consume),
    /// Generate input.
    #[command(
        subcommand,
        after_help = "\
Example:
  streamctl gen access-log --lines 1000 --seed 1"
    )]
    Gen(GenCommand),
    /// List and describe jobs.
    #[command(
        subcommand,
        after_help = "\
Example:
  streamctl job describe ip-count"
    )]
    Job(JobCommand),
    /// Own a data directory and serve it over TCP.
    ///
    /// Other commands reach it with `--broker ADDRESS`, and those on this machine with `--data` too. Standard output
    /// carries one line, once it serves: `listening on ADDRESS`. The first Ctrl-C or SIGTERM ends it in order: nobody is
    /// accepted any more, what is in flight is answered, the log is closed.
    ///
    /// An empty directory is made a data directory. One that is not there is refused, so that a mistyped path does not
    /// serve an empty log.
    #[command(after_help = "\
Examples:
  streamctl serve
  streamctl serve --data /var/lib/tidemill --listen 127.0.0.1:7070
  streamctl consume access-log --broker 127.0.0.1:7070")]
    Serve(Serve),
    /// Run a job.
    ///
    /// Output, late rows, dead letters, state and offsets are committed together, in one transaction a commit: every
    /// record counts exactly once however often the command is stopped or killed. Started again it continues from its
    /// last commit.
    #[command(after_help = "\
Examples:
  streamctl run ip-count --until-end
  streamctl run ip-count --name per-minute --set window=1m --set output=ip-counts-per-minute
  streamctl run ip-count --broker 127.0.0.1:7070 --state /var/tmp/ip-count
  streamctl run ./words --until-end")]
    Run(Run),
    /// Write a crate with a first job of one's own.
    ///
    /// The crate depends on a checkout of Tidemill and has a job, a program and a test that crashes the job at every
    /// step. `streamctl run ./NAME` builds and runs it; every command that takes a job's name takes such a path.
    #[command(after_help = "\
Examples:
  streamctl new words
  streamctl new jobs/page-hits --tidemill ../tidemill")]
    New(New),
    /// Build a crate's program, as `run` does before it runs it, and print where it is.
    ///
    /// The program is this command line with the crate's job: it runs without cargo, wherever it is copied to.
    #[command(after_help = "\
Example:
  streamctl build ./words")]
    Build {
        /// The crate's folder.
        #[arg(value_name = "CRATE")]
        dir: String,
    },
    /// Make a job start again, from the beginning of its input or another place.
    ///
    /// Removes what it committed about its input, its state and its changelogs, and says what before it does. Leaves its
    /// output: rows that the job writes again stand there twice. Refused while the job runs; with --broker that is seen if
    /// --state names the folder its run keeps its state in, and else such a run is stopped at its next commit. Cut short at any moment it is
    /// completed by the same command, and the job does not start before.
    #[command(after_help = "\
Examples:
  streamctl reset ip-count
  streamctl reset ip-count --to latest --yes
  streamctl reset ip-count --name per-minute --to @-1h --yes")]
    Reset(Reset),
    /// Look into the committed state of a job.
    ///
    /// It is folded from the job's changelog, so it works while the job runs, and shows the state of its last commit.
    #[command(
        subcommand,
        after_help = "\
Example:
  streamctl state list ip-count"
    )]
    State(StateCommand),
    /// Explain what a job is made of, and why its windows have not fired.
    #[command(
        subcommand,
        after_help = "\
Example:
  streamctl explain why-not-fired ip-count"
    )]
    Explain(ExplainCommand),
    /// Show how many bytes topics, journal, checkpoints and state take.
    ///
    /// Of each: the bytes in its files, and the blocks they take on the disk, which is more where space was reserved
    /// ahead. Works beside running commands.
    #[command(after_help = "\
Examples:
  streamctl du
  streamctl du --partitions
  streamctl du --format json")]
    Du(Du),
    /// Look into the files of a data directory.
    #[command(
        subcommand,
        after_help = "\
Example:
  streamctl log dump tidemill-data/checkpoint.a"
    )]
    Log(LogCommand),
    /// Print a script that completes commands and options in a shell.
    #[command(after_help = "\
Examples:
  streamctl completions bash > ~/.local/share/bash-completion/completions/streamctl
  streamctl completions zsh > ~/.zfunc/_streamctl
  streamctl completions fish > ~/.config/fish/completions/streamctl.fish")]
    Completions(Completions),
}

impl Command {
    /// The job's name, or the crate that stands in its place, of a command that has one.
    pub fn job_mut(&mut self) -> Option<&mut String> {
        match self {
            Command::Run(run) => Some(&mut run.job),
            Command::Job(JobCommand::Describe { job, .. }) => Some(job),
            Command::Reset(args) => Some(args.job_mut()),
            Command::State(command) => Some(&mut command.job_mut().job),
            Command::Explain(command) => Some(&mut command.job_mut().job),
            Command::Topic(_)
            | Command::Produce(_)
            | Command::Consume(_)
            | Command::Gen(_)
            | Command::Job(JobCommand::List(_))
            | Command::Serve(_)
            | Command::New(_)
            | Command::Build { .. }
            | Command::Du(_)
            | Command::Log(_)
            | Command::Completions(_) => None,
        }
    }
}

/// `streamctl topic ...`
#[derive(Debug, Subcommand)]
pub enum TopicCommand {
    /// Create a topic, and the data directory where it is not there yet.
    #[command(after_help = "\
Example:
  streamctl topic create access-log --partitions 4")]
    Create {
        /// Letters, digits, '.', '_' and '-'; at most 249.
        name: String,
        /// How many partitions.
        #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        partitions: u32,
    },
    /// List the topics: name and partitions.
    #[command(after_help = "\
Example:
  streamctl topic list")]
    List,
    /// Change a topic: more partitions, another segment size, another cleanup.
    ///
    /// Partitions are only ever added: fewer would lose their records. New ones begin empty, and keys hash to other
    /// partitions from then on.
    #[command(after_help = "\
Examples:
  streamctl topic alter access-log --partitions 8
  streamctl topic alter access-log --segment-bytes 64MiB")]
    Alter(Alter),
    /// Delete a topic with all its records.
    ///
    /// Asks nothing. Refused where a job committed to the topic or an open transaction touches it; the error names the
    /// remedy. A name may be used again at once: offsets of the old topic do not count in the new one.
    #[command(after_help = "\
Examples:
  streamctl topic delete ip-counts
  streamctl topic delete ip-counts --force")]
    Delete {
        /// The topic.
        name: String,
        /// Delete it although a job reads or writes it or a transaction touches it. Never what holds a job's state.
        #[arg(long)]
        force: bool,
    },
    /// Show start, end, high watermark and stable offset of each partition.
    #[command(after_help = "\
Example:
  streamctl topic describe access-log")]
    Describe {
        /// The topic.
        name: String,
    },
}

/// `streamctl topic alter ...`
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("change").required(true).multiple(true)))]
pub struct Alter {
    /// The topic.
    pub name: String,
    /// How many partitions, at least as many as there are.
    #[arg(long, value_name = "N", group = "change", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub partitions: Option<u32>,
    /// Close segments before they outgrow this; counts for records that come.
    #[arg(long, value_name = "BYTES", group = "change")]
    pub segment_bytes: Option<Bytes>,
    /// What becomes of old records. It is recorded; nothing is removed yet.
    #[arg(long, value_enum, group = "change")]
    pub cleanup: Option<Cleanup>,
}

/// What becomes of old records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Cleanup {
    /// Old segments go as a whole.
    Delete,
    /// The last record of each key stays.
    Compact,
}

/// `streamctl produce ...`
#[derive(Debug, Args)]
pub struct Produce {
    /// The topic.
    pub topic: String,
    /// Read this file instead of standard input.
    #[arg(long, value_name = "F")]
    pub file: Option<PathBuf>,
    /// Capture group 1 of the first match in a line is the record's key; a line without a match gets no key.
    #[arg(long, value_name = "RE")]
    pub key_regex: Option<String>,
    /// Text before the first C is the record's key, the rest its value; a line without C gets no key. `\t` is a tab.
    #[arg(long, value_name = "C", conflicts_with = "key_regex", value_parser = delimiter)]
    pub key_delimiter: Option<Delimiter>,
    /// How batches are compressed. Readers of any kind open them.
    #[arg(long, value_enum, value_name = "CODEC", default_value_t = Codec::Lz4)]
    pub compression: Codec,
    /// Create the topic (and the data directory) where it is not there.
    #[arg(long)]
    pub create: bool,
    /// With `--create`: how many partitions. Default: 4.
    #[arg(long, value_name = "N", requires = "create", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub partitions: Option<u32>,
    /// Leave out this many leading lines.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub skip_lines: u64,
    /// Write a line of JSON to standard output whenever more leading lines are durable.
    #[arg(long, hide = true)]
    pub status_lines: bool,
}

/// What ends the key of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delimiter(pub char);

fn delimiter(text: &str) -> Result<Delimiter, String> {
    let mut characters = text.chars();
    match (text, characters.next(), characters.next()) {
        ("\\t", ..) => Ok(Delimiter('\t')),
        (_, Some('\n'), None) => Err("a line ends at a newline, before any key".into()),
        (_, Some(one), None) => Ok(Delimiter(one)),
        _ => Err("expected one character, such as , or \\t".into()),
    }
}

/// How batches are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Codec {
    /// Not at all.
    None,
    /// Small and slow.
    Gzip,
    /// Quick.
    Snappy,
    /// Quick, and smaller than snappy.
    Lz4,
}

/// `streamctl consume ...`
#[derive(Debug, Args)]
pub struct Consume {
    /// The topic.
    pub topic: String,
    /// Where to start: `earliest`, `latest`, `N` (that offset, with `--partition`), `-N` (the last N of each partition),
    /// `@-1h` (the first record of each partition with a timestamp so long ago or later) or `@TIME` (the same from a time
    /// on, RFC 3339). The timestamp is when `produce` appended a record, not the time that stands in it; of a job's output
    /// it is the event time.
    #[arg(long, default_value = "earliest", allow_hyphen_values = true, value_name = "FROM")]
    pub from: From,
    /// Stop at the end as it is now, instead of following.
    #[arg(long)]
    pub until_end: bool,
    /// Stop after this many records.
    #[arg(long, value_name = "N")]
    pub max: Option<u64>,
    /// Read only this partition.
    #[arg(long, value_name = "P")]
    pub partition: Option<u32>,
    /// Which records are shown.
    #[arg(long, value_enum, default_value_t = Isolation::ReadCommitted)]
    pub isolation: Isolation,
    /// `text`: the value and a newline. `json`: one object a line.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

/// Where `consume` starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// The first record kept.
    Earliest,
    /// The end as it is now.
    Latest,
    /// This offset.
    Offset(i64),
    /// The last so many records of each partition.
    Last(u64),
    /// The first record of each partition that is not older.
    Time(Timestamp),
}

impl FromStr for From {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "earliest" => Ok(From::Earliest),
            "latest" => Ok(From::Latest),
            _ if text.starts_with('@') => time(&text[1..], Timestamp::now()).map(From::Time),
            _ => match text.strip_prefix('-') {
                Some(last) => last.parse().map(From::Last).map_err(|_| ()),
                None => text.parse().map(From::Offset).map_err(|_| ()),
            }
            .map_err(|()| "expected earliest, latest, N, -N, @TIME or @-DURATION".to_owned()),
        }
    }
}

/// A time as RFC 3339 has it, or so long before `now`.
fn time(text: &str, now: Timestamp) -> Result<Timestamp, String> {
    let example = "such as @-1h30m or @2026-01-31T10:05:00Z";
    match text.strip_prefix('-') {
        Some(ago) => {
            let ago = humantime::parse_duration(ago).map_err(|error| format!("{error}; {example}"))?;
            now.checked_sub(ago).map_err(|_| format!("that is before the calendar begins; {example}"))
        }
        None => text.parse().map_err(|error| format!("{error}; {example}")),
    }
}

/// Which records a reader sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Isolation {
    /// Only records of committed transactions, and those outside of any.
    ReadCommitted,
    /// All records, those of open and aborted transactions too.
    ReadUncommitted,
}

/// How records are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The value and a newline.
    Text,
    /// One object a line: topic partition offset timestamp key value headers.
    Json,
}

/// How a report is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// `streamctl gen ...`
#[derive(Debug, Subcommand)]
pub enum GenCommand {
    /// Generate a web server's access log (combined format); the same for the same arguments.
    ///
    /// Addresses follow a Zipf law, one in six is IPv6; lines carry zone offsets. Of 1000 lines 68 are up to 8 s out of
    /// order, 2 are 15 to 75 s behind, and 1 does not parse.
    #[command(after_help = "\
Examples:
  streamctl gen access-log --lines 100000 --seed 1 --file access.log
  streamctl gen access-log --lines 1000 --seed 2 --start 2026-01-01T00:00:00Z | streamctl produce access-log --create")]
    AccessLog(GenAccessLog),
}

/// `streamctl gen access-log ...`
#[derive(Debug, Args)]
pub struct GenAccessLog {
    /// How many lines.
    #[arg(long, value_name = "N")]
    pub lines: u64,
    /// Chooses the log: the same seed gives the same lines.
    #[arg(long, value_name = "S")]
    pub seed: u64,
    /// How many addresses.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub addresses: u32,
    /// Lines per second of event time.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..))]
    pub rate: u32,
    /// Event time of the first line (RFC 3339).
    #[arg(long, value_name = "RFC3339", default_value = "2015-05-17T10:05:00Z")]
    pub start: Timestamp,
    /// Write this file instead of standard output.
    #[arg(long, value_name = "F")]
    pub file: Option<PathBuf>,
}

/// `streamctl job ...`
#[derive(Debug, Subcommand)]
pub enum JobCommand {
    /// List the jobs of this program and, where there is a data directory, the names that committed in it.
    ///
    /// Of each name: its job, how many records of its input it has not read, and whether it runs on this machine.
    #[command(after_help = "\
Example:
  streamctl job list")]
    List(StateAt),
    /// Show a job's arguments with their defaults and, where it ran, its committed offsets and lag.
    #[command(after_help = "\
Example:
  streamctl job describe ip-count")]
    Describe {
        /// The job, or the path of a crate.
        job: String,
        /// The name it was run under, where that is another one.
        #[arg(long)]
        name: Option<String>,
    },
}

/// `streamctl serve ...`
#[derive(Debug, Args)]
pub struct Serve {
    /// Where to listen; port 0 takes a free one.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7070")]
    pub listen: String,
    /// Listen on an address that other machines reach, too. There is no authentication: whoever reaches it may read and
    /// delete everything.
    #[arg(long)]
    pub insecure_listen: bool,
}

/// `streamctl run ...`
#[derive(Debug, Args)]
pub struct Run {
    /// The job (`streamctl job list` shows them), or a crate: a path with a slash, which is built first.
    pub job: String,
    /// The identity its offsets, state and transactions belong to. Default: the job's name.
    #[arg(long)]
    pub name: Option<String>,
    /// Process to the end as it is now, close all windows, commit and exit.
    #[arg(long)]
    pub until_end: bool,
    /// An argument of the job; `streamctl job describe JOB` shows them.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<Setting>,
    /// How many tasks (threads) process the job. Default: the cores of this machine.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub tasks: Option<u32>,
    /// How often output, state and offsets are committed; the first time with the first output, if that is sooner.
    #[arg(long, value_name = "TIME", default_value = "200ms", value_parser = duration)]
    pub commit_interval: Duration,
    /// Memory for state, RocksDB's own included.
    #[arg(long, value_name = "BYTES", default_value = "256MiB")]
    pub state_memory: Bytes,
    /// The folder for the state of jobs (RocksDB). Default: `state` in the data directory, or ./tidemill-state with
    /// --broker. It is a cache of what the log holds: where it is missing or stale it is rebuilt.
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// What a crash may do to output: `exactly-once` nothing, `at-least-once` repeat some of it, `at-most-once` lose some
    /// of the input. Default: the job's own, which is exactly-once unless the job says otherwise.
    #[arg(long, value_name = "G", value_parser = guarantees())]
    pub guarantee: Option<Guarantee>,
    /// How often a record may make the job panic before it goes to the dead letters. A job without a dead-letter topic
    /// stops instead.
    #[arg(long, value_name = "N", default_value_t = tidemill::engine::poison::TRIES, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub poison_tries: u32,
    /// Write a line of JSON to standard output for every commit, every change of the open transaction and every phase.
    #[arg(long, hide = true)]
    pub status_lines: bool,
}

/// `key=value`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Which argument.
    pub key: String,
    /// Its value as text.
    pub value: String,
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok(Setting { key: key.into(), value: value.into() }),
            _ => Err("expected KEY=VALUE".into()),
        }
    }
}

/// A number of bytes, written as `1048576`, `1024KiB`, `1MiB` or `1GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let scale = match unit.trim() {
            "" | "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            _ => return Err("expected a number and B, KiB, MiB or GiB".into()),
        };
        let number: u64 =
            number.parse().map_err(|_| "expected a number of bytes, such as 256MiB".to_owned())?;
        number.checked_mul(scale).map(Bytes).ok_or_else(|| "that is more than any machine has".into())
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}B", self.0)
    }
}

/// Parses a guarantee, and lists them in the help.
pub fn guarantees() -> impl TypedValueParser<Value = Guarantee> {
    let names = Guarantee::ALL.map(Guarantee::name);
    PossibleValuesParser::new(names).try_map(|name| name.parse::<Guarantee>())
}

fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if time.is_zero() => Err("must be longer than nothing".into()),
        Ok(time) => Ok(time),
        Err(error) => Err(format!("{error}; such as 200ms or 1s")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_command_has_an_example() {
        fn walk(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{path} has no example");
            assert!(help.contains("  streamctl"), "{path} has no example");
            command.get_subcommands().for_each(|sub| walk(sub, &path));
        }
        let command = Cli::command();
        command.clone().debug_assert();
        walk(&command, "");
    }

    /// An argument of a job that is written as an option gets a tip; a misspelt option keeps clap's own.
    #[test]
    fn an_argument_of_a_job_is_no_option() {
        let said = |words: &str| {
            let words = words.split(' ').map(str::to_owned).collect::<Vec<_>>();
            let error = Cli::try_parse_from(&words).unwrap_err();
            tipped(error, &words).to_string()
        };
        let window = said("streamctl run ip-count --window 3s");
        assert!(window.contains("tip: an argument of the job is set with '--set window=VALUE'"), "{window}");
        assert!(!window.contains("as a value"), "{window}");
        let bound = said("streamctl explain plan ip-count --out_of_order=3s");
        assert!(bound.contains("'--set out_of_order=VALUE'"), "{bound}");
        let task = said("streamctl run ip-count --task 3");
        assert!(task.contains("'--tasks'") && !task.contains("--set"), "{task}");
        let why = said("streamctl explain why-not-fired ip-count --window 3s");
        assert!(!why.contains("--set"), "{why}");
        let topic = said("streamctl topic list --window 3s");
        assert!(!topic.contains("--set"), "{topic}");
    }

    /// The examples parse as they stand.
    #[test]
    fn examples_parse() {
        fn walk(command: &clap::Command) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            for line in help.lines().filter(|line| line.trim_start().contains("streamctl ")) {
                for part in line.split(" | ").filter(|part| part.trim().starts_with("streamctl ")) {
                    let part = part.split(" > ").next().unwrap_or_default();
                    let words = part.split_whitespace().collect::<Vec<_>>().join(" ");
                    let words = words.replace("'^([^ ]+)'", "^([^\u{a0}]+)");
                    let parsed = Cli::try_parse_from(words.split(' '));
                    assert!(parsed.is_ok(), "{part}: {}", parsed.unwrap_err());
                }
            }
            command.get_subcommands().for_each(walk);
        }
        walk(&Cli::command());
    }

    #[test]
    fn values_parse() {
        assert_eq!("-5".parse(), Ok(From::Last(5)));
        assert_eq!("5".parse(), Ok(From::Offset(5)));
        assert_eq!("latest".parse(), Ok(From::Latest));
        assert!("newest".parse::<From>().is_err());
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        assert_eq!("@2015-05-17T12:05:00+02:00".parse(), Ok(From::Time(at("2015-05-17T10:05:00Z"))));
        assert_eq!(time("-90m", at("2015-05-17T10:05:00Z")), Ok(at("2015-05-17T08:35:00Z")));
        assert!("@yesterday".parse::<From>().is_err());
        assert!("@-never".parse::<From>().is_err());
        assert!("@-99999y".parse::<From>().is_err());
        assert_eq!(delimiter("\\t"), Ok(Delimiter('\t')));
        assert_eq!(delimiter("ü"), Ok(Delimiter('ü')));
        assert!(delimiter("ab").is_err() && delimiter("").is_err() && delimiter("\n").is_err());
        assert_eq!("256MiB".parse(), Ok(Bytes(256 << 20)));
        assert!("256 MB".parse::<Bytes>().is_err());
        assert!("99999999999GiB".parse::<Bytes>().is_err());
        assert!(duration("0s").is_err());
        assert_eq!("a=b=c".parse(), Ok(Setting { key: "a".into(), value: "b=c".into() }));
        assert!("=b".parse::<Setting>().is_err());
    }
}
