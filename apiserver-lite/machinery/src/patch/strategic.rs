//! Strategic merge patch: a merge patch that knows which lists merge by which key, and obeys `$` directives.

use serde_json::{Map, Value};

use super::order::{ordered, position};
use crate::field::quote;
use crate::schema::{Field, FieldType, PatchStrategy, TypeId, registry};
use crate::status::Status;

const DIRECTIVE: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_PREFIX: &str = "$deleteFromPrimitiveList/";
const ORDER_PREFIX: &str = "$setElementOrder/";

type Object = Map<String, Value>;

/// Applies a strategic merge patch to an object of type `ty`. Directives never appear in the outcome.
///
/// # Errors
/// 400 when the patch is no object, or a directive or a list element is malformed (for example without its merge key; upstream answers
/// 500 there); 422 for lists of lists.
pub fn strategic_merge_patch(original: &Value, patch: &Value, ty: TypeId) -> Result<Value, Status> {
    let (Value::Object(original), Value::Object(patch)) = (original, patch) else {
        return Err(Status::bad_request("invalid JSON document"));
    };
    merge_object(original.clone(), patch.clone(), Some(ty)).map(Value::Object)
}

/// How one field merges.
#[derive(Clone, Copy, Default)]
struct Rule {
    strategy: PatchStrategy,
    merge_key: Option<&'static str>,
    /// Type of the field or of its elements, when that is a known struct.
    ty: Option<TypeId>,
}

impl Rule {
    fn of(ty: Option<TypeId>, key: &str) -> Self {
        let field = ty.and_then(|ty| registry().field(ty, key));
        field.map(Self::from).unwrap_or_default()
    }
}

impl From<&'static Field> for Rule {
    fn from(field: &'static Field) -> Self {
        let ty = match &field.ty {
            // The entries of a map are keyed freely; nothing is known about a key.
            FieldType::Map(_) => None,
            other => other.named(),
        };
        Self { strategy: field.patch_strategy, merge_key: field.patch_merge_key, ty }
    }
}

fn merge_object(mut original: Object, mut patch: Object, ty: Option<TypeId>) -> Result<Object, Status> {
    if let Some(directive) = patch.remove(DIRECTIVE) {
        return match directive.as_str() {
            Some("replace") => Ok(patch),
            Some("delete") => Ok(Object::new()),
            _ => Err(unknown_directive(&directive)),
        };
    }
    retain_keys(&mut original, &mut patch)?;
    merge_ordered_lists(&mut original, &mut patch, ty)?;
    for (key, value) in patch {
        if let Some(list) = key.strip_prefix(DELETE_PREFIX) {
            delete_from_list(&mut original, list, &value)?;
        } else if value.is_null() {
            original.remove(&key);
        } else {
            let rule = Rule::of(ty, &key);
            merge_field(&mut original, key, value, rule)?;
        }
    }
    Ok(original)
}

fn merge_field(original: &mut Object, key: String, value: Value, rule: Rule) -> Result<(), Status> {
    let merged = match (original.remove(&key), value) {
        (Some(Value::Object(_)), Value::Object(patch)) if rule.strategy.replace => Some(Value::Object(patch)),
        (Some(Value::Object(old)), Value::Object(patch)) => Some(Value::Object(merge_object(old, patch, rule.ty)?)),
        (Some(Value::Array(old)), Value::Array(patch)) if rule.strategy.merge => {
            Some(Value::Array(merge_list(old, patch, rule)?))
        }
        (Some(Value::Array(_)), Value::Array(patch)) => Some(Value::Array(patch)),
        (_, value) => added(value),
    };
    if let Some(merged) = merged {
        original.insert(key, merged);
    }
    Ok(())
}

/// A value that nothing merges with: nulls and whatever carries a directive drop out of it.
fn added(value: Value) -> Option<Value> {
    match value {
        Value::Object(entries) if entries.contains_key(DIRECTIVE) => None,
        Value::Object(entries) => {
            let kept = entries.into_iter().filter(|(_, value)| !value.is_null());
            Some(Value::Object(kept.filter_map(|(key, value)| Some((key, added(value)?))).collect()))
        }
        Value::Array(items) => Some(Value::Array(items.into_iter().filter_map(added).collect())),
        other => Some(other),
    }
}

/// `$retainKeys`: fields of the original that are not listed go away.
fn retain_keys(original: &mut Object, patch: &mut Object) -> Result<(), Status> {
    let Some(listed) = patch.remove(RETAIN_KEYS) else { return Ok(()) };
    let malformed = || Status::bad_request("invalid patch format of retainKeys");
    let listed = listed.as_array().ok_or_else(malformed)?;
    let retained = |key: &String| listed.iter().any(|name| name.as_str() == Some(key));
    let is_directive = |key: &String| key.starts_with(DELETE_PREFIX) || key.starts_with(ORDER_PREFIX);
    if patch.iter().any(|(key, value)| !value.is_null() && !is_directive(key) && !retained(key)) {
        return Err(malformed());
    }
    original.retain(|key, _| retained(key));
    Ok(())
}

/// `$setElementOrder/<list>`: merges the list now and gives it the order asked for.
fn merge_ordered_lists(original: &mut Object, patch: &mut Object, ty: Option<TypeId>) -> Result<(), Status> {
    let directives: Vec<String> = patch.keys().filter(|key| key.starts_with(ORDER_PREFIX)).cloned().collect();
    for directive in directives {
        let malformed = || Status::bad_request("invalid patch format of setElementOrder list");
        let Some(Value::Array(order)) = patch.remove(&directive) else { return Err(malformed()) };
        let key = directive.strip_prefix(ORDER_PREFIX).unwrap_or_default();
        let rule = Rule::of(ty, key);
        let old = match original.get(key) {
            None => Vec::new(),
            Some(Value::Array(old)) => old.clone(),
            Some(_) => return Err(malformed()),
        };
        let merged = match patch.get(key) {
            None if old.is_empty() => continue,
            None => old.clone(),
            // An explicit null still means removal, later.
            Some(Value::Null) => continue,
            Some(Value::Array(changes)) => {
                check_order(changes, &order, rule.merge_key)?;
                ordered_base(&old, changes.clone(), rule)?
            }
            Some(_) => return Err(malformed()),
        };
        patch.remove(key);
        check_keys(&merged, rule.merge_key)?;
        check_keys(&order, rule.merge_key)?;
        original.insert(key.to_owned(), Value::Array(ordered(merged, &order, &old, rule.merge_key)));
    }
    Ok(())
}

fn ordered_base(old: &[Value], changes: Vec<Value>, rule: Rule) -> Result<Vec<Value>, Status> {
    if old.is_empty() {
        return Ok(changes.into_iter().filter_map(added).collect());
    }
    if rule.strategy.merge { merge_list(old.to_vec(), changes, rule) } else { Ok(changes) }
}

/// The elements of a patch must appear in the order list, in the same order; deletions don't count.
fn check_order(changes: &[Value], order: &[Value], merge_key: Option<&str>) -> Result<(), Status> {
    if order.is_empty() {
        return Ok(());
    }
    let mut rest = order;
    for change in changes.iter().filter(|change| change.get(DIRECTIVE).is_none()) {
        let Some(at) = position(rest, change, merge_key) else {
            let list = |items: &[Value]| Value::Array(items.to_vec()).to_string();
            return Err(Status::bad_request(format!(
                "The order in patch list:\n{}\n doesn't match $setElementOrder list:\n{}\n",
                list(changes),
                list(order)
            )));
        };
        rest = rest.get(at + 1..).unwrap_or_default();
    }
    Ok(())
}

fn delete_from_list(original: &mut Object, key: &str, unwanted: &Value) -> Result<(), Status> {
    let unwanted = unwanted.as_array().ok_or_else(|| Status::bad_request("invalid patch format of primitive list"))?;
    if let Some(Value::Array(list)) = original.get_mut(key) {
        list.retain(|item| !unwanted.contains(item));
    }
    Ok(())
}

fn merge_list(old: Vec<Value>, changes: Vec<Value>, rule: Rule) -> Result<Vec<Value>, Status> {
    if old.iter().chain(&changes).any(Value::is_array) {
        return Err(Status::unprocessable());
    }
    if old.iter().chain(&changes).all(|item| !item.is_object()) {
        return Ok(merge_scalars(&old, &changes));
    }
    let key = rule.merge_key.ok_or_else(|| Status::bad_request("cannot merge lists without merge key"))?;
    merge_objects(old, changes, key, rule.ty)
}

fn merge_scalars(old: &[Value], changes: &[Value]) -> Vec<Value> {
    let mut merged: Vec<Value> = Vec::with_capacity(old.len() + changes.len());
    for item in old.iter().chain(changes) {
        if !merged.contains(item) {
            merged.push(item.clone());
        }
    }
    ordered(merged, changes, old, None)
}

fn merge_objects(
    mut old: Vec<Value>,
    changes: Vec<Value>,
    key: &'static str,
    ty: Option<TypeId>,
) -> Result<Vec<Value>, Status> {
    check_keys(&old, Some(key))?;
    let mut plain = Vec::with_capacity(changes.len());
    let mut replace = false;
    for change in changes {
        match change.get(DIRECTIVE).map(|directive| directive.as_str().ok_or(directive)) {
            None => plain.push(change),
            Some(Ok("replace")) => replace = true,
            Some(Ok("delete")) => {
                let unwanted = change.get(key).ok_or_else(|| no_merge_key(&change, key))?;
                old.retain(|item| item.get(key) != Some(unwanted));
            }
            Some(Ok("merge")) => {
                return Err(Status::bad_request("merging lists cannot yet be specified in the patch"));
            }
            Some(Ok(other)) => return Err(unknown_directive(&other.into())),
            Some(Err(other)) => return Err(unknown_directive(other)),
        }
    }
    if replace {
        return Ok(plain);
    }
    check_keys(&plain, Some(key))?;
    let server_order = old.clone();
    let patch_order = plain.clone();
    for change in plain {
        merge_element(&mut old, change, key, ty)?;
    }
    Ok(ordered(old, &patch_order, &server_order, Some(key)))
}

fn merge_element(list: &mut Vec<Value>, change: Value, key: &str, ty: Option<TypeId>) -> Result<(), Status> {
    let found = position(list, &change, Some(key)).and_then(|at| list.get_mut(at));
    match (found, change) {
        (Some(slot), Value::Object(change)) => {
            let old = slot.as_object_mut().map(std::mem::take).unwrap_or_default();
            *slot = Value::Object(merge_object(old, change, ty)?);
        }
        (_, change) => list.extend(added(change)),
    }
    Ok(())
}

/// With a merge key, every element must be an object that has it.
fn check_keys(list: &[Value], merge_key: Option<&str>) -> Result<(), Status> {
    let Some(key) = merge_key else { return Ok(()) };
    match list.iter().find(|item| item.get(key).is_none()) {
        Some(item) => Err(no_merge_key(item, key)),
        None => Ok(()),
    }
}

fn no_merge_key(item: &Value, key: &str) -> Status {
    Status::bad_request(format!("map: {item} does not contain declared merge key: {key}"))
}

fn unknown_directive(directive: &Value) -> Status {
    let text = directive.as_str().map_or_else(|| directive.to_string(), quote);
    Status::bad_request(format!("unknown patch type: {text}"))
}
