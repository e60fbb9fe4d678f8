//! A transaction under construction: every change is appended as a message, elements many to a message.

use super::expression::Expression;
use super::set::{ElementRef, Set, write_owner};
use super::{ATTRIBUTE_TABLE, Family, Message, Name, SUBSYSTEM, attribute_u32, family_header};
use crate::netlink::{
    ACK, APPEND, CREATE, MESSAGE_HEADER, REQUEST, attribute, attribute_string, begin_nested, end_message, end_nested,
    message, nested,
};

/// Bytes of one transaction. The kernel takes it as one datagram; 256 MiB are some four million elements.
pub const BATCH_BYTES_MAX: usize = 256 << 20;
/// Bytes of one message of elements: its list is an attribute, whose length has 16 bits.
const ELEMENTS_BYTES_MAX: usize = 60_000;
/// `NFT_TABLE_F_OWNER`.
const TABLE_OWNER: u32 = 2;
/// `NFNL_MSG_BATCH_BEGIN` and `NFNL_MSG_BATCH_END`.
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;

/// Where a base chain is called (`enum nf_inet_hooks`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Hook {
    /// Before the route is looked up.
    Prerouting = 0,
    /// To this machine.
    Input = 1,
    /// Through this machine.
    Forward = 2,
    /// Made by this machine.
    Output = 3,
    /// After the route is known, before it leaves.
    Postrouting = 4,
}

/// What a base chain may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainKind {
    /// Sees every packet.
    Filter,
    /// Sees every packet that this machine makes, whose route is looked up again when its mark has changed. Only of [`Hook::Output`].
    Route,
    /// Translates; sees the first packet of a connection only.
    Nat,
}

/// What makes a chain a base chain. Its policy is accept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainHook {
    /// What it may do.
    pub kind: ChainKind,
    /// Where it is called.
    pub hook: Hook,
    /// Lower is earlier: conntrack is at -200, destination NAT at -100, filters at 0, source NAT at 100.
    pub priority: i32,
}

/// What a message asks, to name it when the kernel refuses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Operation {
    pub(super) verb: &'static str,
    pub(super) object: String,
}

/// A message of elements to which more may be added.
#[derive(Debug)]
struct OpenElements {
    set: Name,
    delete: bool,
    message_start: usize,
    list_start: usize,
}

/// Changes of one table that happen together or not at all.
#[derive(Debug)]
pub struct Batch {
    family: Family,
    table: Name,
    buffer: Vec<u8>,
    operations: Vec<Operation>,
    open: Option<OpenElements>,
    last_message: usize,
    sets: u32,
}

impl Batch {
    /// An empty batch for the table of this name, which need not exist.
    pub fn new(family: Family, table: impl Into<Name>) -> Self {
        let mut batch = Self {
            family,
            table: table.into(),
            buffer: Vec::new(),
            operations: Vec::new(),
            open: None,
            last_message: 0,
            sets: 0,
        };
        batch.boundary(BATCH_BEGIN, "begin");
        batch
    }

    /// Family of the table.
    pub fn family(&self) -> Family {
        self.family
    }

    /// Name of the table.
    pub fn table_name(&self) -> String {
        self.table.to_string()
    }

    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.operations.len() <= 1
    }

    /// Bytes so far.
    pub fn bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Creates the table if it is not there. `marker`, at most 256 bytes, is kept with it if it is created.
    pub fn add_table(&mut self, marker: &[u8]) {
        let table = self.table.clone();
        self.message(Message::NewTable, CREATE, "add table", &table, |buffer| {
            attribute_string(buffer, 1, &table);
            attribute(buffer, 6, marker);
        });
    }

    /// Creates a table that belongs to the connection which commits this, and goes with it, however its process ends. `EPERM` when
    /// another connection has one of this name; `EOPNOTSUPP` before Linux 5.12.
    pub fn add_owned_table(&mut self) {
        let table = self.table.clone();
        self.message(Message::NewTable, CREATE, "add table", &table, |buffer| {
            attribute_string(buffer, 1, &table);
            attribute_u32(buffer, 2, TABLE_OWNER);
        });
    }

    /// Deletes the table with everything in it. It must be there.
    pub fn delete_table(&mut self) {
        let table = self.table.clone();
        self.message(Message::DeleteTable, 0, "delete table", &table, |buffer| attribute_string(buffer, 1, &table));
    }

    /// Creates a chain if it is not there; with a hook it is a base chain.
    pub fn add_chain(&mut self, chain: &str, hook: Option<ChainHook>) {
        let table = self.table.clone();
        self.message(Message::NewChain, CREATE, "add chain", chain, |buffer| {
            attribute_string(buffer, ATTRIBUTE_TABLE, &table);
            attribute_string(buffer, 3, chain);
            let Some(hook) = hook else { return };
            nested(buffer, 4, |buffer| {
                attribute_u32(buffer, 1, hook.hook as u32);
                attribute_u32(buffer, 2, hook.priority.cast_unsigned());
            });
            let kind = match hook.kind {
                ChainKind::Filter => "filter",
                ChainKind::Route => "route",
                ChainKind::Nat => "nat",
            };
            attribute_string(buffer, 7, kind);
        });
    }

    /// Deletes a chain. It must be there, and no rule and no element may lead to it.
    pub fn delete_chain(&mut self, chain: &str) {
        let table = self.table.clone();
        self.message(Message::DeleteChain, 0, "delete chain", chain, |buffer| {
            attribute_string(buffer, ATTRIBUTE_TABLE, &table);
            attribute_string(buffer, 3, chain);
        });
    }

    /// Deletes all rules of a chain.
    pub fn flush_chain(&mut self, chain: &str) {
        let table = self.table.clone();
        self.message(Message::DeleteRule, 0, "flush chain", chain, |buffer| {
            attribute_string(buffer, ATTRIBUTE_TABLE, &table);
            attribute_string(buffer, 2, chain);
        });
    }

    /// Appends a rule to a chain.
    pub fn add_rule(&mut self, chain: &str, rule: &[Expression]) {
        let table = self.table.clone();
        self.message(Message::NewRule, CREATE | APPEND, "add rule to chain", chain, |buffer| {
            attribute_string(buffer, ATTRIBUTE_TABLE, &table);
            attribute_string(buffer, 2, chain);
            nested(buffer, 4, |buffer| rule.iter().for_each(|expression| expression.write(buffer)));
        });
    }

    /// Creates a set or map. One of that name that is there must have the same properties.
    pub fn add_set(&mut self, set: &Set) {
        self.sets += 1;
        let (table, id) = (self.table.clone(), self.sets);
        self.message(Message::NewSet, CREATE, "add set", &set.name, |buffer| {
            attribute_string(buffer, ATTRIBUTE_TABLE, &table);
            attribute_string(buffer, 2, &set.name);
            set.write(buffer, id);
        });
    }

    /// Deletes a set. It must be there, and no rule may look at it.
    pub fn delete_set(&mut self, set: &str) {
        let table = self.table.clone();
        self.message(Message::DeleteSet, 0, "delete set", set, |buffer| {
            attribute_string(buffer, ATTRIBUTE_TABLE, &table);
            attribute_string(buffer, 2, set);
        });
    }

    /// Deletes all elements of a set.
    pub fn flush_set(&mut self, set: &str) {
        let table = self.table.clone();
        self.message(Message::DeleteElement, 0, "flush set", set, |buffer| write_owner(buffer, &table, set));
    }

    /// Adds an element. One that is there must have the same data: to change it, delete it first, in the same batch.
    pub fn add_element(&mut self, set: impl Into<Name>, element: ElementRef<'_>) {
        self.element(set.into(), false, element);
    }

    /// Deletes an element. It must be there.
    pub fn delete_element(&mut self, set: impl Into<Name>, element: ElementRef<'_>) {
        self.element(set.into(), true, element);
    }

    fn element(&mut self, set: Name, delete: bool, element: ElementRef<'_>) {
        let size = element.bytes_max();
        let fits = self.open.as_ref().is_some_and(|open| {
            open.set == set
                && open.delete == delete
                && self.buffer.len() - open.message_start + size <= ELEMENTS_BYTES_MAX
        });
        if !fits {
            self.open_elements(set, delete);
        }
        element.write(&mut self.buffer);
    }

    fn open_elements(&mut self, set: Name, delete: bool) {
        self.close_elements();
        let (kind, flags, verb) = if delete {
            (Message::DeleteElement, 0, "delete elements of set")
        } else {
            (Message::NewElement, CREATE, "add elements to set")
        };
        let message_start = self.buffer.len();
        let table = self.table.clone();
        self.message(kind, flags, verb, &set, |buffer| write_owner(buffer, &table, &set));
        let list_start = begin_nested(&mut self.buffer, 3);
        self.open = Some(OpenElements { set, delete, message_start, list_start });
    }

    fn close_elements(&mut self) {
        if let Some(open) = self.open.take() {
            end_nested(&mut self.buffer, open.list_start);
            end_message(&mut self.buffer, open.message_start);
        }
    }

    fn message(
        &mut self,
        kind: Message,
        flags: u16,
        verb: &'static str,
        object: &str,
        body: impl FnOnce(&mut Vec<u8>),
    ) {
        self.close_elements();
        self.last_message = self.buffer.len();
        let family = self.family as u8;
        message(&mut self.buffer, kind.kind(), REQUEST | flags, 0, |buffer| {
            family_header(buffer, family, 0);
            body(buffer);
        });
        self.operations.push(Operation { verb, object: object.to_owned() });
    }

    /// Begin and end belong to no family; they name the subsystem instead.
    fn boundary(&mut self, kind: u16, verb: &'static str) {
        self.close_elements();
        message(&mut self.buffer, kind, REQUEST, 0, |buffer| family_header(buffer, 0, SUBSYSTEM));
        self.operations.push(Operation { verb, object: "transaction".to_owned() });
    }

    /// The datagram, its messages numbered from `first` on, and what each of them asks. The last one that changes something
    /// asks to be acknowledged: its number is the second value.
    pub(super) fn finish(mut self, first: u32) -> (Vec<u8>, u32, Vec<Operation>) {
        self.close_elements();
        if let Some(flags) = self.buffer.get_mut(self.last_message + 6..self.last_message + 8) {
            flags.copy_from_slice(&(flag_bits(flags) | ACK).to_ne_bytes());
        }
        self.boundary(BATCH_END, "end");
        let mut sequence = first;
        let mut start = 0;
        while let Some(header) = self.buffer.get_mut(start..start + MESSAGE_HEADER) {
            let length = header.first_chunk().map_or(0, |length| u32::from_ne_bytes(*length) as usize);
            if let Some(field) = header.get_mut(8..12) {
                field.copy_from_slice(&sequence.to_ne_bytes());
            }
            sequence = sequence.wrapping_add(1);
            start += length.max(MESSAGE_HEADER);
        }
        // One beyond the end message; the last that changes something is before it.
        (self.buffer, sequence.wrapping_sub(2), self.operations)
    }
}

fn flag_bits(field: &[u8]) -> u16 {
    field.first_chunk().map_or(0, |flags| u16::from_ne_bytes(*flags))
}
