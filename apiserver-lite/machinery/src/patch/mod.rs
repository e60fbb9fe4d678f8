//! The three patch forms of the API: JSON patch, merge patch and strategic merge patch.

mod json;
mod order;
mod strategic;

use serde_json::Value;

pub use json::{JSON_PATCH_COPIED_BYTES_MAX, JSON_PATCH_OPERATIONS_MAX, json_patch};
pub use strategic::strategic_merge_patch;

/// Applies a merge patch (RFC 7386): objects merge, null removes, everything else replaces.
pub fn merge_patch(original: &Value, patch: &Value) -> Value {
    let mut patched = original.clone();
    json_patch::merge(&mut patched, patch);
    patched
}

#[cfg(test)]
mod tests;
