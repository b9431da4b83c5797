//! A generated section of a document, between marks; people write the rest.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// Replaces the section `name` of a document by `text`, or appends it if there is none yet.
///
/// # Errors
/// The document cannot be read or written.
pub(super) fn replace(path: &Path, name: &str, text: &str) -> Result<()> {
    let old = fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    fs::write(path, replaced(&old, name, text)).with_context(|| format!("{}", path.display()))
}

fn replaced(old: &str, name: &str, text: &str) -> String {
    let (begin, end) = (format!("<!-- begin: {name} -->"), format!("<!-- end: {name} -->"));
    let section = format!("{begin}\n\n{}\n\n{end}", text.trim());
    let from = old.find(&begin);
    let to = old.find(&end).map(|at| at + end.len());
    match (from, to) {
        (Some(from), Some(to)) if from < to => format!("{}{section}{}", &old[..from], &old[to..]),
        _ => format!("{}\n\n{section}\n", old.trim_end()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_replaced_and_the_rest_is_kept() {
        let first = replaced("# Title\n\nBefore.\n", "x", "one");
        assert_eq!(first, "# Title\n\nBefore.\n\n<!-- begin: x -->\n\none\n\n<!-- end: x -->\n");
        let more = first + "\nBehind.\n";
        assert_eq!(replaced(&more, "x", "two\n"), more.replace("one", "two"));
        assert_eq!(replaced(&replaced(&more, "y", "other"), "x", "two").matches("begin").count(), 2);
    }
}
