//! `./x prove`: the long banks, one after the other, and at the end a table of what they showed.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::chaos::{self, Bank, Guarantee, Layouts};
use crate::demo::Demo;
use crate::full_disk;
use crate::page::Pages;
use crate::power::{FileSystem, Outcome, Power};
use crate::within;

/// Crates with a bank of seeded faults: rules that a test breaks to see that it notices. Their sweeps are whole here
/// (every case and 20,000 schedules of transactions of the log's, 10,000 random jobs of the engine's), where `./x test` takes
/// samples.
const FAULT_BANKS: [&str; 2] = ["tidemill-log", "tidemill-stream"];
const WHOLE_SWEEPS: [(&str, &str); 3] =
    [("TIDEMILL_SWEEP", "all"), ("TIDEMILL_SEEDS", "0-10000"), ("TXN_SEEDS", "20000")];
/// The rule of the log that the control of the power cuts breaks, and most cuts until that must be noticed. Of the other
/// syncs a fast machine misses more, but a busy one may not get as far as to need them.
const CONTROL: (&str, u64) = ("sync:journal", 5);
/// Decoders that are thrown random and damaged bytes, this often each.
const DECODERS: [&[&str]; 2] = [
    &["-p", "tidemill-log", "--test", "batch", "no_bytes_make_it_panic"],
    &["-p", "tidemill-rpc", "--lib", "decode_tests::hostile"],
];
const DECODER_CASES: &str = "100000";
/// Case studies with the arguments of their default run, but for the port, which may be taken; the longest one may take.
const CASE_STUDIES: [(&str, &[&str]); 3] =
    [("ip-count", &["--port", "0"]), ("ip-count-exactly-once", &[]), ("life-of-a-message", &[])];
const CASE_STUDY: Duration = Duration::from_secs(20);
/// All of it is to take no longer on two cores that do nothing else. More is said, and no failure.
const MINUTES: u64 = 15;

/// `./x prove ...`
#[derive(Debug, Args)]
pub struct Prove {
    /// The streamctl to run.
    #[arg(long, hide = true)]
    streamctl: PathBuf,
    /// How many kills of job and owner.
    #[arg(long, default_value_t = 100)]
    kills: u32,
    /// How many power cuts on each file system.
    #[arg(long, default_value_t = 50)]
    cuts: u64,
    /// Chooses the moments.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run only the banks whose name contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// What the banks showed so far.
#[derive(Debug, Default)]
struct Table {
    only: Option<String>,
    rows: Vec<(String, String, Duration)>,
}

impl Table {
    /// Runs a bank and notes what it says; an error if it fails.
    #[allow(clippy::print_stdout, reason = "what it prints is its result")]
    fn bank(&mut self, name: &str, bank: impl FnOnce() -> Result<String>) -> Result<()> {
        if self.only.as_ref().is_some_and(|only| !name.contains(only)) {
            return Ok(());
        }
        println!("\n== {name}");
        let started = Instant::now();
        let said = bank().with_context(|| format!("bank \"{name}\""))?;
        println!("{said}");
        self.rows.push((name.to_owned(), said, started.elapsed()));
        Ok(())
    }

    /// Names of the banks that showed nothing.
    fn skipped(&self) -> Vec<&str> {
        let skipped = self.rows.iter().filter(|(_, said, _)| said.starts_with(SKIPPED));
        skipped.map(|(name, ..)| name.as_str()).collect()
    }

    fn text(&self) -> String {
        let wide = self.rows.iter().map(|(name, ..)| name.chars().count()).max().unwrap_or(0);
        let mut text = String::new();
        for (name, said, took) in &self.rows {
            let seconds = took.as_secs();
            let _ = writeln!(text, "{name:<wide$}  {:>2} min {:02} s  {said}", seconds / 60, seconds % 60);
        }
        text
    }
}

impl Prove {
    /// Runs the banks; an error at the first that fails.
    #[allow(clippy::print_stdout, reason = "what it prints is its result")]
    pub fn run(&self) -> Result<()> {
        let started = Instant::now();
        let mut table = Table { only: self.only.clone(), ..Table::default() };
        let result = self.banks(&mut table);
        println!("\n{}", table.text());
        let seconds = started.elapsed().as_secs();
        let took = format!("{} min {:02} s", seconds / 60, seconds % 60);
        let skipped = table.skipped();
        match &result {
            Ok(()) if !skipped.is_empty() => {
                println!("./x prove: the banks that ran held, in {took}; SKIPPED: {}", skipped.join(", "));
            }
            Ok(()) if self.only.is_some() => println!("./x prove: the banks above held, in {took}"),
            Ok(()) if seconds > MINUTES * 60 => {
                println!(
                    "./x prove: all banks held, in {took}, which is more than the {MINUTES} min it is to take"
                );
            }
            Ok(()) => println!("./x prove: all banks held, in {took}"),
            Err(_) => println!("./x prove: FAILED after {took}; the banks above held"),
        }
        result
    }

    fn banks(&self, table: &mut Table) -> Result<()> {
        for package in FAULT_BANKS {
            table.bank(&format!("seeded faults and whole sweeps of {package}"), || {
                let tests = tests_of(&["-p", package, "--features", "faults"], &WHOLE_SWEEPS)?;
                Ok(format!("{tests} tests passed"))
            })?;
        }
        table.bank("decoders", || {
            let mut tests = 0;
            for decoder in DECODERS {
                tests += tests_of(decoder, &[("PROPTEST_CASES", DECODER_CASES)])?;
            }
            Ok(format!("{tests} decoders, {DECODER_CASES} inputs each: no panic"))
        })?;
        table.bank("a disk that fills up", || {
            full_disk::in_namespace(&self.streamctl)?;
            Ok("refused appends before anything was lost; with room again the input was completed".into())
        })?;
        for fs in [FileSystem::Ext4, FileSystem::Xfs] {
            table.bank(&format!("power cuts on {}", fs.name()), || self.power_cuts(fs))?;
        }
        table.bank("control: power cuts with a missing sync", || self.control())?;
        table.bank("kills of a job and of its log's owner", || self.kills())?;
        for weaker in [Guarantee::AtLeastOnce, Guarantee::AtMostOnce] {
            table.bank("control: a weaker guarantee under kills", || self.weaker(weaker))?;
        }
        table.bank("pages that are run", || {
            let pages = vec![PathBuf::from("docs/first-job.md")];
            Pages { streamctl: self.streamctl.clone(), write: false, pages }.run()
        })?;
        table.bank("case studies", || self.case_studies())?;
        table.bank("the demo", || {
            Demo::with_defaults(self.streamctl.clone()).run()?;
            Ok("two kills, every window exact".into())
        })
    }

    fn power(&self, fs: FileSystem, cuts: u64) -> Power {
        let (streamctl, seed) = (self.streamctl.clone(), self.seed);
        Power { fs, cuts, seed, streamctl, load: None, fault: None, inside: None }
    }

    fn power_cuts(&self, fs: FileSystem) -> Result<String> {
        Ok(match self.power(fs, self.cuts).run()? {
            Outcome::Done(counts) => counts.sentence(fs),
            Outcome::Skipped(why) => skipped(&why),
        })
    }

    /// With a sync left out, the cuts must find that something is lost or damaged.
    fn control(&self) -> Result<String> {
        let (fault, cuts) = CONTROL;
        let built = self.streamctl.with_file_name("tidemill-load");
        let broken = self.streamctl.with_file_name("tidemill-load-faults");
        cargo(&["build", "--quiet", "--release", "-p", "tidemill-load", "--features", "faults"])?;
        std::fs::copy(&built, &broken).with_context(|| format!("cannot copy {}", built.display()))?;
        cargo(&["build", "--quiet", "--release", "-p", "tidemill-load"])?;
        let (load, fault_name) = (Some(broken), Some(fault.to_owned()));
        let power = Power { load, fault: fault_name, ..self.power(FileSystem::Ext4, cuts) };
        match power.run() {
            Ok(Outcome::Skipped(why)) => Ok(skipped(&why)),
            Ok(Outcome::Done(_)) => {
                bail!("{cuts} cuts without `{fault}` lost nothing: the bank would not notice")
            }
            Err(error) => {
                let said = format!("{error:#}");
                let noticed = ["LOST OR INVENTED", "a crash is called corruption"];
                let loss = noticed.iter().any(|what| said.contains(what));
                ensure!(loss, "it failed, but not for a loss: {said}");
                Ok(format!("noticed that `{fault}` was left out, within {cuts} cuts"))
            }
        }
    }

    /// Exactly once under kills of the job, of its log's owner and of its producer, over both layouts.
    #[allow(clippy::print_stdout, reason = "what it prints is its result")]
    fn kills(&self) -> Result<String> {
        let bank = Bank::new(Some(self.streamctl.clone()), None, Layouts::Both, false)?;
        let began = Instant::now();
        let (report, violations) = bank.exactly_once(self.kills, self.seed)?;
        print!("{}", chaos::summary(&report, began.elapsed()));
        chaos::judge(&report, &violations, self.kills)?;
        Ok(format!(
            "{} kills, {} of them within an open transaction: 0 lost, 0 duplicated",
            report.kills, report.hits
        ))
    }

    /// Each as its reader runs it, and in the time its reader has.
    fn case_studies(&self) -> Result<String> {
        cargo(&["build", "--quiet", "--release", "-p", "tidemill-examples", "--bins"])?;
        let mut said = Vec::new();
        for (name, args) in CASE_STUDIES {
            let started = Instant::now();
            let mut study = Command::new(self.streamctl.with_file_name(name));
            study.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            // One that is too slow by less says how slow it is.
            let output = within::output(&mut study, b"", 3 * CASE_STUDY)?;
            let took = started.elapsed();
            let stderr = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "{name} ended with {}: {stderr}", output.status);
            ensure!(
                took <= CASE_STUDY,
                "{name} took {:.1} s, and is to take {:?}",
                took.as_secs_f64(),
                CASE_STUDY
            );
            said.push(format!("{name} {:.1} s", took.as_secs_f64()));
        }
        Ok(said.join(", "))
    }

    /// The weaker guarantees under the same kills must be found out.
    fn weaker(&self, guarantee: Guarantee) -> Result<String> {
        let bank = Bank::new(Some(self.streamctl.clone()), None, Layouts::Both, false)?;
        bank.control(guarantee, self.kills, self.seed)
    }
}

/// Loud: a line that cannot be taken for a result.
const SKIPPED: &str = "SKIPPED, NOTHING WAS SHOWN";

fn skipped(why: &str) -> String {
    format!("{SKIPPED}: {why}")
}

fn cargo_command(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args);
    command
}

fn cargo(args: &[&str]) -> Result<()> {
    let status = cargo_command(args).status().context("cannot start cargo")?;
    ensure!(status.success(), "cargo {} ended with {status}", args.join(" "));
    Ok(())
}

/// Runs tests, passes on what they print, and counts those that passed.
#[allow(clippy::print_stdout, reason = "what it prints is its result")]
fn tests_of(args: &[&str], env: &[(&str, &str)]) -> Result<u64> {
    let mut command = cargo_command(&["test", "--release"]);
    command.args(args).envs(env.iter().copied()).stdout(Stdio::piped());
    let mut child = command.spawn().context("cannot start cargo")?;
    let mut passed = 0;
    for line in BufReader::new(child.stdout.take().context("standard output is piped")?).lines() {
        let line = line?;
        println!("{line}");
        passed += passed_in(&line);
    }
    let status = child.wait()?;
    ensure!(status.success(), "cargo test {} ended with {status}", args.join(" "));
    ensure!(passed > 0, "cargo test {} ran no test", args.join(" "));
    Ok(passed)
}

/// The number in `test result: ok. 12 passed; ...`.
fn passed_in(line: &str) -> u64 {
    let counted = line.strip_prefix("test result: ok. ").and_then(|rest| rest.split_once(" passed"));
    counted.and_then(|(n, _)| n.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skip_is_named() {
        let mut table = Table::default();
        table.bank("cuts", || Ok(skipped("no loop devices"))).unwrap();
        table.bank("kills", || Ok("7 kills".into())).unwrap();
        assert_eq!(table.skipped(), ["cuts"]);
    }

    #[test]
    fn passed_tests_are_counted() {
        assert_eq!(passed_in("test result: ok. 12 passed; 0 failed; 0 ignored"), 12);
        assert_eq!(passed_in("test result: FAILED. 3 passed; 1 failed"), 0);
        assert_eq!(passed_in("test a::b ... ok"), 0);
    }

    #[test]
    fn the_table_has_a_line_a_bank_and_a_failed_one_has_none() {
        let mut table = Table::default();
        table.bank("short", || Ok("7 things".into())).unwrap();
        let failed = table.bank("a longer name", || bail!("lost"));
        assert_eq!(format!("{:#}", failed.unwrap_err()), "bank \"a longer name\": lost");
        table.bank("a longer name", || Ok("8 things".into())).unwrap();
        assert_eq!(
            table.text(),
            "short           0 min 00 s  7 things\na longer name   0 min 00 s  8 things\n"
        );
    }
}
