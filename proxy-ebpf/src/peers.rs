//! Reads what the socket hooks remember out to user space: for every socket with storage, its cookie and the stored value.
//!
//! A BPF iterator over the socket storage maps (Linux 5.9): it sees the sockets of all network namespaces.

use core::ffi::c_void;

use aya_ebpf::bindings::seq_file;
use aya_ebpf::helpers::{bpf_get_socket_cookie, bpf_seq_write};

/// The beginning of `struct bpf_iter_meta` (kernel/bpf/bpf_iter.c).
#[repr(C)]
struct Meta {
    seq: *mut seq_file,
}

/// `struct bpf_iter__bpf_sk_storage_map` (net/core/bpf_sk_storage.c).
#[repr(C)]
pub struct StorageContext {
    meta: *const Meta,
    map: *const c_void,
    sk: *mut c_void,
    value: *const c_void,
}

/// Writes one record: eight bytes of cookie and the value `T`. What does not fit any more the kernel repeats by itself.
#[inline(always)]
pub fn write<T>(ctx: &StorageContext) -> i32 {
    let (sk, value) = (ctx.sk, ctx.value);
    // The last call says that there is nothing more.
    if sk.is_null() || value.is_null() {
        return 0;
    }
    // SAFETY: the kernel gives a pointer to its own structure, as the verifier knows.
    let seq = unsafe { (*ctx.meta).seq };
    // SAFETY: a socket of the kernel's, just found not to be null.
    let cookie: u64 = unsafe { bpf_get_socket_cookie(sk) };
    // SAFETY: eight bytes of the stack.
    unsafe { bpf_seq_write(seq, (&raw const cookie).cast(), size_of::<u64>() as u32) };
    // SAFETY: the map's values are of this type, and the verifier compares its size with theirs.
    unsafe { bpf_seq_write(seq, value, size_of::<T>() as u32) };
    0
}
