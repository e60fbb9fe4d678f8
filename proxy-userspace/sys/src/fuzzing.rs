//! What the kernel answers, read from any bytes: for `fuzz/fuzz_targets`, and in no other build.

use crate::{conntrack, ipvs, netlink, nftables, sock_diag};

/// Reads `datagram` as if the kernel had sent it, each message as every kind of answer. Returns how many messages it has.
pub fn datagram(datagram: &[u8]) -> usize {
    let mut count = 0;
    let read = netlink::messages(datagram, |message| {
        count += 1;
        let _answer = netlink::answer(message);
        conntrack::fuzzing(message.body);
        sock_diag::fuzzing(message.body);
        ipvs::fuzzing(message.body);
        nftables::fuzzing(message.body);
        Ok(())
    });
    // What is no message ends a datagram.
    drop(read);
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_answer_is_read() {
        let mut buffer = Vec::new();
        for kind in [2, 3] {
            netlink::message(&mut buffer, kind, 0, 1, |body| {
                body.extend([0; 4]);
                netlink::nested(body, 1, |body| netlink::attribute(body, 1, &[1; 16]));
            });
        }
        assert_eq!(datagram(&buffer), 2);
        buffer.truncate(buffer.len() - 1);
        assert_eq!(datagram(&buffer), 1);
    }
}
