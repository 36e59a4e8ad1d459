//! A disk that fills up: a small tmpfs, a producer that meets its end, and the same producer after room was made.
//!
//! Refused appends must lose nothing: what the command said is durable is there, what is there is a prefix of the input,
//! the directory still opens and reads, and with room again `--skip-lines` completes it.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::streamctl::Streamctl;

/// Room for the journal's first files and some segments.
const SIZE_MB: u64 = 400;
/// Kept back, and removed once the disk was full.
const BALLAST_MB: u64 = 100;

/// Runs `xtask full-disk` again inside a mount namespace of its own, where it may mount.
pub fn in_namespace(streamctl: &Path) -> Result<()> {
    let own = std::env::current_exe()?;
    let dir = std::env::temp_dir().join(format!("tidemill-full-disk-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    let script = format!(
        "mount -t tmpfs -o size={SIZE_MB}m tmpfs \"$1\" && exec \"$2\" full-disk --streamctl \"$3\" --dir \"$1\""
    );
    let result = Command::new("unshare")
        .args(["--mount", "--map-root-user", "sh", "-c", &script, "sh"])
        .arg(&dir)
        .arg(own)
        .arg(std::path::absolute(streamctl)?)
        .status();
    let removed = fs::remove_dir(&dir);
    let status = result.context("cannot start unshare (package util-linux)")?;
    ensure!(status.success(), "the full-disk test ended with {status}");
    removed.context("the tmpfs is gone, but not its folder")
}

/// The test itself, on a folder that is a small file system.
pub fn run(streamctl: &Path, dir: &Path) -> Result<()> {
    let free = rustix::fs::statfs(dir)?;
    let free_mb = (free.f_bavail * u64::try_from(free.f_bsize)?) >> 20;
    ensure!(
        free_mb <= SIZE_MB,
        "{} has {free_mb} MB: not the small file system this test fills",
        dir.display()
    );
    let streamctl = Streamctl::new(streamctl, dir.join("data"));
    fs::write(dir.join("ballast"), vec![1; usize::try_from(BALLAST_MB << 20)?])?;

    // Incompressible enough to fill the disk, and each line says where it stands.
    let lines: Vec<String> = (0..SIZE_MB * 1500).map(line).collect();
    let input = lines.concat();
    let (code, said) = produce(&streamctl, &["t", "--create", "--partitions", "1"], input.as_bytes())?;
    ensure!(code == Some(1), "a full disk ends produce with {code:?}: {said}");
    ensure!(said.contains("full"), "the error does not say that the disk is full: {said}");
    let durable = number_before(&said, " leading lines are durable")?;
    let doubt = number_before(&said, " more are in doubt")?;
    let there = streamctl.values("t", "read-committed").context("a full directory must still be read")?;
    let held = there.iter().filter(|b| **b == b'\n').count() as u64;
    ensure!(input.as_bytes().starts_with(&there), "what is there is no prefix of the input");
    ensure!(held >= durable, "{durable} lines were called durable, {held} are there");
    ensure!(held <= durable + doubt, "{durable} durable and {doubt} in doubt, but {held} are there");
    ensure!(held < lines.len() as u64, "the disk was never full");

    fs::remove_file(dir.join("ballast"))?;
    let (from, more) = (usize::try_from(held)?, 1000);
    let upto = lines[..from + more].concat();
    let (code, said) = produce(&streamctl, &["t", "--skip-lines", &held.to_string()], upto.as_bytes())?;
    ensure!(code == Some(0), "with room again produce ends with {code:?}: {said}");
    let there = streamctl.values("t", "read-committed")?;
    ensure!(
        there == upto.as_bytes(),
        "after room was made, {} lines are not the input's",
        held + more as u64
    );
    Ok(())
}

/// About 700 bytes that compress badly.
fn line(number: u64) -> String {
    let mut text = format!("{number} ");
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for _ in 0..44 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        text.push_str(&format!("{state:016x}"));
    }
    text.push('\n');
    text
}

fn produce(streamctl: &Streamctl, args: &[&str], input: &[u8]) -> Result<(Option<i32>, String)> {
    let mut child = streamctl
        .command(["produce"].iter().chain(args))
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start streamctl")?;
    let mut stdin = child.stdin.take().context("standard input is piped")?;
    std::thread::scope(|scope| {
        // Ends with an error once the command stops reading.
        scope.spawn(move || drop(std::io::Write::write_all(&mut stdin, input)));
        let output = child.wait_with_output()?;
        Ok((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
    })
}

fn number_before(text: &str, what: &str) -> Result<u64> {
    let Some((before, _)) = text.split_once(what) else { bail!("nothing says {what:?}: {text}") };
    let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    digits.parse().with_context(|| format!("no number before {what:?}: {text}"))
}
