//! Finds things in the files of a data directory, without the library that wrote them. docs/disk-format.md has the
//! formats.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// Rounds of the journal begin at multiples of this.
const PAGE: usize = 4096;

/// A file, by the name under which the data directory knows it, and its bytes.
#[derive(Debug)]
pub(crate) struct File {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
}

/// A round of the journal, and where it was found: the number of the file, and the position in it.
#[derive(Debug)]
pub(crate) struct Round {
    pub(crate) file_number: u64,
    pub(crate) at: usize,
    /// All of it, without the padding.
    pub(crate) bytes: Vec<u8>,
}

pub(crate) fn read(data: &Path, name: impl Into<String>) -> Result<File> {
    let name = name.into();
    let bytes = fs::read(data.join(&name)).with_context(|| format!("cannot read {name}"))?;
    Ok(File { name, bytes })
}

/// A file of a topic's partition: `topics/<uuid>/<partition>/<base offset>.<kind>`.
pub(crate) fn partition_file(data: &Path, topic: u128, partition: u32, kind: &str) -> Result<File> {
    let hex = format!("{topic:032x}");
    let [a, b, c, d, e] = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    read(data, format!("topics/{a}-{b}-{c}-{d}-{e}/{partition}/{:020}.{kind}", 0))
}

/// Bytes of a journal file, as the directory's `format` says.
pub(crate) fn journal_file_bytes(data: &Path) -> Result<u64> {
    let format = fs::read_to_string(data.join("format"))?;
    let line = format.lines().find_map(|line| line.strip_prefix("journal-file-bytes "));
    line.and_then(|n| n.parse().ok()).context("`format` does not say how large a journal file is")
}

/// The round whose bytes contain these.
pub(crate) fn round_with(data: &Path, needle: &[u8]) -> Result<Round> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(data.join("journal"))?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.sort();
    for path in files {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(file_number) = name.strip_suffix(".wal").and_then(|number| number.parse().ok()) else {
            continue;
        };
        let bytes = fs::read(&path)?;
        for at in (0..bytes.len()).step_by(PAGE) {
            let Some(round) = round_at(&bytes, at) else { continue };
            if round.windows(needle.len()).any(|part| part == needle) {
                return Ok(Round { file_number, at, bytes: round.to_vec() });
            }
        }
    }
    bail!("no round of the journal holds the bytes")
}

/// The bytes of the round that ends at this LSN.
pub(crate) fn round_ending_at(data: &Path, lsn: u64, file_bytes: u64) -> Result<Vec<u8>> {
    let number = lsn.saturating_sub(1) / file_bytes;
    let file = read(data, format!("journal/{number:010}.wal"))?.bytes;
    let end = usize::try_from(lsn - number * file_bytes)?;
    let rounds = (0..end).step_by(PAGE).filter_map(|at| Some((at, round_at(&file, at)?)));
    let ending = rounds.into_iter().find(|(at, round)| at + round.len().next_multiple_of(PAGE) == end);
    Ok(ending.context("no round ends where this one says that the one before ended")?.1.to_vec())
}

fn round_at(file: &[u8], at: usize) -> Option<&[u8]> {
    let head = file.get(at..at + 72)?;
    let length = u32::from_le_bytes(head[60..64].try_into().ok()?) as usize;
    if head[..4] == *b"TMR1" { file.get(at..at + length) } else { None }
}

/// The batches of a segment, in order.
pub(crate) fn batches(segment: &[u8]) -> Result<Vec<&[u8]>> {
    let (mut rest, mut batches) = (segment, Vec::new());
    // What is reserved behind the last batch is zeros.
    while rest.len() >= 12 && rest[8..12] != [0; 4] {
        let length = u32::from_be_bytes(rest[8..12].try_into()?) as usize + 12;
        let batch = rest.get(..length).context("a segment ends within a batch")?;
        batches.push(batch);
        rest = &rest[length..];
    }
    Ok(batches)
}
