//! The table of flows as it lies in maps; what it does is in [`proxy_common::flow_table`].

use core::intrinsics::{AtomicOrdering, atomic_cxchg};
use core::marker::PhantomData;
use core::ptr::write_volatile;

use aya_ebpf::Global;
use proxy_common::flow_table::{self, FlowEntry, FlowHead, FlowInsertError, FlowSecret, FlowStore};
use proxy_common::{Flow, FlowKey};

use crate::forward::ticks;
use crate::maps::{FLOW_SECRET, Family, Ipv4, Ipv6};

/// Buckets of each family's table. User space overrides it together with the sizes of the maps.
#[unsafe(no_mangle)]
static FLOW_BUCKETS: Global<u32> = Global::new(65536);

/// The flows of a family.
pub struct Flows<F>(PhantomData<F>);

impl<F: Family> Flows<F> {
    /// There is nothing in it: every map has a name.
    pub const NEW: Self = Self(PhantomData);

    /// Copies the flow of `key`. Returns the index of its entry, for [`Self::at`].
    #[inline(always)]
    pub fn read(&self, key: &FlowKey<F::A>, into: &mut Flow<F::A>) -> Option<u32> {
        let index = F::read_flow(key, into);
        if index == NOWHERE { None } else { Some(index) }
    }

    /// The flow in an entry, to write single fields of it.
    #[inline(always)]
    pub fn at(&self, index: u32) -> Option<&'static mut Flow<F::A>> {
        // SAFETY: an element of an array, which is never freed; any bytes are a value, and what others write at once is whole fields.
        self.entry(index).map(|entry| unsafe { &mut (*entry).flow })
    }

    /// Writes the flow of `key` if it has none.
    ///
    /// # Errors
    /// When it has one, or the bucket is being written all the time.
    #[inline(always)]
    pub fn add(&self, key: &FlowKey<F::A>, flow: &Flow<F::A>) -> Result<(), FlowInsertError> {
        result(F::write_flow(key, flow, 0))
    }

    /// Writes the flow of `key`.
    ///
    /// # Errors
    /// When the bucket is being written all the time.
    #[inline(always)]
    pub fn set(&self, key: &FlowKey<F::A>, flow: &Flow<F::A>) -> Result<(), FlowInsertError> {
        result(F::write_flow(key, flow, 1))
    }

    /// Removes the flow of `key`.
    #[inline(always)]
    pub fn remove(&self, key: &FlowKey<F::A>) -> bool {
        F::remove_flow(key) != 0
    }

    /// Says that the flow in an entry was seen, and what it is worth by its flags.
    #[inline(always)]
    pub fn touch(&self, index: u32, flags: u8, now: u32) {
        flow_table::touch(self, index, flags, now);
    }
}

/// Of a lookup that found nothing.
const NOWHERE: u32 = u32::MAX;
const WRITTEN: u32 = 0;
const EXISTS: u32 = 1;
const BUSY: u32 = 2;

#[inline(always)]
const fn result(code: u32) -> Result<(), FlowInsertError> {
    match code {
        WRITTEN => Ok(()),
        EXISTS => Err(FlowInsertError::Exists),
        _ => Err(FlowInsertError::Busy),
    }
}

/// The functions of one family. They are global for the verifier: it walks each of them once, and not at each call, and so wants pointers
/// checked that may be null as far as it knows.
macro_rules! functions {
    ($family:ty, $read:ident, $write:ident, $remove:ident) => {
        /// Copies the flow of `key` to `into`. Returns the index of its entry, or [`NOWHERE`].
        ///
        /// # Safety
        /// The pointers are to whole values, or null.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub unsafe extern "C" fn $read(
            key: *const FlowKey<Address<$family>>,
            into: *mut Flow<Address<$family>>,
        ) -> u32 {
            // SAFETY: the verifier lets pointers to whole values through, and null.
            let (Some(key), Some(into)) = (unsafe { (key.as_ref(), into.as_mut()) }) else { return NOWHERE };
            flow_table::read(&Flows::<$family>::NEW, key, into).unwrap_or(NOWHERE)
        }

        /// Writes the flow of `key`; one that is there is replaced if `replace` is not 0. Returns one of `WRITTEN`, `EXISTS`, `BUSY`.
        ///
        /// # Safety
        /// As above.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub unsafe extern "C" fn $write(
            key: *const FlowKey<Address<$family>>,
            flow: *const Flow<Address<$family>>,
            replace: u32,
        ) -> u32 {
            // SAFETY: as above.
            let (Some(key), Some(flow)) = (unsafe { (key.as_ref(), flow.as_ref()) }) else { return BUSY };
            match flow_table::insert(&Flows::<$family>::NEW, key, flow, replace != 0, ticks()) {
                Ok(()) => WRITTEN,
                Err(FlowInsertError::Exists) => EXISTS,
                Err(FlowInsertError::Busy) => BUSY,
            }
        }

        /// Removes the flow of `key`. Returns 1 if there was one.
        ///
        /// # Safety
        /// As above.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub unsafe extern "C" fn $remove(key: *const FlowKey<Address<$family>>) -> u32 {
            // SAFETY: as above.
            let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
            flow_table::remove(&Flows::<$family>::NEW, key).into()
        }
    };
}

type Address<F> = <F as Family>::A;

functions!(Ipv4, read_flow_v4, write_flow_v4, remove_flow_v4);
functions!(Ipv6, read_flow_v6, write_flow_v6, remove_flow_v6);

impl<F: Family> FlowStore for Flows<F> {
    type A = F::A;

    #[inline(always)]
    fn buckets(&self) -> u32 {
        FLOW_BUCKETS.load()
    }

    #[inline(always)]
    fn secret(&self) -> Option<&FlowSecret> {
        FLOW_SECRET.get(0)
    }

    #[inline(always)]
    fn head(&self, bucket: u32) -> Option<*mut FlowHead> {
        F::flow_heads().get_ptr_mut(bucket)
    }

    #[inline(always)]
    fn entry(&self, index: u32) -> Option<*mut FlowEntry<F::A>> {
        F::flow_entries().get_ptr_mut(index)
    }

    #[inline(always)]
    fn barrier(&self) {
        // x86 keeps stores and loads in order as far as this table needs it, so only the compiler has to.
        // SAFETY: there is no instruction.
        #[cfg(not(bpf_target_arch = "aarch64"))]
        unsafe {
            core::arch::asm!("", options(nostack, preserves_flags))
        };
        // SAFETY: a variable of our own. An atomic addition is a barrier on every machine.
        #[cfg(bpf_target_arch = "aarch64")]
        let _ = unsafe { core::intrinsics::atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(&mut 0, 1) };
    }

    #[inline(always)]
    unsafe fn try_lock(&self, lock: *mut u64) -> bool {
        // SAFETY: the caller's.
        let (was, _) =
            unsafe { atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(lock, 0, 1) };
        was == 0
    }

    #[inline(always)]
    unsafe fn unlock(&self, lock: *mut u64) {
        // SAFETY: the caller's. Stores are seen in order on x86.
        #[cfg(not(bpf_target_arch = "aarch64"))]
        unsafe {
            write_volatile(lock, 0)
        };
        // SAFETY: the caller's. An atomic exchange is the barrier that BPF has for every machine.
        #[cfg(bpf_target_arch = "aarch64")]
        let _ = unsafe { core::intrinsics::atomic_xchg::<u64, { AtomicOrdering::SeqCst }>(lock, 0) };
    }
}
