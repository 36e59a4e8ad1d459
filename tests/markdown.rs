//! The repository's Markdown: its links lead somewhere, and the two READMEs show the same commands.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Every Markdown file but those of build folders and of templates, whose links hold elsewhere.
fn documents(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a folder of the repository") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let hidden = name.starts_with('.') || name == "target" || name.starts_with("tidemill-data");
        if path.is_dir() && !hidden {
            documents(&path, into);
        } else if name.ends_with(".md") {
            into.push(path);
        }
    }
}

/// Splits a document into its prose, with inline code taken out, and its code blocks, each with its language.
fn parts(text: &str) -> (String, Vec<(String, String)>) {
    let (mut prose, mut blocks) = (String::new(), Vec::new());
    let mut block: Option<(String, String)> = None;
    for line in text.lines() {
        match (line.trim_start().strip_prefix("```"), &mut block) {
            (Some(language), None) => block = Some((language.trim().to_owned(), String::new())),
            (Some(_), Some(_)) => blocks.extend(block.take()),
            (None, Some((_, code))) => {
                code.push_str(line);
                code.push('\n');
            }
            (None, None) => {
                let outside = line.split('`').step_by(2);
                prose.push_str(&outside.collect::<Vec<_>>().join("`"));
                prose.push('\n');
            }
        }
    }
    assert!(block.is_none(), "a code block is not closed: {block:?}");
    (prose, blocks)
}

/// The targets of `[text](target)`.
fn links(prose: &str) -> impl Iterator<Item = &str> {
    prose.split("](").skip(1).filter_map(|rest| rest.split(')').next()).map(str::trim)
}

/// What a heading is called in a link, as the usual hosts make it.
fn anchors(prose: &str) -> BTreeSet<String> {
    let headings = prose.lines().filter(|line| line.starts_with('#'));
    let letters = |c: char| match c {
        ' ' => Some('-'),
        c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c),
        _ => None,
    };
    headings
        .map(|line| line.trim_start_matches('#').trim().to_lowercase().chars().filter_map(letters).collect())
        .collect()
}

#[test]
fn links_lead_to_files_and_headings_that_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    documents(root, &mut files);
    let (mut broken, mut seen) = (Vec::new(), 0);
    for file in &files {
        let text = fs::read_to_string(file).expect("Markdown is UTF-8");
        let (prose, _) = parts(&text);
        for link in links(&prose).filter(|link| !link.contains("://") && !link.starts_with("mailto:")) {
            seen += 1;
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let to = if path.is_empty() { file.clone() } else { file.with_file_name("").join(path) };
            let shown = file.strip_prefix(root).unwrap_or(file).display();
            if !to.exists() {
                broken.push(format!("{shown}: {link}"));
            } else if !anchor.is_empty() {
                let there = fs::read_to_string(&to).unwrap_or_default();
                // Headings keep their code words: anchors are made of the whole text.
                if !anchors(&there.replace('`', "")).contains(anchor) {
                    broken.push(format!("{shown}: {link}: no such heading"));
                }
            }
        }
    }
    assert!(broken.is_empty(), "links that lead nowhere: {broken:#?}");
    assert!(
        files.len() >= 8 && seen >= 10,
        "{} files with {seen} links: the test looks at nothing",
        files.len()
    );
}

/// The commands of a README: the lines of its shell blocks without what is said about them.
fn commands(text: &str) -> Vec<String> {
    let (_, blocks) = parts(text);
    let shell = blocks.iter().filter(|(language, _)| language == "sh");
    let lines = shell.flat_map(|(_, code)| code.lines());
    let bare = |line: &str| line.split(" #").next().unwrap_or_default().trim().to_owned();
    lines.map(bare).filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}

#[test]
fn both_readmes_show_the_same_commands_and_code() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |name: &str| fs::read_to_string(root.join(name)).expect(name);
    let (english, chinese) = (read("README.md"), read("README.zh-CN.md"));
    assert!(commands(&english).len() >= 6, "README.md has lost its commands");
    assert_eq!(commands(&english), commands(&chinese));
    // Comments may be in either language; everything else in Rust code is the same.
    let rust = |text: &str| -> Vec<String> {
        let (_, blocks) = parts(text);
        let rust = blocks.into_iter().filter(|(language, _)| language.starts_with("rust"));
        let lines = rust.flat_map(|(_, code)| code.lines().map(str::to_owned).collect::<Vec<_>>());
        lines.filter(|line| !line.trim_start().starts_with("//")).collect()
    };
    assert!(!rust(&english).is_empty(), "README.md has lost its job");
    assert_eq!(rust(&english), rust(&chinese));
    let headings = |text: &str| parts(text).0.lines().filter(|line| line.starts_with('#')).count();
    assert_eq!(headings(&english), headings(&chinese), "one README has sections that the other has not");
}
