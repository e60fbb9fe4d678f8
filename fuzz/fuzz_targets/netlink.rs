//! Datagrams of the kernel: netlink, conntrack, sock_diag, IPVS and nf_tables.
#![no_main]

libfuzzer_sys::fuzz_target!(|datagram: &[u8]| {
    let _messages = node_sys::fuzzing::datagram(datagram);
});
