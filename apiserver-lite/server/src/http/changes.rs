//! What `PATCH` wants to make of an object.

use std::sync::{Mutex, PoisonError};

use apiserver_machinery::decode::{self, Decoded, FieldValidation};
use apiserver_machinery::patch;
use apiserver_machinery::status::Status;
use serde_json::Value;

use crate::engine::{Change, Target, check_names};

/// The forms of a patch, by content type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PatchForm {
    Json,
    Merge,
    Strategic,
}

impl PatchForm {
    /// Reads the content type of a `PATCH`.
    ///
    /// # Errors
    /// 415 for any other.
    pub(crate) fn of(content_type: &str) -> Result<Self, Status> {
        match content_type {
            "application/json-patch+json" => Ok(Self::Json),
            "application/merge-patch+json" => Ok(Self::Merge),
            "application/strategic-merge-patch+json" => Ok(Self::Strategic),
            "application/apply-patch+yaml" => Err(no_server_side_apply()),
            _ => Err(Status::unsupported_media_type(&[
                "application/json-patch+json",
                "application/merge-patch+json",
                "application/strategic-merge-patch+json",
            ])),
        }
    }
}

fn no_server_side_apply() -> Status {
    let mut status = Status::unsupported_media_type(&[]);
    status.message = "this server does not support server-side apply (application/apply-patch+yaml) yet; \
                      use client-side apply, or a JSON, merge or strategic merge patch"
        .to_owned();
    status
}

/// A patch, and the warnings that its last application gave.
pub(crate) struct Patch {
    target: Target,
    form: PatchForm,
    document: Value,
    validation: FieldValidation,
    warnings: Mutex<Vec<String>>,
}

impl Patch {
    pub(crate) fn new(target: Target, form: PatchForm, document: Value, validation: FieldValidation) -> Self {
        Self { target, form, document, validation, warnings: Mutex::default() }
    }

    /// The warnings of the outcome.
    pub(crate) fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut *self.warnings.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn patched(&self, current: &Value) -> Result<Value, Status> {
        match self.form {
            PatchForm::Json => patch::json_patch(current, &self.document),
            PatchForm::Merge => Ok(patch::merge_patch(current, &self.document)),
            PatchForm::Strategic => match self.target.resource.ty {
                Some(ty) => patch::strategic_merge_patch(current, &self.document, ty),
                None => Err(Status::unsupported_media_type(&[
                    "application/json-patch+json",
                    "application/merge-patch+json",
                ])),
            },
        }
    }
}

impl Change for Patch {
    fn apply(&self, current: &Value) -> Result<Value, Status> {
        let patched = self.patched(current)?;
        let Decoded { object, warnings } = decode::value(patched, self.target.resource, self.validation)?;
        check_names(&self.target, &object)?;
        *self.warnings.lock().unwrap_or_else(PoisonError::into_inner) = warnings;
        Ok(object)
    }

    fn is_repeatable(&self) -> bool {
        true
    }

    fn object_to_create(&self) -> Option<Value> {
        None
    }
}
