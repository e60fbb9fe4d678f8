//! What the kernel gives to BPF iterators.

use core::ffi::c_void;

use aya_ebpf::bindings::seq_file;

/// The beginning of `struct bpf_iter_meta` (kernel/bpf/bpf_iter.c).
#[repr(C)]
pub struct Meta {
    pub(crate) seq: *mut seq_file,
}

/// `struct bpf_iter__bpf_sk_storage_map` (net/core/bpf_sk_storage.c): one socket with storage; null at the end.
#[repr(C)]
pub struct StorageContext {
    pub(crate) meta: *const Meta,
    map: *const c_void,
    pub(crate) sk: *mut c_void,
    pub(crate) value: *const c_void,
}
