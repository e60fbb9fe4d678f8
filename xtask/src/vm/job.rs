//! What is to be done in a guest, as a shell script that carries the caller's words, folder and environment unchanged.

use std::env;
use std::fmt::Write;

use crate::run::root;

/// Variables that the guest gets from the caller, besides PATH: those that programs and tests of this workspace read.
const PREFIXES: [&str; 3] = ["TRAMA_", "RUST_", "CARGO_"];

/// A command with its environment.
#[derive(Debug)]
pub(crate) struct Job {
    words: Vec<String>,
    variables: Vec<(String, String)>,
}

impl Job {
    /// A command with those of the caller's variables that concern this workspace, run in the workspace's root.
    pub(crate) fn new(words: &[impl AsRef<str>]) -> Self {
        let mut variables: Vec<(String, String)> = env::vars().filter(|(name, _)| is_wanted(name)).collect();
        variables.sort();
        Self { words: words.iter().map(|word| word.as_ref().to_owned()).collect(), variables }
    }

    /// Sets a variable, unless the caller has set it.
    #[must_use]
    pub(crate) fn with_default(mut self, name: &str, value: impl Into<String>) -> Self {
        if !self.variables.iter().any(|(known, _)| known == name) {
            self.variables.push((name.to_owned(), value.into()));
        }
        self
    }

    /// The script.
    pub(crate) fn script(&self) -> String {
        let mut script = format!("cd {} || exit\n", quoted(&root().display().to_string()));
        for (name, value) in &self.variables {
            let _ = writeln!(script, "export {name}={}", quoted(value));
        }
        let words: Vec<String> = self.words.iter().map(|word| quoted(word)).collect();
        let _ = writeln!(script, "exec {}", words.join(" "));
        script
    }
}

fn is_wanted(name: &str) -> bool {
    let is_name = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    is_name && (["HOME", "PATH"].contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
}

/// One word for a shell: nothing is special between apostrophes but the apostrophe.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_shell_unchanged() {
        let job = Job { words: ["echo", "it's", "$HOME; a b"].map(str::to_owned).to_vec(), variables: Vec::new() };
        let script = job.with_default("TRAMA_X", "1").with_default("TRAMA_X", "2").script();
        let lines: Vec<&str> = script.lines().skip(1).collect();
        assert_eq!(lines, ["export TRAMA_X='1'", r"exec 'echo' 'it'\''s' '$HOME; a b'"]);
    }

    #[test]
    fn the_environment_is_chosen_by_name() {
        assert!(is_wanted("PATH") && is_wanted("TRAMA_BIN_DIR") && is_wanted("RUST_LOG"));
        assert!(!is_wanted("KUBECONFIG") && !is_wanted("TRAMA_a-b"));
    }
}
