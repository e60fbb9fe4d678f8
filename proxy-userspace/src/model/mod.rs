//! The semantic core: what every Service means on this node, decided once for every backend.
//!
//! Pure: no IO, no clock, no tokio, no kube and no aya types.
mod answer;
mod balancing;
mod claims;
mod decide;
mod delta;
mod desired;
mod endpoint;
mod forwarding;
mod object;
mod snapshot;

#[cfg(test)]
pub(crate) mod tests;

pub use answer::{Answer, Packet, answer};
pub use balancing::{
    ANNOTATION_ALGORITHM, ANNOTATION_WEIGHT, ANNOTATION_WEIGHTS, Algorithm, Balancing, WEIGHT_DEFAULT, WEIGHT_MAX,
    WEIGHTS_MAX, parse_weight,
};
pub use decide::{NodePolicy, decide, health_checks};
pub use delta::{apply, diff};
pub use desired::{Desired, NoLocalEndpoints};
pub use forwarding::{ANNOTATION_FORWARDING, Forwarding};
pub use object::{PortSpec, ServiceKey, ServiceObject, SliceEndpoint, SliceObject, SlicePort};
pub use snapshot::*;
