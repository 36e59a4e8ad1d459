//! The deadline of the call being handled, inherited by the calls it makes.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::pin;

use tokio::time::Instant;

thread_local! {
    static CURRENT: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// The deadline in force: of the call this handler answers, or of [`with_deadline`] around it.
/// A task that a handler spawns does not inherit it; wrap its future in `with_deadline`.
pub fn deadline() -> Option<Instant> {
    CURRENT.get()
}

/// Runs `future` with the nearer of `at` and the deadline already in force, which the calls it makes inherit.
/// It does not end `future` by itself. Dropping it drops `future`.
pub async fn with_deadline<F: Future>(at: Instant, future: F) -> F::Output {
    let mut future = pin!(future);
    poll_fn(|cx| {
        let _entered = enter(nearer(at, deadline()));
        future.as_mut().poll(cx)
    })
    .await
}

pub(crate) fn nearer(at: Instant, other: Option<Instant>) -> Instant {
    other.map_or(at, |other| at.min(other))
}

/// Sets the deadline until the guard is dropped, a panic included.
pub(crate) fn enter(at: Instant) -> Entered {
    Entered(CURRENT.replace(Some(at)))
}

pub(crate) struct Entered(Option<Instant>);

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}
