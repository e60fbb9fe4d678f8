//! Values as Go's flag libraries read them.

use std::collections::BTreeMap;

/// Sets a field to what a flag says, and notes that it was given.
pub(super) fn set<T: Clone>(
    field: &mut Option<T>,
    flag: &Option<T>,
    name: &'static str,
    given: &mut Vec<&'static str>,
) {
    if flag.is_some() {
        field.clone_from(flag);
        given.push(name);
    }
}

/// `--interfaces=` is an empty list.
pub(super) fn without_empty(list: &Option<Vec<String>>) -> Option<Vec<String>> {
    list.as_ref().map(|list| list.iter().filter(|entry| !entry.is_empty()).cloned().collect())
}

/// The spellings of `strconv.ParseBool`.
pub(super) fn go_bool(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("neither true nor false".to_owned()),
    }
}

/// `A=true,B=false`.
pub(super) fn gates(text: &str) -> Result<BTreeMap<String, bool>, String> {
    let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=').ok_or_else(|| format!("{pair:?} is not NAME=BOOL"))?;
            Ok((name.trim().to_owned(), go_bool(value.trim()).map_err(|problem| format!("{pair:?}: {problem}"))?))
        })
        .collect()
}
