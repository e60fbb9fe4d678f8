//! Services and EndpointSlices in numbers, whose endpoints nobody asks.

use std::net::Ipv4Addr;
use std::ops::Range;

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use trama_lab::Cluster;

/// Requests to the API server at once while the objects are made.
const REQUESTS_AT_ONCE: usize = 16;
/// First endpoint address: the rest follow one by one, outside of every range that the lab uses.
const FIRST_ENDPOINT: Ipv4Addr = Ipv4Addr::new(10, 128, 0, 1);
/// From one changed Service to the next: a prime, so that all come before one comes again.
const STRIDE: u32 = 7919;

/// How many there are.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Services, each with one port and one EndpointSlice.
    pub services: u32,
    /// Endpoints of every Service.
    pub endpoints: u32,
}

impl Size {
    /// Makes them all; several requests at once.
    ///
    /// # Errors
    /// When the API server refuses one.
    pub async fn create_all(self, cluster: &Cluster) -> Result<()> {
        self.create(cluster, 0..self.services).await
    }

    /// Makes those of these numbers.
    ///
    /// # Errors
    /// When the API server refuses one.
    pub async fn create(self, cluster: &Cluster, numbers: Range<u32>) -> Result<()> {
        let services: Api<Service> = Api::namespaced(cluster.client(), "default");
        let slices: Api<EndpointSlice> = Api::namespaced(cluster.client(), "default");
        let numbers = futures::stream::iter(numbers).map(Ok::<u32, anyhow::Error>);
        let create = async |number: u32| {
            let service = serde_json::from_value(service(number))?;
            let slice = serde_json::from_value(self.slice(number, 0))?;
            services.create(&PostParams::default(), &service).await.context("cannot create a Service")?;
            slices.create(&PostParams::default(), &slice).await.context("cannot create an EndpointSlice")?;
            Ok(())
        };
        numbers.try_for_each_concurrent(REQUESTS_AT_ONCE, create).await
    }

    /// Moves the last endpoint of one Service; a Service that comes again moves it once more.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn change(self, cluster: &Cluster, number: u32) -> Result<()> {
        let stride = if self.services.is_multiple_of(STRIDE) { 1 } else { STRIDE };
        let index = number.wrapping_mul(stride) % self.services;
        let moved = self.slice(index, 1 + number / self.services % 2);
        let api: Api<EndpointSlice> = Api::namespaced(cluster.client(), "default");
        let name = format!("svc-{index}-1");
        api.patch(&name, &PatchParams::default(), &Patch::Merge(moved)).await.context("cannot change a slice")?;
        Ok(())
    }

    /// The slice of a Service; with `shift` its last endpoint moves to another address.
    fn slice(self, number: u32, shift: u32) -> Value {
        let first = u32::from(FIRST_ENDPOINT) + number * self.endpoints;
        let endpoints: Vec<Value> = (0..self.endpoints)
            .map(|index| {
                let moved = if index + 1 == self.endpoints { shift << 22 } else { 0 };
                let address = Ipv4Addr::from(first + index + moved);
                json!({ "addresses": [address.to_string()], "conditions": { "ready": true } })
            })
            .collect();
        json!({
            "metadata": {
                "name": format!("svc-{number}-1"),
                "labels": {
                    "kubernetes.io/service-name": format!("svc-{number}"),
                    "endpointslice.kubernetes.io/managed-by": "benches",
                },
            },
            "addressType": "IPv4",
            "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
            "endpoints": endpoints,
        })
    }
}

fn service(number: u32) -> Value {
    json!({
        "metadata": { "name": format!("svc-{number}") },
        "spec": { "ports": [{ "name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080 }] },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shift_moves_one_endpoint_only() {
        let size = Size { services: 10, endpoints: 3 };
        let addresses = |shift| {
            let slice = size.slice(2, shift);
            let endpoints = slice["endpoints"].as_array().unwrap().clone();
            endpoints.iter().map(|e| e["addresses"][0].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(addresses(0), ["10.128.0.7", "10.128.0.8", "10.128.0.9"]);
        assert_eq!(addresses(1), ["10.128.0.7", "10.128.0.8", "10.192.0.9"]);
    }
}
