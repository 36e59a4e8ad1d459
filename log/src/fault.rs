//! Seeded bugs: rules of the log that a test breaks at run time to see that it would notice.
//!
//! Only with the cargo feature `faults`; without it [`active`] is a constant and the branches vanish.

use std::io;

/// Every sync of the log that something relies on, by the name under which a test can leave it out.
pub const SYNCS: &[(&str, &str)] = &[
    ("sync:journal", "a round, before its entries are released"),
    ("sync:journal-dir", "the new name of a recycled journal file, before a round is in it"),
    ("sync:segment", "segments, before a slot says that they are there"),
    ("sync:sidecar", "their sidecars, before the same"),
    ("sync:segment-dir", "the names of new segments, before the same"),
    ("sync:slot", "a slot, before what it stands for is used again"),
    ("sync:topics-dir", "a topic's directory, before its entry"),
    ("sync:topic-dir", "its partitions' directories, before its entry"),
    ("sync:alter-dir", "the directories of added partitions, before the entry that adds them"),
    (
        "sync:open-names",
        "open: the names of `format` and the slots, which a killed creation may have left unsynced",
    ),
    ("sync:open-slot", "open: the slot it started from, before the other one is written"),
    ("sync:open-journal", "open: the rounds it replayed, before a slot stands for them"),
    ("sync:open-segments", "open: what it wrote to segments, before the slots"),
    ("sync:open-dirs", "open: the names of segments, before the slots"),
    ("sync:open-other-slot", "open: the first slot, before the second is written"),
    ("sync:open-this-slot", "open: the second slot, before a checkpoint writes the first"),
    ("sync:create-format", "create: the bytes of `format`"),
    ("sync:create-mark", "create: the mark that the rest is not complete"),
    ("sync:create-slots", "create: the slots"),
    ("sync:create-names", "create: every name, before `format` gets its own"),
];

/// Syncs that only a full disk shows to be needed: what was not synced must be written again, and has no space then.
pub const SYNCS_FOR_SPACE: &[(&str, &str)] = &[
    ("sync:create-journal", "create: the zeros of the first journal files"),
    ("sync:create-journal-dir", "create: their names"),
];

/// Rules of the log whose breaking a test must notice.
pub const BREAKS: &[(&str, &str)] = &[
    ("ack-before-sync", "entries are acked when written"),
    ("recycle-newer-only", "journal files are recycled below the newer slot only"),
    ("unlink-one-slot", "files are unlinked when the newer slot is past them"),
    ("slot-through-c", "the slot holds the sequenced State, journal and segments being there only through C"),
    ("cut-before-decision", "recovery cuts segments before it knows whether there is corruption"),
    ("both-slots-at-once", "open writes both slots before it syncs one of them"),
    ("stale-accepted", "neither the LSN nor the link of a round is checked"),
    ("link-unchecked", "a round is replayed without checking the previous crc"),
    ("d-ignored", "damage below D is dropped like a tail"),
    ("incarnation-kept", "open does not raise the incarnation"),
    ("lso-by-sequence", "the last stable offset moves when the end is queued"),
    ("no-epoch-bump", "an abort that nobody asked for keeps the epoch"),
    ("lso-off-by-one", "the last stable offset is one past the first record of the oldest open transaction"),
];

/// Rules between the log and its producers, whose breaking only repeats, late requests and time-outs show.
pub const PROTOCOL: &[(&str, &str)] = &[
    ("no-epoch-check", "a request with an old producer epoch counts"),
    ("epoch-kept", "the end of a transaction gives the same epoch again"),
    ("no-epoch-bump", "an abort that nobody asked for keeps the epoch"),
    ("old-id-stays", "a producer id that was replaced stays valid"),
    ("duplicate-unreleased", "a repeat is answered before the first append is released"),
    ("beyond-five-accepted", "a repeat of a batch older than the last five is appended again"),
    ("sequence-on-reject", "a batch that is refused as out of order moves the expected sequence"),
    ("retried-end-blind", "a repeated end is answered without looking which transaction it ended"),
    ("retry-gives-current", "a repeated end is given whatever producer is current"),
    ("lso-by-sequence", "the last stable offset moves when the end is queued"),
    ("offsets-outside", "offsets added to a transaction count at once"),
    ("no-timeout-after-open", "transactions that an open keeps never time out"),
];

/// What the log does when the disk fails it.
pub const FAILURES: &[(&str, &str)] = &[("sync-retried", "a sync that failed is done again, and believed")];

/// Does this sync, unless the site is left out.
pub(crate) fn synced(site: &'static str, sync: impl Fn() -> io::Result<()>) -> io::Result<()> {
    debug_assert!(
        SYNCS.iter().chain(SYNCS_FOR_SPACE).any(|(name, _)| *name == site),
        "{site} is not in the list"
    );
    if active(site) {
        return Ok(());
    }
    match sync() {
        // Broken on purpose: the system has dropped the pages that it could not write, so this one succeeds.
        Err(_) if active("sync-retried") => sync(),
        done => done,
    }
}

#[cfg(feature = "faults")]
mod on {
    use std::cell::Cell;
    use std::sync::OnceLock;

    thread_local! {
        static FAULT: Cell<Option<&'static str>> = const { Cell::new(None) };
    }

    fn of_process() -> Option<&'static str> {
        static NAME: OnceLock<Option<String>> = OnceLock::new();
        NAME.get_or_init(|| std::env::var("TIDEMILL_FAULT").ok()).as_deref()
    }

    /// Is this rule broken on this thread, or (environment variable `TIDEMILL_FAULT`) in this process?
    pub fn active(name: &str) -> bool {
        FAULT.get() == Some(name) || of_process() == Some(name)
    }

    /// Breaks one rule on this thread; `None` breaks none.
    pub fn set(name: Option<&'static str>) {
        FAULT.set(name);
    }
}

#[cfg(feature = "faults")]
pub use on::{active, set};

/// No rule is broken in a normal build.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn active(_name: &str) -> bool {
    false
}
