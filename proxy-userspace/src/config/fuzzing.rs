//! A configuration file, read from any text: for `fuzz/fuzz_targets`, and in no other build.

use std::path::Path;

use super::{Config, ConfigError, Documents, check};

/// Reads `text` as a configuration file, checks it, and compares it with what is read of it once it is written.
///
/// # Errors
/// The first thing that is wrong.
pub fn configuration(text: &str) -> Result<Config, ConfigError> {
    let path = Path::new("config.yaml");
    let mut documents = Documents::parse(text, path)?;
    documents.set_defaults();
    let config = check::config(documents, None)?;
    let written = config.effective.text().map_err(|error| error.to_string());
    let again = written.and_then(|text| Documents::parse(&text, path).map_err(|error| error.to_string()));
    assert_eq!(again.as_ref(), Ok(&config.effective), "what is written is read back");
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_are_read_and_written_and_nothing_else() {
        let config = configuration(include_str!("../../../fuzz/seeds/configuration/both.yaml")).unwrap();
        assert_eq!(config.node_name, "node1");
        assert!(configuration("kind: Pod").is_err());
    }
}
