//! Pages of documentation that are run: what they show is what happens.
//!
//! ````text
//! ```console
//! $ streamctl topic list          a command: typed as it stands, in one bash for the whole page
//! access-log  4                   what it printed, standard error included
//! ...                             any lines, or none
//! ```
//! ````
//!
//! A block under a line `<!-- varies -->` shows what differs from run to run: there only failures are compared.
//!
//! The page's bash works in a scratch folder, without network for cargo, and with the built `streamctl` on its PATH. Times, process ids and the
//! scratch folder's path are masked on both sides before they are compared. A command that fails says so in the next
//! line: `[exit 1]`, which the page must show as well, so that an error is never taken for an ordinary end.
//!
//! The first `streamctl run` of a page builds a crate: it must take less than a minute, and no C++ may be compiled.
//!
//! `--write` puts what was printed into the page, where it keeps no `...`; a reviewer reads the difference.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::within;

/// `xtask page ...`
#[derive(Debug, Args)]
pub struct Pages {
    /// The streamctl to run.
    #[arg(long, hide = true)]
    pub streamctl: PathBuf,
    /// Write what was printed into the pages instead of comparing it.
    #[arg(long)]
    pub write: bool,
    /// The pages.
    #[arg(default_value = "docs/first-job.md")]
    pub pages: Vec<PathBuf>,
}

impl Pages {
    /// Runs each page, and says so; an error at the first that shows something else than what happened.
    pub fn run(&self) -> Result<String> {
        let mut said = Vec::new();
        for page in &self.pages {
            let text = fs::read_to_string(page).with_context(|| format!("cannot read {}", page.display()))?;
            let steps = steps(&text);
            ensure!(!steps.is_empty(), "{} has no console block with a command", page.display());
            let before = compiled_cxx(&self.streamctl)?;
            let (printed, took) = perform(&steps, &self.streamctl)?;
            let compiled = compiled_cxx(&self.streamctl)?;
            ensure!(
                compiled.is_subset(&before),
                "{} had C++ compiled, into {:?}: a user's crate is to be built with what is there",
                page.display(),
                compiled.difference(&before).collect::<Vec<_>>()
            );
            let first =
                steps.iter().position(|step| step.command.starts_with("streamctl run ")).map(|at| took[at]);
            ensure!(
                first.is_none_or(|took| took < FIRST_RUN),
                "{}: the first `streamctl run` took {:.1} s, and it is to take less than {} s",
                page.display(),
                first.unwrap_or_default().as_secs_f64(),
                FIRST_RUN.as_secs()
            );
            if self.write {
                fs::write(page, written(&text, &printed))
                    .with_context(|| format!("cannot write {}", page.display()))?;
                said.push(format!("{}: wrote what {} commands printed", page.display(), steps.len()));
                continue;
            }
            for (step, printed) in steps.iter().zip(&printed) {
                let (mut shown, mut happened) = (masked(&step.shown), masked(printed));
                if step.varies {
                    for lines in [&mut shown, &mut happened] {
                        lines.retain(|line| line.starts_with("[exit "));
                    }
                }
                ensure!(
                    matches(&shown, &happened),
                    "{}: $ {}\n--- the page shows\n{}\n--- and this happened\n{}\n(after a look: xtask page --write)",
                    page.display(),
                    step.command,
                    shown.join("\n"),
                    happened.join("\n")
                );
            }
            let first =
                first.map(|took| format!(", the first `streamctl run` in {:.1} s", took.as_secs_f64()));
            let first = first.unwrap_or_default();
            said.push(format!("{}: {} commands, each as shown{first}", page.display(), steps.len()));
        }
        Ok(said.join("; "))
    }
}

/// A command of a page and the lines shown behind it.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    command: String,
    shown: Vec<String>,
    varies: bool,
}

/// The commands of a page, in order.
fn steps(page: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let (mut inside, mut varies) = (false, false);
    for line in page.lines() {
        match line {
            "```console" => inside = true,
            "```" => (inside, varies) = (false, false),
            "<!-- varies -->" => varies = true,
            _ if !inside => {}
            _ => match (line.strip_prefix("$ "), steps.last_mut()) {
                (Some(command), _) => {
                    steps.push(Step { command: command.to_owned(), shown: Vec::new(), varies })
                }
                (None, Some(step)) => step.shown.push(line.to_owned()),
                (None, None) => {}
            },
        }
    }
    steps
}

/// The page with what was printed in the place of what it showed; a step that shows `...` keeps what it has.
fn written(page: &str, printed: &[Vec<String>]) -> String {
    let mut out = String::new();
    let mut keep = true;
    let steps = steps(page);
    let mut next = steps.iter().zip(printed);
    let mut inside = false;
    for line in page.lines() {
        if line == "```console" {
            inside = true;
        } else if line == "```" {
            (inside, keep) = (false, true);
        }
        let command = inside && line.starts_with("$ ");
        if !inside || command || line == "```console" || keep {
            out.push_str(line);
            out.push('\n');
        }
        if command && let Some((step, lines)) = next.next() {
            keep = step.shown.iter().any(|line| line == "...");
            if !keep {
                lines.iter().for_each(|line| out.extend([line, "\n"]));
            }
        }
    }
    out
}

/// Between the outputs of two commands, with the time behind it. No command prints it.
const MARK: &str = "\u{1}step\u{1}";
/// The first run of a user's crate builds it, on top of what is built already, in less than this.
const FIRST_RUN: Duration = Duration::from_secs(60);
/// A page whose commands are not done after this waits for something that does not come.
const PAGE: Duration = Duration::from_secs(600);

/// The folders of compiled C++ in the target folder of this binary: another one means that it was compiled again.
fn compiled_cxx(streamctl: &Path) -> Result<BTreeSet<PathBuf>> {
    let build = streamctl.parent().context("the binary is in a folder")?.join("build");
    let Ok(entries) = fs::read_dir(build) else { return Ok(BTreeSet::new()) };
    let ours = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("librocksdb-sys-") && path.join("out").is_dir()
    };
    Ok(entries.flatten().map(|entry| entry.path()).filter(ours).collect())
}

/// Runs the commands in one bash and returns what each printed, and how long it took.
fn perform(steps: &[Step], streamctl: &Path) -> Result<(Vec<Vec<String>>, Vec<Duration>)> {
    let streamctl =
        streamctl.canonicalize().with_context(|| format!("there is no {}", streamctl.display()))?;
    let bin = streamctl.parent().context("the binary is in a folder")?;
    let target = bin.parent().context("the binary is in a target folder")?;
    // On the disk that the build is on, and outside of the workspace's own folders of sources.
    let scratch = target.join(format!("tidemill-page-{}", std::process::id()));
    fs::create_dir_all(&scratch)?;
    let mut script = String::new();
    for step in steps {
        // A failure is part of what a reader sees. The sign of a background command is its shell's, and stays silent.
        script.push_str(&format!(
            "printf '{MARK}%s\\n' \"$EPOCHREALTIME\"\n{}\ncode=$?; [ $code = 0 ] || echo \"[exit $code]\"\n",
            step.command
        ));
    }
    script.push_str(&format!("printf '{MARK}%s\\n' \"$EPOCHREALTIME\"\n"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let paths = std::iter::once(bin.to_owned()).chain(std::env::split_paths(&path));
    let mut bash = Command::new("bash");
    // The script comes through standard input, so that commands find it at its end; both outputs are one.
    bash.args(["-c", "exec 2>&1; script=$(cat); exec </dev/null; eval \"$script\""])
        .current_dir(&scratch)
        .env("PATH", std::env::join_paths(paths)?)
        .env("CARGO_NET_OFFLINE", "true")
        .env("CARGO_TARGET_DIR", target)
        .env("CARGO_TERM_COLOR", "never")
        .env_remove("TIDEMILL_DATA")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let output = within::output(&mut bash, script.as_bytes(), PAGE)?;
    let text = String::from_utf8_lossy(&output.stdout).replace(&*scratch.to_string_lossy(), "/home/you");
    let mut printed: Vec<Vec<String>> =
        text.split(MARK).skip(1).map(|part| part.lines().map(str::to_owned).collect()).collect();
    // Seconds, behind a point or, by locale, a comma.
    let time = |part: &mut Vec<String>| part.remove(0).replace(',', ".").parse::<f64>().unwrap_or_default();
    let times: Vec<f64> = printed.iter_mut().filter(|part| !part.is_empty()).map(time).collect();
    let took = times.windows(2).map(|pair| Duration::from_secs_f64((pair[1] - pair[0]).max(0.0))).collect();
    ensure!(
        printed.len() == steps.len() + 1,
        "the page's shell ended after {} of {} commands ({}); its folder is {}:\n{text}",
        printed.len(),
        steps.len(),
        output.status,
        scratch.display()
    );
    fs::remove_dir_all(&scratch)?;
    printed.pop();
    Ok((printed, took))
}

/// Lines with what differs from run to run taken out: times, process ids, bash's word about a killed child.
fn masked(lines: &[String]) -> Vec<String> {
    let killed = |line: &&String| !(line.contains(": line ") && line.contains(" Killed "));
    lines
        .iter()
        .filter(killed)
        .map(|line| mask_numbers(line))
        .map(|line| line.trim_end().to_owned())
        .collect()
}

/// Units whose numbers are not the same twice.
const MEASURED: [&str; 6] = [" s", "s", " ms", "ms", " records/s", " MB/s"];

/// Each decimal number followed by a unit of [`MEASURED`] becomes `#`, as does each after `pid `.
fn mask_numbers(line: &str) -> String {
    let mut out = String::new();
    let mut rest = line;
    while let Some(at) = rest.find(|c: char| c.is_ascii_digit()) {
        let (before, from) = rest.split_at(at);
        let digits = from.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == ',')).unwrap_or(from.len());
        let (number, after) = from.split_at(digits);
        out.push_str(before);
        let whole = |unit: &str| {
            after
                .strip_prefix(unit)
                .is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_alphanumeric()))
        };
        // `10s` in an argument or a window's length is no measurement: those have no point and no space.
        let measured =
            MEASURED.iter().any(|unit| whole(unit) && (unit.starts_with(' ') || number.contains('.')));
        out.push_str(if measured || before.ends_with("pid ") { "#" } else { number });
        rest = after;
    }
    out + rest
}

/// Whether the lines shown, in which `...` stands for any lines, are what happened.
fn matches(shown: &[String], happened: &[String]) -> bool {
    match shown.split_first() {
        None => happened.is_empty(),
        Some((first, rest)) if first == "..." => {
            (0..=happened.len()).any(|skip| matches(rest, &happened[skip..]))
        }
        Some((first, rest)) => {
            happened.split_first().is_some_and(|(line, after)| line == first && matches(rest, after))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.lines().map(str::to_owned).collect()
    }

    const PAGE: &str = "# A page\n\n```console\n$ one\nprinted\n$ two\n```\n\ntext\n\n```sh\n$ no command\n```\n\n```console\n$ three\n...\nend\n```\n";

    #[test]
    fn a_page_is_its_commands_and_what_they_print() {
        let of =
            |command: &str, shown: &str| Step { command: command.into(), shown: lines(shown), varies: false };
        assert_eq!(steps(PAGE), [of("one", "printed"), of("two", ""), of("three", "...\nend")]);
        let page = format!("<!-- varies -->\n{PAGE}");
        assert_eq!(steps(&page).iter().map(|step| step.varies).collect::<Vec<_>>(), [true, true, false]);
    }

    #[test]
    fn writing_replaces_what_is_shown_and_nothing_else() {
        let same = [lines("printed"), lines(""), lines("anything\nend")];
        assert_eq!(written(PAGE, &same), PAGE);
        let other = [lines("1"), lines("2\n3"), lines("anything\nend")];
        assert_eq!(written(PAGE, &other), PAGE.replace("printed\n$ two\n", "1\n$ two\n2\n3\n"));
    }

    #[test]
    fn compiled_cxx_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let binary = dir.path().join("streamctl");
        assert!(compiled_cxx(&binary).unwrap().is_empty());
        for name in ["librocksdb-sys-1/out", "librocksdb-sys-2", "other-3/out"] {
            fs::create_dir_all(dir.path().join("build").join(name)).unwrap();
        }
        let found = compiled_cxx(&binary).unwrap();
        assert_eq!(found.into_iter().collect::<Vec<_>>(), [dir.path().join("build/librocksdb-sys-1")]);
    }

    #[test]
    fn elisions_stand_for_any_lines() {
        assert!(matches(&lines("...\nend"), &lines("end")));
        assert!(matches(&lines("a\n...\nend"), &lines("a\nb\nend\nc\nend")));
        assert!(!matches(&lines("...\nend"), &lines("end\nmore")));
        assert!(!matches(&lines("a"), &lines("a\nb")));
        assert!(!matches(&lines("a\nb"), &lines("a")));
    }

    #[test]
    fn measurements_are_masked_and_results_are_not() {
        assert_eq!(
            mask_numbers("words reached the end: 20003 records in 0.1 s, all committed"),
            "words reached the end: 20003 records in # s, all committed"
        );
        assert_eq!(
            mask_numbers("committed with window `10s`, this run has `1m`"),
            "committed with window `10s`, this run has `1m`"
        );
        assert_eq!(mask_numbers("2 passed; finished in 0.02s"), "2 passed; finished in #s");
        assert_eq!(mask_numbers("1431857100000 apple 142"), "1431857100000 apple 142");
        assert_eq!(mask_numbers("held by pid 4711"), "held by pid #");
        let killed = lines("bash: line 7:  4711 Killed                  streamctl run .\nx");
        assert_eq!(masked(&killed), ["x"]);
    }

    /// What the runner itself promises, on commands that every machine has.
    #[test]
    fn commands_share_a_shell_and_failures_are_shown() {
        let dir = tempfile::tempdir().unwrap();
        let binary = dir.path().join("release").join("streamctl");
        fs::create_dir_all(binary.parent().unwrap()).unwrap();
        fs::write(&binary, "").unwrap();
        let step = |command: &str| Step { command: command.into(), shown: Vec::new(), varies: false };
        let steps = [
            step("x=1; mkdir d; cd d"),
            step("echo $x; pwd; echo err >&2"),
            step("cat"),
            step("(exit 3)"),
            step("sleep 0.2"),
        ];
        let (printed, took) = perform(&steps, &binary).unwrap();
        assert_eq!(took.len(), steps.len());
        assert_eq!(
            printed,
            [lines(""), lines("1\n/home/you/d\nerr"), lines(""), lines("[exit 3]"), lines("")]
        );
        assert!(took[4] >= Duration::from_millis(150), "{took:?}");
        let error = perform(&[step("exit 1"), step("echo")], &binary).unwrap_err();
        assert!(error.to_string().contains("after 1 of 2 commands"), "{error}");
    }
}
