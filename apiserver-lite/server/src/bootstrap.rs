//! What every cluster has from its first moment: four namespaces, the Service `kubernetes` and the ServiceCIDR `kubernetes`.

use std::net::IpAddr;

use apiserver_machinery::meta;
use apiserver_machinery::schema::{Resource, registry};
use apiserver_machinery::status::Status;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::config::Config;
use crate::engine::{Engine, ListRequest, Part, Replacement, Selection, Target, VersionMatch};

/// Namespaces that kube-apiserver makes.
const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

/// Why a server can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The tables of this build lack a resource.
    #[error("this build knows no resource {plural:?} in group {group:?}")]
    UnknownResource {
        /// API group.
        group: &'static str,
        /// Plural.
        plural: &'static str,
    },
    /// An object that the cluster begins with can't be written or read.
    #[error("the initial {what} can't be written or read")]
    Object {
        /// What it was.
        what: String,
        /// The answer of the API.
        #[source]
        status: Status,
    },
}

/// Takes over what the store holds, then writes what is missing.
pub(crate) async fn run(engine: &Engine, config: &Config) -> Result<(), StartError> {
    adopt_services(engine).await?;
    for namespace in NAMESPACES {
        ensure(engine, "", "namespaces", "", &json!({"metadata": {"name": namespace}})).await?;
        ensure(engine, "", "serviceaccounts", namespace, &json!({"metadata": {"name": "default"}})).await?;
    }
    service_cidr(engine).await?;
    kubernetes_service(engine, config).await
}

async fn adopt_services(engine: &Engine) -> Result<(), StartError> {
    let target = Target { resource: find("", "services")?, namespace: String::new(), name: String::new() };
    let failed = |status| StartError::Object { what: "list of services".to_owned(), status };
    let request = ListRequest {
        selection: Selection::parse(target.resource, "", "").map_err(failed)?,
        revision: None,
        version_match: VersionMatch::Unset,
        limit: 0,
        token: String::new(),
    };
    let listing = engine.list(&target, &request).await.map_err(|error| failed(error.status))?;
    for item in listing.items {
        engine.services.adopt(&item.decode().map_err(failed)?);
    }
    Ok(())
}

/// The ranges as the object that describes them, ready at once: nothing has to be reconciled.
async fn service_cidr(engine: &Engine) -> Result<(), StartError> {
    let ranges: Vec<String> = engine.services.ranges().iter().map(ToString::to_string).collect();
    let object = json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ranges}});
    if !ensure(engine, "networking.k8s.io", "servicecidrs", "", &object).await? {
        return Ok(());
    }
    let target = Target {
        resource: find("networking.k8s.io", "servicecidrs")?,
        namespace: String::new(),
        name: "kubernetes".to_owned(),
    };
    let mut with_status = typed(target.resource, &object);
    let condition = json!({
        "type": "Ready", "status": "True", "reason": "", "message": "Kubernetes Service CIDR is ready",
        "lastTransitionTime": meta::format_time(Timestamp::now()),
    });
    if let Some(fields) = with_status.as_object_mut() {
        fields.insert("status".to_owned(), json!({"conditions": [condition]}));
    }
    let failed = |status| StartError::Object { what: "status of the ServiceCIDR kubernetes".to_owned(), status };
    let change = Replacement::new(&target, with_status).map_err(failed)?;
    engine.update(&target, Part::Status, &change, false).await.map(drop).map_err(failed)
}

async fn kubernetes_service(engine: &Engine, config: &Config) -> Result<(), StartError> {
    let Some(ip) = engine.services.kubernetes_ip() else { return Ok(()) };
    let port = config.advertise_port;
    let service = json!({
        "metadata": {"name": "kubernetes", "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {
            "type": "ClusterIP", "clusterIP": ip.to_string(),
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": port}],
        },
    });
    ensure(engine, "", "services", "default", &service).await?;
    let address = config.advertise_address;
    if !is_reachable(address) {
        tracing::info!(%address, "the Service kubernetes has no endpoints: nodes can't reach the server at this address");
        return Ok(());
    }
    let endpoints = json!({
        "metadata": {"name": "kubernetes", "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
        "subsets": [{"addresses": [{"ip": address}], "ports": [{"name": "https", "port": port, "protocol": "TCP"}]}],
    });
    ensure(engine, "", "endpoints", "default", &endpoints).await?;
    let slice = json!({
        "metadata": {"name": "kubernetes", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": if address.is_ipv4() { "IPv4" } else { "IPv6" },
        "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
        "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
    });
    ensure(engine, "discovery.k8s.io", "endpointslices", "default", &slice).await.map(drop)
}

/// Whether an endpoint may have this address: loopback and "any" mean another machine on every node.
fn is_reachable(address: IpAddr) -> bool {
    !address.is_loopback() && !address.is_unspecified()
}

/// Creates an object unless there is one of that name, and returns whether it did.
async fn ensure(
    engine: &Engine,
    group: &'static str,
    plural: &'static str,
    namespace: &str,
    object: &Value,
) -> Result<bool, StartError> {
    let resource = find(group, plural)?;
    let target = Target { resource, namespace: namespace.to_owned(), name: meta::name(object).to_owned() };
    // Looked up first: the address of an existing Service would be refused before its name is.
    if engine.get(&target, None).await.is_ok() {
        return Ok(false);
    }
    match engine.create(&target, typed(resource, object), false).await {
        Ok(_) => Ok(true),
        Err(status) if status.reason == "AlreadyExists" => Ok(false),
        Err(status) => Err(StartError::Object { what: format!("{} {}", resource.kind, meta::name(object)), status }),
    }
}

fn typed(resource: &Resource, object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(fields) = object.as_object_mut() {
        fields.insert("apiVersion".to_owned(), json!(resource.api_version()));
        fields.insert("kind".to_owned(), json!(resource.kind));
    }
    object
}

fn find(group: &'static str, plural: &'static str) -> Result<&'static Resource, StartError> {
    registry().resource(group, "v1", plural).ok_or(StartError::UnknownResource { group, plural })
}
