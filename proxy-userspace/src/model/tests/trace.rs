//! [`answer`] with addresses as text.

use crate::model::{Answer, Packet, Protocol, ServiceSnapshot, answer};

/// An [`Answer`] that is easy to write down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// To one of these; whether the source becomes the node's.
    Dnat(Vec<String>, bool),
    Reject,
    Drop,
    Pass,
}

/// What a TCP packet meets.
pub(crate) fn tcp(snapshot: &ServiceSnapshot, src: &str, dst: &str) -> Verdict {
    through(snapshot, None, src, dst)
}

/// What a TCP packet meets that came in through `input`.
pub(crate) fn through(snapshot: &ServiceSnapshot, input: Option<&str>, src: &str, dst: &str) -> Verdict {
    let (source, destination) = (src.parse().unwrap(), dst.parse().unwrap());
    match answer(snapshot, &Packet { protocol: Protocol::Tcp, source, destination, input }) {
        Answer::Forward { endpoints, masquerade, .. } => {
            assert!(!endpoints.is_empty(), "{src} to {dst}: forwards to nobody");
            Verdict::Dnat(endpoints.iter().map(|e| e.address().to_string()).collect(), masquerade)
        }
        Answer::Reject => Verdict::Reject,
        Answer::Drop => Verdict::Drop,
        Answer::Pass => Verdict::Pass,
    }
}

/// A verdict that forwards.
pub(crate) fn to(backends: &[&str], masquerade: bool) -> Verdict {
    Verdict::Dnat(backends.iter().map(ToString::to_string).collect(), masquerade)
}
