//! In place of the programs' `ctx`: packets in this process's memory, of which a part is linear.

use std::cell::Cell;

use crate::lab::read::{ETHERNET, HEADERS};

pub const ETHERNET_LENGTH: usize = ETHERNET;
pub const HEADERS_LENGTH: u32 = HEADERS as u32;

/// What the parser asks of a packet and of a frame.
pub trait Hook {
    /// A pointer to `T` at `offset`, or `None` when the linear part is shorter.
    fn at<T>(&self, offset: usize) -> Option<*mut T>;
}

/// A packet at a tc hook.
pub struct Packet<'a> {
    bytes: &'a [u8],
    linear: Cell<usize>,
}

impl<'a> Packet<'a> {
    pub fn new(bytes: &'a [u8], linear: usize) -> Self {
        Self { bytes, linear: Cell::new(linear) }
    }

    pub fn byte(&self, offset: usize) -> Option<u8> {
        self.bytes.get(offset).copied()
    }

    pub fn pull_headers(&self) {
        self.linear.set(self.linear.get().max(HEADERS.min(self.bytes.len())));
    }

    pub fn length(&self) -> u32 {
        self.bytes.len() as u32
    }

    /// None is to be cut by a device.
    pub fn segment_size(&self) -> u32 {
        0
    }
}

impl Hook for Packet<'_> {
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        at(&self.bytes[..self.linear.get()], offset)
    }
}

/// A frame at the XDP hook.
pub struct Frame<'a> {
    pub bytes: &'a [u8],
}

impl Frame<'_> {
    pub fn length(&self) -> usize {
        self.bytes.len()
    }
}

impl Hook for Frame<'_> {
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        at(self.bytes, offset)
    }
}

/// The parser reads and never writes.
fn at<T>(bytes: &[u8], offset: usize) -> Option<*mut T> {
    let part = bytes.get(offset..offset.checked_add(size_of::<T>())?)?;
    Some(part.as_ptr().cast_mut().cast())
}
