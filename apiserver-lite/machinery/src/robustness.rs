//! Whatever JSON arrives, no stage panics, and each stage keeps its promises about what it leaves behind.

use jiff::Timestamp;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use crate::decode::{self, FieldValidation, Format};
use crate::schema::{Resource, registry};
use crate::selector::{FieldSelector, LabelSelector};
use crate::table::{self, IncludeObject};
use crate::{defaults, validation};

/// Field names that lead deep into the served kinds, so that random objects are not refused at the door.
const KEYS: &[&str] = &[
    "metadata",
    "name",
    "namespace",
    "labels",
    "finalizers",
    "ownerReferences",
    "creationTimestamp",
    "deletionTimestamp",
    "spec",
    "ports",
    "port",
    "nodePort",
    "targetPort",
    "protocol",
    "type",
    "selector",
    "clusterIP",
    "clusterIPs",
    "ipFamilies",
    "externalIPs",
    "sessionAffinity",
    "sessionAffinityConfig",
    "containers",
    "image",
    "env",
    "volumes",
    "volumeMounts",
    "status",
    "phase",
    "loadBalancer",
    "ingress",
    "ip",
    "podIPs",
    "containerStatuses",
    "state",
    "terminated",
    "conditions",
    "subsets",
    "addresses",
    "endpoints",
    "addressType",
    "hints",
    "forZones",
    "data",
    "binaryData",
    "stringData",
    "taints",
    "podCIDRs",
    "cidrs",
    "parentRef",
    "involvedObject",
    "regarding",
    "series",
    "eventTime",
    "capacity",
    "readinessGates",
    "immutable",
];

const TEXTS: &[&str] = &[
    "",
    "a",
    "A",
    "10.0.0.1",
    "fd00::1",
    "None",
    "10.0.0.0/8",
    "NodePort",
    "LoadBalancer",
    "ExternalName",
    "ClientIP",
    "IPv4",
    "FQDN",
    "TCP",
    "é\u{0}",
    "2026-01-01T00:00:00Z",
    "eA==",
    "100m",
    "Always",
    "Running",
    "True",
];

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0..70_000i64).prop_map(Value::from),
        any::<f64>().prop_map(|number| json!(number)),
        prop::sample::select(TEXTS).prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 64, 6, |inner| {
        let key = prop::sample::select(KEYS).prop_map(str::to_owned);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key, inner, 0..8).prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn any_object() -> impl Strategy<Value = Value> {
    let key = prop::sample::select(KEYS).prop_map(str::to_owned);
    prop::collection::btree_map(key, any_json(), 0..8)
        .prop_map(|map| Value::Object(map.into_iter().collect::<Map<String, Value>>()))
}

fn any_resource() -> impl Strategy<Value = &'static Resource> {
    prop::sample::select(registry().served().collect::<Vec<_>>())
}

fn has_null(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.iter().any(has_null),
        Value::Object(map) => map.values().any(has_null),
        _ => false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn undecoded_objects_never_panic(resource in any_resource(), object in any_object(), old in any_object()) {
        let mut defaulted = object.clone();
        defaults::apply(resource, &mut defaulted);
        validation::validate_create(resource, &defaulted);
        validation::validate_update(resource, &defaulted, &old);
        validation::validate_status_update(resource, &object, &old);
        let table = table::render(resource, [&object], &json!({}), IncludeObject::Metadata, Timestamp::UNIX_EPOCH);
        prop_assert_eq!(
            table["rows"][0]["cells"].as_array().map(Vec::len),
            table["columnDefinitions"].as_array().map(Vec::len)
        );
    }

    #[test]
    fn decoding_is_idempotent(resource in any_resource(), object in any_object()) {
        let decode = |object: &Value, validation| {
            decode::object(object.to_string().as_bytes(), Format::Json, resource, validation)
        };
        match decode(&object, FieldValidation::Ignore) {
            Err(status) => prop_assert_eq!(status.code, 400),
            Ok(decoded) => {
                let again = decode(&decoded.object, FieldValidation::Strict);
                prop_assert_eq!(again.map(|it| it.object), Ok(decoded.object));
            }
        }
    }

    #[test]
    fn defaults_are_idempotent(resource in any_resource(), object in any_object()) {
        let decoded = decode::object(object.to_string().as_bytes(), Format::Json, resource, FieldValidation::Ignore);
        prop_assume!(decoded.is_ok());
        let mut once = decoded.map(|decoded| decoded.object).unwrap_or_default();
        defaults::apply(resource, &mut once);
        let mut twice = once.clone();
        defaults::apply(resource, &mut twice);
        prop_assert_eq!(&twice, &once);
        // What was filled in has the structure that the kind asks for.
        let body = once.to_string();
        let again = decode::object(body.as_bytes(), Format::Json, resource, FieldValidation::Strict);
        prop_assert!(again.is_ok() || has_null(&once), "{:?}", again);
    }

    #[test]
    fn selectors_never_panic(text in "[a-c=!,() ><\\\\\"é]{0,12}", resource in any_resource(), object in any_object()) {
        if let Ok(selector) = LabelSelector::parse(&text) {
            selector.matches(&object);
        }
        if let Ok(selector) = FieldSelector::parse(resource, &text) {
            selector.matches(&object);
        }
        if let Ok(selector) = LabelSelector::from_object(object.get("metadata")) {
            selector.matches(&object);
        }
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..64), yaml in any::<bool>()) {
        let format = if yaml { Format::Yaml } else { Format::Json };
        let resource = registry().resource("", "v1", "services");
        if let Some(Err(status)) = resource.map(|it| decode::object(&bytes, format, it, FieldValidation::Strict)) {
            prop_assert_eq!(status.code, 400);
        }
    }
}
