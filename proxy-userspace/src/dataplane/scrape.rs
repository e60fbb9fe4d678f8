//! What a scrape of `/metrics` gets from a data plane, and on which thread.
//!
//! Whoever scrapes must not keep a change waiting: the thread that programs gives what it has at hand and answers questions about what it
//! knows; whole maps are read on another one.

use std::fmt;
use std::net::SocketAddr;

use crate::model::ServicePortName;

/// Counters of the kernel side: complete Prometheus name, label pairs, value.
pub type Counters = Vec<(String, Vec<(String, String)>, u64)>;

/// A ServicePort by the number that the kernel has for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NumberedService {
    /// Its number.
    pub id: u32,
    /// Its name.
    pub name: ServicePortName,
    /// Number and address of each endpoint.
    pub endpoints: Vec<(u32, SocketAddr)>,
}

/// Asks the thread that programs for the ServicePorts with these numbers, and waits for the answer: [`super::Dataplane::numbered`].
pub type AskNumbered<'a> = &'a dyn Fn(Vec<u32>, usize) -> Vec<NumberedService>;

/// Reads what is not at hand.
type Read = Box<dyn FnOnce(AskNumbered<'_>) -> Counters + Send>;

/// What a scrape gets.
pub struct Scrape {
    counters: Counters,
    rest: Option<Read>,
}

impl Scrape {
    /// These, and nothing that takes time.
    pub fn at_hand(counters: Counters) -> Self {
        Self { counters, rest: None }
    }

    /// These, and what `read` gives.
    pub fn with_rest(self, read: impl FnOnce(AskNumbered<'_>) -> Counters + Send + 'static) -> Self {
        Self { rest: Some(Box::new(read)), ..self }
    }

    /// All counters. To be called on a thread that may be busy for milliseconds, and that is not the one that `ask` waits for.
    pub fn read(self, ask: AskNumbered<'_>) -> Counters {
        let mut counters = self.counters;
        counters.extend(self.rest.map(|read| read(ask)).unwrap_or_default());
        counters
    }
}

impl fmt::Debug for Scrape {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Scrape").field("counters", &self.counters).finish_non_exhaustive()
    }
}
