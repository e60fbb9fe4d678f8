//! A connection to nf_tables: commits batches, asks for the generation, and reads back.

use std::collections::BTreeMap;
use std::io;

use super::batch::Operation;
use super::set::{Contents, Element, write_owner};
use super::{ATTRIBUTE_TABLE, BATCH_BYTES_MAX, Batch, Family, Message, family_header, read_string, read_u32, read_u64};
#[cfg(test)]
use crate::netlink::nested;
use crate::netlink::{ACK, Answer, DUMP, Received, Socket, attribute_string, find};

/// How often a listing is begun again because what it read changed meanwhile.
const LISTINGS_MAX: usize = 5;
/// How often a set that is not as it was written is looked at before it counts as changed by somebody: a listing is not exact while
/// the kernel rearranges the set.
const LOOKS: usize = 3;

/// Why nf_tables did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum NftablesError {
    /// The kernel refused a transaction; nothing of it was done.
    #[error("cannot {operation} in table {table}: {source}{explanation}")]
    Refused {
        /// What it refused: verb and object.
        operation: String,
        /// The table.
        table: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
        /// What the kernel says beside it: empty, or `" (text)"`.
        explanation: String,
    },
    /// A transaction is larger than [`BATCH_BYTES_MAX`].
    #[error("a transaction of {bytes} bytes is too large; at most {BATCH_BYTES_MAX} fit")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// A question was not answered.
    #[error("cannot {action}: {source}")]
    Ask {
        /// What was asked.
        action: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl NftablesError {
    /// Whether the kernel says that something is not there.
    pub fn is_not_found(&self) -> bool {
        self.errno() == Some(libc::ENOENT)
    }

    /// Whether this kernel has no nf_tables, or not for this family.
    pub fn is_unsupported(&self) -> bool {
        matches!(self.errno(), Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT | libc::EPROTONOSUPPORT | libc::EINVAL))
    }

    fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } | Self::Ask { source, .. } => source.raw_os_error(),
            Self::TooLarge { .. } => None,
        }
    }
}

/// A table that is there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Table {
    /// Its number: a table that was deleted and made again has another.
    pub handle: u64,
    /// Chains, sets and other objects in it.
    pub objects: u32,
    /// What [`Batch::add_table`] left with it.
    pub marker: Vec<u8>,
}

/// A chain that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Its name.
    pub name: String,
    /// Whether it hangs in a hook.
    pub is_base: bool,
}

/// A rule that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Chain that it is in.
    pub chain: String,
    /// Its number.
    pub handle: u64,
}

/// A connection to the nf_tables of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Nftables {
    socket: Socket,
}

impl Nftables {
    /// Opens the connection.
    ///
    /// # Errors
    /// When there is no netlink socket to be had.
    pub fn open() -> Result<Self, NftablesError> {
        let socket = Socket::open(libc::NETLINK_NETFILTER);
        let socket = socket.map_err(|source| NftablesError::Ask { action: "open a netlink socket".into(), source })?;
        Ok(Self { socket })
    }

    /// Makes all changes of a batch, at one moment, or none.
    ///
    /// # Errors
    /// [`NftablesError::Refused`] names the first message that the kernel refused.
    pub fn commit(&mut self, batch: Batch) -> Result<(), NftablesError> {
        if batch.is_empty() {
            return Ok(());
        }
        if batch.bytes() > BATCH_BYTES_MAX {
            return Err(NftablesError::TooLarge { bytes: batch.bytes() });
        }
        let table = batch.table_name();
        let first = self.socket.next_sequence();
        let (datagram, last, operations) = batch.finish(first);
        for _ in 1..operations.len() {
            self.socket.next_sequence();
        }
        let sent = self.socket.send(&datagram);
        drop(datagram);
        let answers = sent.and_then(|()| self.socket.acknowledged(first, last));
        let failures = answers.map_err(|source| ask_error("send a transaction to", &table, source))?;
        match failures.into_iter().next() {
            None => Ok(()),
            Some(failure) => Err(refusal(&failure, first, &operations, table)),
        }
    }

    /// Number of transactions in this network namespace, whoever made them.
    ///
    /// # Errors
    /// [`NftablesError::Ask`].
    pub fn generation(&mut self) -> Result<u32, NftablesError> {
        let mut generation = None;
        let asked = self.socket.ask(
            Message::GetGeneration.kind(),
            ACK,
            |buffer| family_header(buffer, 0, 0),
            |message| {
                if let Some(body) = body(message, Message::NewGeneration) {
                    generation = find(body, 1).and_then(read_u32);
                }
                Ok(())
            },
        );
        asked
            .and_then(|()| generation.ok_or_else(|| io::ErrorKind::InvalidData.into()))
            .map_err(|source| NftablesError::Ask { action: "ask for the generation of nf_tables".to_owned(), source })
    }

    /// The table of this name, or `None`.
    ///
    /// # Errors
    /// [`NftablesError::Ask`].
    pub fn table(&mut self, family: Family, table: &str) -> Result<Option<Table>, NftablesError> {
        let mut found = None;
        let request = |buffer: &mut Vec<u8>| {
            family_header(buffer, family as u8, 0);
            attribute_string(buffer, ATTRIBUTE_TABLE, table);
        };
        let asked = self.socket.ask(Message::GetTable.kind(), ACK, request, |message| {
            if let Some(body) = body(message, Message::NewTable) {
                found = Some(Table {
                    handle: find(body, 4).and_then(read_u64).unwrap_or_default(),
                    objects: find(body, 3).and_then(read_u32).unwrap_or_default(),
                    marker: find(body, 6).unwrap_or_default().to_vec(),
                });
            }
            Ok(())
        });
        match asked {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(ask_error("ask for", table, source)),
            Ok(()) => Ok(found),
        }
    }

    /// All chains of a table; none if there is no such table.
    ///
    /// # Errors
    /// [`NftablesError::Ask`].
    pub fn chains(&mut self, family: Family, table: &str) -> Result<Vec<Chain>, NftablesError> {
        let owner = |buffer: &mut Vec<u8>| family_header(buffer, family as u8, 0);
        self.list(table, Message::GetChain, Message::NewChain, owner, |body, chains: &mut Vec<Chain>| {
            // The kernel lists the chains of all tables of the family.
            let ours = find(body, ATTRIBUTE_TABLE).is_some_and(|name| read_string(name) == table);
            if let Some(name) = find(body, 3).filter(|_| ours) {
                chains.push(Chain { name: read_string(name), is_base: find(body, 4).is_some() });
            }
        })
    }

    /// All rules of a table, chain by chain in their order; none if there is no such table.
    ///
    /// # Errors
    /// [`NftablesError::Ask`].
    pub fn rules(&mut self, family: Family, table: &str) -> Result<Vec<Rule>, NftablesError> {
        let owner = |buffer: &mut Vec<u8>| {
            family_header(buffer, family as u8, 0);
            attribute_string(buffer, ATTRIBUTE_TABLE, table);
        };
        self.list(table, Message::GetRule, Message::NewRule, owner, |body, rules: &mut Vec<Rule>| {
            let handle = find(body, 3).and_then(read_u64).unwrap_or_default();
            rules.extend(find(body, 2).map(|chain| Rule { chain: read_string(chain), handle }));
        })
    }

    /// All elements of a set, in no order; an error that [`NftablesError::is_not_found`] if there is no such set. While the kernel
    /// rearranges a set that grew, some may be named twice and others left out.
    ///
    /// # Errors
    /// [`NftablesError::Ask`].
    pub fn elements(&mut self, family: Family, table: &str, set: &str) -> Result<Vec<Element>, NftablesError> {
        let owner = |buffer: &mut Vec<u8>| {
            family_header(buffer, family as u8, 0);
            write_owner(buffer, table, set);
        };
        self.list(table, Message::GetElement, Message::NewElement, owner, |body, elements: &mut Vec<Element>| {
            elements.extend(find(body, 3).into_iter().flat_map(Element::read_all));
        })
    }

    /// What a set holds at the moment, without keeping it; nothing if there is no such set. While the kernel rearranges a set that grew,
    /// some elements may be counted twice and others left out: a difference is one if it is seen again.
    ///
    /// # Errors
    /// [`NftablesError::Ask`].
    pub fn contents(&mut self, family: Family, table: &str, set: &str) -> Result<Contents, NftablesError> {
        let owner = |buffer: &mut Vec<u8>| {
            family_header(buffer, family as u8, 0);
            write_owner(buffer, table, set);
        };
        let counted =
            self.list(table, Message::GetElement, Message::NewElement, owner, |body, contents: &mut Contents| {
                find(body, 3).into_iter().for_each(|list| contents.add_all(list));
            });
        match counted {
            Err(error) if error.is_not_found() => Ok(Contents::default()),
            counted => counted,
        }
    }

    /// Whether a set holds this. A difference counts when it is seen three times.
    ///
    /// # Errors
    /// [`NftablesError::Ask`].
    pub fn holds(&mut self, family: Family, table: &str, set: &str, wanted: Contents) -> Result<bool, NftablesError> {
        for _ in 0..LOOKS {
            if self.contents(family, table, set)? == wanted {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Number of rules of every chain of a table that has one.
    ///
    /// # Errors
    /// [`NftablesError::Ask`].
    pub fn rule_counts(&mut self, family: Family, table: &str) -> Result<BTreeMap<String, usize>, NftablesError> {
        let mut counts = BTreeMap::new();
        for rule in self.rules(family, table)? {
            *counts.entry(rule.chain).or_default() += 1;
        }
        Ok(counts)
    }

    /// Whether a packet with this key would find something in a set.
    #[cfg(test)]
    pub(super) fn has_element(&mut self, family: Family, table: &str, set: &str, key: &[u8]) -> bool {
        let mut found = false;
        let request = |buffer: &mut Vec<u8>| {
            family_header(buffer, family as u8, 0);
            write_owner(buffer, table, set);
            nested(buffer, 3, |buffer| super::ElementRef::key(key).write(buffer));
        };
        let asked = self.socket.ask(Message::GetElement.kind(), ACK, request, |message| {
            found |= body(message, Message::NewElement).is_some();
            Ok(())
        });
        assert!(asked.is_ok() || asked.is_err_and(|error| error.kind() == io::ErrorKind::NotFound));
        found
    }

    /// Lists, from the beginning again when what is listed changed meanwhile.
    fn list<A: Default>(
        &mut self,
        table: &str,
        ask: Message,
        reply: Message,
        owner: impl Fn(&mut Vec<u8>),
        read: impl Fn(&[u8], &mut A),
    ) -> Result<A, NftablesError> {
        for _ in 0..LISTINGS_MAX {
            let mut all = A::default();
            let asked = self.socket.ask(ask.kind(), DUMP, &owner, |message| {
                if let Some(body) = body(message, reply) {
                    read(body, &mut all);
                }
                Ok(())
            });
            match asked {
                Ok(()) => return Ok(all),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(source) => return Err(ask_error("list", table, source)),
            }
        }
        Err(ask_error("list", table, io::ErrorKind::Interrupted.into()))
    }
}

/// The attributes of a message of this kind.
fn body(message: Received<'_>, kind: Message) -> Option<&[u8]> {
    if message.kind == kind.kind() { message.body.get(4..) } else { None }
}

fn ask_error(action: &str, table: &str, source: io::Error) -> NftablesError {
    NftablesError::Ask { action: format!("{action} nf_tables table {table}"), source }
}

fn refusal(failure: &Answer, first: u32, operations: &[Operation], table: String) -> NftablesError {
    let operation = operations.get(failure.sequence.wrapping_sub(first) as usize);
    // The kernel answers to the beginning when the whole does not do.
    let operation = operation.filter(|operation| operation.verb != "begin");
    NftablesError::Refused {
        operation: operation
            .map_or_else(|| "commit".to_owned(), |operation| format!("{} {}", operation.verb, operation.object)),
        table,
        source: io::Error::from_raw_os_error(failure.errno),
        explanation: failure.text.as_ref().map(|text| format!(" ({text})")).unwrap_or_default(),
    }
}
