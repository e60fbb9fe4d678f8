//! Whether the EndpointSlice controller has caught up with the Pods.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};

/// Whether the slices of every Service with a selector name exactly the Pods that run and match it, in each of its families.
pub(crate) async fn are_complete(client: &Client) -> Result<bool> {
    let all = ListParams::default();
    let services = Api::<Service>::all(client.clone()).list(&all).await.context("cannot list the Services")?;
    let slices =
        Api::<EndpointSlice>::all(client.clone()).list(&all).await.context("cannot list the EndpointSlices")?;
    let pods = Api::<Pod>::all(client.clone()).list(&all).await.context("cannot list the Pods")?;
    Ok(services.iter().all(|service| {
        let wanted = wanted_addresses(service, &pods.items);
        wanted.is_none_or(|wanted| wanted == named_addresses(service, &slices.items))
    }))
}

/// Addresses of the matching Pods that run; `None` for a Service without a selector.
fn wanted_addresses(service: &Service, pods: &[Pod]) -> Option<BTreeSet<String>> {
    let spec = service.spec.as_ref()?;
    let selector = spec.selector.as_ref().filter(|selector| !selector.is_empty())?;
    let families: Vec<&str> = spec.ip_families.iter().flatten().map(String::as_str).collect();
    let matching = pods.iter().filter(|pod| {
        let labelled = selector.iter().all(|(key, value)| pod.labels().get(key) == Some(value));
        labelled && pod.namespace() == service.namespace() && pod.metadata.deletion_timestamp.is_none()
    });
    let addresses = matching.filter_map(|pod| pod.status.as_ref()).flat_map(|status| status.pod_ips.iter().flatten());
    let of_family = |ip: &&str| families.contains(&if ip.contains(':') { "IPv6" } else { "IPv4" });
    Some(addresses.map(|address| address.ip.as_str()).filter(of_family).map(str::to_owned).collect())
}

fn named_addresses(service: &Service, slices: &[EndpointSlice]) -> BTreeSet<String> {
    let of_service = slices.iter().filter(|slice| {
        let named = slice.labels().get("kubernetes.io/service-name").is_some_and(|name| *name == service.name_any());
        named && slice.namespace() == service.namespace()
    });
    let ready = of_service
        .flat_map(|slice| slice.endpoints.iter().flatten())
        .filter(|endpoint| endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true));
    ready.flat_map(|endpoint| &endpoint.addresses).cloned().collect()
}
