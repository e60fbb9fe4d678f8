//! Ranges of numbers: ids and slot blocks, with a quarantine for what a program may still be reading.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// How long a freed range is kept from reuse, in milliseconds. Programs run for microseconds; a reader that is slower all
/// the same notices the other service's id in the backend and looks again.
pub(super) const QUARANTINE_MS: u64 = 50;

/// Hands out contiguous ranges of `0..capacity`, best fit, coalescing what comes back.
#[derive(Debug)]
pub(super) struct RangeAllocator {
    first: u32,
    size: u32,
    by_start: BTreeMap<u32, u32>,
    by_length: BTreeSet<(u32, u32)>,
    quarantine: VecDeque<Quarantined>,
    free: u64,
}

#[derive(Debug)]
struct Quarantined {
    until_ms: u64,
    start: u32,
    length: u32,
}

impl RangeAllocator {
    /// Everything in `first..capacity` is free.
    pub(super) fn new(first: u32, capacity: u32) -> Self {
        let size = capacity.saturating_sub(first);
        let mut allocator = Self {
            first,
            by_start: BTreeMap::new(),
            by_length: BTreeSet::new(),
            quarantine: VecDeque::new(),
            size,
            free: 0,
        };
        allocator.insert(first, size);
        allocator
    }

    /// Takes a range of `length`; a length of 0 is always granted and takes nothing. `None` when no gap is large enough,
    /// quarantined ones included: a reader is protected by the service id, so running out is the worse of the two.
    pub(super) fn take(&mut self, length: u32, now_ms: u64) -> Option<u32> {
        if length == 0 {
            return Some(0);
        }
        self.release(|entry| entry.until_ms <= now_ms);
        if let Some(start) = self.take_free(length) {
            return Some(start);
        }
        self.release(|_| true);
        self.take_free(length)
    }

    /// Gives a range back once its quarantine is over.
    pub(super) fn give_back(&mut self, start: u32, length: u32, now_ms: u64) {
        if length > 0 {
            self.quarantine.push_back(Quarantined { until_ms: now_ms + QUARANTINE_MS, start, length });
        }
    }

    /// Marks a range as taken, as found in the kernel. `false` when part of it is taken already.
    pub(super) fn reserve(&mut self, start: u32, length: u32) -> bool {
        if length == 0 {
            return true;
        }
        let Some((&gap, &gap_length)) = self.by_start.range(..=start).next_back() else { return false };
        let (end, gap_end) = (u64::from(start) + u64::from(length), u64::from(gap) + u64::from(gap_length));
        if end > gap_end {
            return false;
        }
        self.remove(gap, gap_length);
        self.insert(gap, start - gap);
        self.insert(start + length, u32::try_from(gap_end - end).unwrap_or(0));
        true
    }

    /// The number above all that are taken or in quarantine.
    pub(super) fn end(&self) -> u32 {
        let end = self.first + self.size;
        match self.by_start.last_key_value() {
            Some((start, length)) if start + length == end => *start,
            _ => end,
        }
    }

    /// Numbers that are taken; those in quarantine are not.
    pub(super) fn taken(&self) -> u64 {
        let waiting: u64 = self.quarantine.iter().map(|entry| u64::from(entry.length)).sum();
        u64::from(self.size) - self.free - waiting
    }

    fn take_free(&mut self, length: u32) -> Option<u32> {
        let &(gap_length, start) = self.by_length.range((length, 0)..).next()?;
        self.remove(start, gap_length);
        self.insert(start + length, gap_length - length);
        Some(start)
    }

    fn release(&mut self, over: impl Fn(&Quarantined) -> bool) {
        while let Some(entry) = self.quarantine.pop_front_if(|entry| over(entry)) {
            self.insert_coalescing(entry.start, entry.length);
        }
    }

    fn insert_coalescing(&mut self, mut start: u32, mut length: u32) {
        let before = self.by_start.range(..start).next_back().map(|(&s, &l)| (s, l)).filter(|(s, l)| s + l == start);
        if let Some((before_start, before_length)) = before {
            self.remove(before_start, before_length);
            start = before_start;
            length += before_length;
        }
        if let Some(&after_length) = self.by_start.get(&(start + length)) {
            self.remove(start + length, after_length);
            length += after_length;
        }
        self.insert(start, length);
    }

    fn insert(&mut self, start: u32, length: u32) {
        if length > 0 {
            self.by_start.insert(start, length);
            self.by_length.insert((length, start));
            self.free += u64::from(length);
        }
    }

    fn remove(&mut self, start: u32, length: u32) {
        self.by_start.remove(&start);
        self.by_length.remove(&(length, start));
        self.free -= u64::from(length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn freed_ranges_wait_for_their_quarantine() {
        let mut ranges = RangeAllocator::new(0, 100);
        assert_eq!(ranges.take(10, 0), Some(0));
        ranges.give_back(0, 10, 0);
        assert_eq!(ranges.take(10, QUARANTINE_MS - 1), Some(10));
        assert_eq!(ranges.take(10, QUARANTINE_MS), Some(0));
    }

    #[test]
    fn a_full_allocator_cuts_the_quarantine_short_and_then_refuses() {
        let mut ranges = RangeAllocator::new(1, 11);
        assert_eq!(ranges.take(10, 0), Some(1));
        assert_eq!(ranges.take(1, 0), None);
        assert_eq!(ranges.taken(), 10);
        ranges.give_back(1, 10, 0);
        assert_eq!(ranges.taken(), 0, "what is in quarantine can be had");
        assert_eq!(ranges.take(10, 0), Some(1));
    }

    #[test]
    fn the_end_is_above_all_that_is_taken() {
        let mut ranges = RangeAllocator::new(1, 100);
        assert_eq!(ranges.end(), 1);
        assert_eq!(ranges.take(9, 0), Some(1));
        assert_eq!(ranges.end(), 10);
        ranges.give_back(1, 5, 0);
        assert_eq!((ranges.take(90, 1000), ranges.end()), (Some(10), 100));
    }

    #[test]
    fn reserving_splits_a_gap_once() {
        let mut ranges = RangeAllocator::new(0, 100);
        assert!(ranges.reserve(10, 5));
        assert!(!ranges.reserve(12, 5));
        assert!(!ranges.reserve(98, 5));
        assert_eq!(ranges.taken(), 5);
        assert_eq!(ranges.take(86, 0), None);
        assert_eq!(ranges.take(85, 0), Some(15));
    }

    proptest! {
        /// Nothing is handed out twice, and all of it comes back as one gap.
        #[test]
        fn ranges_never_overlap(lengths in prop::collection::vec((1u32..20, any::<bool>()), 1..60)) {
            let mut ranges = RangeAllocator::new(0, 400);
            let mut held: Vec<(u32, u32)> = Vec::new();
            for (step, (length, give_back)) in lengths.into_iter().enumerate() {
                let now = step as u64 * 10;
                if let Some(start) = ranges.take(length, now) {
                    prop_assert!(held.iter().all(|&(s, l)| start + length <= s || s + l <= start));
                    held.push((start, length));
                }
                if give_back && !held.is_empty() {
                    let (start, length) = held.swap_remove(0);
                    ranges.give_back(start, length, now);
                }
            }
            for (start, length) in held {
                ranges.give_back(start, length, 0);
            }
            prop_assert_eq!(ranges.take(400, 10_000), Some(0));
        }
    }
}
