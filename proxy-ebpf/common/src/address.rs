//! Addresses and ports in network byte order, and what the programs need to know about a family.

use crate::pod::{Pod, impl_pod};

/// A 16-bit number in network byte order: ports.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
#[repr(transparent)]
pub struct Be16(pub u16);

impl Be16 {
    /// From host byte order.
    #[inline(always)]
    pub const fn from_host(value: u16) -> Self {
        Self(value.to_be())
    }

    /// To host byte order.
    #[inline(always)]
    pub const fn to_host(self) -> u16 {
        u16::from_be(self.0)
    }
}

/// An IPv4 address: four bytes in network byte order, held as the integer that those bytes are in memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
#[repr(transparent)]
pub struct V4(pub u32);

/// An IPv6 address: sixteen bytes in network byte order, held as four integers as they are in memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
#[repr(transparent)]
pub struct V6(pub [u32; 4]);

/// What the generic packet code needs of an address; one implementation a family, so that IPv4 and IPv6 share the rest.
pub trait Address: Pod + Eq + Default {
    /// Number of 32-bit words.
    const WORDS: usize;

    /// Word `index` of the address as it is in memory; 0 beyond [`Self::WORDS`].
    fn word(&self, index: usize) -> u32;

    /// Whether it is one of the loopback addresses: 127.0.0.0/8 (RFC 1122, 3.2.1.3), ::1 (RFC 4291, 2.5.3).
    fn is_loopback(&self) -> bool;

    /// The address in sixteen bytes: an IPv4 one as `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2).
    fn widen(&self) -> V6;
    /// Whether no packet on a link can have it as its source: "this network" 0.0.0.0/8, loopback, multicast and beyond (RFC 1122,
    /// 3.2.1.3), the unspecified address, ::1 and ff00::/8 (RFC 4291, 2.5 and 2.7). The kernel calls these martian.
    fn is_never_a_source(&self) -> bool;

    /// Whether `self & mask == network & mask`; used with masks that have their host bits clear.
    #[inline(always)]
    fn in_network(&self, network: &Self, mask: &Self) -> bool {
        let mut different = 0;
        let mut index = 0;
        while index < Self::WORDS {
            different |= (self.word(index) ^ network.word(index)) & mask.word(index);
            index += 1;
        }
        different == 0
    }
}

impl Address for V4 {
    const WORDS: usize = 1;

    #[inline(always)]
    fn word(&self, index: usize) -> u32 {
        if index == 0 { self.0 } else { 0 }
    }

    #[inline(always)]
    fn is_loopback(&self) -> bool {
        u32::from_be(self.0) >> 24 == 127
    }

    #[inline(always)]
    fn widen(&self) -> V6 {
        V6([0, 0, 0xffff_u32.to_be(), self.0])
    }

    #[inline(always)]
    fn is_never_a_source(&self) -> bool {
        let first = u32::from_be(self.0) >> 24;
        first == 0 || first == 127 || first >= 224
    }
}

impl Address for V6 {
    const WORDS: usize = 4;

    #[inline(always)]
    fn word(&self, index: usize) -> u32 {
        match index {
            0 => self.0[0],
            1 => self.0[1],
            2 => self.0[2],
            3 => self.0[3],
            _ => 0,
        }
    }

    #[inline(always)]
    fn is_loopback(&self) -> bool {
        self.0[0] | self.0[1] | self.0[2] == 0 && self.0[3] == 1_u32.to_be()
    }

    #[inline(always)]
    fn widen(&self) -> V6 {
        *self
    }

    #[inline(always)]
    fn is_never_a_source(&self) -> bool {
        let low = u32::from_be(self.0[3]);
        self.0[0] | self.0[1] | self.0[2] == 0 && low <= 1 || u32::from_be(self.0[0]) >> 24 == 0xff
    }
}

impl V4 {
    /// From the four octets in the order they are written.
    pub const fn from_octets(octets: [u8; 4]) -> Self {
        Self(u32::from_ne_bytes(octets))
    }

    /// The four octets in the order they are written.
    pub const fn octets(self) -> [u8; 4] {
        self.0.to_ne_bytes()
    }
}

impl V6 {
    /// From the sixteen octets in the order they are written.
    pub const fn from_octets(o: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }

    /// The sixteen octets in the order they are written.
    pub const fn octets(self) -> [u8; 16] {
        let [a, b, c, d] = self.0;
        let (a, b, c, d) = (a.to_ne_bytes(), b.to_ne_bytes(), c.to_ne_bytes(), d.to_ne_bytes());
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
    }

    /// The IPv4 address inside `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2).
    #[inline(always)]
    pub const fn mapped_v4(self) -> Option<V4> {
        if self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0xffff_u32.to_be() { Some(V4(self.0[3])) } else { None }
    }
}

/// A network to compare with: two addresses, the second being the mask.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(C)]
pub struct Cidr<A> {
    /// Network address, host bits clear.
    pub network: A,
    /// Mask: leading ones. An all-zero mask matches everything.
    pub mask: A,
}

impl_pod! {
    Be16 = 2,
    V4 = 4,
    V6 = 16,
    Cidr<V4> = 8,
    Cidr<V6> = 32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octets_survive() {
        assert_eq!(V4::from_octets([10, 0, 0, 1]).octets(), [10, 0, 0, 1]);
        let octets: [u8; 16] = core::array::from_fn(|index| index as u8);
        assert_eq!(V6::from_octets(octets).octets(), octets);
        assert_eq!(V6::from_octets(octets).as_bytes(), octets);
    }

    #[test]
    fn mapped_addresses_are_recognised() {
        let mut octets = [0; 16];
        octets[10..].copy_from_slice(&[0xff, 0xff, 10, 1, 2, 3]);
        assert_eq!(V6::from_octets(octets).mapped_v4(), Some(V4::from_octets([10, 1, 2, 3])));
        octets[0] = 0x20;
        assert_eq!(V6::from_octets(octets).mapped_v4(), None);
    }

    #[test]
    fn a_widened_address_holds_the_narrow_one() {
        let v4 = V4::from_octets([10, 1, 2, 3]);
        assert_eq!(v4.widen().mapped_v4(), Some(v4));
        let v6 = V6([1, 2, 3, 4]);
        assert_eq!(v6.widen(), v6);
    }

    #[test]
    fn loopback_addresses_are_recognised() {
        assert!(V4::from_octets([127, 0, 0, 1]).is_loopback());
        assert!(V4::from_octets([127, 255, 1, 9]).is_loopback());
        assert!(!V4::from_octets([128, 0, 0, 127]).is_loopback());
        let mut octets = [0; 16];
        assert!(!V6::from_octets(octets).is_loopback());
        octets[15] = 1;
        assert!(V6::from_octets(octets).is_loopback());
        octets[0] = 1;
        assert!(!V6::from_octets(octets).is_loopback());
    }

    #[test]
    fn networks_match_by_mask() {
        let net = V4::from_octets([10, 244, 0, 0]);
        let mask = V4::from_octets([255, 255, 0, 0]);
        assert!(V4::from_octets([10, 244, 9, 9]).in_network(&net, &mask));
        assert!(!V4::from_octets([10, 245, 0, 1]).in_network(&net, &mask));
        assert!(V4::from_octets([1, 2, 3, 4]).in_network(&V4(0), &V4(0)));
    }
}
