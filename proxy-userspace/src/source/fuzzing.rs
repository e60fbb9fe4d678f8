//! What the API server sends, read from any bytes: for `fuzz/fuzz_targets`, and in no other build.

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Deserializer, Value, from_value};

use super::convert::{Converter, node_facts, trigger_time};
use crate::model::{NodePolicy, ServiceObject, SliceObject, decide};

/// Reads JSON objects, one behind the other, each as a Service, an EndpointSlice and a Node, and decides every Service with every
/// EndpointSlice. Returns how many ServicePorts that comes to.
pub fn objects(json: &[u8]) -> usize {
    let mut converter = Converter::new("node1");
    let (mut services, mut slices) = (Vec::new(), Vec::new());
    for value in Deserializer::from_slice(json).into_iter::<Value>().map_while(Result::ok) {
        services.extend(from_value::<Service>(value.clone()).ok().and_then(|service| converter.service(&service)));
        if let Ok(slice) = from_value::<EndpointSlice>(value.clone()) {
            let _trigger = trigger_time(&slice);
            slices.extend(converter.slice(&slice));
        }
        let _facts = from_value::<Node>(value).map(|node| node_facts(&node));
    }
    services.iter().map(|service| ports(service, &slices)).sum()
}

fn ports(service: &ServiceObject, slices: &[SliceObject]) -> usize {
    let slices: Vec<&SliceObject> = slices.iter().collect();
    decide(service, &slices, &NodePolicy::default()).len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_and_its_slice_are_decided() {
        assert_eq!(objects(include_bytes!("../../../fuzz/seeds/objects/dual-stack.json")), 2);
        assert_eq!(objects(b"{} 7 [] {\"metadata\": {}} {"), 0);
    }
}
