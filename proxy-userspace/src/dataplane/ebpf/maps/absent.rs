//! What the programs need not look up: see [`proxy_common::absent`].

use std::io;
use std::marker::PhantomData;

use node_sys::bpf::MappedArray;
use proxy_common::{ABSENT_WORDS, Address, absent_place, fill_absent};

/// Of an element.
const WORDS: usize = size_of::<u64>() / size_of::<u32>();

/// The bits of one family, in mapped memory.
#[derive(Debug)]
pub(super) struct Absent<A> {
    bits: MappedArray,
    family: PhantomData<A>,
}

impl<A: Address> Absent<A> {
    pub(super) fn new(bits: MappedArray) -> Self {
        Self { bits, family: PhantomData }
    }

    /// Any address may be one of ours again: to be called before programs run that another process's bits may mislead.
    pub(super) fn forget(&mut self) -> io::Result<()> {
        (0..ABSENT_WORDS).try_for_each(|word| self.write(word, 0))
    }

    /// These addresses are all that there are; each of them was added before it was used.
    pub(super) fn replace<'a>(&mut self, present: impl Iterator<Item = &'a A>) -> io::Result<()>
    where
        A: 'a,
    {
        let mut words = vec![0; ABSENT_WORDS as usize];
        fill_absent(present, &mut words);
        (0..).zip(words).try_for_each(|(word, bits)| self.write(word, bits))
    }

    /// To be called before the address is used.
    pub(super) fn add(&mut self, address: &A) -> io::Result<()> {
        let (word, bit) = absent_place(address);
        let bits = self.read(word)?;
        if bits >> bit & 1 == 0 { Ok(()) } else { self.write(word, bits & !(1 << bit)) }
    }

    /// Whether the programs take the address for nothing of ours.
    pub(super) fn contains(&self, address: &A) -> io::Result<bool> {
        let (word, bit) = absent_place(address);
        Ok(self.read(word)? >> bit & 1 != 0)
    }

    fn read(&self, word: u32) -> io::Result<u64> {
        let mut bits = 0;
        self.bits.read(word, 1, WORDS, |_, halves| {
            bits = halves.iter().rev().fold(0, |bits, half| bits << 32 | u64::from(*half));
        })?;
        Ok(bits)
    }

    /// Halves are seen one after the other, and each is right by itself.
    fn write(&mut self, word: u32, bits: u64) -> io::Result<()> {
        let halves = [bits as u32, (bits >> 32) as u32];
        self.bits.write(word, &halves, 0)
    }
}
