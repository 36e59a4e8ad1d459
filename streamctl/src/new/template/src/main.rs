//! The job as a program: all of `streamctl`, with this job beside the ready-made ones.

use __crate__::__Job__;
use tidemill::JobSpec;

fn main() {
    streamctl::main(&[JobSpec::of::<__Job__>("occurrences of each name per window")])
}
