//! The kernel's description of types (BTF, Documentation/bpf/btf.rst): which fields a structure has, by name, and where they lie.

use std::collections::BTreeMap;

/// `BTF_MAGIC` of little-endian BTF, the only one that our programs have.
const MAGIC: u16 = 0xeb9f;
/// Bytes of the header without what later versions may add.
const HEADER: usize = 24;
/// How deep types may be nested; deeper ones have no fields.
const DEPTH_MAX: usize = 16;
/// Elements of an array of structures that are told apart; longer ones have no fields.
const ELEMENTS_MAX: u32 = 64;

/// Types that are looked at for the fields of one, which names types again and again; one that needs more has no fields.
const LOOKS_MAX: usize = 4096;

/// Where a field lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Bytes before it.
    pub offset: usize,
    /// Its own bytes.
    pub size: usize,
}

/// The fields of a type by their paths, such as `route.mtu`. Numbers and arrays of numbers are fields; a number has the path ``.
pub type Fields = BTreeMap<String, Field>;

/// Types of one BTF blob.
#[derive(Debug)]
pub struct Btf<'a> {
    /// By id from 1 on.
    types: Vec<Type<'a>>,
}

#[derive(Debug)]
enum Type<'a> {
    /// A number of so many bytes.
    Scalar(u32),
    /// An element's type and how many there are.
    Array(u32, u32),
    /// Name, type and offset in bits of each member.
    Struct(Vec<(&'a str, u32, u32)>),
    /// Another type under another name, or qualified.
    Alias(u32),
    /// Nothing that lies in a map.
    Other,
}

/// A place in a type, and how many types deep others may lie in it.
#[derive(Debug, Clone, Copy)]
struct At<'p> {
    path: &'p str,
    offset: usize,
    depth: usize,
}

/// What was found, and how many more types may be looked at.
#[derive(Debug)]
struct Found {
    fields: Fields,
    left: usize,
}

impl Found {
    /// `None` for a field that ends nowhere.
    fn put(&mut self, at: At<'_>, size: usize) -> Option<()> {
        at.offset.checked_add(size)?;
        self.fields.insert(at.path.to_owned(), Field { offset: at.offset, size });
        Some(())
    }
}

/// Reads 32-bit words, little-endian.
struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn next(&mut self) -> Option<u32> {
        let (word, rest) = self.0.split_first_chunk::<4>()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*word))
    }

    fn skip(&mut self, words: usize) -> Option<()> {
        self.0 = self.0.get(words.checked_mul(4)?..)?;
        Some(())
    }
}

impl<'a> Btf<'a> {
    /// Reads a blob; `None` for anything but BTF of a kind that is known.
    pub fn parse(blob: &'a [u8]) -> Option<Self> {
        let mut header = Words(blob.get(..HEADER)?);
        if header.next()? & 0xffff != u32::from(MAGIC) {
            return None;
        }
        let mut next = || usize::try_from(header.next()?).ok();
        let (length, types_at, types_length, names_at, names_length) = (next()?, next()?, next()?, next()?, next()?);
        let body = blob.get(length..)?;
        let names = body.get(names_at..names_at.checked_add(names_length)?)?;
        let mut words = Words(body.get(types_at..types_at.checked_add(types_length)?)?);
        let mut types = Vec::new();
        while !words.0.is_empty() {
            types.push(read_type(&mut words, names)?);
        }
        Some(Self { types })
    }

    /// The fields of the type with this id; `None` where it has something that no map has, or is nested too deeply.
    pub fn fields(&self, id: u32) -> Option<Fields> {
        let mut found = Found { fields: Fields::new(), left: LOOKS_MAX };
        self.collect(id, At { path: "", offset: 0, depth: DEPTH_MAX }, &mut found)?;
        Some(found.fields)
    }

    fn collect(&self, id: u32, at: At<'_>, found: &mut Found) -> Option<()> {
        let at = At { depth: at.depth.checked_sub(1)?, ..at };
        found.left = found.left.checked_sub(1)?;
        match self.get(id)? {
            Type::Alias(to) => self.collect(*to, at, found),
            Type::Scalar(size) => found.put(at, usize::try_from(*size).ok()?),
            Type::Array(of, count) => self.collect_array(id, (*of, *count), at, found),
            Type::Struct(members) => {
                for (name, of, bits) in members {
                    let path = if at.path.is_empty() { (*name).to_owned() } else { format!("{}.{name}", at.path) };
                    let offset = at.offset.checked_add(usize::try_from(bits / 8).ok()?)?;
                    self.collect(*of, At { path: &path, offset, ..at }, found)?;
                }
                Some(())
            }
            Type::Other => None,
        }
    }

    fn collect_array(&self, id: u32, (of, count): (u32, u32), at: At<'_>, found: &mut Found) -> Option<()> {
        let size = self.size(of, at.depth, &mut found.left)?;
        if self.is_of_scalars(id, at.depth) {
            return found.put(at, size.checked_mul(usize::try_from(count).ok()?)?);
        }
        for index in 0..Some(count).filter(|count| *count <= ELEMENTS_MAX)? {
            let before = size.checked_mul(usize::try_from(index).ok()?)?;
            let (path, offset) = (format!("{}[{index}]", at.path), at.offset.checked_add(before)?);
            self.collect(of, At { path: &path, offset, ..at }, found)?;
        }
        Some(())
    }

    fn get(&self, id: u32) -> Option<&Type<'a>> {
        self.types.get(usize::try_from(id).ok()?.checked_sub(1)?)
    }

    fn is_of_scalars(&self, id: u32, depth: usize) -> bool {
        match (self.get(id), depth.checked_sub(1)) {
            (Some(Type::Scalar(_)), _) => true,
            (Some(Type::Array(of, _) | Type::Alias(of)), Some(depth)) => self.is_of_scalars(*of, depth),
            _ => false,
        }
    }

    /// Bytes of a type: of a structure as far as its last field reaches, which is all of it where nothing is padded.
    fn size(&self, id: u32, depth: usize, left: &mut usize) -> Option<usize> {
        let mut found = Found { fields: Fields::new(), left: *left };
        self.collect(id, At { path: "", offset: 0, depth }, &mut found)?;
        *left = found.left;
        found.fields.values().map(|field| field.offset + field.size).max()
    }
}

/// `BTF_KIND_*` of include/uapi/linux/btf.h.
fn read_type<'a>(words: &mut Words<'_>, names: &'a [u8]) -> Option<Type<'a>> {
    let (_name, info, size_or_type) = (words.next()?, words.next()?, words.next()?);
    let (kind, count) = (info >> 24 & 0x1f, usize::try_from(info & 0xffff).ok()?);
    match kind {
        // INT, FLOAT
        1 => {
            words.skip(1)?;
            Some(Type::Scalar(size_or_type))
        }
        16 => Some(Type::Scalar(size_or_type)),
        // ENUM, ENUM64
        6 | 19 => {
            words.skip(count * if kind == 6 { 2 } else { 3 })?;
            Some(Type::Scalar(size_or_type))
        }
        // ARRAY
        3 => {
            let (of, _index, length) = (words.next()?, words.next()?, words.next()?);
            Some(Type::Array(of, length))
        }
        // STRUCT. The members of a UNION lie in the same place, and nobody knows which is meant.
        4 => {
            let bitfields = info >> 31 == 1;
            let mut members = Vec::with_capacity(count);
            for _ in 0..count {
                let (name, of, offset) = (words.next()?, words.next()?, words.next()?);
                members.push((name_at(names, name)?, of, if bitfields { offset & 0x00ff_ffff } else { offset }));
            }
            Some(Type::Struct(members))
        }
        5 => words.skip(count * 3).map(|()| Type::Other),
        // TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG
        8..=11 | 18 => Some(Type::Alias(size_or_type)),
        // FUNC_PROTO, DATASEC, VAR and DECL_TAG have more to them.
        13 => words.skip(count * 2).map(|()| Type::Other),
        15 => words.skip(count * 3).map(|()| Type::Other),
        14 | 17 => words.skip(1).map(|()| Type::Other),
        // PTR, FWD, FUNC
        2 | 7 | 12 => Some(Type::Other),
        _ => None,
    }
}

fn name_at(names: &[u8], at: u32) -> Option<&str> {
    let name = names.get(usize::try_from(at).ok()?..)?.split(|byte| *byte == 0).next()?;
    std::str::from_utf8(name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A blob of these types.
    fn blob_of(parts: &[&[u32]], names: &[u8]) -> Vec<u8> {
        let types: Vec<u8> = parts.concat().iter().flat_map(|word| word.to_le_bytes()).collect();
        let lengths = [HEADER, 0, types.len(), types.len(), names.len()].map(|length| u32::try_from(length).unwrap());
        let mut blob = vec![0x9f, 0xeb, 1, 0];
        blob.extend(lengths.iter().flat_map(|length| length.to_le_bytes()));
        blob.extend(types);
        blob.extend(names);
        blob
    }

    /// `struct { u32 first; u16 pair[2]; struct { u32 __0; } inner[2]; }`
    fn blob() -> Vec<u8> {
        let structure = |members: u32, size: u32| [0, 4 << 24 | members, size];
        let parts = [
            &[0, 1 << 24, 4, 32][..],  // 1: u32
            &[0, 1 << 24, 2, 16],      // 2: u16
            &[0, 3 << 24, 0, 2, 1, 2], // 3: u16[2]
            &structure(1, 4),          // 4: struct inner
            &[18, 1, 0],
            &[0, 3 << 24, 0, 4, 1, 2], // 5: struct inner[2]
            &structure(3, 16),         // 6
            &[1, 1, 0, 7, 3, 32, 12, 5, 64],
            &[0, 2 << 24, 1],  // 7: u32 *
            &[0, 10 << 24, 6], // 8: const struct
        ];
        blob_of(&parts, b"\0first\0pair\0inner\0__0\0")
    }

    #[test]
    fn what_has_no_end_has_no_fields() {
        let array = |of: u32, count: u32| [0, 3 << 24, 0, of, 1, count];
        // A number, an array that is as long as memory, and one of two structures that hold one.
        let huge = [&[0, 16 << 24, u32::MAX][..], &array(1, u32::MAX), &[0, 4 << 24 | 1, 0, 0, 2, 0], &array(3, 2)];
        let huge = blob_of(&huge, b"\0");
        let btf = Btf::parse(&huge).unwrap();
        assert!(btf.fields(3).is_some());
        assert_eq!(btf.fields(4), None);
        // Structures of sixteen of the one before: sixteen to the tenth numbers.
        let mut parts = vec![vec![0, 16 << 24, 4]];
        parts.extend((1..=10).map(|of| [vec![0, 4 << 24 | 16, 0], [0, of, 0].repeat(16)].concat()));
        let many = blob_of(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>(), b"\0");
        let btf = Btf::parse(&many).unwrap();
        assert!(btf.fields(2).is_some());
        assert_eq!(btf.fields(11), None);
    }

    #[test]
    fn fields_have_paths_and_places() {
        let blob = blob();
        let btf = Btf::parse(&blob).unwrap();
        let fields = btf.fields(8).unwrap();
        let all: Vec<_> = fields.iter().map(|(path, field)| (path.as_str(), field.offset, field.size)).collect();
        assert_eq!(all, [("first", 0, 4), ("inner[0].__0", 8, 4), ("inner[1].__0", 12, 4), ("pair", 4, 4)]);
        assert_eq!(btf.fields(1).unwrap(), Fields::from([(String::new(), Field { offset: 0, size: 4 })]));
        assert_eq!(btf.fields(7), None);
        assert_eq!(btf.fields(0), None);
        assert_eq!(btf.fields(9), None);
    }

    #[test]
    fn what_ends_early_is_no_btf() {
        let blob = blob();
        for length in 0..blob.len() {
            // It may be read as fewer types, but never beyond its end.
            let _ = Btf::parse(&blob[..length]).map(|btf| btf.fields(8));
        }
        assert!(Btf::parse(b"no BTF at all, but long enough").is_none());
    }
}
