//! `streamctl du`: where the bytes of a data directory are.
//!
//! Files are counted as they are; the names of topics come from the log. A file that goes while this looks counts as
//! nothing. `bytes` is what files say they hold, `on disk` the blocks they take: more where space was reserved ahead.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};
use tidemill_broker::Broker;

use crate::cli::ReportFormat;
use crate::data::{self, Intent};
use crate::stdout;
use crate::target::Target;
use crate::units::Size;

/// `streamctl du ...`
#[derive(Debug, Args)]
pub struct Du {
    /// Show every partition.
    #[arg(long)]
    pub partitions: bool,
    /// `text`: a table. `json`: one object, with every partition.
    #[arg(long, value_enum, default_value_t = ReportFormat::Text)]
    pub format: ReportFormat,
}

/// Bytes and files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Use {
    bytes: u64,
    on_disk: u64,
    files: u64,
}

impl Use {
    fn add(&mut self, other: Use) {
        self.bytes += other.bytes;
        self.on_disk += other.on_disk;
        self.files += other.files;
    }

    fn sum<'a>(all: impl IntoIterator<Item = &'a Use>) -> Use {
        all.into_iter().fold(Use::default(), |mut sum, one| {
            sum.add(*one);
            sum
        })
    }

    fn json(self) -> Value {
        json!({ "bytes": self.bytes, "on_disk": self.on_disk, "files": self.files })
    }
}

/// Partitions by number.
type Partitions = BTreeMap<u32, Use>;

/// What a directory holds.
#[derive(Debug, Default)]
struct Found {
    /// By uuid.
    topics: BTreeMap<String, Partitions>,
    journal: Use,
    checkpoints: Use,
    /// By identity.
    state: BTreeMap<String, Use>,
    /// `format`, `LOCK`, and what is not ours.
    other: Use,
}

/// Runs the command.
pub async fn run(dir: &Path, args: &Du) -> Result<()> {
    let access = data::open(&Target::Directory(dir.to_owned()), Intent::Use).await?;
    let topics = access.topics().await.map_err(data::explain);
    let topics = data::close(access, topics).await?;
    let names: BTreeMap<String, String> =
        topics.into_iter().map(|topic| (format!("{:032x}", topic.id.0), topic.name)).collect();
    let found = look(dir).with_context(|| format!("cannot look into {}", dir.display()))?;
    let named = |uuid: &str| names.get(&uuid.replace('-', "")).cloned();
    match args.format {
        ReportFormat::Json => stdout::line(format_args!("{}", as_json(&found, &named))),
        ReportFormat::Text => print(&found, &named, args.partitions),
    }
}

fn look(dir: &Path) -> io::Result<Found> {
    let mut found = Found::default();
    for (name, path) in entries(dir)? {
        match name.as_str() {
            "topics" => {
                for (uuid, path) in entries(&path)? {
                    let mut partitions = Partitions::new();
                    for (partition, path) in entries(&path)? {
                        if let Ok(number) = partition.parse() {
                            partitions.insert(number, size(&path)?);
                        }
                    }
                    found.topics.insert(uuid, partitions);
                }
            }
            "journal" => found.journal = size(&path)?,
            "checkpoint.a" | "checkpoint.b" => found.checkpoints.add(size(&path)?),
            "state" => {
                for (identity, path) in entries(&path)? {
                    match path.is_dir() {
                        true => found.state.insert(identity, size(&path)?).map_or((), drop),
                        false => found.other.add(size(&path)?),
                    }
                }
            }
            _ => found.other.add(size(&path)?),
        }
    }
    Ok(found)
}

/// Names and paths in a folder, in order; none where it is gone.
fn entries(dir: &Path) -> io::Result<Vec<(String, std::path::PathBuf)>> {
    let listed = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed?,
    };
    let mut all = Vec::new();
    for entry in listed {
        let entry = entry?;
        all.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
    }
    all.sort();
    Ok(all)
}

/// A file, or all files of a folder. Links are not followed.
fn size(path: &Path) -> io::Result<Use> {
    let of = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Use::default()),
        of => of?,
    };
    if of.is_dir() {
        let inside = entries(path)?.iter().map(|(_, path)| size(path)).collect::<io::Result<Vec<_>>>()?;
        return Ok(Use::sum(&inside));
    }
    Ok(Use { bytes: of.len(), on_disk: of.blocks() * 512, files: 1 })
}

impl Found {
    fn total(&self) -> Use {
        let topics = self.topics.values().flat_map(BTreeMap::values);
        Use::sum(topics.chain(self.state.values()).chain([&self.journal, &self.checkpoints, &self.other]))
    }
}

fn as_json(found: &Found, named: &dyn Fn(&str) -> Option<String>) -> Value {
    let with = |mut all: Value, more: &[(&str, Value)]| {
        for (name, value) in more {
            all[*name] = value.clone();
        }
        all
    };
    let topics: Vec<Value> = found
        .topics
        .iter()
        .map(|(uuid, partitions)| {
            let parts: Vec<Value> = partitions
                .iter()
                .map(|(number, one)| with(one.json(), &[("partition", json!(number))]))
                .collect();
            let more = [("topic", json!(named(uuid))), ("id", json!(uuid)), ("partitions", json!(parts))];
            with(Use::sum(partitions.values()).json(), &more)
        })
        .collect();
    let state: Vec<Value> =
        found.state.iter().map(|(name, one)| with(one.json(), &[("name", json!(name))])).collect();
    json!({
        "topics": topics,
        "journal": found.journal.json(),
        "checkpoints": found.checkpoints.json(),
        "state": state,
        "other": found.other.json(),
        "total": found.total().json(),
    })
}

fn print(found: &Found, named: &dyn Fn(&str) -> Option<String>, partitions: bool) -> Result<()> {
    let mut lines = Vec::new();
    let mut topics: Vec<_> = found
        .topics
        .iter()
        .map(|(uuid, of)| (named(uuid).unwrap_or_else(|| format!("{uuid} (deleted)")), of))
        .collect();
    topics.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, of) in topics {
        lines.push((format!("topic {name}"), Use::sum(of.values())));
        if partitions {
            lines.extend(of.iter().map(|(number, one)| (format!("  partition {number}"), *one)));
        }
    }
    lines.push(("journal".to_owned(), found.journal));
    lines.push(("checkpoints".to_owned(), found.checkpoints));
    lines.extend(found.state.iter().map(|(name, one)| (format!("state {name}"), *one)));
    lines.push(("other".to_owned(), found.other));
    lines.push(("total".to_owned(), found.total()));
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    stdout::line(format_args!("{:width$}       bytes     on disk   files", ""))?;
    for (name, one) in lines {
        stdout::line(format_args!(
            "{name:width$}  {:>10}  {:>10}  {:>6}",
            Size(one.bytes),
            Size(one.on_disk),
            one.files
        ))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_counted_where_they_belong() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: usize| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, vec![7; bytes]).unwrap();
        };
        write("topics/u/0/0.log", 1000);
        write("topics/u/0/0.index", 10);
        write("topics/u/1/0.log", 5);
        write("journal/0000000001.wal", 4096);
        write("checkpoint.a", 7);
        write("checkpoint.b", 8);
        write("state/job/CURRENT", 3);
        write("format", 2);
        let found = look(dir.path()).unwrap();
        let bytes = |one: &Use| (one.bytes, one.files);
        assert_eq!(found.topics["u"].values().map(bytes).collect::<Vec<_>>(), [(1010, 2), (5, 1)]);
        assert_eq!(
            [found.journal, found.checkpoints, found.other].map(|u| bytes(&u)),
            [(4096, 1), (15, 2), (2, 1)]
        );
        assert_eq!(bytes(&found.state["job"]), (3, 1));
        assert_eq!(bytes(&found.total()), (1010 + 5 + 4096 + 15 + 3 + 2, 8));
        let json = as_json(&found, &|_| Some("t".into()));
        assert_eq!(
            (&json["total"]["bytes"], &json["topics"][0]["partitions"][1]["bytes"]),
            (&json!(5131), &json!(5))
        );
    }
}
