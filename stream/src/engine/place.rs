//! PLACE: the partitions that take part in event time, and the floor, under one lock.
//!
//! The job value is the minimum over the partitions that take part. It is read, published and noted as the floor in
//! one step, and a partition joins in one step at max(own, floor): so nobody ever joins below a value that some task
//! has already acted on. Where no partition takes part, the floor itself is the job value: time stands still there.

use parking_lot::Mutex;

use super::{Join, Start};
use crate::fault::{self, Fault};
use crate::time::MIN;

/// The shared place. One per process and connected part of the plan.
#[derive(Debug)]
pub struct Place(Mutex<Inside>);

#[derive(Debug)]
struct Inside {
    /// By partition number; `None` does not take part.
    taking: Vec<Option<i64>>,
    floor: i64,
}

impl Place {
    /// Every assigned partition takes part before anything is published: at its committed value, or where it has
    /// none at the committed floor.
    pub(crate) fn new(start: &Start) -> Self {
        let floor = if fault::active(Fault::FloorNotRestored) { MIN } else { start.floor };
        let partitions = start.partitions.iter().map(|p| p.partition as usize + 1).max().unwrap_or(0);
        let mut taking = vec![None; partitions];
        if !fault::active(Fault::JoinAlone) {
            for p in &start.partitions {
                taking[p.partition as usize] = Some(Self::at_start(p.watermark, floor));
            }
        }
        Self(Mutex::new(Inside { taking, floor }))
    }

    fn at_start(committed: Option<i64>, floor: i64) -> i64 {
        match committed {
            Some(own) if fault::active(Fault::FloorForAllAtStart) => own.max(floor),
            Some(own) => own,
            None if fault::active(Fault::NewAtStartLow) => MIN,
            None => floor,
        }
    }

    /// The value at which a partition takes part since the start.
    pub(crate) fn value(&self, partition: u32, committed: Option<i64>) -> i64 {
        let mut inside = self.0.lock();
        let floor = inside.floor;
        let slot = slot(&mut inside.taking, partition);
        // Only with `JoinAlone` is it not there yet.
        *slot.get_or_insert_with(|| committed.unwrap_or(MIN).max(floor))
    }

    /// The partition's event-time watermark rose.
    pub(crate) fn raise(&self, partition: u32, to: i64) {
        if let Some(value) = slot(&mut self.0.lock().taking, partition) {
            *value = to;
        }
    }

    /// A new or returning partition takes part at max(own, floor), which is returned.
    pub(crate) fn join(&self, partition: u32, own: i64) -> i64 {
        let mut inside = self.0.lock();
        let floor = if fault::active(Fault::ReturnKeepsOwn) { MIN } else { inside.floor };
        let value = own.max(floor);
        *slot(&mut inside.taking, partition) = Some(value);
        value
    }

    /// The partition no longer takes part.
    pub(crate) fn leave(&self, partition: u32) {
        *slot(&mut self.0.lock().taking, partition) = None;
    }

    /// The job value, noted as published.
    pub(crate) fn publish(&self) -> i64 {
        let mut inside = self.0.lock();
        let value = inside.job_value();
        if !fault::active(Fault::FloorSetLater) {
            inside.floor = inside.floor.max(value);
        }
        value
    }

    /// With `Fault::FloorSetLater`: raises the floor outside the step that read the value.
    pub(crate) fn note(&self, value: i64) {
        let mut inside = self.0.lock();
        inside.floor = inside.floor.max(value);
    }

    /// The highest job value ever published.
    pub fn floor(&self) -> i64 {
        self.0.lock().floor
    }

    /// The job value now, published or not.
    pub fn job_value(&self) -> i64 {
        self.0.lock().job_value()
    }

    /// The partitions and their event-time watermarks; `None` does not take part. What `explain why-not-fired` shows.
    pub fn partitions(&self) -> Vec<Option<i64>> {
        self.0.lock().taking.clone()
    }
}

impl Inside {
    fn job_value(&self) -> i64 {
        let silent = fault::active(Fault::AllIdleSilent);
        let nobody = if silent { MIN } else { self.floor };
        self.taking.iter().flatten().copied().min().unwrap_or(nobody)
    }
}

fn slot(taking: &mut Vec<Option<i64>>, partition: u32) -> &mut Option<i64> {
    let at = partition as usize;
    if taking.len() <= at {
        taking.resize(at + 1, None);
    }
    &mut taking[at]
}

/// Notes a join where it changed something.
pub(crate) fn joined(joins: &mut Vec<Join>, partition: u32, offset: i64, own: i64, value: i64) {
    if value > own {
        joins.push(Join { partition, offset, value });
    }
}
