//! The one place that promises a type may be copied to and from the kernel byte by byte.

/// Plain old data: any bit pattern is valid and no byte is padding.
///
/// # Safety
/// Implementors are `repr(C)`, have no padding and hold integers or other `Pod` types only.
pub unsafe trait Pod: Copy + 'static {
    /// The bytes of the value, as the kernel sees them.
    fn as_bytes(&self) -> &[u8] {
        // SAFETY: `Self` has no padding, so all `size_of::<Self>()` bytes behind the reference are initialised.
        unsafe { core::slice::from_raw_parts(core::ptr::from_ref(self).cast::<u8>(), size_of::<Self>()) }
    }

    /// The value with these bytes, as the kernel handed them out; `None` for another number of bytes than it has.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        // SAFETY: there are `size_of::<Self>()` bytes behind the pointer, any bit pattern is a value, and no alignment is asked for.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }
}

/// Implements [`Pod`] (and aya's, in user space) for types whose size is the sum of their fields' sizes.
macro_rules! impl_pod {
    ($($type:ty = $size:expr),+ $(,)?) => {$(
        const _: () = assert!(size_of::<$type>() == $size, "implicit padding or a changed layout");
        // SAFETY: repr(C), integer fields only, and the assertion above excludes padding.
        unsafe impl $crate::pod::Pod for $type {}
        #[cfg(feature = "user")]
        // SAFETY: as above; aya's trait asks for the same.
        unsafe impl aya::Pod for $type {}
    )+};
}
pub(crate) use impl_pod;
