//! What an audit found: in words for the log and for `status`, in numbers for `/metrics`.

use std::collections::BTreeMap;

use super::maps::COMPARED;
use crate::dataplane::Counters;

/// Name of the metric.
const METRIC: &str = "trama_drift_entries";
/// What is compared but the maps of a family.
const OTHERS: [&str; 3] = ["interfaces", "pins", "programs"];
/// Ends of the names of the maps of a family.
const FAMILIES: [&str; 2] = ["v4", "v6"];

/// In how many entries the kernel differed from what was written, by map; nothing that did not differ is in it.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Drift(BTreeMap<String, usize>);

impl Drift {
    /// Adds what was found of a map, or of what `name` stands for; nothing where it is 0.
    pub(super) fn add(&mut self, name: impl Into<String>, count: usize) {
        if count > 0 {
            *self.0.entry(name.into()).or_default() += count;
        }
    }

    /// Adds what was found of the maps of one family.
    pub(super) fn add_family(&mut self, suffix: &str, found: Vec<(&'static str, usize)>) {
        found.into_iter().for_each(|(map, count)| self.add(format!("{map}_{suffix}"), count));
    }

    /// In words; `None` where all is as it was left.
    pub(super) fn describe(&self) -> Option<String> {
        let found: Vec<String> = self
            .0
            .iter()
            .map(|(name, count)| match name.as_str() {
                "pins" => format!("{count} pins were removed"),
                "programs" => format!("{count} programs were detached"),
                map => format!("map {map} was changed in {count} entries"),
            })
            .collect();
        if found.is_empty() { None } else { Some(found.join(", ")) }
    }

    /// A sample for everything that is compared, most of them 0.
    pub(super) fn samples(&self) -> Counters {
        let maps = FAMILIES.iter().flat_map(|suffix| COMPARED.iter().map(move |map| format!("{map}_{suffix}")));
        let all = maps.chain(OTHERS.map(str::to_owned));
        all.map(|map| {
            let count = self.0.get(&map).copied().unwrap_or_default();
            (METRIC.to_owned(), vec![("map".to_owned(), map)], count as u64)
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_told_in_words_and_numbers() {
        let mut drift = Drift::default();
        assert_eq!(drift.describe(), None);
        assert!(drift.samples().iter().all(|(_, _, count)| *count == 0));
        drift.add("pins", 0);
        drift.add("programs", 2);
        drift.add_family("v4", vec![("slots", 3)]);
        assert_eq!(drift.describe().unwrap(), "2 programs were detached, map slots_v4 was changed in 3 entries");
        let samples = drift.samples();
        let of = |map: &str| samples.iter().find(|(_, labels, _)| labels[0].1 == map).map(|(_, _, count)| *count);
        assert_eq!((of("slots_v4"), of("slots_v6"), of("programs"), of("pins")), (Some(3), Some(0), Some(2), Some(0)));
        assert_eq!(samples.len(), 21);
    }
}
