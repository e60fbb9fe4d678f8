//! What `PUT` wants to make of an object: another whole one.

use apiserver_machinery::meta;
use apiserver_machinery::status::Status;
use serde_json::Value;

use super::{Change, Target};

/// A whole new object.
pub(crate) struct Replacement {
    object: Value,
}

impl Replacement {
    /// Checks that the object is the one that the path names.
    ///
    /// # Errors
    /// 400.
    pub(crate) fn new(target: &Target, mut object: Value) -> Result<Self, Status> {
        if meta::name(&object).is_empty() {
            meta::set(&mut object, "name", target.name.as_str());
        }
        check_names(target, &object)?;
        Ok(Self { object })
    }
}

impl Change for Replacement {
    fn apply(&self, _current: &Value) -> Result<Value, Status> {
        Ok(self.object.clone())
    }

    fn is_repeatable(&self) -> bool {
        false
    }

    fn object_to_create(&self) -> Option<Value> {
        Some(self.object.clone())
    }
}

/// Checks that an object is the one that the path names.
///
/// # Errors
/// 400.
pub(crate) fn check_names(target: &Target, object: &Value) -> Result<(), Status> {
    let name = meta::name(object);
    if name != target.name {
        let message = format!("the name of the object ({name}) does not match the name on the URL ({})", target.name);
        return Err(Status::bad_request(message));
    }
    let namespace = meta::namespace(object);
    if !namespace.is_empty() && namespace != target.namespace {
        let message = format!(
            "the namespace of the object ({namespace}) does not match the namespace on the request ({})",
            target.namespace
        );
        return Err(Status::bad_request(message));
    }
    Ok(())
}
