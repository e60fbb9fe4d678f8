//! Query parameters of the API: how their texts are read and what is refused.

use apiserver_machinery::decode::FieldValidation;
use apiserver_machinery::field::{FieldError, quote};
use apiserver_machinery::status::{GroupResource, Status};
use apiserver_machinery::table::IncludeObject;
use apiserver_store::Revision;

use crate::engine::{ListRequest, Selection, Target, VersionMatch};

/// The decoded parameters of one request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query {
    pairs: Vec<(String, String)>,
}

impl Query {
    pub(crate) fn parse(text: Option<&str>) -> Self {
        let pairs = form_urlencoded::parse(text.unwrap_or_default().as_bytes()).into_owned().collect();
        Self { pairs }
    }

    /// The first value of a parameter; empty when it is absent.
    pub(crate) fn text(&self, name: &str) -> &str {
        self.pairs.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str()).unwrap_or_default()
    }

    /// A truth value as Kubernetes reads it: anything but `false` and `0` is true.
    pub(crate) fn flag(&self, name: &str) -> Option<bool> {
        let (_, value) = self.pairs.iter().find(|(key, _)| key == name)?;
        Some(!(value == "0" || value.eq_ignore_ascii_case("false")))
    }

    /// A whole number.
    ///
    /// # Errors
    /// 400.
    pub(crate) fn number(&self, name: &str) -> Result<Option<i64>, Status> {
        match self.text(name) {
            "" => Ok(None),
            text => match text.parse() {
                Ok(number) => Ok(Some(number)),
                Err(_) => {
                    Err(Status::bad_request(format!("strconv.ParseInt: parsing {}: invalid syntax", quote(text))))
                }
            },
        }
    }

    /// Whether `dryRun` asks to change nothing.
    ///
    /// # Errors
    /// 422 for another word than `All`.
    pub(crate) fn dry_run(&self, options_kind: &str) -> Result<bool, Status> {
        let values: Vec<&str> =
            self.pairs.iter().filter(|(key, _)| key == "dryRun").map(|(_, value)| value.as_str()).collect();
        check_dry_run(&values, options_kind)
    }

    /// `fieldValidation`.
    ///
    /// # Errors
    /// For any unknown word.
    pub(crate) fn field_validation(&self, options_kind: &str) -> Result<FieldValidation, Status> {
        FieldValidation::parse(self.text("fieldValidation"), options_kind)
    }

    /// `includeObject` of a Table.
    ///
    /// # Errors
    /// 400 for any unknown word.
    pub(crate) fn include_object(&self) -> Result<IncludeObject, Status> {
        match self.text("includeObject") {
            "" | "Metadata" => Ok(IncludeObject::Metadata),
            "Object" => Ok(IncludeObject::Object),
            "None" => Ok(IncludeObject::None),
            other => Err(Status::bad_request(format!("unrecognized includeObject value: {}", quote(other)))),
        }
    }

    /// `resourceVersion`: `None` when it is empty.
    ///
    /// # Errors
    /// 400 for what is no number.
    pub(crate) fn revision(&self) -> Result<Option<Revision>, Status> {
        match self.text("resourceVersion") {
            "" => Ok(None),
            text => match text.parse() {
                Ok(number) => Ok(Some(Revision(number))),
                Err(_) => Err(Status::bad_request(format!("invalid resource version: {}", version_error(text)))),
            },
        }
    }

    /// Both selectors.
    ///
    /// # Errors
    /// 400.
    pub(crate) fn selection(&self, target: &Target) -> Result<Selection, Status> {
        let labels = self.text("labelSelector");
        let fields = self.text("fieldSelector");
        if target.name.is_empty() {
            return Selection::parse(target.resource, labels, fields);
        }
        Selection::parse(target.resource, labels, fields)?.check_name(&target.name)?;
        Selection::parse(target.resource, labels, &format!("metadata.name={}", target.name))
    }

    /// The parameters of a list.
    ///
    /// # Errors
    /// 400 and 422 for parameters that are broken or do not go together.
    pub(crate) fn list_request(&self, target: &Target) -> Result<ListRequest, Status> {
        let mut errors = self.version_match_errors();
        if self.flag("sendInitialEvents").is_some() {
            errors.push(FieldError::forbidden("sendInitialEvents", "sendInitialEvents is forbidden for list"));
        }
        refuse_list_options(&errors)?;
        let token = self.text("continue").to_owned();
        let revision = self.revision()?;
        if !token.is_empty() && revision.is_some_and(|revision| revision.0 > 0) {
            return Err(Status::bad_request("specifying resource version is not allowed when using continue"));
        }
        let version_match = match self.text("resourceVersionMatch") {
            "Exact" => VersionMatch::Exact,
            "NotOlderThan" => VersionMatch::NotOlderThan,
            _ => VersionMatch::Unset,
        };
        let limit = self.number("limit")?.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(0);
        Ok(ListRequest { selection: self.selection(target)?, revision, version_match, limit, token })
    }

    fn version_match_errors(&self) -> Vec<FieldError> {
        let field = "resourceVersionMatch";
        let wanted = self.text(field);
        let mut errors = Vec::new();
        if wanted.is_empty() {
            return errors;
        }
        let version = self.text("resourceVersion");
        if version.is_empty() {
            errors.push(FieldError::forbidden(
                field,
                "resourceVersionMatch is forbidden unless resourceVersion is provided",
            ));
        }
        if !self.text("continue").is_empty() {
            errors.push(FieldError::forbidden(field, "resourceVersionMatch is forbidden when continue is provided"));
        }
        if !matches!(wanted, "Exact" | "NotOlderThan") {
            errors.push(FieldError::not_supported(field, wanted, &["Exact", "NotOlderThan", ""]));
        }
        if wanted == "Exact" && version == "0" {
            let detail = "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"";
            errors.push(FieldError::forbidden(field, detail));
        }
        errors
    }

    /// Checks the parameters of a watch against each other.
    ///
    /// # Errors
    /// 422.
    pub(crate) fn check_watch(&self) -> Result<(), Status> {
        let field = "resourceVersionMatch";
        let wanted = self.text(field);
        let initial = self.flag("sendInitialEvents").is_some();
        let mut errors = Vec::new();
        if initial && wanted != "NotOlderThan" {
            let detail = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
            errors.push(FieldError::forbidden(field, detail));
        }
        if !wanted.is_empty() && !initial {
            let detail = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided";
            errors.push(FieldError::forbidden(field, detail));
        }
        if !matches!(wanted, "" | "NotOlderThan") {
            errors.push(FieldError::not_supported(field, wanted, &["NotOlderThan"]));
        }
        if !wanted.is_empty() && !self.text("continue").is_empty() {
            errors.push(FieldError::forbidden(field, "resourceVersionMatch is forbidden when continue is provided"));
        }
        refuse_list_options(&errors)
    }
}

/// Checks the values of `dryRun`, wherever they came from.
///
/// # Errors
/// 422 for another word than `All`.
pub(crate) fn check_dry_run(values: &[&str], options_kind: &str) -> Result<bool, Status> {
    let wrong: Vec<FieldError> = values
        .iter()
        .filter(|value| !matches!(**value, "All" | ""))
        .map(|value| FieldError::not_supported("dryRun", *value, &["All"]))
        .collect();
    if wrong.is_empty() {
        return Ok(values.contains(&"All"));
    }
    Err(Status::invalid(GroupResource { group: "meta.k8s.io", resource: options_kind }, "", &wrong))
}

fn refuse_list_options(errors: &[FieldError]) -> Result<(), Status> {
    if errors.is_empty() {
        return Ok(());
    }
    Err(Status::invalid(GroupResource { group: "meta.k8s.io", resource: "ListOptions" }, "", errors))
}

fn version_error(text: &str) -> FieldError {
    let detail = format!("strconv.ParseUint: parsing {}: invalid syntax", quote(text));
    FieldError::invalid("resourceVersion", text, detail)
}

#[cfg(test)]
mod tests {
    use apiserver_machinery::schema::registry;

    use super::*;

    fn pods() -> Target {
        let resource = registry().resource("", "v1", "pods").unwrap();
        Target { resource, namespace: "ns".to_owned(), name: String::new() }
    }

    fn list(query: &str) -> Result<ListRequest, Status> {
        Query::parse(Some(query)).list_request(&pods())
    }

    #[test]
    fn list_parameters_are_checked_against_each_other() {
        for (query, code) in [
            ("resourceVersionMatch=Exact", 422),
            ("resourceVersionMatch=Exact&resourceVersion=0", 422),
            ("resourceVersionMatch=Never&resourceVersion=1", 422),
            ("resourceVersionMatch=NotOlderThan&resourceVersion=1&continue=x", 422),
            ("sendInitialEvents=true", 422),
            ("resourceVersion=abc", 400),
            ("limit=x", 400),
            ("continue=x&resourceVersion=3", 400),
        ] {
            assert_eq!(list(query).unwrap_err().code, code, "{query}");
        }
        let fine = list("limit=500&resourceVersion=0").unwrap();
        assert_eq!((fine.limit, fine.revision), (500, Some(Revision(0))));
    }

    #[test]
    fn watch_parameters_are_checked_against_each_other() {
        for query in [
            "sendInitialEvents=true",
            "resourceVersionMatch=NotOlderThan",
            "sendInitialEvents=false&resourceVersionMatch=Exact",
        ] {
            assert_eq!(Query::parse(Some(query)).check_watch().unwrap_err().code, 422, "{query}");
        }
        Query::parse(Some("sendInitialEvents=true&resourceVersionMatch=NotOlderThan")).check_watch().unwrap();
    }

    #[test]
    fn dry_run_knows_one_word() {
        assert!(Query::parse(Some("dryRun=All")).dry_run("CreateOptions").unwrap());
        assert!(!Query::parse(None).dry_run("CreateOptions").unwrap());
        let refused = Query::parse(Some("dryRun=Some")).dry_run("CreateOptions").unwrap_err();
        assert_eq!(refused.code, 422);
    }

    #[test]
    fn flags_are_read_as_kubernetes_does() {
        let query = Query::parse(Some("a=true&b=0&c=False&d="));
        assert_eq!(
            ["a", "b", "c", "d", "e"].map(|name| query.flag(name)),
            [Some(true), Some(false), Some(false), Some(true), None]
        );
    }
}
