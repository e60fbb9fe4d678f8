//! A plan as data: the elements, chains and rules that one transaction changes.

use node_sys::nftables::Verdict;

use super::layout::SetName;
use super::rules::Rule;
use crate::dataplane::elements::Words;

/// An element to be added or deleted; its bytes lie in the arena, key before value.
#[derive(Debug, Clone, Copy)]
struct Entry {
    set: SetName,
    key: u8,
    value: u8,
}

/// Elements of many sets, packed: a plan of everything has a hundred thousand and more.
#[derive(Debug, Default)]
pub(super) struct Elements {
    entries: Vec<Entry>,
    bytes: Vec<u8>,
}

impl Elements {
    /// Appends an element; the value is empty for a set. For a range, the value is its last key.
    pub(super) fn push(&mut self, set: SetName, key: &Words, value: &Words) {
        let (key, value) = (key.bytes(), value.bytes());
        let length = |bytes: &[u8]| u8::try_from(bytes.len()).unwrap_or(u8::MAX);
        self.entries.push(Entry { set, key: length(key), value: length(value) });
        self.bytes.extend_from_slice(key);
        self.bytes.extend_from_slice(value);
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Each with its set, key and value, those of one set together.
    pub(super) fn iter(&self) -> impl Iterator<Item = (SetName, &[u8], &[u8])> {
        SetName::ALL.into_iter().flat_map(|set| self.of(set).map(move |(key, value)| (set, key, value)))
    }

    fn of(&self, set: SetName) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut rest = self.bytes.as_slice();
        let all = self.entries.iter().map_while(move |entry| {
            let (key, behind) = rest.split_at_checked(usize::from(entry.key))?;
            let (value, behind) = behind.split_at_checked(usize::from(entry.value))?;
            rest = behind;
            Some((entry.set, key, value))
        });
        all.filter(move |(of, ..)| *of == set).map(|(_, key, value)| (key, value))
    }
}

/// What one transaction changes. The order is that of the fields: what is added may have been deleted before.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// New chains with their rules.
    pub(super) chains: Vec<(String, Vec<Rule>)>,
    /// Chains whose rules are replaced.
    pub(super) replaced: Vec<(&'static str, Vec<Rule>)>,
    /// Elements to be deleted.
    pub(super) deleted: Elements,
    /// Elements to be added.
    pub(super) added: Elements,
    /// New elements of the map of classes.
    pub(super) classes: Vec<(u32, Verdict)>,
}

impl Changes {
    /// Number of objects and elements that are written.
    pub(super) fn len(&self) -> usize {
        self.chains.len() + self.replaced.len() + self.deleted.len() + self.added.len() + self.classes.len()
    }
}
