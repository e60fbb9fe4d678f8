//! A table as the kernel executes it: sets, chains, and registers that must be loaded in the rule that reads them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use node_sys::nftables::{Comparison, CtKey, DynsetOperation, Expression, LookupTarget, MetaKey, PayloadBase, Verdict};

use super::super::changes::Changes;
use super::super::layout::{AFFINITY_MAX, BASE_CHAINS, SetName, chain};
use super::super::rules::{Rule, Rules};
use crate::model::{IpFamily, Packet};

/// What became of the first packet of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fate {
    Pass,
    Reject,
    Drop,
    Translated { endpoint: SocketAddr, masquerade: bool },
}

/// Which hooks it passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hooks {
    Forwarded,
    Local,
}

/// A packet under way.
#[derive(Debug, Clone)]
struct Skb {
    source: IpAddr,
    destination: SocketAddr,
    protocol: u8,
    input: String,
    mark: u32,
    translated: bool,
    masqueraded: bool,
    choice: u32,
    trace: Vec<String>,
}

/// How a chain ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Continue,
    Accept,
    Drop,
    Reject,
}

#[derive(Debug)]
pub(super) struct Machine {
    family: IpFamily,
    chains: HashMap<String, Rc<[Rule]>>,
    sets: BTreeMap<SetName, BTreeMap<Vec<u8>, Vec<u8>>>,
    classes: BTreeMap<Vec<u8>, Verdict>,
    /// Of the random numbers that the last packet met; 1 if it met none.
    largest_modulus: u32,
}

impl Machine {
    pub(super) fn new(family: IpFamily, rules: Rules) -> Self {
        let names = chain::REGULAR.into_iter().chain(BASE_CHAINS.map(|(name, _)| name));
        let chains = names.map(|name| (name.to_owned(), rules.fixed(name).into())).collect();
        let sets = SetName::ALL.into_iter().map(|set| (set, BTreeMap::new())).collect();
        Self { family, chains, sets, classes: BTreeMap::new(), largest_modulus: 1 }
    }

    /// A transaction, with the kernel's objections.
    pub(super) fn execute(&mut self, changes: &Changes) {
        for (name, rules) in &changes.chains {
            assert!(self.chains.insert(name.clone(), rules.clone().into()).is_none(), "chain {name} is there already");
        }
        for (name, rules) in &changes.replaced {
            *self.chains.get_mut(*name).unwrap() = rules.clone().into();
        }
        for (number, verdict) in &changes.classes {
            if let Verdict::Goto(chain) = verdict {
                assert!(self.chains.contains_key(&**chain), "no chain {chain}");
            }
            assert_eq!(self.classes.insert(number.to_ne_bytes().to_vec(), verdict.clone()), None);
        }
        for (set, key, _) in changes.deleted.iter() {
            assert!(self.set(set).remove(key).is_some(), "{}: no element {key:?}", set.name());
        }
        for (set, key, value) in changes.added.iter() {
            let before = self.set(set).insert(key.to_vec(), value.to_vec());
            assert_eq!(before, None, "{}: element {key:?} is there", set.name());
        }
    }

    fn set(&mut self, set: SetName) -> &mut BTreeMap<Vec<u8>, Vec<u8>> {
        self.sets.get_mut(&set).unwrap()
    }

    pub(super) fn len(&self, set: SetName) -> usize {
        self.sets[&set].len()
    }

    pub(super) fn fill_affinity(&mut self) {
        let size = usize::try_from(AFFINITY_MAX).unwrap();
        self.set(SetName::Affinity).extend((0..size).map(|number| (number.to_ne_bytes().to_vec(), Vec::new())));
    }

    /// Every fate that chance allows; no client is remembered.
    pub(super) fn fates(&mut self, packet: &Packet<'_>, hooks: Hooks) -> BTreeSet<Fate> {
        let remembered = self.sets[&SetName::Affinity].clone();
        let (mut fates, mut choices) = (BTreeSet::new(), 0..1);
        while let Some(choice) = choices.next() {
            fates.insert(self.fate(packet, hooks, choice));
            choices.end = self.largest_modulus;
            self.sets.insert(SetName::Affinity, remembered.clone());
        }
        fates
    }

    /// What becomes of a packet when chance says `choice`.
    pub(super) fn fate(&mut self, packet: &Packet<'_>, hooks: Hooks, choice: u32) -> Fate {
        let mut skb = Skb::new(packet, choice);
        self.largest_modulus = 1;
        let chains = match hooks {
            Hooks::Forwarded => ["filter-prerouting", "nat-prerouting", "filter-forward", "nat-postrouting"],
            Hooks::Local => ["filter-output-nat", "nat-output", "filter-output", "nat-postrouting"],
        };
        for chain in chains {
            match self.run(chain, &mut skb) {
                End::Continue | End::Accept => (),
                End::Drop => return Fate::Drop,
                End::Reject => return Fate::Reject,
            }
        }
        assert_eq!(skb.mark, 0, "our mark stays behind");
        skb.fate()
    }

    /// The same for a packet that is in the middle of the rules, at the beginning of `chain`.
    pub(super) fn fate_in(&mut self, chain: &str, packet: &Packet<'_>, choice: u32) -> Fate {
        let mut skb = Skb::new(packet, choice);
        match self.run(chain, &mut skb) {
            End::Drop => Fate::Drop,
            End::Reject => Fate::Reject,
            End::Continue | End::Accept => skb.fate(),
        }
    }

    /// The last chain that decides a packet's destination.
    pub(super) fn chain_of(&mut self, packet: &Packet<'_>) -> String {
        let mut skb = Skb::new(packet, 0);
        self.run("nat-prerouting", &mut skb);
        skb.trace.last().unwrap().clone()
    }

    fn run(&mut self, chain: &str, skb: &mut Skb) -> End {
        skb.trace.push(chain.to_owned());
        let rules = self.chains.get(chain).unwrap_or_else(|| panic!("no chain {chain}")).clone();
        for rule in rules.iter() {
            match self.rule(rule, skb) {
                None | Some(Verdict::Continue) => (),
                Some(Verdict::Accept) => return End::Accept,
                Some(Verdict::Drop) => return End::Drop,
                Some(Verdict::Return) => return End::Continue,
                Some(Verdict::Goto(next)) if next == chain::REJECT => return End::Reject,
                Some(Verdict::Goto(next)) => return self.run(&next, skb),
                Some(Verdict::Jump(next)) => match self.run(&next, skb) {
                    End::Continue => (),
                    end => return end,
                },
            }
        }
        End::Continue
    }

    /// `None` when an expression does not match.
    fn rule(&mut self, rule: &[Expression], skb: &mut Skb) -> Option<Verdict> {
        let mut registers = Registers::default();
        for expression in rule {
            match expression {
                Expression::Payload { base, offset, length, to } => {
                    let bytes = skb.payload(*base, *offset);
                    registers.store(to.0, &bytes[..*length as usize]);
                }
                Expression::Meta { key, to } => registers.store(to.0, &skb.meta(*key)),
                Expression::SetMark { from } => {
                    skb.mark = u32::from_ne_bytes(registers.load(from.0, 4).try_into().unwrap());
                }
                Expression::Ct { key: CtKey::State, to } => registers.store(to.0, &8u32.to_ne_bytes()),
                Expression::Ct { key: CtKey::Status, to } => {
                    let status: u32 = if skb.translated { 0x20 } else { 0 };
                    registers.store(to.0, &status.to_ne_bytes());
                }
                Expression::Compare { from, comparison, with } => {
                    let equal = registers.load(from.0, with.len()) == *with;
                    match comparison {
                        Comparison::Equal if equal => (),
                        Comparison::NotEqual if !equal => (),
                        Comparison::Equal | Comparison::NotEqual => return None,
                        other => panic!("{other:?} is not used"),
                    }
                }
                Expression::Bitwise { from, to, mask, xor } => {
                    let bytes = registers.load(from.0, mask.len());
                    let result: Vec<u8> = bytes.iter().zip(mask).zip(xor).map(|((b, m), x)| (b & m) ^ x).collect();
                    registers.store(to.0, &result);
                }
                Expression::Constant { value, to } => {
                    assert!(value.len() <= 16, "the kernel's constants have 16 bytes");
                    registers.store(to.0, value);
                }
                Expression::Lookup { set, key, target } => {
                    if let Some(verdict) = self.lookup(set, key.0, *target, &mut registers)? {
                        return Some(verdict);
                    }
                }
                Expression::Random { modulus, offset, to } => {
                    self.largest_modulus = self.largest_modulus.max(*modulus);
                    registers.store(to.0, &(offset + skb.choice % modulus).to_ne_bytes());
                }
                Expression::Dynset { set, operation, key, data, timeout_ms } => {
                    assert_eq!(set, SetName::Affinity.name());
                    assert_eq!(timeout_ms.is_some(), *operation != DynsetOperation::Delete);
                    let (client, endpoint) = self.affinity_lengths();
                    let key = registers.load(key.0, client);
                    let data = registers.load(data.unwrap().0, endpoint);
                    self.change_affinity(*operation, key, data)?;
                }
                Expression::DestinationNat { address, port, .. } => {
                    let bytes = registers.load(address.0, self.address_bytes());
                    let port = registers.load(port.0, 2);
                    skb.destination = SocketAddr::new(address_of(&bytes), u16::from_be_bytes(port.try_into().unwrap()));
                    skb.translated = true;
                    return Some(Verdict::Accept);
                }
                Expression::Masquerade { .. } => {
                    skb.masqueraded = true;
                    return Some(Verdict::Accept);
                }
                Expression::Verdict(verdict) => return Some(verdict.clone()),
                other => panic!("{other:?} is not used"),
            }
        }
        None
    }

    /// `None` ends the rule; a verdict ends it too.
    fn lookup(&self, set: &str, key: u8, target: LookupTarget, registers: &mut Registers) -> Option<Option<Verdict>> {
        let set = SetName::ALL.into_iter().find(|name| name.name() == set).unwrap();
        let key = registers.load(key, self.key_bytes(set));
        if target == LookupTarget::Verdict {
            assert_eq!(set, SetName::Classes);
            return self.classes.get(&key).cloned().map(Some);
        }
        let elements = &self.sets[&set];
        let found = match set {
            SetName::SourceRanges => {
                elements.iter().find(|(first, last)| first[..4] == key[..4] && **first <= key && key <= **last)
            }
            _ => elements.get_key_value(&key),
        };
        match (target, found) {
            (LookupTarget::Nothing, Some(_)) | (LookupTarget::NothingUnless, None) => Some(None),
            (LookupTarget::Register(to), Some((_, value))) => {
                registers.store(to.0, value);
                Some(None)
            }
            _ => None,
        }
    }

    fn change_affinity(&mut self, operation: DynsetOperation, key: Vec<u8>, data: Vec<u8>) -> Option<()> {
        let full = self.len(SetName::Affinity) >= usize::try_from(AFFINITY_MAX).unwrap();
        let elements = self.set(SetName::Affinity);
        match operation {
            DynsetOperation::Delete => drop(elements.remove(&key)),
            DynsetOperation::Add | DynsetOperation::Update if elements.contains_key(&key) => (),
            DynsetOperation::Add | DynsetOperation::Update if full => return None,
            DynsetOperation::Add | DynsetOperation::Update => drop(elements.insert(key, data)),
        }
        Some(())
    }

    fn address_bytes(&self) -> usize {
        match self.family {
            IpFamily::V4 => 4,
            IpFamily::V6 => 16,
        }
    }

    fn affinity_lengths(&self) -> (usize, usize) {
        (self.address_bytes() + 4, self.address_bytes() + 8)
    }

    fn key_bytes(&self, set: SetName) -> usize {
        let address = self.address_bytes();
        match set {
            SetName::Frontends | SetName::Restricted => address + 8,
            SetName::Classes => 4,
            SetName::Slots => 8,
            SetName::Affinity | SetName::SourceRanges => address + 4,
            SetName::ClusterEndpoints | SetName::LocalEndpoints => address + 8,
            SetName::ClusterIps | SetName::NodeAddresses | SetName::NodePortAddresses => address,
            SetName::Hairpin => 2 * address,
        }
    }
}

impl Skb {
    fn new(packet: &Packet<'_>, choice: u32) -> Self {
        Self {
            source: packet.source,
            destination: packet.destination,
            protocol: packet.protocol as u8,
            input: packet.input.unwrap_or_default().to_owned(),
            mark: 0,
            translated: false,
            masqueraded: false,
            choice,
            trace: Vec::new(),
        }
    }

    fn fate(&self) -> Fate {
        if self.translated {
            Fate::Translated { endpoint: self.destination, masquerade: self.masqueraded }
        } else {
            assert!(!self.masqueraded, "only what is ours is masqueraded");
            Fate::Pass
        }
    }

    fn payload(&self, base: PayloadBase, offset: u32) -> Vec<u8> {
        let bytes = |address: IpAddr| match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        let v4 = self.source.is_ipv4();
        match (base, offset) {
            (PayloadBase::Network, 12) if v4 => bytes(self.source),
            (PayloadBase::Network, 16) if v4 => bytes(self.destination.ip()),
            (PayloadBase::Network, 8) if !v4 => bytes(self.source),
            (PayloadBase::Network, 24) if !v4 => bytes(self.destination.ip()),
            (PayloadBase::Transport, 2) => self.destination.port().to_be_bytes().to_vec(),
            other => panic!("nothing is read at {other:?}"),
        }
    }

    fn meta(&self, key: MetaKey) -> Vec<u8> {
        match key {
            MetaKey::Mark => self.mark.to_ne_bytes().to_vec(),
            MetaKey::InputInterfaceName => {
                let mut name = self.input.clone().into_bytes();
                name.resize(16, 0);
                name
            }
            MetaKey::Protocol => vec![self.protocol],
            other => panic!("{other:?} is not read"),
        }
    }
}

fn address_of(bytes: &[u8]) -> IpAddr {
    match bytes.first_chunk::<16>() {
        Some(octets) => IpAddr::from(*octets),
        None => IpAddr::from(*bytes.first_chunk::<4>().unwrap()),
    }
}

/// Sixteen registers of four bytes; what was not stored in this rule cannot be read.
#[derive(Debug, Default)]
struct Registers([Option<[u8; 4]>; 16]);

impl Registers {
    fn store(&mut self, first: u8, bytes: &[u8]) {
        for (register, word) in self.0[usize::from(first)..].iter_mut().zip(bytes.chunks(4)) {
            let mut padded = [0; 4];
            padded[..word.len()].copy_from_slice(word);
            *register = Some(padded);
        }
        assert!(usize::from(first) * 4 + bytes.len() <= 64, "{} bytes at register {first}", bytes.len());
    }

    fn load(&self, first: u8, length: usize) -> Vec<u8> {
        let words = self.0[usize::from(first)..].iter().take(length.div_ceil(4));
        let bytes: Vec<u8> = words.flat_map(|word| word.expect("a register that was loaded in this rule")).collect();
        assert!(bytes.len() >= length, "register {first} and {length} bytes");
        bytes[..length].to_vec()
    }
}
