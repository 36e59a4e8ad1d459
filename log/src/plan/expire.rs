//! Producers that nobody uses any more are forgotten, by the aging clock.

use super::{Context, Plan, Request};
use crate::entry::Change;
use crate::state::State;

/// A producer that was idle for this long is forgotten: as Kafka does, a week.
const IDLE_MS: i64 = 7 * 24 * 60 * 60 * 1000;
/// Most that one entry forgets.
const AT_ONCE: usize = 10_000;

/// Forgets plain producers, and transactional ids that have nothing open, with their producers.
#[derive(Debug)]
pub(crate) struct Expire {
    pub producers: Vec<i64>,
    pub transactional_ids: Vec<String>,
}

impl Expire {
    /// Who is idle; `None` if nobody is.
    pub(crate) fn idle(s: &State, clock: i64) -> Option<Self> {
        let old = |used: i64| used < clock.saturating_sub(IDLE_MS);
        let plain = s.producers.iter().filter(|(_, p)| p.transactional_id.is_none() && old(p.clock));
        let owners = s.owners.iter().filter(|(_, o)| o.txn.is_none() && old(o.clock));
        let producers: Vec<i64> = plain.map(|(id, _)| *id).take(AT_ONCE).collect();
        let transactional_ids: Vec<String> = owners.map(|(id, _)| id.clone()).take(AT_ONCE).collect();
        let some = !producers.is_empty() || !transactional_ids.is_empty();
        some.then_some(Self { producers, transactional_ids })
    }
}

impl Request for Expire {
    type Answer = ();

    /// Somebody may have come back since: only who is still idle is forgotten.
    fn plan(&self, s: &State, with: &mut Context) -> Plan<()> {
        let Some(mut idle) = Self::idle(s, with.clock) else { return Plan::Rests { n: s.n, answer: () } };
        idle.producers.retain(|id| self.producers.contains(id));
        idle.transactional_ids.retain(|id| self.transactional_ids.contains(id));
        let change = Change::Expire { producers: idle.producers, transactional_ids: idle.transactional_ids };
        Plan::Entry { entry: with.entry(change), answer: () }
    }
}
