//! Seeded bugs: rules of the log that a test breaks at run time to see that it would notice.
//!
//! Only with the cargo feature `faults`; without it [`active`] is a constant and the branches vanish.

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
