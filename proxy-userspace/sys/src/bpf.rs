//! What of bpf(2) the loader library does not offer: memory-mapped arrays, and pinned links and their programs.

use std::collections::VecDeque;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// `BPF_OBJ_GET` of `enum bpf_cmd` (include/uapi/linux/bpf.h).
const BPF_OBJ_GET: libc::c_long = 7;

/// `BPF_OBJ_PIN` of `enum bpf_cmd` (include/uapi/linux/bpf.h).
const BPF_OBJ_PIN: libc::c_long = 6;

/// `BPF_LINK_UPDATE` of `enum bpf_cmd` (include/uapi/linux/bpf.h).
const BPF_LINK_UPDATE: libc::c_long = 29;

/// `BPF_LINK_CREATE` and `BPF_ITER_CREATE` of `enum bpf_cmd`, and `BPF_TRACE_ITER` of `enum bpf_attach_type`.
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_ITER_CREATE: libc::c_long = 33;
const BPF_TRACE_ITER: u32 = 28;

/// The first members of `union bpf_attr` for `BPF_LINK_CREATE` of an iterator.
#[repr(C)]
struct IteratorCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    iter_info: u64,
    iter_info_len: u32,
    pad: u32,
}

/// The first members of `union bpf_attr` for `BPF_ITER_CREATE`.
#[repr(C)]
struct IterationCreate {
    link_fd: u32,
    flags: u32,
}

/// The first members of `union bpf_attr` for `BPF_LINK_UPDATE`.
#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// The first members of `union bpf_attr` for `BPF_OBJ_GET` and `BPF_OBJ_PIN`.
#[repr(C)]
struct ObjectGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// Opens what is pinned at `path`: a map, a program or a link.
///
/// # Errors
/// `ENOENT` when nothing is pinned there; `EINVAL` for a path with a zero byte.
pub fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attributes = ObjectGet { pathname: path.as_ptr().addr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: the kernel reads `size` bytes from the structure and a string from the path; both outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attributes, size_of::<ObjectGet>()) };
    owned(fd)
}

/// Pins a map, a program or a link at `path`, so that it outlives this process.
///
/// # Errors
/// `EEXIST` when something is there; `EPERM` outside of a BPF file system; `EINVAL` for a path with a zero byte.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let object = object.as_raw_fd().cast_unsigned();
    let attributes = ObjectGet { pathname: path.as_ptr().addr() as u64, bpf_fd: object, file_flags: 0 };
    // SAFETY: the kernel reads `size` bytes from the structure and a string from the path; both outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_PIN, &raw const attributes, size_of::<ObjectGet>()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Replaces the program behind `link` at once: no packet passes without one of the two.
///
/// # Errors
/// `ENOLINK` when what the link was attached to is gone; `EINVAL` when the program is of another type.
pub fn replace_program(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = LinkUpdate {
        link_fd: link.as_raw_fd().cast_unsigned(),
        new_prog_fd: program.as_raw_fd().cast_unsigned(),
        flags: 0,
        old_prog_fd: 0,
    };
    // SAFETY: the kernel reads `size` bytes from the structure, which outlives the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_UPDATE, &raw const attributes, size_of::<LinkUpdate>()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `BPF_PROG_TEST_RUN` of `enum bpf_cmd` (include/uapi/linux/bpf.h).
const BPF_PROG_TEST_RUN: libc::c_long = 10;

/// The shortest frame that a program can be run on.
const ETHERNET_BYTES: usize = 14;

/// How much longer than it was a frame may get: a program that sends fragments on which waited for their first one leaves the last of them in
/// its place.
const FRAME_GROWTH: usize = 2048;

/// The members of `union bpf_attr` for `BPF_PROG_TEST_RUN`.
#[repr(C)]
struct TestRunAttributes {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

/// What a program did with a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestRun {
    /// What it returned.
    pub verdict: u32,
    /// The frame as it left it.
    pub frame: Vec<u8>,
    /// The context as it left it, as long as the one that it was given.
    pub context: Vec<u8>,
}

/// Runs a tc program, which goes by what its maps hold and not by a frame, `times` times, at least once; others get the CPU in between.
/// Needs Linux 5.2.
///
/// # Errors
/// `EINTR` when a signal arrives: it has run less often then.
pub fn run_repeatedly(program: BorrowedFd<'_>, times: u32) -> io::Result<()> {
    test_run_times(program, &[0; ETHERNET_BYTES], &[], times).map(|_| ())
}

/// Runs a tc or XDP program once on `frame`, an Ethernet frame, with `context` as its `struct __sk_buff` or `struct xdp_md`. No interface
/// sees the frame, whatever the program returns; what it does to its maps stays. Needs Linux 5.2 (XDP with a context 5.14), and the
/// interface that the context names in this network namespace.
///
/// # Errors
/// `EINVAL` for a frame without headers, a context with other fields set than a test may, or an unknown interface.
pub fn test_run(program: BorrowedFd<'_>, frame: &[u8], context: &[u8]) -> io::Result<TestRun> {
    test_run_times(program, frame, context, 1)
}

fn test_run_times(program: BorrowedFd<'_>, frame: &[u8], context: &[u8], times: u32) -> io::Result<TestRun> {
    let length = |length: usize| u32::try_from(length).map_err(io::Error::other);
    let mut out = vec![0; frame.len() + FRAME_GROWTH];
    let mut context_out = vec![0; context.len()];
    let mut attributes = TestRunAttributes {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        retval: 0,
        data_size_in: length(frame.len())?,
        data_size_out: length(out.len())?,
        data_in: frame.as_ptr().addr() as u64,
        data_out: out.as_mut_ptr().addr() as u64,
        repeat: times,
        duration: 0,
        ctx_size_in: length(context.len())?,
        ctx_size_out: length(context_out.len())?,
        // The kernel wants an address with a size, and none without.
        ctx_in: if context.is_empty() { 0 } else { context.as_ptr().addr() as u64 },
        ctx_out: if context_out.is_empty() { 0 } else { context_out.as_mut_ptr().addr() as u64 },
        flags: 0,
        cpu: 0,
        batch_size: 0,
        pad: 0,
    };
    // SAFETY: the kernel reads and writes the structure, reads frame and context and writes at most the lengths of `out` and
    // `context_out`; all of it outlives the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, &raw mut attributes, size_of::<TestRunAttributes>()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    out.truncate(attributes.data_size_out as usize);
    Ok(TestRun { verdict: attributes.retval, frame: out, context: context_out })
}

/// A program of type iterator tied to one map: each [`MapIterator::read`] runs it over every entry.
#[derive(Debug)]
pub struct MapIterator {
    link: OwnedFd,
}

impl MapIterator {
    /// Ties `program` to `map`. Nothing runs yet, and nothing is left when the value is dropped. Needs Linux 5.9.
    ///
    /// # Errors
    /// `EINVAL` for another type of program or map, `EACCES` when the program reads beyond the map's values.
    pub fn new(program: BorrowedFd<'_>, map: BorrowedFd<'_>) -> io::Result<Self> {
        let target: u32 = map.as_raw_fd().cast_unsigned();
        let attributes = IteratorCreate {
            prog_fd: program.as_raw_fd().cast_unsigned(),
            target_fd: 0,
            attach_type: BPF_TRACE_ITER,
            flags: 0,
            iter_info: (&raw const target).addr() as u64,
            iter_info_len: u32::try_from(size_of::<u32>()).map_err(io::Error::other)?,
            pad: 0,
        };
        // SAFETY: the kernel reads `size` bytes from the structure and `iter_info_len` behind its pointer; both outlive the call.
        let fd = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_LINK_CREATE, &raw const attributes, size_of::<IteratorCreate>())
        };
        Ok(Self { link: owned(fd)? })
    }

    /// What the program writes about all entries, as a stream.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub fn read(&self) -> io::Result<File> {
        let attributes = IterationCreate { link_fd: self.link.as_raw_fd().cast_unsigned(), flags: 0 };
        // SAFETY: the kernel reads `size` bytes from the structure, which outlives the call.
        let fd = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_ITER_CREATE, &raw const attributes, size_of::<IterationCreate>())
        };
        owned(fd).map(File::from)
    }
}

/// The descriptor that bpf(2) answered with, or its error.
fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(fd) {
        // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Bytes that are mapped at once; a multiple of every page size in use (4 to 64 KiB) and of every stride.
const SEGMENT_BYTES: usize = 64 * 1024;
const SEGMENT_WORDS: usize = SEGMENT_BYTES / size_of::<u32>();

/// Segments of one array that are mapped at a time; all mapped pages count as this process's memory.
const SEGMENTS_MAX: usize = 8;

/// A `BPF_MAP_TYPE_ARRAY` with `BPF_F_MMAPABLE`, mapped into this process. Elements are seen as 32-bit words.
///
/// Writes cost no system call and are seen by running programs word by word; [`MappedArray::write`] says in what order.
/// Segments are mapped when they are written, at most eight of 64 KiB at a time, so that a large map costs this process little: the
/// kernel maps all pages of a mapping at once. Needs Linux 5.5.
#[derive(Debug)]
pub struct MappedArray {
    map: OwnedFd,
    segments: Vec<Option<Segment>>,
    /// Numbers of the mapped segments, the oldest first; at most [`SEGMENTS_MAX`].
    mapped: VecDeque<usize>,
    entries: u32,
    /// Words from one element to the next: the kernel rounds elements up to eight bytes.
    stride: usize,
}

impl MappedArray {
    /// Takes the array behind `map`: `entries` elements of `value_size` bytes each, a value size that divides a segment when
    /// rounded up to eight (powers of two do).
    ///
    /// # Errors
    /// `EINVAL` for another value size; those of mmap(2): `EPERM` or `ENOTSUPP` for a map that is not memory-mappable.
    pub fn map(map: BorrowedFd<'_>, entries: u32, value_size: usize) -> io::Result<Self> {
        let stride = value_size.div_ceil(8) * 2;
        if stride == 0 || !SEGMENT_WORDS.is_multiple_of(stride) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let count = (entries as usize * stride).div_ceil(SEGMENT_WORDS);
        let mut array = Self {
            map: map.try_clone_to_owned()?,
            segments: std::iter::repeat_with(|| None).take(count).collect(),
            mapped: VecDeque::with_capacity(SEGMENTS_MAX),
            entries,
            stride,
        };
        // Found out now rather than at the first write.
        if count > 0 {
            array.map_segment(0)?;
        }
        Ok(array)
    }

    /// Number of elements.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Reads `count` elements from `first` on, `words` words of each, and hands them to `visit` with their index. What is not
    /// mapped is mapped for the reading only.
    ///
    /// # Errors
    /// Those of mmap(2); `EINVAL` for a range beyond the array or more words than an element has.
    pub fn read(&self, first: u32, count: u32, words: usize, mut visit: impl FnMut(u32, &[u32])) -> io::Result<()> {
        let end = first.checked_add(count).filter(|end| *end <= self.entries && words <= self.stride);
        let end = end.ok_or(io::ErrorKind::InvalidInput)?;
        let mut element = vec![0; words];
        let mut borrowed: Option<(usize, Segment)> = None;
        for index in first..end {
            let (number, offset) = self.position(index);
            let segment = match self.segments.get(number) {
                Some(Some(segment)) => segment,
                _ => {
                    if borrowed.as_ref().is_none_or(|(mapped, _)| *mapped != number) {
                        borrowed = Some((number, self.new_segment(number)?));
                    }
                    match &borrowed {
                        Some((_, segment)) => segment,
                        None => continue,
                    }
                }
            };
            for (word, value) in element.iter_mut().enumerate() {
                *value = segment.word(offset + word).map_or(0, |word| word.load(Ordering::Acquire));
            }
            visit(index, &element);
        }
        Ok(())
    }

    /// Writes `words` to element `index`, word `last` after all others, so that a program that sees it sees the rest.
    ///
    /// # Errors
    /// Those of mmap(2); `EINVAL` for an index beyond the array or more words than an element has.
    pub fn write(&mut self, index: u32, words: &[u32], last: usize) -> io::Result<()> {
        if index >= self.entries || words.len() > self.stride {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (number, offset) = self.position(index);
        let segment = self.map_segment(number)?;
        let store = |position: usize, value: u32, ordering| {
            if let Some(word) = segment.word(offset + position) {
                word.store(value, ordering);
            }
        };
        for (position, value) in words.iter().enumerate().filter(|(position, _)| *position != last) {
            store(position, *value, Ordering::Relaxed);
        }
        if let Some(value) = words.get(last) {
            store(last, *value, Ordering::Release);
        }
        Ok(())
    }

    /// Segment of an element, and the offset of its first word there.
    fn position(&self, index: u32) -> (usize, usize) {
        let word = index as usize * self.stride;
        (word / SEGMENT_WORDS, word % SEGMENT_WORDS)
    }

    fn map_segment(&mut self, number: usize) -> io::Result<&Segment> {
        if self.segments.get(number).is_some_and(Option::is_none) {
            let segment = self.new_segment(number)?;
            let oldest = if self.mapped.len() < SEGMENTS_MAX { None } else { self.mapped.pop_front() };
            if let Some(slot) = oldest.and_then(|oldest| self.segments.get_mut(oldest)) {
                *slot = None;
            }
            if let Some(slot) = self.segments.get_mut(number) {
                *slot = Some(segment);
                self.mapped.push_back(number);
            }
        }
        match self.segments.get(number) {
            Some(Some(segment)) => Ok(segment),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn new_segment(&self, number: usize) -> io::Result<Segment> {
        let total = (self.entries as usize * self.stride * size_of::<u32>()).next_multiple_of(8);
        let start = number * SEGMENT_BYTES;
        Segment::map(self.map.as_fd(), start, total.saturating_sub(start).min(SEGMENT_BYTES))
    }
}

/// A mapped piece of an array.
#[derive(Debug)]
struct Segment {
    base: NonNull<AtomicU32>,
    length: usize,
}

// SAFETY: the mapping belongs to this value alone and every access through it is atomic.
unsafe impl Send for Segment {}

impl Segment {
    fn map(map: BorrowedFd<'_>, start: usize, length: usize) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let start = libc::off_t::try_from(start).map_err(io::Error::other)?;
        // SAFETY: a new mapping is asked for, so no memory of ours is touched; the kernel checks range and length.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, map.as_raw_fd(), start) };
        match NonNull::new(base.cast()) {
            Some(words) if base != libc::MAP_FAILED => Ok(Self { base: words, length }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Word `offset`, or `None` beyond the mapping.
    fn word(&self, offset: usize) -> Option<&AtomicU32> {
        if (offset + 1) * size_of::<u32>() > self.length {
            return None;
        }
        // SAFETY: the offset was just found to lie inside the mapping.
        let word = unsafe { self.base.add(offset) };
        // SAFETY: the mapping is page-aligned, lives as long as `self`, and is only ever accessed atomically.
        Some(unsafe { word.as_ref() })
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length and nothing borrows from it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
    }
}
