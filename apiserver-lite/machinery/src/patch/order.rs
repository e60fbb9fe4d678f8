//! The order of a merged list: what the patch says first, what the server already had second.

use serde_json::Value;

/// What identifies a list element: the whole scalar, or one field of an object.
pub(super) fn identity<'a>(item: &'a Value, merge_key: Option<&str>) -> Option<&'a Value> {
    match merge_key {
        Some(key) => item.get(key),
        None => Some(item),
    }
}

/// Where `item` stands in `list`, by identity.
pub(super) fn position(list: &[Value], item: &Value, merge_key: Option<&str>) -> Option<usize> {
    let wanted = identity(item, merge_key)?;
    list.iter().position(|candidate| identity(candidate, merge_key) == Some(wanted))
}

/// Orders `merged`: elements named in `patch_order` follow it, the others keep their place of `server_order`, interleaved where both
/// orders are known.
pub(super) fn ordered(
    merged: Vec<Value>,
    patch_order: &[Value],
    server_order: &[Value],
    merge_key: Option<&str>,
) -> Vec<Value> {
    let named = |item: &Value| position(patch_order, item, merge_key).is_some();
    let (mut patched, mut server_only): (Vec<Value>, Vec<Value>) = merged.into_iter().partition(named);
    let rank = |order: &[Value], item: &Value| position(order, item, merge_key).unwrap_or(usize::MAX);
    patched.sort_by_key(|item| rank(patch_order, item));
    server_only.sort_by_key(|item| rank(server_order, item));
    interleave(server_only, patched, server_order, merge_key)
}

/// Merges two lists without changing the order within either: an element of `left` goes before the first element of `right` that
/// followed it on the server.
fn interleave(left: Vec<Value>, right: Vec<Value>, server_order: &[Value], merge_key: Option<&str>) -> Vec<Value> {
    let mut merged = Vec::with_capacity(left.len() + right.len());
    let (mut left, mut right) = (left.into_iter().peekable(), right.into_iter().peekable());
    while let (Some(l), Some(r)) = (left.peek(), right.peek()) {
        let places = (position(server_order, l, merge_key), position(server_order, r, merge_key));
        let left_first = matches!(places, (Some(l), Some(r)) if l < r);
        merged.extend(if left_first { left.next() } else { right.next() });
    }
    merged.extend(right);
    merged.extend(left);
    merged
}
