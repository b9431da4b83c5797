//! Replays the inputs that fuzzing found useful, and those that once failed.

use std::path::Path;

use cipe_fuzz::TARGETS;

#[test]
fn every_input_of_every_target_runs() {
    for (name, run) in TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut inputs = 0;
        for entry in entries {
            let path = entry.expect("a directory can be read").path();
            let input = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            run(&input);
            inputs += 1;
        }
        assert!(inputs > 0, "{} is empty", folder.display());
    }
}
