//! The table in plain memory against a plain map.

extern crate std;

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering, fence};
use std::collections::HashMap;
use std::vec::Vec;

use super::*;
use crate::Be16;

/// A table of its own.
struct Memory<A> {
    heads: Vec<UnsafeCell<FlowHead>>,
    entries: Vec<UnsafeCell<FlowEntry<A>>>,
}

impl<A: Address> Memory<A>
where
    FlowEntry<A>: Default,
{
    fn new(buckets: u32) -> Self {
        let heads = (0..buckets).map(|_| UnsafeCell::default()).collect();
        Self { heads, entries: (0..buckets * WAYS).map(|_| UnsafeCell::default()).collect() }
    }
}

// SAFETY: all that is shared is used as the table's protocol says, which the test of several threads checks.
unsafe impl<A> Sync for Memory<A> {}

impl<A: Address> FlowStore for Memory<A> {
    type A = A;

    fn buckets(&self) -> u32 {
        self.heads.len() as u32
    }

    fn secret(&self) -> Option<&FlowSecret> {
        const SECRET: FlowSecret = FlowSecret {
            transport: [0x1234_5678, 0x9abc_def0],
            addresses: [
                [0x0fed_cba9, 0x8765_4321],
                [0x3141_5926, 0x5358_9793],
                [0x2718_2818, 0x2845_9045],
                [0x1618_0339, 0x8874_9894],
            ],
        };
        Some(&SECRET)
    }

    fn head(&self, bucket: u32) -> Option<*mut FlowHead> {
        self.heads.get(bucket as usize).map(UnsafeCell::get)
    }

    fn entry(&self, index: u32) -> Option<*mut FlowEntry<A>> {
        self.entries.get(index as usize).map(UnsafeCell::get)
    }

    fn barrier(&self) {
        fence(Ordering::SeqCst);
    }

    unsafe fn try_lock(&self, lock: *mut u64) -> bool {
        // SAFETY: the caller's; only these two touch it.
        unsafe { AtomicU64::from_ptr(lock) }.compare_exchange(0, 1, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    unsafe fn unlock(&self, lock: *mut u64) {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(lock) }.store(0, Ordering::SeqCst);
    }
}

fn key(number: u32) -> FlowKey<V4> {
    FlowKey {
        source: V4::from_octets([10, 0, (number >> 16) as u8, 1]),
        destination: V4::from_octets([10, 96, 0, 1]),
        source_port: Be16::from_host(number as u16),
        destination_port: Be16::from_host(80),
        protocol: 6,
        padding: [0; 3],
    }
}

fn flow(number: u32, flags: u8) -> Flow<V4> {
    Flow { backend_id: number, flags, ..Flow::default() }
}

fn get(table: &Memory<V4>, number: u32) -> Option<u32> {
    let mut found = Flow::default();
    read(table, &key(number), &mut found).map(|_| found.backend_id)
}

fn add(table: &Memory<V4>, number: u32, flags: u8, now: u32) {
    insert(table, &key(number), &flow(number, flags), true, now).unwrap();
}

/// Numbers of flows that share a bucket of the table.
fn sharing(table: &Memory<V4>, count: usize) -> Vec<u32> {
    let buckets = |number| {
        let place = place(table, &key(number));
        (place.first, place.second)
    };
    (1..).filter(|number| buckets(*number) == buckets(1)).take(count).collect()
}

#[test]
fn what_was_written_is_read() {
    let table = Memory::<V4>::new(64);
    add(&table, 7, 0, 0);
    assert_eq!((get(&table, 7), get(&table, 8)), (Some(7), None));
    assert_eq!(insert(&table, &key(7), &flow(9, 0), false, 0), Err(FlowInsertError::Exists));
    insert(&table, &key(7), &flow(9, 0), true, 0).unwrap();
    assert_eq!(get(&table, 7), Some(9));
    assert!(remove(&table, &key(7)));
    assert!(!remove(&table, &key(7)) && get(&table, 7).is_none());
}

#[test]
fn a_locked_bucket_is_not_written() {
    let table = Memory::<V4>::new(1);
    add(&table, 1, 0, 0);
    // SAFETY: one thread, and no other pointer into the head is in use.
    unsafe { (*table.heads[0].get()).lock = 1 };
    assert_eq!(insert(&table, &key(2), &flow(2, 0), true, 0), Err(FlowInsertError::Busy));
    assert!(!remove(&table, &key(1)));
    assert_eq!(get(&table, 1), Some(1), "readers do not wait");
}

#[test]
fn the_oldest_goes_first() {
    let table = Memory::<V4>::new(16);
    let numbers = sharing(&table, 17);
    for (age, number) in numbers.iter().take(16).enumerate() {
        add(&table, *number, FLOW_CONFIRMED, (age as u32 + 5) * AGE_TICKS);
    }
    // The first was seen once more.
    let mut found = Flow::default();
    let index = read(&table, &key(numbers[0]), &mut found).unwrap();
    touch(&table, index, FLOW_CONFIRMED, 99 * AGE_TICKS);
    add(&table, numbers[16], FLOW_CONFIRMED, 100 * AGE_TICKS);
    let left: Vec<_> = numbers.iter().map(|number| get(&table, *number).is_some()).collect();
    assert_eq!(left.iter().filter(|is_there| !**is_there).count(), 1);
    assert!(!left[1], "{left:?}");
}

/// A flood of connections that nobody answers, or that are over, finds its own kind.
#[test]
fn what_is_not_answered_goes_before_what_is() {
    let table = Memory::<V4>::new(16);
    let numbers = sharing(&table, 200);
    for number in &numbers[..14] {
        add(&table, *number, FLOW_CONFIRMED, AGE_TICKS);
    }
    add(&table, numbers[14], FLOW_CONFIRMED | FLOW_CLOSED, 50 * AGE_TICKS);
    for (age, number) in numbers[15..].iter().enumerate() {
        add(&table, *number, 0, (60 + age as u32) * AGE_TICKS);
    }
    assert!(numbers[..14].iter().all(|number| get(&table, *number) == Some(*number)));
    assert_eq!(get(&table, numbers[14]), None);
    assert_eq!(get(&table, numbers[199]), Some(numbers[199]));
}

/// The clock of ages begins anew every half hour at the least; what is near its end is still older than what is behind it.
#[test]
fn ages_survive_the_end_of_their_range() {
    let table = Memory::<V4>::new(16);
    let numbers = sharing(&table, 17);
    let end = AGE_TICKS << 15;
    for (age, number) in numbers.iter().take(16).enumerate() {
        add(&table, *number, FLOW_CONFIRMED, end - 4 * AGE_TICKS + age as u32 * AGE_TICKS);
    }
    add(&table, numbers[16], FLOW_CONFIRMED, end + 20 * AGE_TICKS);
    assert_eq!(get(&table, numbers[0]), None);
    assert!(numbers[1..].iter().all(|number| get(&table, *number).is_some()));
}

#[test]
fn entries_read_back_as_bytes() {
    let table = Memory::<V4>::new(1);
    add(&table, 3, FLOW_CONFIRMED, 0);
    let bytes = |index: usize| {
        // SAFETY: one thread; the entry has no padding for this family.
        unsafe { core::slice::from_raw_parts(table.entries[index].get().cast::<u8>(), 64) }
    };
    assert_eq!(FlowEntry::<V4>::from_bytes(bytes(0)), Some((key(3), flow(3, FLOW_CONFIRMED))));
    assert_eq!(FlowEntry::<V4>::from_bytes(bytes(1)), None, "a free entry");
    assert_eq!(FlowEntry::<V4>::from_bytes(&bytes(0)[1..]), None);
    remove(&table, &key(3));
    assert_eq!(FlowEntry::<V4>::from_bytes(bytes(0)), None);
}

/// Half of a table's entries are in use: none is pushed out. At three quarters one in a thousand may be.
#[test]
fn tuples_that_differ_in_their_ports_spread() {
    let table = Memory::<V4>::new(8192);
    let lost = |of: std::ops::Range<u32>| of.filter(|number| get(&table, *number).is_none()).count();
    (0..32_768).for_each(|number| add(&table, number, FLOW_CONFIRMED, 0));
    assert_eq!(lost(0..32_768), 0);
    (32_768..49_152).for_each(|number| add(&table, number, FLOW_CONFIRMED, 0));
    assert!(lost(0..49_152) < 50, "{} of 49152 flows were pushed out", lost(0..49_152));
}

/// What was put in the second bucket is found when the first has room again, and free entries are used again.
#[test]
fn a_bucket_that_was_full_leads_on() {
    let table = Memory::<V4>::new(16);
    let numbers = sharing(&table, 17);
    numbers[..16].iter().for_each(|number| add(&table, *number, FLOW_CONFIRMED, 0));
    numbers[..8].iter().for_each(|number| assert!(remove(&table, &key(*number))));
    assert!(numbers[8..16].iter().all(|number| get(&table, *number) == Some(*number)));
    numbers[..8].iter().for_each(|number| add(&table, *number, FLOW_CONFIRMED, 0));
    assert!(numbers[..16].iter().all(|number| get(&table, *number) == Some(*number)), "nothing had to go");
}

#[test]
fn ipv6_works_alike() {
    let table = Memory::<V6>::new(4);
    let key = FlowKey { source: V6([1, 2, 3, 4]), destination: V6([5, 6, 7, 8]), protocol: 17, ..FlowKey::default() };
    let other = FlowKey { source: V6([1, 2, 3, 5]), ..key };
    insert(&table, &key, &Flow { backend_id: 5, ..Flow::default() }, false, 0).unwrap();
    let mut found = Flow::default();
    assert!(read(&table, &key, &mut found).is_some() && found.backend_id == 5);
    assert!(read(&table, &other, &mut found).is_none());
}

/// Numbers that look random, always the same (Marsaglia's xorshift).
fn numbers() -> impl Iterator<Item = u64> {
    core::iter::successors(Some(0x2545_f491_4f6c_dd1d_u64), |state| {
        let state = state ^ state << 13;
        let state = state ^ state >> 7;
        Some(state ^ state << 17)
    })
}

/// As long as nothing has to go, the table is a map.
#[test]
fn a_table_with_room_is_a_map() {
    let table = Memory::<V4>::new(1);
    let mut model = HashMap::new();
    for (serial, random) in numbers().take(20_000).enumerate() {
        let (number, serial) = ((random >> 8) as u32 % 8, serial as u32);
        match random % 3 {
            0 => {
                insert(&table, &key(number), &flow(serial, 0), true, 0).unwrap();
                model.insert(number, serial);
            }
            1 => {
                let added = insert(&table, &key(number), &flow(serial, 0), false, 0).is_ok();
                assert_eq!(added, !model.contains_key(&number));
                model.entry(number).or_insert(serial);
            }
            _ => assert_eq!(remove(&table, &key(number)), model.remove(&number).is_some()),
        }
        for number in 0..8 {
            assert_eq!(get(&table, number), model.get(&number).copied());
        }
    }
}

#[test]
fn bytes_are_found_where_they_are() {
    for random in numbers().take(20_000) {
        let (tags, wanted) = (random & 0x0303_0303_0303_0303, random >> 60 & 3);
        let found = bytes_equal(tags, wanted);
        let expected: Vec<u32> = (0..WAYS).filter(|way| tags >> (way * 8) & 0xff == wanted).collect();
        let found_at: Vec<u32> = (0..WAYS).filter(|way| found >> (way * 8) & 1 == 1).collect();
        assert_eq!(found_at, expected, "{tags:x} {wanted}");
        assert!(found == 0 || expected.first() == Some(&lowest(found)), "{tags:x} {wanted}");
    }
}

/// Two threads write and remove what two others read: nobody sees a flow that was not written for its tuple.
#[test]
fn readers_see_whole_flows() {
    let table = Memory::<V4>::new(2);
    let whole = |number: u32, serial: u32| Flow {
        service_id: number,
        backend_id: serial,
        backend_generation: serial ^ number,
        link: [serial; 3],
        interface: serial,
        ..Flow::default()
    };
    std::thread::scope(|scope| {
        for thread in 0..2_u64 {
            let (table, whole) = (&table, &whole);
            scope.spawn(move || {
                for (serial, random) in numbers().skip(thread as usize * 999).take(200_000).enumerate() {
                    let number = (random >> 8) as u32 % 24;
                    if random % 8 == 0 {
                        remove(table, &key(number));
                    } else {
                        // A busy bucket is as good: its writer is at work.
                        let _busy = insert(table, &key(number), &whole(number, serial as u32), true, serial as u32);
                    }
                }
            });
            scope.spawn(move || {
                for random in numbers().skip(thread as usize * 777).take(400_000) {
                    let (number, mut found) = ((random >> 8) as u32 % 24, Flow::default());
                    if read(table, &key(number), &mut found).is_some() {
                        assert_eq!(found, whole(number, found.backend_id));
                    }
                }
            });
        }
    });
}
