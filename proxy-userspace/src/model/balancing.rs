//! How an endpoint of a Service is chosen: what its annotations ask for, read and bounded once for every backend.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{ANNOTATION_FORWARDING, Forwarding};

/// Annotation of a Service: how its endpoints are chosen, `random`, `maglev` or `least-connections`.
pub const ANNOTATION_ALGORITHM: &str = "service.trama.dev/lb-algorithm";
/// Annotation of a Service: weights of endpoints by address or network, `10.244.1.7=3,10.244.2.0/24=2`; the longest prefix counts.
pub const ANNOTATION_WEIGHTS: &str = "service.trama.dev/lb-weights";
/// Annotation of an EndpointSlice: the weight of all its endpoints that the Service gives none.
pub const ANNOTATION_WEIGHT: &str = "service.trama.dev/lb-weight";

/// The greatest weight; 0 is an endpoint that gets no new flows.
pub const WEIGHT_MAX: u8 = 100;
/// The weight of an endpoint to which nobody gives one.
pub const WEIGHT_DEFAULT: u8 = 1;
/// Entries of [`ANNOTATION_WEIGHTS`] that are read; more are a mistake that is told.
pub const WEIGHTS_MAX: usize = 1024;

/// Which endpoint a new flow goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Algorithm {
    /// Any, in proportion to the weights.
    #[default]
    Random,
    /// The one that a table names for the hash of the flow: the same on every node, and nearly the same after endpoints came or
    /// went (Eisenbud et al., "Maglev", NSDI 2016, 3.4).
    Maglev,
    /// Of two that are drawn at random the one with fewer open flows in proportion to its weight (Mitzenmacher, "The Power of
    /// Two Choices in Randomized Load Balancing", 2001). A node counts the flows that it opened itself.
    LeastConnections,
}

impl Algorithm {
    /// Every algorithm.
    pub const ALL: [Self; 3] = [Self::Random, Self::Maglev, Self::LeastConnections];

    /// Its name in [`ANNOTATION_ALGORITHM`].
    pub const fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Maglev => "maglev",
            Self::LeastConnections => "least-connections",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == text)
    }
}

/// What a Service asks for beyond the default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Balancing {
    /// How an endpoint is chosen.
    pub algorithm: Algorithm,
    /// How endpoints on other nodes are reached from outside; `None` is the node's default.
    pub forwarding: Option<Forwarding>,
    /// Weights by network, the longest prefix first.
    weights: Vec<(IpNet, u8)>,
    /// What is wrong with the annotations, for who wrote them. What is wrong counts as absent.
    pub problem: Option<String>,
}

impl Balancing {
    /// Reads the three annotations of a Service; `None` where none is there.
    pub fn parse(algorithm: Option<&str>, weights: Option<&str>, forwarding: Option<&str>) -> Option<Self> {
        if algorithm.is_none() && weights.is_none() && forwarding.is_none() {
            return None;
        }
        let mut problems = Vec::new();
        let algorithm = algorithm.map_or(Algorithm::Random, |text| {
            Algorithm::parse(text).unwrap_or_else(|| {
                let allowed = Algorithm::ALL.map(Algorithm::name).join(", ");
                problems.push(format!("{ANNOTATION_ALGORITHM}: {text:?} is none of {allowed}; random is used"));
                Algorithm::Random
            })
        });
        let weights = parse_weights(weights.unwrap_or_default(), &mut problems);
        let forwarding = forwarding.and_then(|text| {
            let parsed = Forwarding::parse(text);
            if parsed.is_none() {
                let allowed = Forwarding::ALL.map(Forwarding::name).join(", ");
                problems.push(format!(
                    "{ANNOTATION_FORWARDING}: {text:?} is none of {allowed}; the node's default is used"
                ));
            }
            parsed
        });
        let problem = (!problems.is_empty()).then(|| problems.join("; "));
        Some(Self { algorithm, forwarding, weights, problem })
    }

    /// The weight of an endpoint; `None` where no network of the annotation holds it.
    pub fn weight(&self, address: IpAddr) -> Option<u8> {
        self.weights.iter().find(|(network, _)| network.contains(&address)).map(|(_, weight)| *weight)
    }
}

/// A weight as annotations have it: a number up to [`WEIGHT_MAX`].
pub fn parse_weight(text: &str) -> Option<u8> {
    text.trim().parse().ok().filter(|weight| *weight <= WEIGHT_MAX)
}

fn parse_weights(text: &str, problems: &mut Vec<String>) -> Vec<(IpNet, u8)> {
    let mut weights = Vec::new();
    let entries = text.split(',').map(str::trim).filter(|entry| !entry.is_empty());
    for (index, entry) in entries.enumerate() {
        if index >= WEIGHTS_MAX {
            problems.push(format!("{ANNOTATION_WEIGHTS}: entries beyond {WEIGHTS_MAX} are ignored"));
            break;
        }
        match parse_entry(entry) {
            Some(parsed) => weights.push(parsed),
            // One is enough to say what is wrong.
            None if problems.iter().any(|problem| problem.starts_with(ANNOTATION_WEIGHTS)) => {}
            None => problems.push(format!(
                "{ANNOTATION_WEIGHTS}: {entry:?} is not address=weight or network=weight with a weight of 0 to {WEIGHT_MAX}, and is ignored"
            )),
        }
    }
    weights.sort_by_key(|(network, _)| std::cmp::Reverse(network.prefix_len()));
    weights.shrink_to_fit();
    weights
}

fn parse_entry(entry: &str) -> Option<(IpNet, u8)> {
    let (network, weight) = entry.split_once('=')?;
    let network = network.trim();
    let network = network.parse::<IpNet>().or_else(|_| network.parse::<IpAddr>().map(IpNet::from)).ok()?;
    Some((network.trunc(), parse_weight(weight)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn nothing_is_asked_for_where_nothing_is_said() {
        assert_eq!(Balancing::parse(None, None, None), None);
    }

    #[test]
    fn every_algorithm_is_read_by_its_name() {
        for algorithm in Algorithm::ALL {
            let balancing = Balancing::parse(Some(algorithm.name()), None, None).unwrap();
            assert_eq!((balancing.algorithm, balancing.problem), (algorithm, None));
        }
    }

    #[test]
    fn an_unknown_algorithm_is_random_and_told_with_what_is_allowed() {
        let balancing = Balancing::parse(Some("round-robin"), None, None).unwrap();
        assert_eq!(balancing.algorithm, Algorithm::Random);
        let problem = balancing.problem.unwrap();
        assert!(
            problem.contains("\"round-robin\"") && problem.contains("random, maglev, least-connections"),
            "{problem}"
        );
    }

    #[test]
    fn an_unknown_forwarding_is_the_node_s_and_told_with_what_is_allowed() {
        let balancing = Balancing::parse(None, None, Some("nat")).unwrap();
        assert_eq!(balancing.forwarding, None);
        let problem = balancing.problem.unwrap();
        assert!(problem.contains("\"nat\" is none of snat, dsr, hybrid"), "{problem}");
        assert_eq!(Balancing::parse(None, None, Some("dsr")).unwrap().forwarding, Some(Forwarding::Dsr));
    }

    #[test]
    fn the_longest_prefix_gives_the_weight() {
        let text = "10.244.0.0/16=2, 10.244.1.7=0,10.244.1.0/24=3,fd00::/64=9";
        let balancing = Balancing::parse(None, Some(text), None).unwrap();
        assert_eq!(balancing.problem, None);
        let weights =
            ["10.244.1.7", "10.244.1.8", "10.244.2.1", "fd00::1", "192.0.2.1"].map(|a| balancing.weight(address(a)));
        assert_eq!(weights, [Some(0), Some(3), Some(2), Some(9), None]);
    }

    #[test]
    fn what_is_no_weight_is_ignored_and_told_once() {
        for wrong in ["10.0.0.1=101", "10.0.0.1=-1", "10.0.0.1", "10.0.0.1=", "node-1=3", "10.0.0.1=1=2"] {
            let balancing = Balancing::parse(None, Some(&format!("{wrong},{wrong},10.0.0.2=4")), None).unwrap();
            assert_eq!(balancing.weight(address("10.0.0.1")), None, "{wrong}");
            assert_eq!(balancing.weight(address("10.0.0.2")), Some(4), "{wrong}");
            let problem = balancing.problem.unwrap();
            assert_eq!(problem.matches(ANNOTATION_WEIGHTS).count(), 1, "{problem}");
        }
        let many = vec!["10.0.0.1=1"; WEIGHTS_MAX + 1].join(",");
        let balancing = Balancing::parse(None, Some(&many), None).unwrap();
        assert!(balancing.problem.unwrap().contains("beyond 1024"));
        assert_eq!(balancing.weights.len(), WEIGHTS_MAX);
    }
}
