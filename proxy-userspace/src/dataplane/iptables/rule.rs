//! A rule as data, and its text.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use super::chain::{Chain, ClientList, protocol_name};
use crate::model::Protocol;

/// A condition of a rule; a rule's conditions are looked at in order, and the first that fails ends it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Match {
    /// Source inside the network.
    Source(IpNet),
    /// Source outside of it.
    NotSource(IpNet),
    /// Destination inside the network.
    Destination(IpNet),
    /// Destination outside of it.
    NotDestination(IpNet),
    /// The destination ends in `value` under `mask`, a byte; an address of the family for its width.
    DestinationEnd {
        /// Bits that count.
        mask: u8,
        /// What they are.
        value: u8,
        /// Whether addresses have 128 bits.
        v6: bool,
    },
    /// Came in through this interface, or one whose name begins so.
    Input {
        /// The name.
        name: Arc<str>,
        /// Whether it is only the beginning.
        prefix: bool,
    },
    /// Of this protocol.
    Protocol(Protocol),
    /// Of this protocol, to a port between the two, both included.
    Ports(Protocol, u16, u16),
    /// The source is an address of this node.
    SourceLocal,
    /// The destination is one.
    DestinationLocal,
    /// conntrack's state is one of these, separated by commas.
    State(&'static str),
    /// It is none of these.
    NotState(&'static str),
    /// The mark has this bit.
    Marked(u32),
    /// True once in so many times, by chance.
    OnceIn(usize),
    /// The client is on the list since at most so many seconds; if so, its time begins anew.
    Listed(ClientList, u32),
    /// Always true; puts the client on the list.
    List(ClientList),
    /// Always true; counts the packet in the counter of this name.
    Count(&'static str),
    /// Always true; for people.
    Comment(String),
}

/// What a rule does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Target {
    /// Goes through a chain and comes back.
    Jump(Chain),
    /// Goes through a chain and comes back to where this chain was jumped to from.
    Goto(Chain),
    /// Goes back to where this chain was jumped to from.
    Return,
    /// Nothing: the next rule is looked at.
    Continue,
    /// Lets it in.
    Accept,
    /// Drops it silently.
    Drop,
    /// Answers ICMP port unreachable, whatever the protocol, as kube-proxy does.
    Reject,
    /// The destination becomes this.
    Dnat(SocketAddr),
    /// The source becomes an address of this node, with a random port.
    Masquerade,
    /// Sets a bit of the mark.
    SetMark(u32),
    /// Turns a bit of the mark over.
    ToggleMark(u32),
}

/// A rule: what is done when all conditions are true.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rule {
    pub(super) matches: Vec<Match>,
    pub(super) target: Target,
}

impl Rule {
    pub(super) fn new(matches: impl Into<Vec<Match>>, target: Target) -> Self {
        Self { matches: matches.into(), target }
    }
}

impl fmt::Display for Rule {
    /// As it stands in a line behind `-A CHAIN`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, one) in self.matches.iter().enumerate() {
            write!(f, "{}{one}", if index == 0 { "" } else { " " })?;
        }
        match self.target {
            Target::Continue => Ok(()),
            target if self.matches.is_empty() => write!(f, "{target}"),
            target => write!(f, " {target}"),
        }
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source(net) => write!(f, "-s {net}"),
            Self::NotSource(net) => write!(f, "! -s {net}"),
            Self::Destination(net) => write!(f, "-d {net}"),
            Self::NotDestination(net) => write!(f, "! -d {net}"),
            Self::DestinationEnd { mask, value, v6: false } => write!(f, "-d 0.0.0.{value}/0.0.0.{mask}"),
            Self::DestinationEnd { mask, value, v6: true } => write!(f, "-d ::{value:x}/::{mask:x}"),
            Self::Input { name, prefix } => write!(f, "-i {}{}", plain(name), if *prefix { "+" } else { "" }),
            Self::Protocol(protocol) => write!(f, "-p {}", protocol_name(*protocol)),
            Self::Ports(protocol, first, last) => {
                let name = protocol_name(*protocol);
                write!(f, "-p {name} -m {name} --dport {first}")?;
                if first == last { Ok(()) } else { write!(f, ":{last}") }
            }
            Self::SourceLocal => f.write_str("-m addrtype --src-type LOCAL"),
            Self::DestinationLocal => f.write_str("-m addrtype --dst-type LOCAL"),
            Self::State(states) => write!(f, "-m conntrack --ctstate {states}"),
            Self::NotState(states) => write!(f, "-m conntrack ! --ctstate {states}"),
            Self::Marked(bit) => write!(f, "-m mark --mark {bit:#x}/{bit:#x}"),
            Self::OnceIn(times) => {
                write!(f, "-m statistic --mode random --probability {:.10}", 1.0 / *times as f64)
            }
            Self::Listed(list, seconds) => {
                write!(f, "-m recent --name {list} --update --seconds {seconds} --reap --rsource")
            }
            Self::List(list) => write!(f, "-m recent --name {list} --set --rsource"),
            Self::Count(name) => write!(f, "-m nfacct --nfacct-name {name}"),
            Self::Comment(text) => write!(f, "-m comment --comment \"{}\"", plain(text)),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Jump(chain) => write!(f, "-j {chain}"),
            Self::Goto(chain) => write!(f, "-g {chain}"),
            Self::Return => f.write_str("-j RETURN"),
            Self::Continue => Ok(()),
            Self::Accept => f.write_str("-j ACCEPT"),
            Self::Drop => f.write_str("-j DROP"),
            Self::Reject => f.write_str("-j REJECT"),
            Self::Dnat(to) => write!(f, "-j DNAT --to-destination {to}"),
            Self::Masquerade => f.write_str("-j MASQUERADE --random-fully"),
            Self::SetMark(bit) => write!(f, "-j MARK --or-mark {bit:#x}"),
            Self::ToggleMark(bit) => write!(f, "-j MARK --xor-mark {bit:#x}"),
        }
    }
}

/// Names come from the API and from the configuration: none of their characters may end a word or a line of the text.
fn plain(text: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || "-_./:@".contains(c) { c } else { '?' };
    text.chars().take(240).map(safe).collect()
}

/// A network that holds this address only.
pub(super) fn host(address: IpAddr) -> IpNet {
    IpNet::from(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_what_iptables_reads() {
        let to = "10.244.1.5:8080".parse().unwrap();
        let rule = Rule::new([Match::Protocol(Protocol::Tcp), Match::OnceIn(3)], Target::Dnat(to));
        let text =
            "-p tcp -m statistic --mode random --probability 0.3333333333 -j DNAT --to-destination 10.244.1.5:8080";
        assert_eq!(rule.to_string(), text);
        let end = |v6| Match::DestinationEnd { mask: 255, value: 165, v6 }.to_string();
        assert_eq!((end(false), end(true)), ("-d 0.0.0.165/0.0.0.255".into(), "-d ::a5/::ff".into()));
        assert_eq!(Match::Ports(Protocol::Udp, 64, 127).to_string(), "-p udp -m udp --dport 64:127");
        assert_eq!(Target::Dnat("[fd00::1]:53".parse().unwrap()).to_string(), "-j DNAT --to-destination [fd00::1]:53");
    }

    #[test]
    fn a_hostile_name_stays_one_word() {
        let comment = Match::Comment("ns/web\" -j ACCEPT\n-A INPUT".into()).to_string();
        assert_eq!(comment, "-m comment --comment \"ns/web??-j?ACCEPT?-A?INPUT\"");
    }
}
