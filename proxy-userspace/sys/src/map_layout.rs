//! What a map looks like, as the kernel knows it: type, sizes, and the fields of its keys and values by name.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::btf::{Btf, Fields};

/// `BPF_MAP_UPDATE_ELEM`, `BPF_OBJ_GET_INFO_BY_FD` and `BPF_BTF_GET_FD_BY_ID` of `enum bpf_cmd` (include/uapi/linux/bpf.h).
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_BTF_GET_FD_BY_ID: libc::c_long = 19;
/// `BPF_NOEXIST`.
const BPF_NOEXIST: u64 = 1;
/// `BPF_MAP_TYPE_PERCPU_HASH`, `_PERCPU_ARRAY`, `_LRU_PERCPU_HASH` and `_PERCPU_CGROUP_STORAGE`.
const PER_CPU: [u32; 4] = [5, 6, 10, 21];
/// Longest BTF that is read, in bytes; that of all of trama-proxy's programs is a fiftieth.
const BTF_MAX: u32 = 8 << 20;

/// What a map looks like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapLayout {
    /// `enum bpf_map_type`.
    pub kind: u32,
    /// Bytes of a key.
    pub key_size: usize,
    /// Bytes of a value.
    pub value_size: usize,
    /// Entries that there is room for.
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
    /// Fields of a key; none where the kernel was not told.
    pub key: Fields,
    /// Fields of a value; none where the kernel was not told.
    pub value: Fields,
}

/// `struct bpf_map_info` as of Linux 5.18.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    name: [u8; 16],
    ifindex: u32,
    btf_vmlinux_value_type_id: u32,
    netns_dev: u64,
    netns_ino: u64,
    btf_id: u32,
    btf_key_type_id: u32,
    btf_value_type_id: u32,
    pad: u32,
    map_extra: u64,
}

/// The beginning of `struct bpf_btf_info`.
#[repr(C)]
#[derive(Default)]
struct BtfInfo {
    btf: u64,
    btf_size: u32,
    id: u32,
}

/// The members of `union bpf_attr` for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct GetInfo {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The members of `union bpf_attr` for `BPF_MAP_UPDATE_ELEM`.
#[repr(C)]
struct UpdateElement {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl MapLayout {
    /// Asks the kernel. The fields need CAP_SYS_ADMIN: that is what BTF by its id takes.
    ///
    /// # Errors
    /// Those of bpf(2): `EPERM` without the capability; `EINVAL` for a descriptor that is no map's.
    pub fn of(map: BorrowedFd<'_>) -> io::Result<Self> {
        let info: MapInfo = info(map, MapInfo::default())?;
        let blob = if info.btf_id == 0 { Vec::new() } else { btf(info.btf_id)? };
        let types = Btf::parse(&blob);
        let fields = |id| types.as_ref().and_then(|types| types.fields(id)).unwrap_or_default();
        Ok(Self { key: fields(info.btf_key_type_id), value: fields(info.btf_value_type_id), ..Self::sizes(&info)? })
    }

    /// The same without fields, which takes no CAP_SYS_ADMIN.
    ///
    /// # Errors
    /// Those of bpf(2): `EINVAL` for a descriptor that is no map's.
    pub fn without_fields(map: BorrowedFd<'_>) -> io::Result<Self> {
        Self::sizes(&info(map, MapInfo::default())?)
    }

    fn sizes(info: &MapInfo) -> io::Result<Self> {
        let size = |size: u32| usize::try_from(size).map_err(io::Error::other);
        Ok(Self {
            kind: info.kind,
            key_size: size(info.key_size)?,
            value_size: size(info.value_size)?,
            max_entries: info.max_entries,
            flags: info.map_flags,
            key: Fields::default(),
            value: Fields::default(),
        })
    }
}

/// The kernel's facts about what a descriptor stands for. `T` is the kernel's structure, or the beginning of it.
fn info<T>(object: BorrowedFd<'_>, mut info: T) -> io::Result<T> {
    let mut attributes = GetInfo {
        bpf_fd: object.as_raw_fd().cast_unsigned(),
        info_len: u32::try_from(size_of::<T>()).map_err(io::Error::other)?,
        info: (&raw mut info).addr() as u64,
    };
    // SAFETY: the kernel reads and writes the structure and at most `info_len` bytes of the other; both outlive the call, and are
    // plain numbers, for which any bytes are a value.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET_INFO_BY_FD, &raw mut attributes, size_of::<GetInfo>()) };
    if result == 0 { Ok(info) } else { Err(io::Error::last_os_error()) }
}

/// The BTF blob with this id.
fn btf(id: u32) -> io::Result<Vec<u8>> {
    // SAFETY: the kernel reads one word, which outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_BTF_GET_FD_BY_ID, &raw const id, size_of::<u32>()) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let size = info(fd.as_fd(), BtfInfo::default())?.btf_size.min(BTF_MAX);
    let mut blob = vec![0_u8; usize::try_from(size).map_err(io::Error::other)?];
    // The kernel writes at most `btf_size` bytes there.
    info(fd.as_fd(), BtfInfo { btf: blob.as_mut_ptr().addr() as u64, btf_size: size, id: 0 })?;
    Ok(blob)
}

/// A map and its layout.
#[derive(Debug)]
pub struct DescribedMap {
    map: OwnedFd,
    layout: MapLayout,
}

impl DescribedMap {
    /// Asks the kernel for the layout.
    ///
    /// # Errors
    /// As [`MapLayout::of`].
    pub fn new(map: OwnedFd) -> io::Result<Self> {
        Ok(Self { layout: MapLayout::of(map.as_fd())?, map })
    }

    /// The same without the fields.
    ///
    /// # Errors
    /// As [`MapLayout::without_fields`].
    pub fn without_fields(map: OwnedFd) -> io::Result<Self> {
        Ok(Self { layout: MapLayout::without_fields(map.as_fd())?, map })
    }

    /// What the map looks like.
    pub fn layout(&self) -> &MapLayout {
        &self.layout
    }

    /// Hands every entry to `visit`, as [`read_entries`](crate::read_entries) does; arrays too.
    ///
    /// # Errors
    /// As there; `EINVAL` for a map of values by CPU.
    pub fn read(&self, visit: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
        self.refuse_per_cpu()?;
        crate::read_entries(self.map.as_fd(), (self.layout.key_size, self.layout.value_size), visit)
    }

    /// Writes an entry, given as bytes; `if_absent` leaves one alone that is there. Whether it was written.
    ///
    /// # Errors
    /// Those of bpf(2): `E2BIG` for a full map. `EINVAL` for bytes of other lengths than the map's, and for a map of values by CPU.
    pub fn write(&self, key: &[u8], value: &[u8], if_absent: bool) -> io::Result<bool> {
        self.refuse_per_cpu()?;
        if key.len() != self.layout.key_size || value.len() != self.layout.value_size {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let attributes = UpdateElement {
            map_fd: self.map.as_raw_fd().cast_unsigned(),
            pad: 0,
            key: key.as_ptr().addr() as u64,
            value: value.as_ptr().addr() as u64,
            flags: if if_absent { BPF_NOEXIST } else { 0 },
        };
        // SAFETY: the kernel reads the structure, and from key and value as many bytes as it said itself that the map's have; all of it
        // outlives the call. Maps by CPU, whose values are longer than said, were refused.
        let result = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_MAP_UPDATE_ELEM, &raw const attributes, size_of::<UpdateElement>())
        };
        let error = io::Error::last_os_error();
        match result {
            0 => Ok(true),
            _ if if_absent && error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            _ => Err(error),
        }
    }

    fn refuse_per_cpu(&self) -> io::Result<()> {
        if PER_CPU.contains(&self.layout.kind) { Err(io::ErrorKind::InvalidInput.into()) } else { Ok(()) }
    }
}
