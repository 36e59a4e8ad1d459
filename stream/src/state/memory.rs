//! The state store of tests: a sorted map, and the same map as it was when it was last flushed.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};

use parking_lot::Mutex;

use super::{KeyList, StateBackend, StateError, StoreBatch, StoreOp};

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Debug, Default)]
struct Maps {
    now: Map,
    durable: Map,
}

/// A [`StateBackend`] in memory whose crash loses what was not flushed.
#[derive(Debug, Default)]
pub struct MemoryState(Mutex<Maps>);

impl MemoryState {
    /// The machine loses power: what was not flushed is gone.
    pub fn crash(&self) {
        let mut maps = self.0.lock();
        maps.now = maps.durable.clone();
    }

    /// The directory was deleted.
    pub fn wipe(&self) {
        *self.0.lock() = Maps::default();
    }

    /// A copy of what is there, as a directory that was backed up.
    pub fn copy(&self) -> Self {
        let now = self.0.lock().now.clone();
        Self(Mutex::new(Maps { durable: now.clone(), now }))
    }

    /// The directory is replaced by another one.
    pub fn replace_by(&self, other: &Self) {
        let now = other.0.lock().now.clone();
        *self.0.lock() = Maps { durable: now.clone(), now };
    }

    /// All entries.
    pub fn dump(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        self.0.lock().now.iter().map(|(k, v)| (k.clone(), v.clone())).collect()
    }
}

impl StateBackend for MemoryState {
    fn get_many(&self, keys: &KeyList, found: &mut dyn FnMut(usize, &[u8])) -> Result<(), StateError> {
        let maps = self.0.lock();
        for (i, key) in keys.iter().enumerate() {
            if let Some(value) = maps.now.get(key) {
                found(i, value);
            }
        }
        Ok(())
    }

    fn write(&self, batch: &StoreBatch) -> Result<(), StateError> {
        let now = &mut self.0.lock().now;
        batch.for_each(|op| match op {
            StoreOp::Put(key, value) => {
                now.insert(key.to_vec(), value.to_vec());
            }
            StoreOp::DeleteRange(from, to) => {
                let range = (Bound::Included(from), Bound::Excluded(to));
                let gone: Vec<_> = now.range::<[u8], _>(range).map(|(k, _)| k.clone()).collect();
                for key in gone {
                    now.remove(&key);
                }
            }
        });
        Ok(())
    }

    fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        each: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), StateError> {
        let maps = self.0.lock();
        for (key, value) in maps.now.range::<[u8], _>((Bound::Included(from), Bound::Excluded(to))) {
            if each(key, value).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), StateError> {
        let mut maps = self.0.lock();
        maps.durable = maps.now.clone();
        Ok(())
    }
}
