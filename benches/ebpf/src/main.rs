//! Programs for `BPF_PROG_TEST_RUN`: calibration rows, and the packet path behind a wrapper.
//!
//! The kernel does not restore the packet between the repeats of a test run, so the wrapper writes the headers of the next
//! packet itself, calls the packet path and counts what it returned. Its own cost has a row of its own and is part of every
//! other one.
#![no_std]
#![no_main]

use aya_ebpf::bindings::{
    BPF_ANY, BPF_F_MMAPABLE, BPF_F_PSEUDO_HDR, TC_ACT_OK, TC_ACT_SHOT, bpf_fib_lookup, xdp_action,
};
use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap, PerCpuArray};
use aya_ebpf::helpers::{self, bpf_l4_csum_replace};
use aya_ebpf::macros::{btf_map, cgroup_sock, cgroup_sock_addr, classifier, xdp};
use aya_ebpf::programs::{SockAddrContext, SockContext, TcContext, XdpContext};
use proxy_ebpf::ctx::{Frame, Hook, Packet};
use proxy_ebpf::maps::{Family, Ipv4};
use proxy_ebpf::{connected, sock, tc, xdp as frames};

/// Steps that one calibration run repeats, so that the call itself weighs little.
const STEPS: u32 = 128;

/// Words of eight bytes that the wrapper writes behind the first two: Ethernet, IPv6 and TCP are 74 bytes. So no field of theirs lies in
/// two words: who reads one waits until both are in the cache, which no packet from a device costs.
const WORDS: usize = 9;
/// The bytes before these words.
const LEAD: usize = 2;

/// A client and an endpoint of the benchmark, for the route row.
const CLIENT: [u8; 4] = [10, 1, 0, 0];
const BACKEND: [u8; 4] = [10, 244, 0, 1];

/// What the wrapper writes and how it varies from packet to packet. Flow `n` has source port `1024 + n % 32768`, and the last two
/// bytes of its source address count `n / 32768`; both are zero in `headers`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Template {
    /// The packet's first bytes, but for the two of `lead`.
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
    /// Bytes of the frame.
    pub length: u32,
    /// Its first two bytes.
    pub lead: u16,
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
/// Cache lines, each of which says which is the next.
#[btf_map]
static LINES: Array<[u64; 8], 1, { BPF_F_MMAPABLE as usize }> = Array::new();
/// What the route row works on.
#[btf_map]
static ROUTE: Array<bpf_fib_lookup, 1> = Array::new();
/// Counts the keys of the insert row.
#[btf_map]
static NEXT_KEY: Array<u64, 1> = Array::new();
/// Datagrams that have come to `sink`.
#[btf_map]
static ARRIVED: PerCpuArray<u64, 1> = PerCpuArray::new();

/// Bytes of an IPv4 frame up to the end of its protocol number, in words of two bytes.
const PROTOCOL_WORDS: usize = 12;
/// `ETH_P_IP` of include/uapi/linux/if_ether.h, and `IPPROTO_UDP`.
const IPV4: u16 = 0x0800;
const UDP: u8 = 17;

/// The socket path: connect().
#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    sock::connect::<Ipv4>(&ctx)
}

/// The socket path: sendmsg() with a destination.
#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    sock::send::<Ipv4>(&ctx)
}

/// The socket path: the end of a socket.
#[cgroup_sock(sock_release)]
fn sock_release(ctx: SockContext) -> i32 {
    connected::closed(&ctx);
    1
}

/// A sock_release program that does nothing.
#[cgroup_sock(sock_release)]
fn empty_sock_release(_ctx: SockContext) -> i32 {
    1
}

/// A connect() program that does nothing.
#[cgroup_sock_addr(connect4)]
fn empty_connect4(_ctx: SockAddrContext) -> i32 {
    1
}

/// A connect() program that only makes room at the socket for what the socket path remembers.
#[cgroup_sock_addr(connect4)]
fn storage_connect4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the map is made for this hook, and nothing of the storage is touched.
    let storage = unsafe { Ipv4::sockets().get_or_insert_ptr_mut(&ctx, None) };
    i32::from(!storage.is_null())
}

/// A sendmsg() program that does nothing.
#[cgroup_sock_addr(sendmsg4)]
fn empty_sendmsg4(_ctx: SockAddrContext) -> i32 {
    1
}

/// The end of a forwarded datagram's way: counts it and drops it, and leaves everything else alone.
#[classifier]
fn sink(ctx: TcContext) -> i32 {
    let Some(words) = Packet::new(&ctx).at::<[u16; PROTOCOL_WORDS]>(0) else { return TC_ACT_OK };
    // SAFETY: `at` checked the bounds.
    let [.., ether_type, _, _, _, _, protocol] = unsafe { words.read_unaligned() };
    if u16::from_be(ether_type) != IPV4 || u16::from_be(protocol) as u8 != UDP {
        return TC_ACT_OK;
    }
    if let Some(arrived) = ARRIVED.get_ptr_mut(0) {
        // SAFETY: the slot belongs to this CPU.
        unsafe { *arrived += 1 };
    }
    TC_ACT_SHOT
}

/// A frame that is made and goes nowhere: what the generator of live frames costs by itself.
#[xdp]
fn generate_and_drop(ctx: XdpContext) -> u32 {
    let Some(template) = TEMPLATE.get_ptr_mut(0) else { return xdp_action::XDP_ABORTED };
    // SAFETY: test runs are not concurrent.
    match write_headers(&Frame { xdp: &ctx }, unsafe { &mut *template }) {
        Some(()) => xdp_action::XDP_DROP,
        None => xdp_action::XDP_ABORTED,
    }
}

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

/// Reads of cache lines, each told by the one before: nothing can be fetched ahead, as with a packet that is the first one of its flow for
/// long.
#[classifier]
fn line_reads(_ctx: TcContext) -> i32 {
    let Some(at) = SEED.get_ptr_mut(0) else { return TC_ACT_OK };
    // SAFETY: the element of an array map; test runs are not concurrent.
    let mut line = unsafe { *at };
    for _ in 0..STEPS {
        let Some(words) = LINES.get(line as u32) else { return -1 };
        line = words[0];
    }
    // SAFETY: as above.
    unsafe { *at = line };
    STEPS as i32
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

/// The wrapper of frames alone.
#[xdp]
fn wrapper_only_xdp(ctx: XdpContext) -> u32 {
    let Some(template) = TEMPLATE.get_ptr_mut(0) else { return 0 };
    // SAFETY: test runs are not concurrent.
    let template = unsafe { &mut *template };
    match write_headers(&Frame { xdp: &ctx }, template) {
        Some(()) => xdp_action::XDP_PASS,
        None => xdp_action::XDP_ABORTED,
    }
}

/// The XDP path, one frame.
#[xdp]
fn wrapped_xdp(ctx: XdpContext) -> u32 {
    run_frame(&ctx)
}

#[inline(always)]
fn run_frame(ctx: &XdpContext) -> u32 {
    let Some(template) = TEMPLATE.get_ptr_mut(0) else { return 0 };
    // SAFETY: test runs are not concurrent.
    let template = unsafe { &mut *template };
    if write_headers(&Frame { xdp: ctx }, template).is_none() {
        return xdp_action::XDP_ABORTED;
    }
    let verdict = frames::run(ctx);
    match verdict {
        xdp_action::XDP_REDIRECT | xdp_action::XDP_TX => template.redirected += 1,
        xdp_action::XDP_PASS => template.passed += 1,
        _ => template.dropped += 1,
    }
    verdict
}

/// Moves of a frame's head, as many down as up.
#[xdp]
fn move_head(ctx: XdpContext) -> u32 {
    const IPV4_HEADER: i32 = 20;
    let mut moved = 0;
    for step in 0..STEPS as i32 {
        let distance = if step & 1 == 0 { -IPV4_HEADER } else { IPV4_HEADER };
        // SAFETY: the context is the kernel's.
        moved += u32::from(unsafe { helpers::bpf_xdp_adjust_head(ctx.ctx, distance) } == 0);
    }
    moved
}

/// The XDP path, one frame that goes into a tunnel: that of the last repeat is taken off first.
#[xdp]
fn wrapped_xdp_direct(ctx: XdpContext) -> u32 {
    let Some(template) = TEMPLATE.get_ptr_mut(0) else { return 0 };
    // SAFETY: test runs are not concurrent.
    let tunnel = Frame { xdp: &ctx }.length() as i32 - unsafe { (*template).length } as i32;
    // SAFETY: the context is the kernel's.
    if tunnel > 0 && unsafe { helpers::bpf_xdp_adjust_head(ctx.ctx, tunnel) } != 0 {
        return xdp_action::XDP_ABORTED;
    }
    run_frame(&ctx)
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

/// Writes the next packet over the last one, and takes the mark of translation off.
#[inline(always)]
fn restore(ctx: &TcContext, template: &mut Template) -> i32 {
    if write_headers(&Packet::new(ctx), template).is_none() {
        return -1;
    }
    ctx.set_mark(0);
    TC_ACT_OK
}

/// Whole words at a time: a smaller piece written first would make the processor wait.
#[inline(always)]
fn write_headers(packet: &impl Hook, template: &mut Template) -> Option<()> {
    let flow = template.next;
    template.next = if flow + 1 >= template.flows { 0 } else { flow + 1 };
    let port = u64::from(((1024 + (flow & 0x7fff)) as u16).to_be());
    let address = u64::from(((flow >> 15) as u16).to_be());
    let bytes = packet.at::<[u8; LEAD + WORDS * 8]>(0)?.cast::<u8>();
    // SAFETY: the bounds were checked just now.
    let start = unsafe {
        bytes.cast::<u16>().write_volatile(template.lead);
        bytes.add(LEAD).cast::<u64>()
    };
    for index in 0..WORDS {
        let word = template.headers[index] + port * template.port[index] + address * template.address[index];
        // SAFETY: the bounds were checked just now, and BPF allows misaligned access. Volatile, or the loop becomes a call of memcpy.
        unsafe { start.add(index).write_volatile(word) };
    }
    Some(())
}

/// Tells the kernel that helpers reserved for GPL programs may be used.
// SAFETY: the kernel reads this section as a NUL-terminated string.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
