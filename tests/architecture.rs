//! ARCHITECTURE.md and README.md name files, folders and types; those must exist.

use std::fs;
use std::path::{Path, PathBuf};

/// What stands between single backticks, outside of code blocks.
fn quoted(text: &str) -> Vec<String> {
    let mut inside = false;
    let prose: Vec<&str> = text
        .lines()
        .filter(|line| {
            let fence = line.trim_start().starts_with("```");
            inside ^= fence;
            !inside && !fence
        })
        .collect();
    prose.join("\n").split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Whether the text between backticks claims to be a path of this repository.
fn is_path(name: &str) -> bool {
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "._-/".contains(c));
    let root = name.split('/').next().unwrap_or_default();
    let known = [
        "log",
        "rpc",
        "stream",
        "jobs",
        "streamctl",
        "xtask",
        "tests",
        "benches",
        "examples",
        "models",
        "src",
        ".ci",
        "docs",
    ];
    plain && (name.ends_with(".rs") || name.ends_with(".md") || (name.contains('/') && known.contains(&root)))
}

/// `Name` or `Name::item`, as our types are written.
fn is_type(name: &str) -> bool {
    let first = name.split("::").next().unwrap_or_default();
    first.starts_with(|c: char| c.is_ascii_uppercase())
        && first.len() > 2
        && first.contains(|c: char| c.is_ascii_lowercase())
        && first.chars().all(|c| c.is_ascii_alphanumeric())
}

fn sources(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a folder of the workspace") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&path, into);
        } else if name.ends_with(".rs") {
            into.push(path);
        }
    }
}

#[test]
fn paths_and_types_that_the_documents_name_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    sources(root, &mut files);
    let code: String = files.iter().map(|path| fs::read_to_string(path).expect("source is UTF-8")).collect();
    let mut missing = Vec::new();
    let (mut paths, mut types) = (0, 0);
    for document in ["README.md", "ARCHITECTURE.md"] {
        let text = fs::read_to_string(root.join(document)).expect(document);
        for name in quoted(&text) {
            if is_path(&name) {
                paths += 1;
                if !root.join(&name).exists() {
                    missing.push(format!("{document}: {name}"));
                }
            } else if is_type(&name) {
                types += 1;
                let word = name.split("::").next().unwrap_or_default();
                let declared = ["struct", "enum", "trait", "type", "derive", "const", "mod"]
                    .iter()
                    .any(|keyword| code.contains(&format!("{keyword} {word}")));
                if !declared {
                    missing.push(format!("{document}: type {name}"));
                }
            }
        }
        // Links to files of the repository.
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = link.split('#').next().unwrap_or_default();
            if !link.contains("://") && !path.is_empty() && !root.join(path).exists() {
                missing.push(format!("{document}: link {link}"));
            }
        }
    }
    assert!(missing.is_empty(), "named, but not there: {missing:#?}");
    assert!(paths >= 10 && types >= 5, "the test reads {paths} paths and {types} types: it looks at nothing");
}
