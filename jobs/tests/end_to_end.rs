//! Job `ip-count` through every layer: broker, log, engine, RocksDB; held against a recount that shares no code.

mod common;

use common::{FROM, Rig, lines, settings};
use tidemill::adapters::RunOptions;
use xtask::recount::Recount;

#[test]
fn counts_equal_a_recount_for_any_partitions_and_tasks() {
    let text = lines(60_000, 2_000, 1_000, 1, FROM);
    for partitions in [1, 4] {
        let expected = Recount::of(settings(partitions), text.as_bytes());
        assert!(!expected.late.is_empty() && !expected.dead.is_empty());
        for tasks in [1, 2, 3] {
            let dir = tempfile::tempdir().unwrap();
            let rig = Rig::open(dir.path());
            rig.produce("access-log", partitions, &text);
            let report = rig.until_end(&RunOptions { tasks: Some(tasks), ..RunOptions::default() });
            assert_eq!(report.counters.rows_in, 60_000);
            rig.check(&expected);
            rig.close();
        }
    }
}
