//! What is written is what the kernel holds: every message and expression against the real nf_tables, in a namespace of its own.

use std::time::{Duration, Instant};

use super::*;
use crate::Netns;

const TABLE: &str = "trama-test";

/// Runs `work` in a fresh namespace, for each family.
fn in_namespace(work: impl Fn(&mut Nftables, Family) + Sync) {
    let netns = Netns::anonymous().unwrap();
    for family in [Family::Ipv4, Family::Ipv6, Family::Inet] {
        netns.run(|| work(&mut Nftables::open().unwrap(), family)).unwrap();
    }
}

fn with_table(family: Family) -> Batch {
    let mut batch = Batch::new(family, TABLE);
    batch.add_table(b"marker");
    batch
}

fn set(name: &'static str, key: &'static [Field], data: Data) -> Set {
    Set { name: name.into(), key, data, flags: SetFlags::default(), size: None }
}

/// A key of the fields number and port.
fn key(number: u32) -> Vec<u8> {
    let port = u16::try_from(number % 60_000).unwrap();
    [&number.to_ne_bytes()[..], &port.to_be_bytes(), &[0; 2]].concat()
}

#[test]
fn a_table_comes_with_its_marker_and_goes_with_all_that_is_in_it() {
    in_namespace(|nftables, family| {
        assert_eq!(nftables.table(family, TABLE).unwrap(), None);
        let before = nftables.generation().unwrap();
        nftables.commit(Batch::new(family, TABLE)).unwrap();
        assert_eq!(nftables.generation().unwrap(), before, "an empty batch is no transaction");
        nftables.commit(with_table(family)).unwrap();
        assert_eq!(nftables.generation().unwrap(), before + 1);
        let first = nftables.table(family, TABLE).unwrap().unwrap();
        assert_eq!((first.marker.as_slice(), first.objects), (b"marker".as_slice(), 0));

        let mut batch = Batch::new(family, TABLE);
        batch.delete_table();
        batch.add_table(b"again");
        batch.add_chain("one", None);
        nftables.commit(batch).unwrap();
        let second = nftables.table(family, TABLE).unwrap().unwrap();
        assert_ne!(first.handle, second.handle);
        assert_eq!((second.marker.as_slice(), second.objects), (b"again".as_slice(), 1));

        let mut batch = Batch::new(family, TABLE);
        batch.delete_table();
        nftables.commit(batch).unwrap();
        assert_eq!(nftables.table(family, TABLE).unwrap(), None);
        assert!(nftables.chains(family, TABLE).unwrap().is_empty());
    });
}

/// Every element of the set `big`, sorted. The kernel's table grows behind our back after so many insertions, and a listing meanwhile
/// names some elements twice and others not at all.
fn all_elements(nftables: &mut Nftables, family: Family, count: usize) -> Vec<Element> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let mut elements = nftables.elements(family, TABLE, "big").unwrap();
        elements.sort_by_key(|element| u32::from_ne_bytes(*element.key.first_chunk().unwrap()));
        elements.dedup_by(|a, b| a.key == b.key);
        if elements.len() == count {
            return elements;
        }
        assert!(Instant::now() < deadline, "{} of {count} elements", elements.len());
    }
}

#[test]
fn many_elements_take_many_messages_and_one_transaction() {
    const COUNT: u32 = 20_000;
    in_namespace(|nftables, family| {
        let mut batch = with_table(family);
        batch.add_set(&set("big", &[Field::Number, Field::Port], Data::Value(&[Field::Ipv4, Field::Port])));
        for number in 0..COUNT {
            let value = [number.to_be_bytes(), [1, 2, 0, 0]].concat();
            batch.add_element("big", ElementRef::key(&key(number)).value(&value));
        }
        assert!(batch.bytes() > 10 * 60_000, "{} bytes are not many messages", batch.bytes());
        let before = nftables.generation().unwrap();
        nftables.commit(batch).unwrap();
        assert_eq!(nftables.generation().unwrap(), before + 1);

        let elements = all_elements(nftables, family, COUNT as usize);
        for (number, element) in (0..).zip(&elements) {
            assert_eq!(element.key, key(number));
            assert_eq!(element.value, [number.to_be_bytes(), [1, 2, 0, 0]].concat());
        }
        assert!(nftables.has_element(family, TABLE, "big", &key(7)));
        assert!(!nftables.has_element(family, TABLE, "big", &key(COUNT)));
        let value = |number: u32| [number.to_be_bytes(), [1, 2, 0, 0]].concat();
        let mut contents = Contents::default();
        (0..COUNT).rev().for_each(|number| contents.add(&key(number), &value(number)));
        assert_eq!(nftables.contents(family, TABLE, "big").unwrap(), contents);

        // Changed, deleted and flushed.
        let mut batch = Batch::new(family, TABLE);
        batch.delete_element("big", ElementRef::key(&key(7)));
        batch.delete_element("big", ElementRef::key(&key(8)));
        batch.add_element("big", ElementRef::key(&key(7)).value(&[9; 8]));
        nftables.commit(batch).unwrap();
        assert_ne!(nftables.contents(family, TABLE, "big").unwrap(), contents);
        contents.remove(&key(7), &value(7));
        contents.remove(&key(8), &value(8));
        contents.add(&key(7), &[9; 8]);
        assert_eq!(nftables.contents(family, TABLE, "big").unwrap(), contents);
        let elements = all_elements(nftables, family, COUNT as usize - 1);
        assert_eq!(elements.iter().find(|element| element.key == key(7)).unwrap().value, [9; 8]);
        let mut batch = Batch::new(family, TABLE);
        batch.flush_set("big");
        batch.add_element("big", ElementRef::key(&key(1)).value(&[1; 8]));
        nftables.commit(batch).unwrap();
        assert_eq!(nftables.elements(family, TABLE, "big").unwrap().len(), 1);
    });
}

#[test]
fn a_refused_transaction_changes_nothing_and_names_what_was_refused() {
    in_namespace(|nftables, family| {
        let mut batch = with_table(family);
        batch.add_set(&set("set", &[Field::Number, Field::Port], Data::None));
        batch.add_element("set", ElementRef::key(&key(1)));
        nftables.commit(batch).unwrap();
        let before = nftables.generation().unwrap();

        let mut batch = Batch::new(family, TABLE);
        batch.add_element("set", ElementRef::key(&key(2)));
        batch.delete_element("set", ElementRef::key(&key(3)));
        batch.add_chain("never", None);
        let error = nftables.commit(batch).unwrap_err();
        assert!(error.is_not_found(), "{error}");
        assert!(error.to_string().starts_with("cannot delete elements of set set in table trama-test: "), "{error}");
        let mut batch = Batch::new(family, TABLE);
        batch.add_rule("nowhere", &[Expression::Counter]);
        let error = nftables.commit(batch).unwrap_err();
        assert!(error.to_string().starts_with("cannot add rule to chain nowhere in table trama-test: "), "{error}");

        assert_eq!(nftables.generation().unwrap(), before);
        assert_eq!(nftables.elements(family, TABLE, "set").unwrap().len(), 1);
        assert!(nftables.chains(family, TABLE).unwrap().is_empty());
        // The next transaction is not confused by the answers to the former.
        let mut batch = Batch::new(family, TABLE);
        batch.add_element("set", ElementRef::key(&key(2)));
        nftables.commit(batch).unwrap();
        assert!(nftables.elements(family, "nothing", "set").unwrap_err().is_not_found());
    });
}

#[test]
fn ranges_of_concatenated_fields_are_found_by_what_lies_inside() {
    in_namespace(|nftables, family| {
        let mut batch = with_table(family);
        let ranges = set("ranges", &[Field::Number, Field::Ipv4], Data::None);
        batch.add_set(&Set { flags: SetFlags::INTERVAL, ..ranges });
        let at = |id: u32, address: [u8; 4]| [id.to_ne_bytes(), address].concat();
        let (first, last) = (at(1, [10, 0, 0, 0]), at(1, [10, 0, 255, 255]));
        batch.add_element("ranges", ElementRef::key(&first).to(&last));
        batch.add_element("ranges", ElementRef::key(&at(2, [10, 0, 0, 7])).to(&at(2, [10, 0, 0, 7])));
        nftables.commit(batch).unwrap();
        for (id, address, found) in [
            (1, [10, 0, 0, 0], true),
            (1, [10, 0, 3, 4], true),
            (1, [10, 1, 0, 0], false),
            (2, [10, 0, 0, 7], true),
            (2, [10, 0, 0, 8], false),
            (3, [10, 0, 0, 7], false),
        ] {
            let found_now = nftables.has_element(family, TABLE, "ranges", &at(id, address));
            assert_eq!(found_now, found, "{id} {address:?}");
        }
        let mut contents = Contents::default();
        contents.add(&first, &last);
        contents.add(&at(2, [10, 0, 0, 7]), &at(2, [10, 0, 0, 7]));
        assert_eq!(nftables.contents(family, TABLE, "ranges").unwrap(), contents);
        let elements = nftables.elements(family, TABLE, "ranges").unwrap();
        assert!(elements.iter().any(|element| element.key == first && element.key_end.as_ref() == Some(&last)));
        let mut batch = Batch::new(family, TABLE);
        batch.delete_element("ranges", ElementRef::key(&first).to(&last));
        nftables.commit(batch).unwrap();
        assert_eq!(nftables.elements(family, TABLE, "ranges").unwrap().len(), 1);
    });
}

#[test]
fn timeouts_are_kept_and_verdicts_lead_to_chains() {
    in_namespace(|nftables, family| {
        let mut batch = with_table(family);
        let timed = set("timed", &[Field::Number, Field::Port], Data::None);
        batch.add_set(&Set { flags: SetFlags::TIMEOUT.and(SetFlags::DYNAMIC), size: Some(100), ..timed });
        batch.add_element("timed", ElementRef::key(&key(1)).timeout(60_000, 30_000));
        batch.add_set(&set("verdicts", &[Field::Number], Data::Verdict));
        batch.add_chain("target", None);
        for (number, verdict) in [(1u32, Verdict::Goto("target".into())), (2, Verdict::Drop)] {
            batch.add_element("verdicts", ElementRef::key(&number.to_ne_bytes()).verdict(&verdict));
        }
        nftables.commit(batch).unwrap();
        let timed = nftables.elements(family, TABLE, "timed").unwrap().remove(0);
        assert_eq!(timed.timeout_ms, Some(60_000));
        assert!((1..=30_000).contains(&timed.left_ms.unwrap()), "{timed:?}");
        let mut chains: Vec<_> = nftables.elements(family, TABLE, "verdicts").unwrap();
        chains.sort_by_key(|element| element.key.clone());
        let chains: Vec<_> = chains.into_iter().map(|element| element.chain).collect();
        assert_eq!(chains, [Some("target".to_owned()), None]);
    });
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table of all expressions")]
fn every_expression_is_understood() {
    in_namespace(|nftables, family| {
        let nat_family = if family == Family::Ipv6 { Family::Ipv6 } else { Family::Ipv4 };
        let (r0, r1, r2) = (Register(0), Register(1), Register(2));
        let port = Expression::Payload { base: PayloadBase::Transport, offset: 2, length: 2, to: r1 };
        let key = [Expression::Meta { key: MetaKey::Protocol, to: r0 }, port];
        let lookup = |target| Expression::Lookup { set: "ports".into(), key: r0, target };
        // Before Linux 6.4 a map may not be looked at as if it were a set.
        let member = |target| Expression::Lookup { set: "members".into(), key: r0, target };
        let mark = Expression::Meta { key: MetaKey::Mark, to: r0 };
        let constant = |to| Expression::Constant { value: vec![0, 0, 0, 1], to };
        let dynset = |operation, timeout_ms| {
            let (set, data) = ("sticky".into(), Some(r1));
            vec![constant(r0), constant(r1), Expression::Dynset { set, operation, key: r0, data, timeout_ms }]
        };
        let nat = Expression::DestinationNat { family: nat_family, address: Register(4), port: Register(8) };
        let address: Vec<_> = if nat_family == Family::Ipv6 { vec![0; 16] } else { vec![10, 0, 0, 1] };
        let nat_address = Expression::Constant { value: address, to: Register(4) };
        let rules: Vec<(&str, Vec<Expression>)> = vec![
            ("filter", [&key[..], &[member(LookupTarget::Nothing), Expression::Counter]].concat()),
            ("filter", [&key[..], &[member(LookupTarget::NothingUnless)]].concat()),
            ("filter", [&key[..], &[lookup(LookupTarget::Register(r2))]].concat()),
            ("filter", vec![Expression::Meta { key: MetaKey::InputInterfaceName, to: r0 }]),
            ("filter", vec![Expression::Meta { key: MetaKey::InputInterface, to: r0 }]),
            (
                "filter",
                vec![
                    mark.clone(),
                    Expression::Bitwise { from: r0, to: r0, mask: vec![0xff; 4], xor: vec![0, 0x40, 0, 0] },
                    Expression::SetMark { from: r0 },
                ],
            ),
            (
                "filter",
                vec![
                    Expression::Ct { key: CtKey::State, to: r0 },
                    Expression::Compare { from: r0, comparison: Comparison::NotEqual, with: vec![0; 4] },
                    Expression::Verdict(Verdict::Jump("regular".into())),
                ],
            ),
            (
                "filter",
                vec![
                    Expression::Ct { key: CtKey::Status, to: r0 },
                    Expression::Compare { from: r0, comparison: Comparison::Equal, with: vec![0; 4] },
                    Expression::Verdict(Verdict::Return),
                ],
            ),
            (
                "filter",
                vec![
                    Expression::FibType { address: FibAddress::Source, to: r0 },
                    Expression::Compare { from: r0, comparison: Comparison::Equal, with: 2u32.to_ne_bytes().to_vec() },
                ],
            ),
            (
                "filter",
                vec![
                    Expression::Random { modulus: 3, offset: 1 << 31, to: r0 },
                    Expression::Lookup { set: "chains".into(), key: r0, target: LookupTarget::Verdict },
                ],
            ),
            ("filter", dynset(DynsetOperation::Delete, None)),
            ("filter", dynset(DynsetOperation::Update, Some(10_000))),
            ("filter", dynset(DynsetOperation::Add, Some(10_000))),
            ("regular", vec![Expression::Verdict(Verdict::Drop)]),
            ("nat", vec![nat_address, constant(Register(8)), nat]),
            ("postrouting", vec![Expression::Masquerade { fully_random: true }]),
        ];
        let mut batch = with_table(family);
        batch.add_set(&set("ports", &[Field::Protocol, Field::Port], Data::Value(&[Field::Number])));
        batch.add_set(&set("members", &[Field::Protocol, Field::Port], Data::None));
        batch.add_set(&set("chains", &[Field::Number], Data::Verdict));
        let sticky = set("sticky", &[Field::Number], Data::Value(&[Field::Number]));
        batch.add_set(&Set { flags: SetFlags::TIMEOUT.and(SetFlags::DYNAMIC), size: Some(64), ..sticky });
        let hook = |kind, hook, priority| Some(ChainHook { kind, hook, priority });
        batch.add_chain("filter", hook(ChainKind::Filter, Hook::Prerouting, -110));
        batch.add_chain("nat", hook(ChainKind::Nat, Hook::Prerouting, -100));
        batch.add_chain("postrouting", hook(ChainKind::Nat, Hook::Postrouting, 100));
        batch.add_chain("regular", None);
        rules.iter().for_each(|(chain, rule)| batch.add_rule(chain, rule));
        if family != Family::Inet {
            let v6 = family == Family::Ipv6;
            let kind = if v6 { RejectKind::PortUnreachableV6 } else { RejectKind::PortUnreachableV4 };
            batch.add_rule("regular", &[Expression::Reject(kind)]);
        }
        nftables.commit(batch).unwrap();

        let mut chains = nftables.chains(family, TABLE).unwrap();
        chains.sort_by(|a, b| a.name.cmp(&b.name));
        let chains: Vec<_> = chains.iter().map(|chain| (chain.name.as_str(), chain.is_base)).collect();
        assert_eq!(chains, [("filter", true), ("nat", true), ("postrouting", true), ("regular", false)]);
        let found = nftables.rules(family, TABLE).unwrap();
        let count = |chain: &str| found.iter().filter(|rule| rule.chain == chain).count();
        assert_eq!((count("filter"), count("nat"), count("postrouting")), (13, 1, 1));
        assert_eq!(count("regular"), if family == Family::Inet { 1 } else { 2 });

        let mut batch = Batch::new(family, TABLE);
        batch.flush_chain("nat");
        batch.delete_chain("nat");
        batch.flush_chain("filter");
        batch.delete_set("sticky");
        nftables.commit(batch).unwrap();
        assert_eq!(nftables.chains(family, TABLE).unwrap().len(), 3);
    });
}

#[test]
fn names_and_numbers_are_where_the_kernel_looks_for_them() {
    let mut batch = Batch::new(Family::Ipv4, "t");
    batch.delete_table();
    let (bytes, last, operations) = batch.finish(7);
    assert_eq!((last, operations.len()), (8, 3));
    // Begin: 20 bytes, subsystem 10; delete: header, family 2, then a string of two bytes in eight.
    assert_eq!(bytes[..4], 20u32.to_ne_bytes());
    assert_eq!(bytes[16..20], [0, 0, 0, 10]);
    assert_eq!(bytes[20..24], 28u32.to_ne_bytes());
    assert_eq!(bytes[24..26], (10u16 << 8 | 2).to_ne_bytes());
    assert_eq!(bytes[26..28], 5u16.to_ne_bytes(), "NLM_F_REQUEST and NLM_F_ACK");
    assert_eq!(bytes[28..32], 8u32.to_ne_bytes());
    assert_eq!(bytes[36..48], [2, 0, 0, 0, 6, 0, 1, 0, b't', 0, 0, 0]);
    assert_eq!(bytes.len(), 20 + 28 + 20);
}
