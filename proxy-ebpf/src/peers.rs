//! Reads what the socket hooks remember in sockets out to user space: for every socket its cookie and the remembered value.
//!
//! BPF iterators over the socket storage maps (Linux 5.9), which see the sockets of all network namespaces.

use core::ffi::c_void;

use aya_ebpf::bindings::seq_file;
use aya_ebpf::helpers::{bpf_get_socket_cookie, bpf_seq_write};

use crate::iterator::StorageContext;

/// Writes one record: eight bytes of cookie and the value `T`. What does not fit any more the kernel repeats by itself.
#[inline(always)]
pub fn write<T>(ctx: &StorageContext) -> i32 {
    let (sk, value) = (ctx.sk, ctx.value);
    // The last call says that there is nothing more.
    if sk.is_null() || value.is_null() {
        return 0;
    }
    // SAFETY: a socket of the kernel's, just found not to be null.
    let cookie: u64 = unsafe { bpf_get_socket_cookie(sk) };
    // SAFETY: the kernel gives a pointer to its own structure, as the verifier knows; the map's values are of this type, and the verifier
    // compares its size with theirs.
    unsafe { write_record((*ctx.meta).seq, &cookie, value, size_of::<T>()) };
    0
}

/// # Safety
/// `seq` is the kernel's, and `value` is as long as said.
#[inline(always)]
unsafe fn write_record(seq: *mut seq_file, cookie: &u64, value: *const c_void, length: usize) {
    // SAFETY: eight bytes of the stack, and the caller's.
    unsafe {
        bpf_seq_write(seq, core::ptr::from_ref(cookie).cast_mut().cast(), size_of::<u64>() as u32);
        bpf_seq_write(seq, value.cast_mut().cast(), length as u32);
    }
}
