use node_sys::Field;

use super::*;

fn fields(of: &[(&str, usize, usize)]) -> Fields {
    of.iter().map(|(path, offset, size)| ((*path).to_owned(), Field { offset: *offset, size: *size })).collect()
}

fn layout(key: Fields, value: Fields, value_size: usize) -> MapLayout {
    MapLayout { kind: 9, key_size: 4, value_size, max_entries: 8, flags: 0, key, value }
}

#[test]
fn fields_go_by_their_names() {
    let key = || fields(&[("address", 0, 4)]);
    let old = layout(key(), fields(&[("flags", 0, 2), ("gone", 2, 2), ("seen", 4, 4)]), 8);
    let new = layout(key(), fields(&[("seen", 0, 4), ("new", 4, 4), ("flags", 8, 4)]), 12);
    let there = Copier::new(&old, &new).unwrap();
    assert_eq!(there.key.apply(&[1, 2, 3, 4]), [1, 2, 3, 4]);
    assert_eq!(there.value.apply(&[1, 2, 3, 4, 5, 6, 7, 8]), [5, 6, 7, 8, 0, 0, 0, 0, 1, 2, 0, 0]);
    // A number that has become narrower is not cut.
    let back = Copier::new(&new, &old).unwrap();
    assert_eq!(back.value.apply(&[5, 6, 7, 8, 9, 9, 9, 9, 1, 2, 0, 0]), [0, 0, 0, 0, 5, 6, 7, 8]);
}

#[test]
fn keys_that_would_become_one_are_refused() {
    let value = || fields(&[("flags", 0, 4)]);
    let wide = layout(fields(&[("address", 0, 4), ("port", 4, 2)]), value(), 4);
    let narrow = layout(fields(&[("address", 0, 4)]), value(), 4);
    assert!(Copier::new(&wide, &narrow).is_none());
    assert!(Copier::new(&narrow, &wide).is_some());
    // A kernel that was not told of the fields.
    assert!(Copier::new(&layout(Fields::new(), Fields::new(), 4), &narrow).is_none());
}

#[test]
fn every_map_that_is_copied_has_named_fields() {
    let mut loader = aya::EbpfLoader::new();
    let object = loader.load(super::super::OBJECT).unwrap();
    for name in
        KERNEL_MAPS.into_iter().chain(["FRONTENDS_V4", "BACKENDS_V6", "SLOTS_V4", "SOURCE_RANGES_V6", "NODE_V4"])
    {
        let (aya::maps::Map::HashMap(data)
        | aya::maps::Map::LruHashMap(data)
        | aya::maps::Map::LpmTrie(data)
        | aya::maps::Map::Array(data)) = object.map(name).unwrap()
        else {
            panic!("{name} is of another type");
        };
        let layout = MapLayout::of(data.fd().as_fd()).unwrap();
        let covered = |fields: &Fields| fields.values().map(|field| field.size).sum::<usize>();
        // A flow fills whole cache lines.
        let padding = if name == "FLOWS_V6" { 16 } else { 0 };
        assert_eq!(
            (covered(&layout.key), covered(&layout.value) + padding),
            (layout.key_size, layout.value_size),
            "{name}: {layout:?}"
        );
        assert!(COPIED.contains(&layout.kind), "{name}");
    }
}
