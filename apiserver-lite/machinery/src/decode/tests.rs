//! Behaviour of the decoder on good, odd and broken bodies.

use serde_json::json;

use super::*;
use crate::schema::registry;

fn services() -> &'static Resource {
    registry().resource("", "v1", "services").unwrap()
}

fn strict(body: &str) -> Result<Decoded, Status> {
    object(body.as_bytes(), Format::Json, services(), FieldValidation::Strict)
}

fn refused(body: &str) -> String {
    let status = strict(body).unwrap_err();
    assert_eq!((status.code, status.reason), (400, "BadRequest"));
    status.message
}

#[test]
fn a_service_passes_and_nulls_go() {
    let decoded = strict(
        r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"web","creationTimestamp":null},
            "spec":{"ports":[{"port":80,"targetPort":"http"},{"port":81,"targetPort":8080}],"selector":{"a":"b"}},
            "status":{"loadBalancer":{}}}"#,
    )
    .unwrap();
    assert_eq!(
        decoded.object,
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
            "spec": {"ports": [{"port": 80, "targetPort": "http"}, {"port": 81, "targetPort": 8080}], "selector": {"a": "b"}},
            "status": {"loadBalancer": {}},
        })
    );
    assert!(decoded.warnings.is_empty());
}

#[test]
fn absent_identity_is_filled_in() {
    let decoded = strict(r#"{"metadata":{"name":"web"}}"#).unwrap();
    assert_eq!((&decoded.object["apiVersion"], &decoded.object["kind"]), (&json!("v1"), &json!("Service")));
}

#[test]
fn other_kinds_are_refused() {
    assert_eq!(
        refused(r#"{"apiVersion":"v1","kind":"Pod"}"#),
        "Pod in version \"v1\" cannot be handled as a Service: converting (v1.Pod) to (v1.Service): unknown conversion"
    );
    assert_eq!(
        refused(r#"{"apiVersion":"v1","kind":"Servize"}"#),
        "Servize in version \"v1\" cannot be handled as a Service: no kind \"Servize\" is registered for version \"v1\""
    );
    assert_eq!(
        refused(r#"{"apiVersion":"v7","kind":"Service"}"#),
        "Service in version \"v7\" cannot be handled as a Service: no kind \"Service\" is registered for version \"v7\""
    );
    let events = registry().resource("", "v1", "events").unwrap();
    let body = br#"{"apiVersion":"events.k8s.io/v1","kind":"Event"}"#;
    assert_eq!(
        object(body, Format::Json, events, FieldValidation::Warn).unwrap_err().message,
        "the API version in the data (events.k8s.io/v1) does not match the expected API version (v1)"
    );
}

#[test]
fn broken_text() {
    assert_eq!(
        refused(r#"{"kind":"Service","metadata"#),
        "the object provided is unrecognized (must be of type Service): couldn't get version/kind; \
         json parse error: unexpected end of JSON input ({\"kind\":\"Service\",\"metadata)"
    );
    assert!(refused("").ends_with("(<empty>)"));
    assert!(refused("[1,2]").ends_with("(5b312c325d)"));
}

#[test]
fn wrong_types() {
    let prefix = "Service in version \"v1\" cannot be handled as a Service: ";
    let check = |body: &str, cause: &str| assert_eq!(refused(body), format!("{prefix}{cause}"));
    check(
        r#"{"spec":{"ports":[{"port":"80"}]}}"#,
        "json: cannot unmarshal string into Go struct field ServicePort.spec.ports.port of type int32",
    );
    check(
        r#"{"spec":{"ports":[{"port":1.5}]}}"#,
        "json: cannot unmarshal number 1.5 into Go struct field ServicePort.spec.ports.port of type int32",
    );
    check(
        r#"{"spec":{"ports":[{"port":4294967296}]}}"#,
        "json: cannot unmarshal number 4294967296 into Go struct field ServicePort.spec.ports.port of type int32",
    );
    check(
        r#"{"spec":{"ports":"80"}}"#,
        "json: cannot unmarshal string into Go struct field ServiceSpec.spec.ports of type []v1.ServicePort",
    );
    check(r#"{"spec":7}"#, "json: cannot unmarshal number into Go struct field Service.spec of type v1.ServiceSpec");
    check(
        r#"{"metadata":{"labels":{"a":1}}}"#,
        "json: cannot unmarshal number into Go struct field ObjectMeta.metadata.labels.a of type string",
    );
    check(r#"{"spec":{"ports":[{"targetPort":true}]}}"#, "json: cannot unmarshal bool into Go value of type int32");
}

#[test]
fn unknown_and_duplicate_fields() {
    let body = r#"{"spec":{"foo":1,"ports":[{"port":80,"port":81,"prot":"x"}]},"spic":{}}"#;
    let findings = [
        "duplicate field \"spec.ports[0].port\"",
        "unknown field \"spec.foo\"",
        "unknown field \"spec.ports[0].prot\"",
        "unknown field \"spic\"",
    ];
    assert_eq!(
        refused(body),
        format!(
            "Service in version \"v1\" cannot be handled as a Service: strict decoding error: {}",
            findings.join(", ")
        )
    );
    let warned = object(body.as_bytes(), Format::Json, services(), FieldValidation::Warn).unwrap();
    assert_eq!(warned.warnings, findings);
    assert_eq!(warned.object["spec"], json!({"ports": [{"port": 81}]}));
    let ignored = object(body.as_bytes(), Format::Json, services(), FieldValidation::Ignore).unwrap();
    assert!(ignored.warnings.is_empty());
    assert_eq!(ignored.object, warned.object);
}

#[test]
fn yaml_bodies() {
    let body = b"apiVersion: v1\nkind: Service\nspec:\n  ports:\n  - port: 80\n    foo: 1\n";
    let decoded = object(body, Format::Yaml, services(), FieldValidation::Warn).unwrap();
    assert_eq!(decoded.object["spec"]["ports"][0]["port"], 80);
    assert_eq!(decoded.warnings, ["unknown field \"spec.ports[0].foo\""]);
}

#[test]
fn any_values_are_kept() {
    let body = r#"{"metadata":{"managedFields":[{"fieldsV1":{"f:x":{".":null}}}]}}"#;
    let decoded = strict(body).unwrap();
    assert_eq!(decoded.object["metadata"]["managedFields"][0]["fieldsV1"], json!({"f:x": {".": null}}));
}

#[test]
fn quantities_become_text() {
    let nodes = registry().resource("", "v1", "nodes").unwrap();
    let body = br#"{"status":{"capacity":{"cpu":2,"memory":"1Gi"}}}"#;
    let decoded = object(body, Format::Json, nodes, FieldValidation::Strict).unwrap();
    assert_eq!(decoded.object["status"]["capacity"], json!({"cpu": "2", "memory": "1Gi"}));
}

#[test]
fn patched_objects_are_refused_as_patches() {
    let patched = json!({"apiVersion": "v1", "kind": "Service", "spec": {"nope": 1}});
    let status = value(patched.clone(), services(), FieldValidation::Strict).unwrap_err();
    assert_eq!((status.code, status.reason), (422, "Invalid"));
    assert!(status.message.ends_with("strict decoding error: unknown field \"spec.nope\""), "{}", status.message);
    assert_eq!(value(patched, services(), FieldValidation::Warn).unwrap().warnings, ["unknown field \"spec.nope\""]);
}

#[test]
fn delete_options() {
    let ty = registry().type_by_name("meta.v1", "DeleteOptions").unwrap();
    let decode = |body: &[u8]| typed(body, Format::Json, ty, FieldValidation::Strict);
    assert_eq!(decode(b"").unwrap().object, json!({}));
    let body = br#"{"propagationPolicy":"Background","gracePeriodSeconds":0}"#;
    assert_eq!(decode(body).unwrap().object, json!({"propagationPolicy": "Background", "gracePeriodSeconds": 0}));
    assert_eq!(decode(br#"{"gracePeriodSeconds":"x"}"#).unwrap_err().code, 400);
}

#[test]
fn field_validation_words() {
    assert_eq!(FieldValidation::parse("", "CreateOptions"), Ok(FieldValidation::Warn));
    let status = FieldValidation::parse("strict", "CreateOptions").unwrap_err();
    assert_eq!(status.code, 422);
    assert!(
        status.message.starts_with("CreateOptions.meta.k8s.io \"\" is invalid: fieldValidation: Unsupported value")
    );
}
