use std::sync::Arc;

use trama_proxy::model::{IpFamily, NameParts, Protocol};

use super::*;
use crate::fuzz::read::{ACK, SCTP};

fn tuple(source: &str, destination: &str) -> Tuple {
    Tuple { source: source.parse().unwrap(), destination: destination.parse().unwrap(), protocol: SCTP }
}

fn candidate(out: Tuple) -> Candidate {
    let [namespace, service, port] = ["ns", "s1", "p0"].map(Arc::from);
    let parts = NameParts { namespace, service, port, protocol: Protocol::Sctp, family: IpFamily::V4 };
    let backend = (ServicePortName::new(parts), out.destination, 1);
    let (destination, source) = (out.destination, out.source.ip());
    Candidate {
        destination,
        source,
        masquerade: true,
        remote: true,
        lost: false,
        stack: false,
        course: Course::Plain,
        backend,
    }
}

/// The node opens the tuple that the endpoint sees, when nobody can say what becomes of that: if the endpoint is gone, the program
/// forgets where its answers go.
#[test]
fn answers_of_an_endpoint_that_is_gone_may_be_given_away() {
    let arrived = Crossing { hook: Hook::Ingress, link: Link::Eth0 };
    let (key, out) = (tuple("198.51.100.7:4000", "10.96.0.1:80"), tuple("172.18.0.11:4000", "10.244.2.3:8080"));
    for alive in [true, false] {
        let mut model = Model::default();
        let candidate = candidate(out);
        if alive {
            model.endpoints.insert((candidate.backend.0.clone(), out.destination), 1);
        }
        model.open(arrived, key, out, &candidate);
        let answer = |model: &mut Model| model.segment(arrived, out.reversed(), ACK);
        assert!(matches!(answer(&mut model), Meaning::Known(entry) if entry.reply));
        model.blur(out);
        assert_eq!(matches!(answer(&mut model), Meaning::Known(_)), alive);
        assert_eq!(matches!(model.segment(arrived, key, ACK), Meaning::Known(_)), alive);
    }
}
