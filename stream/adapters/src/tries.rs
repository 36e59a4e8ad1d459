//! How often records made a job panic, in a file beside the job's state.
//!
//! ```json
//! {"version":1,"tried":[{"topic":"018f...","partition":0,"offset":17,"tries":2,"error":"division by zero"}]}
//! ```
//!
//! In the job's state directory, because that is what a job keeps to itself on this machine, and what is deleted with it.
//! Not in the log: a count in the job's transaction would be aborted with it, and a topic of its own would cost every
//! start a read for something that hardly ever happens. Where the directory is lost the record has its tries anew.
//!
//! Written as always: a new file, synced, renamed over the old one, the directory synced. A file that cannot be read as
//! this, a newer version's too, is set aside as `panics.json.bad` with a warning: it costs a few tries more, and no record.
//! An entry that no run can have written (an offset that no record has, a count that cannot grow) is left out.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tidemill_stream::engine::poison::{Tried, TryBook};

/// The file's name; none that RocksDB gives to its own.
const NAME: &str = "panics.json";

/// Largest file that is read: some 10,000 records.
const BYTES_MAX: u64 = 16 << 20;

/// Where a file goes that cannot be read as this one.
const BAD: &str = "panics.json.bad";

const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Written {
    version: u32,
    tried: Vec<Tried>,
}

/// The book of one job.
#[derive(Debug)]
pub(crate) struct FileBook {
    dir: PathBuf,
}

impl FileBook {
    /// In this directory, which is made when something is first saved.
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }
}

impl TryBook for FileBook {
    fn load(&self) -> io::Result<Vec<Tried>> {
        let path = self.dir.join(NAME);
        let bytes = match fs::metadata(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e),
            Ok(found) if found.len() > BYTES_MAX => Vec::new(),
            Ok(_) => fs::read(&path)?,
        };
        match serde_json::from_slice::<Written>(&bytes) {
            Ok(written) if written.version == VERSION => {
                let mut tried = written.tried;
                // The next offset and the next try are of the same types.
                tried.retain(|one| (0..i64::MAX).contains(&one.offset) && one.tries < u32::MAX);
                Ok(tried)
            }
            _ => {
                let bad = self.dir.join(BAD);
                fs::rename(&path, &bad)?;
                tracing::warn!(
                    to = %bad.display(),
                    "how often records made the job panic cannot be read: set aside, and counted anew"
                );
                Ok(Vec::new())
            }
        }
    }

    fn save(&self, tried: &[Tried]) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let (path, new) = (self.dir.join(NAME), self.dir.join(format!("{NAME}.new")));
        let written = Written { version: VERSION, tried: tried.to_vec() };
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(&written)?)?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        File::open(&self.dir)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use tidemill_stream::io::TopicUuid;

    use super::*;

    #[test]
    fn what_was_saved_is_loaded_and_damage_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let book = FileBook::new(&dir.path().join("state"));
        assert_eq!(book.load().unwrap(), []);
        let tried = Tried {
            topic: TopicUuid(7),
            partition: 1,
            offset: 9,
            tries: 2,
            error: "division by \"zero\"".into(),
        };
        book.save(&[tried.clone(), tried.clone()]).unwrap();
        book.save(std::slice::from_ref(&tried)).unwrap();
        assert_eq!(book.load().unwrap(), [tried]);
        let path = dir.path().join("state").join(NAME);
        let whole = fs::read(&path).unwrap();
        for damaged in [&whole[..whole.len() - 1], b"", b"{\"version\":2,\"tried\":[]}"] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(book.load().unwrap(), [], "{damaged:?}");
            assert!(!path.exists(), "it is set aside");
            assert_eq!(fs::read(path.with_file_name(BAD)).unwrap(), damaged);
        }
    }

    #[test]
    fn entries_that_would_overflow_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let book = FileBook::new(dir.path());
        let tried =
            |offset, tries| Tried { topic: TopicUuid(7), partition: 0, offset, tries, error: String::new() };
        let bad = [tried(-1, 1), tried(i64::MIN, 1), tried(i64::MAX, 1), tried(3, u32::MAX)];
        let good = [tried(0, 0), tried(i64::MAX - 1, u32::MAX - 1)];
        book.save(&[&bad[..], &good].concat()).unwrap();
        let text = fs::read_to_string(dir.path().join(NAME)).unwrap();
        assert!(text.contains(&i64::MAX.to_string()) && text.contains(&u32::MAX.to_string()), "{text}");
        assert_eq!(book.load().unwrap(), good);
    }
}
