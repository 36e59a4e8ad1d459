//! What the macros refuse; errors point at the offending token. What they accept is in accepts.rs.
//! `TRYBUILD=overwrite` writes the goldens anew.

use std::process::Command;

/// The compiler whose own words stand in `ui/compiler`; another one phrases them differently.
const COMPILER: &str = "rustc 1.95.";

#[test]
fn refusals_point_at_the_token() {
    let cases = trybuild::TestCases::new();
    cases.compile_fail("tests/ui/macros/*.rs");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = Command::new(rustc).arg("--version").output().expect("rustc says its version").stdout;
    if version.starts_with(COMPILER.as_bytes()) {
        cases.compile_fail("tests/ui/compiler/*.rs");
    }
}
