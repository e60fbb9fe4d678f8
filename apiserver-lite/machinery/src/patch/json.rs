//! JSON patch (RFC 6902) with the limits that keep a small patch from growing a large object.

use json_patch::PatchOperation;
use serde_json::Value;

use crate::status::Status;

/// Operations one JSON patch may hold (kube-apiserver's limit).
pub const JSON_PATCH_OPERATIONS_MAX: usize = 10_000;

/// Bytes that all `copy` operations of one patch may duplicate (kube-apiserver's limit: the largest request body, 3 MiB).
pub const JSON_PATCH_COPIED_BYTES_MAX: usize = 3 * 1024 * 1024;

/// Applies a JSON patch (RFC 6902).
///
/// # Errors
/// 400 when `patch` is no JSON patch, 413 above [`JSON_PATCH_OPERATIONS_MAX`], 422 when it does not apply, a test fails, or it copies
/// more than [`JSON_PATCH_COPIED_BYTES_MAX`].
pub fn json_patch(original: &Value, patch: &Value) -> Result<Value, Status> {
    let operations = patch.as_array().map_or(0, Vec::len);
    if operations > JSON_PATCH_OPERATIONS_MAX {
        return Err(Status::request_entity_too_large(&format!(
            "The allowed maximum operations in a JSON patch is {JSON_PATCH_OPERATIONS_MAX}, got {operations}"
        )));
    }
    let patch: json_patch::Patch = serde::Deserialize::deserialize(patch)
        .map_err(|error| Status::bad_request(format!("error decoding patch: {error}")))?;
    let mut patched = original.clone();
    let mut copied_bytes = 0;
    for operation in patch.iter() {
        copied_bytes += copied_size(&patched, operation);
        if copied_bytes > JSON_PATCH_COPIED_BYTES_MAX {
            return Err(Status::unprocessable());
        }
        // One by one, so that the size of what a `copy` duplicates is known before it happens.
        json_patch::patch(&mut patched, std::slice::from_ref(operation)).map_err(|_| Status::unprocessable())?;
    }
    Ok(patched)
}

fn copied_size(object: &Value, operation: &PatchOperation) -> usize {
    let PatchOperation::Copy(copy) = operation else { return 0 };
    object.pointer(copy.from.as_str()).map_or(0, |value| value.to_string().len())
}
