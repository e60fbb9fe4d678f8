//! What can be done to a connection, numbered: frontends name a class, and a small map leads from it to a chain.
//!
//! A chain knows the number of endpoints to choose from, so there is one for every number in use and not one for every Service.
//! The kernel walks all of a map of verdicts whenever a jump is added to it, and so this map must not grow with Services.

use std::collections::HashMap;
use std::fmt;

use crate::model::{Action, EndpointSet, FrontendAddress, Rule, ServicePort};

/// Sends a connection to an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Pick {
    /// Whether the frontend is found under the NodePort wildcard.
    pub(super) node_port: bool,
    /// Which list is chosen from.
    pub(super) set: EndpointSet,
    /// Its length, at least 1.
    pub(super) count: u32,
    /// How long a client stays with its endpoint.
    pub(super) affinity_seconds: Option<u32>,
    /// Whether the source becomes the node's.
    pub(super) masquerade: bool,
}

/// The name of its chain.
impl fmt::Display for Pick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.node_port { "node-port" } else { "ip" };
        let set = match self.set {
            EndpointSet::Cluster => "cluster",
            EndpointSet::Local => "local",
        };
        write!(f, "{kind}-{set}-{}", self.count)?;
        if let Some(seconds) = self.affinity_seconds {
            write!(f, "-affinity-{seconds}")?;
        }
        if self.masquerade { write!(f, "-masquerade") } else { Ok(()) }
    }
}

/// What is done to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Class {
    /// Refused.
    Reject,
    /// Silently dropped.
    Drop,
    /// Sent to an endpoint.
    Pick(Pick),
}

impl Class {
    /// What `rule` means at a frontend of `service` with this address.
    pub(super) fn of(service: &ServicePort, address: FrontendAddress, rule: Rule) -> Self {
        let set = match rule.action {
            Action::Reject => return Self::Reject,
            Action::Drop => return Self::Drop,
            Action::Forward(set) => set,
        };
        let endpoints = match set {
            EndpointSet::Cluster => service.cluster_endpoints.len(),
            EndpointSet::Local => service.local_endpoints.len(),
        };
        Self::Pick(Pick {
            node_port: address == FrontendAddress::NodePort,
            set,
            count: u32::try_from(endpoints).unwrap_or(u32::MAX),
            affinity_seconds: service.affinity_seconds,
            masquerade: rule.masquerade,
        })
    }
}

/// The classes that have a number, and those whose number is new. Numbers are not taken back before everything is written
/// again: there are as many as there are different combinations in use, and a chain costs a few hundred bytes.
#[derive(Debug, Default)]
pub(super) struct Classes {
    numbers: HashMap<Class, u32>,
    fresh: Vec<(Class, u32)>,
}

impl Classes {
    /// The number of `class`, from 1 on.
    pub(super) fn number(&mut self, class: Class) -> u32 {
        let next = u32::try_from(self.numbers.len() + 1).unwrap_or(u32::MAX);
        *self.numbers.entry(class).or_insert_with(|| {
            self.fresh.push((class, next));
            next
        })
    }

    /// The classes that got a number since the last call.
    pub(super) fn take_fresh(&mut self) -> Vec<(Class, u32)> {
        std::mem::take(&mut self.fresh)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.numbers.len()
    }
}
