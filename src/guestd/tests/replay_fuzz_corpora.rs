//! What fuzzing has kept (`tests/fuzz/corpus`), once through the same code, in the same sandbox.
//!
//! Without the usual harness: the sandbox has to be entered while the process has one thread.

#[path = "../../../tests/fuzz/src/targets.rs"]
mod targets;

use std::path::Path;

fn main() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus");
    if let Err(error) = targets::sandbox::enter() {
        println!("skipped: no sandbox for inputs that remove files: {error}");
        return;
    }
    for (name, target) in targets::TARGETS {
        let mut inputs: Vec<_> = std::fs::read_dir(corpora.join(name))
            .unwrap_or_else(|error| panic!("the corpus of {name}: {error}"))
            .map(|entry| entry.expect("an entry").path())
            .collect();
        inputs.sort();
        for input in &inputs {
            let bytes = std::fs::read(input).expect("an input");
            // Flushed before the input runs: if it ends the process, its name is the last line.
            println!("{name}: {}", input.display());
            target(&bytes);
        }
        println!("{name}: {} inputs", inputs.len());
    }
}
