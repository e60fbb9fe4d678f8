//! Programs for `BPF_PROG_TEST_RUN`: calibration rows, and the packet path behind a wrapper.
//!
//! The kernel does not restore the packet between the repeats of a test run, so the wrapper writes the headers of the next
//! packet itself, calls the packet path and counts what it returned. Its own cost has a row of its own and is part of every
//! other one.
#![no_std]
#![no_main]

use aya_ebpf::bindings::{BPF_ANY, BPF_F_PSEUDO_HDR, TC_ACT_OK, bpf_fib_lookup, xdp_action};
use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap};
use aya_ebpf::helpers::{self, bpf_l4_csum_replace};
use aya_ebpf::macros::{btf_map, classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use proxy_ebpf::tc;

/// Steps that one calibration run repeats, so that the call itself weighs little.
const STEPS: u32 = 128;

/// Words of eight bytes that the wrapper writes: Ethernet, IPv6 and TCP are 74 bytes.
const WORDS: usize = 10;
/// The same in bytes; every frame is at least as long.
const HEADERS: usize = WORDS * 8;

/// A client and an endpoint of the benchmark, for the route row.
const CLIENT: [u8; 4] = [10, 1, 0, 0];
const BACKEND: [u8; 4] = [10, 244, 0, 1];

/// What the wrapper writes and how it varies from packet to packet. Flow `n` has source port `1024 + n % 32768`, and the last two
/// bytes of its source address count `n / 32768`; both are zero in `headers`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Template {
    /// The packet's first bytes.
    pub headers: [u64; WORDS],
    /// For each word, what the source port in network byte order is multiplied with before it is added; 0 where it is not.
    pub port: [u64; WORDS],
    /// The same for the two bytes of the source address.
    pub address: [u64; WORDS],
    /// Number of flows.
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
/// What the route row works on.
#[btf_map]
static ROUTE: Array<bpf_fib_lookup, 1> = Array::new();
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

/// Route lookups of one destination, as the packet path makes them; the last result is returned.
#[classifier]
fn route_lookup(ctx: TcContext) -> i32 {
    let Some(route) = ROUTE.get_ptr_mut(0) else { return -1 };
    let mut found = 0;
    for _ in 0..STEPS {
        // SAFETY: the element of an array map; test runs are not concurrent.
        let route = unsafe { &mut *route };
        *route = bpf_fib_lookup { family: 2, l4_protocol: 6, ifindex: interface(&ctx), ..*route };
        route.__bindgen_anon_1.tot_len = 0;
        route.__bindgen_anon_2.tos = 0;
        route.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(CLIENT);
        route.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(BACKEND);
        route.__bindgen_anon_5.tbid = 0;
        let size = size_of::<bpf_fib_lookup>() as i32;
        // SAFETY: the context is the kernel's and the structure is as large as said.
        let result = unsafe { helpers::bpf_fib_lookup(ctx.skb.skb.cast(), route, size, 0) };
        found += i32::from(result == 0);
    }
    found
}

/// Updates of the transport checksum by the helper that also knows what devices compute.
#[classifier]
fn checksum_replace(ctx: TcContext) -> i32 {
    let mut done = 0;
    for step in 0..STEPS {
        // SAFETY: the context is the kernel's; the helper checks the offset.
        let result =
            unsafe { bpf_l4_csum_replace(ctx.skb.skb, 14 + 20 + 16, 0, u64::from(step), BPF_F_PSEUDO_HDR.into()) };
        done += i32::from(result == 0);
    }
    done
}

#[inline(always)]
fn interface(ctx: &TcContext) -> u32 {
    // SAFETY: field access through the kernel's context.
    unsafe { (*ctx.skb.skb).ifindex }
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

/// Writes the next packet over the last one, whole words at a time: a smaller piece written first would make the processor wait.
#[inline(always)]
fn restore(ctx: &TcContext, template: &mut Template) -> i32 {
    let flow = template.next;
    template.next = if flow + 1 >= template.flows { 0 } else { flow + 1 };
    let port = u64::from(((1024 + (flow & 0x7fff)) as u16).to_be());
    let address = u64::from(((flow >> 15) as u16).to_be());
    let start = ctx.data();
    if start + HEADERS > ctx.data_end() {
        return -1;
    }
    let packet = start as *mut u64;
    for index in 0..WORDS {
        let word = template.headers[index] + port * template.port[index] + address * template.address[index];
        // SAFETY: the bounds were checked just now, and BPF allows misaligned access. Volatile, or the loop becomes a call of memcpy.
        unsafe { packet.add(index).write_volatile(word) };
    }
    // Translation marks the packet; the next repeat must not see it.
    ctx.set_mark(0);
    TC_ACT_OK
}

/// Tells the kernel that helpers reserved for GPL programs may be used.
// SAFETY: the kernel reads this section as a NUL-terminated string.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
