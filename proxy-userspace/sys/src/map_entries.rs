//! Reading a whole map in few system calls.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `BPF_MAP_LOOKUP_BATCH` of `enum bpf_cmd` (include/uapi/linux/bpf.h).
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;

/// Entries of one system call. The kernel gives a bucket of a hash whole or not at all, and none holds so many.
const BATCH: u32 = 1024;

/// The members of `union bpf_attr` for `BPF_MAP_LOOKUP_BATCH`.
#[repr(C)]
struct LookupBatch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Hands every entry of a hash or an LPM trie to `visit`, as bytes of key and value, in no order. `key` and `value` are their
/// sizes. What somebody changes meanwhile may be missing or come twice. Needs Linux 5.13.
///
/// # Errors
/// `ENOTSUPP` for another type of map, `EINTR` when others keep changing it, `EINVAL` for a size of 0.
pub fn read_entries(
    map: BorrowedFd<'_>,
    (key, value): (usize, usize),
    mut visit: impl FnMut(&[u8], &[u8]),
) -> io::Result<()> {
    read(map, (key, value), None, usize::MAX, &mut visit)
}

/// Hands `count` elements of an array to `visit`, from index `first` on, as their bytes; fewer where the array ends. `value` is their
/// size. Needs Linux 5.13.
///
/// # Errors
/// `ENOTSUPP` for another type of map, `EINVAL` for a size of 0.
pub fn read_elements(
    map: BorrowedFd<'_>,
    value: usize,
    first: u32,
    count: usize,
    mut visit: impl FnMut(&[u8]),
) -> io::Result<()> {
    // The kernel goes on behind the key that it is told.
    let behind = first.checked_sub(1).map(u32::to_ne_bytes);
    read(map, (size_of::<u32>(), value), behind.as_ref().map(<[u8; 4]>::as_slice), count, &mut |_, value| visit(value))
}

/// Entries behind the one of key `behind`, at most `count`.
fn read(
    map: BorrowedFd<'_>,
    (key, value): (usize, usize),
    behind: Option<&[u8]>,
    mut count: usize,
    visit: &mut dyn FnMut(&[u8], &[u8]),
) -> io::Result<()> {
    if key == 0 || value == 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut keys = vec![0_u8; key * BATCH as usize];
    let mut values = vec![0_u8; value * BATCH as usize];
    // Where to go on: a bucket of a hash, a key of a trie.
    let mut place = vec![0_u8; key.max(size_of::<u32>())];
    let mut first = behind.is_none();
    if let Some((place, behind)) = behind.and_then(|behind| Some((place.get_mut(..behind.len())?, behind))) {
        place.copy_from_slice(behind);
    }
    while count > 0 {
        let mut batch = LookupBatch {
            in_batch: if first { 0 } else { place.as_ptr().addr() as u64 },
            out_batch: place.as_mut_ptr().addr() as u64,
            keys: keys.as_mut_ptr().addr() as u64,
            values: values.as_mut_ptr().addr() as u64,
            count: u32::try_from(count).unwrap_or(BATCH).min(BATCH),
            map_fd: map.as_raw_fd().cast_unsigned(),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: the kernel reads the structure and writes its count; it writes at most BATCH entries of the sizes that the caller
        // names, and one key or bucket number; all of it outlives the call.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut batch, size_of::<LookupBatch>()) };
        let error = io::Error::last_os_error();
        let last = result != 0 && error.raw_os_error() == Some(libc::ENOENT);
        if result != 0 && !last {
            return Err(error);
        }
        let entries = keys.chunks_exact(key).zip(values.chunks_exact(value));
        entries.take(batch.count as usize).for_each(|(key, value)| visit(key, value));
        if last {
            return Ok(());
        }
        count = count.saturating_sub(batch.count as usize);
        first = false;
    }
    Ok(())
}
