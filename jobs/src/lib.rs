//! Ready-made jobs and their registry.
//!
//! ```
//! let job = tidemill_jobs::find("ip-count").expect("it is in the registry");
//! assert_eq!(job.args[0].name, "input");
//! ```

pub mod access_log;
pub mod ip_count;

use tidemill::JobSpec;

/// Every job, by name.
pub fn all() -> Vec<JobSpec> {
    vec![JobSpec::of::<ip_count::IpCount>("requests per address and window, from an access log")]
}

/// The job of this name.
pub fn find(name: &str) -> Option<JobSpec> {
    all().into_iter().find(|job| job.name == name)
}
