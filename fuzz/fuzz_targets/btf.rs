//! The kernel's description of what lies in maps, and the fields of every type in it.
#![no_main]

/// More types than anything small enough to be made here has.
const TYPES_MAX: u32 = 64;

libfuzzer_sys::fuzz_target!(|blob: &[u8]| {
    let Some(btf) = node_sys::Btf::parse(blob) else { return };
    let _fields: Vec<_> = (0..TYPES_MAX).map(|id| btf.fields(id)).collect();
});
