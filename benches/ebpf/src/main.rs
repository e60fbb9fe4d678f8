//! Programs for `BPF_PROG_TEST_RUN`: calibration rows, and the packet path behind a wrapper.
//!
//! The kernel does not restore the packet between the repeats of a test run, so the wrapper writes the headers of the next
//! packet itself, calls the packet path and counts what it returned. Its own cost has a row of its own and is part of every
//! other one.
#![no_std]
#![no_main]

use aya_ebpf::bindings::{__sk_buff, BPF_ANY, TC_ACT_OK, xdp_action};
use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap};
use aya_ebpf::helpers::bpf_skb_store_bytes;
use aya_ebpf::macros::{btf_map, classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use proxy_ebpf::tc;

/// Steps that one calibration run repeats, so that the call itself weighs little.
const STEPS: u32 = 128;

/// Headers that the wrapper writes: Ethernet, IPv6 and TCP are 74 bytes.
const HEADERS: usize = 76;

/// What the wrapper writes and how it varies from packet to packet.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Template {
    /// The packet's first bytes.
    pub headers: [u8; HEADERS],
    /// How many of them count.
    pub length: u32,
    /// Offset of the source port; the wrapper writes it and the last two bytes of the source address before it.
    pub port_offset: u32,
    /// Offset of the last two bytes of the source address.
    pub address_offset: u32,
    /// Number of flows; flow `n` has source port `1024 + n % 32768` and the address counts `n / 32768`.
    pub flows: u32,
    /// Next flow.
    pub next: u32,
    /// Packets that the packet path redirected.
    pub redirected: u32,
    /// Packets that it passed.
    pub passed: u32,
    /// Packets that it dropped.
    pub dropped: u32,
}

#[btf_map]
static TEMPLATE: Array<Template, 1> = Array::new();
#[btf_map]
static HASH: HashMap<u64, u64, 65536> = HashMap::new();
#[btf_map]
static LRU: LruHashMap<u64, u64, 65536> = LruHashMap::new();
/// Keys that the hash rows draw from, less one: a power of two less one.
#[btf_map]
static KEY_MASK: Array<u64, 1> = Array::new();
/// Where the order of the lookup row has got to.
#[btf_map]
static SEED: Array<u64, 1> = Array::new();
/// Counts the keys of the insert row.
#[btf_map]
static NEXT_KEY: Array<u64, 1> = Array::new();

/// An XDP program that does nothing.
#[xdp]
fn empty_xdp(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

/// A tc program that does nothing.
#[classifier]
fn empty_tc(_ctx: TcContext) -> i32 {
    TC_ACT_OK
}

/// Lookups of keys in a pseudo-random order.
#[classifier]
fn hash_lookup(_ctx: TcContext) -> i32 {
    let (Some(mask), Some(seed)) = (KEY_MASK.get(0), SEED.get_ptr_mut(0)) else { return TC_ACT_OK };
    // The sequence goes on from run to run: starting over would only ever touch the same few keys.
    // SAFETY: the element of an array map; test runs are not concurrent.
    let mut state = unsafe { *seed } | 1;
    let mut found = 0;
    for _ in 0..STEPS {
        // Xorshift (Marsaglia 2003): cheap, and every key comes up.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // SAFETY: the value is copied before any update.
        found += u32::from(unsafe { HASH.get(state & mask) }.is_some());
    }
    // SAFETY: as above.
    unsafe { *seed = state };
    found as i32
}

/// Inserts of keys that were not there: every one evicts once the table is full.
#[classifier]
fn lru_insert(_ctx: TcContext) -> i32 {
    let Some(next) = NEXT_KEY.get_ptr_mut(0) else { return TC_ACT_OK };
    for _ in 0..STEPS {
        // SAFETY: the element of an array map; test runs are not concurrent.
        let key = unsafe {
            *next += 1;
            *next
        };
        if LRU.insert(key, key, BPF_ANY.into()).is_err() {
            return -1;
        }
    }
    STEPS as i32
}

/// The wrapper alone.
#[classifier]
fn wrapper_only(ctx: TcContext) -> i32 {
    match TEMPLATE.get_ptr_mut(0) {
        // SAFETY: test runs are not concurrent.
        Some(template) => restore(&ctx, unsafe { &mut *template }),
        None => -1,
    }
}

/// The packet path on ingress, one packet.
#[classifier]
fn wrapped_ingress(ctx: TcContext) -> i32 {
    let Some(template) = TEMPLATE.get_ptr_mut(0) else { return -1 };
    // SAFETY: test runs are not concurrent.
    let template = unsafe { &mut *template };
    if restore(&ctx, template) != TC_ACT_OK {
        return -1;
    }
    let verdict = tc::run(&ctx, tc::Direction::Ingress);
    match verdict {
        7 => template.redirected += 1,
        TC_ACT_OK => template.passed += 1,
        _ => template.dropped += 1,
    }
    verdict
}

/// Writes the next packet over the last one.
#[inline(always)]
fn restore(ctx: &TcContext, template: &mut Template) -> i32 {
    let skb: *mut __sk_buff = ctx.skb.skb;
    let flow = template.next;
    template.next = if flow + 1 >= template.flows { 0 } else { flow + 1 };
    write(&mut template.headers, template.port_offset, (1024 + (flow & 0x7fff)) as u16);
    write(&mut template.headers, template.address_offset, (flow >> 15) as u16);
    let length = template.length;
    if length < 1 || length > HEADERS as u32 {
        return -1;
    }
    // SAFETY: the template is longer than `length` and the helper checks the packet's end.
    let stored = unsafe { bpf_skb_store_bytes(skb, 0, template.headers.as_ptr().cast(), length, 0) };
    if stored != 0 {
        return -1;
    }
    // Translation marks the packet; the next repeat must not see it.
    ctx.set_mark(0);
    TC_ACT_OK
}

/// Writes a number in network byte order into the headers.
#[inline(always)]
fn write(headers: &mut [u8; HEADERS], offset: u32, value: u16) {
    let offset = offset as usize;
    if offset + 1 < HEADERS {
        let bytes = value.to_be_bytes();
        headers[offset] = bytes[0];
        headers[offset + 1] = bytes[1];
    }
}

/// Tells the kernel that helpers reserved for GPL programs may be used.
// SAFETY: the kernel reads this section as a NUL-terminated string.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
