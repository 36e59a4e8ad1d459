//! `docs/fault-bank.md` names every fault of the log, and tests that there are.

use std::collections::BTreeSet;
use std::path::Path;

use tidemill_log::fault::{BREAKS, FAILURES, PROTOCOL, SYNCS, SYNCS_FOR_SPACE};

#[test]
fn the_page_names_every_fault_and_tests_that_exist() {
    let log = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(log.join("../docs/fault-bank.md")).unwrap();
    let (mut named, mut test) = (BTreeSet::new(), String::new());
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, fault, _, noticed_by, seen_as, _] = cells[..] else { panic!("four cells: {line}") };
        assert!(!seen_as.is_empty(), "what is seen then? {line}");
        assert!(named.insert(fault.trim_matches('`').to_owned()), "{fault} is there twice");
        if noticed_by != "same" {
            test = noticed_by.trim_matches('`').to_owned();
            let (file, name) = (test.split("::").next().unwrap(), test.rsplit("::").next().unwrap());
            let source = std::fs::read_to_string(log.join(format!("src/{file}.rs"))).unwrap();
            assert!(source.contains(&format!("fn {name}()")), "there is no test {test}");
        }
        assert!(!test.is_empty(), "the first row of a table names its test: {line}");
    }
    let all = [BREAKS, PROTOCOL, FAILURES, SYNCS, SYNCS_FOR_SPACE];
    let known: BTreeSet<String> = all.into_iter().flatten().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(named, known, "docs/fault-bank.md and log/src/fault.rs");
    assert!(known.len() >= 20, "{} faults", known.len());
}
