//! Which EndpointSlices a Service should have, and the fewest writes that lead there.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::ResourceExt as _;

use crate::candidate::{self, Family};

/// Endpoints in one slice, as in kube-controller-manager.
const ENDPOINTS_PER_SLICE_MAX: usize = 100;

pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";
pub(crate) const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
pub(crate) const MANAGER: &str = "endpointslice-controller.k8s.io";
pub(crate) const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
const HEADLESS: &str = "service.kubernetes.io/headless";
const ZONE: &str = "topology.kubernetes.io/zone";

/// The writes that make a Service's slices right.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) create: Vec<EndpointSlice>,
    pub(crate) update: Vec<EndpointSlice>,
    pub(crate) delete: Vec<Arc<EndpointSlice>>,
}

/// What a plan is made from.
pub(crate) struct Input<'a> {
    pub(crate) service: &'a Service,
    /// The pods that the Service selects.
    pub(crate) pods: &'a [Arc<Pod>],
    /// Looks a node up by name.
    pub(crate) node: &'a dyn Fn(&str) -> Option<Arc<Node>>,
    /// The slices of the Service that this controller manages.
    pub(crate) existing: &'a [Arc<EndpointSlice>],
    /// When what caused this plan happened, if that is known.
    pub(crate) trigger: Option<Timestamp>,
}

/// Whether a slice is ours and belongs to this Service.
pub(crate) fn is_ours(slice: &EndpointSlice, service: &str) -> bool {
    let label = |key: &str| slice.labels().get(key).map(String::as_str);
    label(MANAGED_BY) == Some(MANAGER) && label(SERVICE_NAME) == Some(service)
}

impl Input<'_> {
    /// Makes the plan over all families of the Service.
    pub(crate) fn plan(&self) -> Plan {
        let mut plan = Plan::default();
        let families = Family::of_service(self.service);
        for family in &families {
            self.plan_family(*family, &mut plan);
        }
        let unwanted =
            |slice: &&Arc<EndpointSlice>| !families.iter().any(|family| slice.address_type == family.as_str());
        plan.delete.extend(self.existing.iter().filter(unwanted).cloned());
        plan
    }

    fn plan_family(&self, family: Family, plan: &mut Plan) {
        let mut groups = self.desired(family);
        if groups.is_empty() {
            // A Service without endpoints has one empty slice, so that its consumers know that it was seen.
            groups.insert(String::new(), (Vec::new(), BTreeMap::new()));
        }
        let mut existing: HashMap<String, Vec<&Arc<EndpointSlice>>> = HashMap::new();
        for slice in self.existing.iter().filter(|slice| slice.address_type == family.as_str()) {
            existing.entry(ports_key(slice.ports.as_deref().unwrap_or_default())).or_default().push(slice);
        }
        for (key, (ports, endpoints)) in groups {
            let slices = existing.remove(&key).unwrap_or_default();
            self.plan_group(family, &ports, endpoints, &slices, plan);
        }
        plan.delete.extend(existing.into_values().flatten().cloned());
    }

    /// The endpoints of a family by their ports; pods with the same named ports share slices.
    fn desired(&self, family: Family) -> BTreeMap<String, (Vec<EndpointPort>, BTreeMap<String, Endpoint>)> {
        let mut groups: BTreeMap<String, (Vec<EndpointPort>, BTreeMap<String, Endpoint>)> = BTreeMap::new();
        for pod in self.pods.iter().filter(|pod| !candidate::has_ended(pod)) {
            let Some(address) = candidate::address(pod, family) else { continue };
            let ports = candidate::ports(self.service, pod);
            let endpoint = self.endpoint(pod, address);
            let group = groups.entry(ports_key(&ports)).or_insert_with(|| (ports, BTreeMap::new()));
            group.1.insert(endpoint_key(&endpoint), endpoint);
        }
        groups
    }

    fn endpoint(&self, pod: &Pod, address: &str) -> Endpoint {
        let serving = candidate::is_ready(pod);
        let terminating = pod.metadata.deletion_timestamp.is_some();
        let node_name = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
        let node = node_name.as_deref().and_then(self.node);
        Endpoint {
            addresses: vec![address.to_owned()],
            conditions: Some(EndpointConditions {
                ready: Some(candidate::publishes_unready(self.service) || (serving && !terminating)),
                serving: Some(serving),
                terminating: Some(terminating),
            }),
            hostname: candidate::hostname(self.service, pod),
            zone: node.and_then(|node| node.labels().get(ZONE).cloned()),
            node_name,
            target_ref: Some(ObjectReference {
                kind: Some("Pod".to_owned()),
                namespace: pod.namespace(),
                name: pod.metadata.name.clone(),
                uid: pod.metadata.uid.clone(),
                ..ObjectReference::default()
            }),
            ..Endpoint::default()
        }
    }

    /// Keeps endpoints where they are, fills up slices that change anyway, and puts the rest into new ones.
    fn plan_group(
        &self,
        family: Family,
        ports: &[EndpointPort],
        mut missing: BTreeMap<String, Endpoint>,
        slices: &[&Arc<EndpointSlice>],
        plan: &mut Plan,
    ) {
        let mut kept: Vec<(&Arc<EndpointSlice>, Vec<Endpoint>, bool)> = Vec::new();
        for slice in slices {
            let before = slice.endpoints.as_deref().unwrap_or_default();
            let after: Vec<Endpoint> =
                before.iter().filter_map(|endpoint| missing.remove(&endpoint_key(endpoint))).collect();
            let changed = after != before;
            kept.push((slice, after, changed));
        }
        // Slices that change anyway take new endpoints first, then the fullest of the others.
        kept.sort_by_key(|(_, endpoints, changed)| (!changed, std::cmp::Reverse(endpoints.len())));
        let mut rest = missing.into_values();
        for (_, endpoints, changed) in &mut kept {
            let room = ENDPOINTS_PER_SLICE_MAX.saturating_sub(endpoints.len());
            let before = endpoints.len();
            endpoints.extend(rest.by_ref().take(room));
            *changed |= endpoints.len() != before;
        }
        let rest: Vec<Endpoint> = rest.collect();
        plan.create.extend(rest.chunks(ENDPOINTS_PER_SLICE_MAX).map(|chunk| self.slice(family, ports, chunk.to_vec())));
        self.settle(kept, plan, family, ports);
    }

    fn settle(
        &self,
        kept: Vec<(&Arc<EndpointSlice>, Vec<Endpoint>, bool)>,
        plan: &mut Plan,
        family: Family,
        ports: &[EndpointPort],
    ) {
        let any_filled = kept.iter().any(|(_, endpoints, _)| !endpoints.is_empty()) || !plan_is_empty(plan, family);
        let mut placeholder = any_filled;
        for (slice, endpoints, changed) in kept {
            if endpoints.is_empty() && placeholder {
                plan.delete.push(Arc::clone(slice));
                continue;
            }
            placeholder |= endpoints.is_empty();
            let labels = self.labels();
            if changed
                || slice.metadata.labels.as_ref() != Some(&labels)
                || slice.metadata.owner_references != Some(vec![self.owner()])
            {
                plan.update.push(self.updated(slice, labels, endpoints));
            }
        }
        if !placeholder {
            plan.create.push(self.slice(family, ports, Vec::new()));
        }
    }

    fn updated(
        &self,
        slice: &EndpointSlice,
        labels: BTreeMap<String, String>,
        endpoints: Vec<Endpoint>,
    ) -> EndpointSlice {
        let mut slice = slice.clone();
        slice.metadata.labels = Some(labels);
        slice.metadata.owner_references = Some(vec![self.owner()]);
        slice.endpoints = Some(endpoints);
        self.stamp(&mut slice.metadata);
        slice
    }

    fn slice(&self, family: Family, ports: &[EndpointPort], endpoints: Vec<Endpoint>) -> EndpointSlice {
        let mut metadata = ObjectMeta {
            generate_name: Some(format!("{}-", self.service.name_any())),
            namespace: self.service.namespace(),
            labels: Some(self.labels()),
            owner_references: Some(vec![self.owner()]),
            ..ObjectMeta::default()
        };
        self.stamp(&mut metadata);
        EndpointSlice {
            address_type: family.as_str().to_owned(),
            endpoints: Some(endpoints),
            metadata,
            ports: Some(ports.to_vec()),
        }
    }

    fn stamp(&self, metadata: &mut ObjectMeta) {
        let annotations = metadata.annotations.get_or_insert_default();
        match self.trigger {
            Some(trigger) => {
                annotations.insert(TRIGGER_TIME.to_owned(), format!("{trigger:.0}"));
            }
            // An old time would count what happened since as latency.
            None => {
                annotations.remove(TRIGGER_TIME);
            }
        }
        if annotations.is_empty() {
            metadata.annotations = None;
        }
    }

    /// The Service's own labels and those that say whose slice it is.
    fn labels(&self) -> BTreeMap<String, String> {
        let own = self
            .service
            .labels()
            .iter()
            .filter(|(key, _)| ![HEADLESS, SERVICE_NAME, MANAGED_BY].contains(&key.as_str()));
        let mut labels: BTreeMap<String, String> = own.map(|(key, value)| (key.clone(), value.clone())).collect();
        labels.insert(SERVICE_NAME.to_owned(), self.service.name_any());
        labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
        if candidate::is_headless(self.service) {
            labels.insert(HEADLESS.to_owned(), String::new());
        }
        labels
    }

    fn owner(&self) -> OwnerReference {
        OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Service".to_owned(),
            name: self.service.name_any(),
            uid: self.service.uid().unwrap_or_default(),
            controller: Some(true),
            block_owner_deletion: Some(true),
        }
    }
}

fn plan_is_empty(plan: &Plan, family: Family) -> bool {
    !plan.create.iter().any(|slice| slice.address_type == family.as_str())
}

/// What makes two port lists the same, whatever their order.
fn ports_key(ports: &[EndpointPort]) -> String {
    let mut texts: Vec<String> = ports
        .iter()
        .map(|port| {
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            format!(
                "{}/{}/{}/{}",
                text(&port.name),
                text(&port.protocol),
                port.port.unwrap_or(0),
                text(&port.app_protocol)
            )
        })
        .collect();
    texts.sort();
    texts.join(",")
}

/// What makes an endpoint the same one when its conditions change: the pod and the address.
fn endpoint_key(endpoint: &Endpoint) -> String {
    let uid = endpoint.target_ref.as_ref().and_then(|target| target.uid.as_deref()).unwrap_or_default();
    format!("{}/{uid}", endpoint.addresses.first().map(String::as_str).unwrap_or_default())
}
