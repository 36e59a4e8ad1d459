//! The workspace's arrows: who may depend on whom, held against `cargo metadata`.
//!
//! The list is the rule, not a snapshot: an arrow that is allowed here may be absent, any other one fails. Dependencies
//! of tests count too, apart from `xtask`, which depends on none of ours and gives the tests their oracle.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Each package and what of the workspace it may use.
const ALLOWED: &[(&str, &[&str])] = &[
    // log and rpc do not know each other; the broker joins them.
    ("tidemill-log", &[]),
    ("tidemill-rpc-macros", &[]),
    ("tidemill-rpc", &["tidemill-rpc-macros"]),
    ("tidemill-broker", &["tidemill-log", "tidemill-rpc"]),
    // The engine knows neither: only its own source, sink and state traits.
    ("tidemill-stream-macros", &[]),
    ("tidemill-stream", &["tidemill-stream-macros"]),
    ("tidemill-adapters", &["tidemill-stream", "tidemill-broker"]),
    // The facade a user depends on, and jobs written as a user would.
    ("tidemill", &["tidemill-stream", "tidemill-stream-macros", "tidemill-adapters"]),
    ("tidemill-jobs", &["tidemill"]),
    ("streamctl", &["tidemill", "tidemill-jobs", "tidemill-broker", "tidemill-log"]),
    // Nothing uses these. Case studies take what a user takes: the facade.
    ("tidemill-examples", &["tidemill"]),
    (
        "tidemill-benches",
        &[
            "tidemill",
            "tidemill-log",
            "tidemill-rpc",
            "tidemill-broker",
            "tidemill-stream",
            "tidemill-adapters",
            "tidemill-jobs",
        ],
    ),
    ("tidemill-models", &["tidemill-log", "tidemill-rpc", "tidemill-stream"]),
    ("xtask", &[]),
    ("tidemill-load", &["tidemill-log"]),
];

#[test]
fn arrows_point_inward() {
    let metadata = MetadataCommand::new().no_deps().exec().expect("cargo metadata runs in the workspace");
    let ours: BTreeSet<_> = metadata.packages.iter().map(|package| package.name.to_string()).collect();
    let allowed: BTreeMap<_, _> = ALLOWED.iter().copied().collect();
    let mut wrong = Vec::new();
    for package in &metadata.packages {
        let name = package.name.as_str();
        let Some(may_use) = allowed.get(name) else {
            wrong.push(format!("{name} is new: add it to the list with what it may use"));
            continue;
        };
        for dependency in package.dependencies.iter().filter(|dependency| ours.contains(&dependency.name)) {
            let oracle = dependency.name == "xtask" && dependency.kind == DependencyKind::Development;
            if dependency.name != name && !oracle && !may_use.contains(&dependency.name.as_str()) {
                wrong.push(format!("{name} uses {}, and may use {may_use:?}", dependency.name));
            }
        }
    }
    for (name, _) in ALLOWED {
        if !ours.contains(*name) {
            wrong.push(format!("{name} is in the list and not in the workspace"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// RocksDB is C++: a user's `cargo test`, and ours of the core, must not compile it.
#[test]
fn the_core_builds_without_cpp() {
    let metadata = MetadataCommand::new().no_deps().exec().expect("cargo metadata runs in the workspace");
    for package in &metadata.packages {
        for dependency in package.dependencies.iter().filter(|dependency| dependency.name == "rocksdb") {
            assert_eq!(package.name.as_str(), "tidemill-adapters", "only the adapters know RocksDB");
            assert!(dependency.optional, "RocksDB is a feature");
        }
    }
}
