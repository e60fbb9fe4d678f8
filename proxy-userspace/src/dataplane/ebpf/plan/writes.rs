//! The writes of one sync.

use std::collections::HashSet;

use proxy_common::{Backend, EndpointKey, Frontend, FrontendKey, SourceRange};

use super::Range;

/// Backends and slots that a plan collects before they are worth writing: a first plan for a large cluster would hold megabytes.
const WRITE_AHEAD_MIN: usize = 8192;

/// Writes of one sync, in the order in which they are executed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::dataplane::ebpf) struct Writes<A> {
    /// Backends that get an endpoint.
    pub(in crate::dataplane::ebpf) backends: Vec<(u32, Backend<A>)>,
    /// Slots: index and backend id.
    pub(in crate::dataplane::ebpf) slots: Vec<(u32, u32)>,
    /// Client networks that are let in. Between this and `ranges_gone` the old ones and the new ones are.
    pub(in crate::dataplane::ebpf) ranges: Vec<Range<A>>,
    /// Where other nodes' tunnels lead, with the backend.
    pub(in crate::dataplane::ebpf) endpoints: Vec<(EndpointKey<A>, u32)>,
    /// Frontends that are new or different.
    pub(in crate::dataplane::ebpf) frontends: Vec<(FrontendKey<A>, Frontend)>,
    /// Frontends that go.
    pub(in crate::dataplane::ebpf) deleted: Vec<FrontendKey<A>>,
    /// Client networks that are let in no longer.
    pub(in crate::dataplane::ebpf) ranges_gone: Vec<Range<A>>,
    /// Where tunnels lead no longer.
    pub(in crate::dataplane::ebpf) endpoints_gone: Vec<EndpointKey<A>>,
    /// Backends that lose their endpoint.
    pub(in crate::dataplane::ebpf) retired: Vec<(u32, Backend<A>)>,
}

impl<A> Default for Writes<A> {
    fn default() -> Self {
        Self {
            backends: vec![],
            slots: vec![],
            ranges: vec![],
            endpoints: vec![],
            frontends: vec![],
            deleted: vec![],
            ranges_gone: vec![],
            endpoints_gone: vec![],
            retired: vec![],
        }
    }
}

impl<A> Writes<A> {
    /// What moved from one ServicePort to another is written, not deleted after it was written.
    pub(in crate::dataplane::ebpf) fn keep_moved(&mut self)
    where
        FrontendKey<A>: std::hash::Hash + Eq,
        SourceRange<A>: std::hash::Hash + Eq,
        EndpointKey<A>: std::hash::Hash + Eq,
    {
        if !self.deleted.is_empty() && !self.frontends.is_empty() {
            let written: HashSet<&FrontendKey<A>> = self.frontends.iter().map(|(key, _)| key).collect();
            self.deleted.retain(|key| !written.contains(key));
        }
        if !self.ranges_gone.is_empty() && !self.ranges.is_empty() {
            let written: HashSet<&Range<A>> = self.ranges.iter().collect();
            self.ranges_gone.retain(|range| !written.contains(range));
        }
        if !self.endpoints_gone.is_empty() && !self.endpoints.is_empty() {
            let written: HashSet<&EndpointKey<A>> = self.endpoints.iter().map(|(key, _)| key).collect();
            self.endpoints_gone.retain(|key| !written.contains(key));
        }
        if !self.retired.is_empty() && !self.backends.is_empty() {
            let written: HashSet<u32> = self.backends.iter().map(|(id, _)| *id).collect();
            self.retired.retain(|(id, _)| !written.contains(id));
        }
    }

    /// Takes out what nobody reads before a frontend refers to it, once there is much of it: it may be written ahead of the rest.
    /// Nothing while backends are to be retired, because one of them may be among those that get an endpoint.
    pub(in crate::dataplane::ebpf) fn take_unread(&mut self) -> Option<Self> {
        if self.backends.len() + self.slots.len() < WRITE_AHEAD_MIN || !self.retired.is_empty() {
            return None;
        }
        let (backends, slots) = (std::mem::take(&mut self.backends), std::mem::take(&mut self.slots));
        Some(Self { backends, slots, ..Self::default() })
    }

    /// Number of entries that are written.
    pub(in crate::dataplane::ebpf) fn len(&self) -> usize {
        let before = self.backends.len() + self.slots.len() + self.ranges.len() + self.endpoints.len();
        let after = self.ranges_gone.len() + self.endpoints_gone.len() + self.retired.len();
        before + self.frontends.len() + self.deleted.len() + after
    }
}
