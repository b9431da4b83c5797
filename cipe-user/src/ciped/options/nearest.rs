//! The known option most similar to a misspelt one.

use super::table::SPECS;

/// The known name with the least edit distance to `name`; the first of several.
pub(super) fn nearest(name: &str) -> &'static str {
    // A long name is never near; comparing only its head bounds the work.
    let name: Vec<char> = name.chars().take(64).collect();
    SPECS.iter().map(|spec| spec.name).min_by_key(|known| distance(&name, known)).unwrap_or("peer")
}

/// Levenshtein distance, one row at a time.
fn distance(a: &[char], b: &str) -> usize {
    let mut row: Vec<usize> = (0..=a.len()).collect();
    for (i, right) in b.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, left) in a.iter().enumerate() {
            let substitution = diagonal + usize::from(*left != right);
            diagonal = row[j + 1];
            row[j + 1] = substitution.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[a.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_finger_finds_its_option() {
        for (typed, meant) in [("pear", "peer"), ("ipadr", "ipaddr"), ("tokeys", "tokey"), ("xdp_mode", "xdp-mode")] {
            assert_eq!(nearest(typed), meant);
        }
    }

    #[test]
    fn distance_counts_edits() {
        for (a, b, edits) in [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("me", "me", 0)] {
            assert_eq!(distance(&a.chars().collect::<Vec<_>>(), b), edits, "{a} {b}");
        }
    }
}
