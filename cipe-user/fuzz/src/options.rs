//! Option files: any text gives values and problems, and no problem shows the key.

use std::path::Path;

use cipe_user::ciped::options::{Draft, Program, read_text};

/// Runs one input: the first octet chooses the program, the rest is the file.
pub fn run(input: &[u8]) {
    let Some((first, text)) = input.split_first() else { return };
    let program = Program::ALL[usize::from(*first) % Program::ALL.len()];
    let (mut draft, mut problems) = (Draft::new(program), Vec::new());
    read_text(text, Path::new("options"), &mut draft, &mut problems);
    let shown: Vec<String> = problems.iter().map(ToString::to_string).collect();
    for (name, value, _) in draft.effective() {
        assert!(!name.is_empty() && !value.contains('\n'));
    }
    let key = text.windows(32).find(|digits| digits.iter().all(u8::is_ascii_hexdigit));
    if let Some(key) = key.and_then(|key| std::str::from_utf8(key).ok()) {
        assert!(shown.iter().all(|line| !line.contains(key)), "{shown:?}");
    }
}
