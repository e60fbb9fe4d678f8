//! Keeps one copy of every string and hint list that many objects share.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

/// Entries held before the first sweep.
const SWEEP_FLOOR: usize = 1024;

/// A set of shared values. It holds at most twice what is in use elsewhere (and [`SWEEP_FLOOR`] more): when it has doubled since
/// the last sweep, what nobody else holds is dropped.
#[derive(Debug)]
struct Pool<T: ?Sized> {
    values: HashSet<Arc<T>>,
    sweep_at: usize,
}

impl<T: ?Sized + Eq + Hash> Pool<T> {
    fn new() -> Self {
        Self { values: HashSet::new(), sweep_at: SWEEP_FLOOR }
    }

    fn share(&mut self, value: impl AsRef<T> + Into<Arc<T>>) -> Arc<T> {
        if let Some(known) = self.values.get(value.as_ref()) {
            return Arc::clone(known);
        }
        if self.values.len() >= self.sweep_at {
            self.values.retain(|value| Arc::strong_count(value) > 1);
            self.sweep_at = self.values.len() * 2 + SWEEP_FLOOR;
        }
        let value: Arc<T> = value.into();
        self.values.insert(Arc::clone(&value));
        value
    }
}

/// The shared strings and zone hints of all sources.
#[derive(Debug)]
pub(super) struct Interner {
    strings: Pool<str>,
    hints: Pool<Vec<Arc<str>>>,
}

impl Interner {
    pub(super) fn new() -> Self {
        Self { strings: Pool::new(), hints: Pool::new() }
    }

    pub(super) fn string(&mut self, text: &str) -> Arc<str> {
        self.strings.share(text)
    }

    pub(super) fn hints(&mut self, zones: Vec<Arc<str>>) -> Arc<Vec<Arc<str>>> {
        self.hints.share(zones)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_equal_strings_and_forgets_unused_ones() {
        let mut interner = Interner::new();
        let kept = interner.string("default");
        assert!(Arc::ptr_eq(&kept, &interner.string("default")));
        for i in 0..10 * SWEEP_FLOOR {
            interner.string(&i.to_string());
        }
        assert!(interner.strings.values.len() <= 2 * SWEEP_FLOOR + 2, "{}", interner.strings.values.len());
        assert!(Arc::ptr_eq(&kept, &interner.string("default")));
    }
}
