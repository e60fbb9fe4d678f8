//! Connections that live while one proxy is exchanged for another.
//!
//! To us: connections that conntrack translates go on being translated by it, as long as a NAT hook is registered. The tables of the
//! proxy that we replace may hold the only ones: so we hold some.
//! From us: when the programs go, conntrack is told of the flows that they translate, and whoever comes next carries them on.

use std::collections::HashSet;
use std::hash::Hash;
use std::io;
use std::net::SocketAddr;
use std::path::Path;

use aya::maps::{Array, HashMap, Map, MapData};
use node_sys::conntrack::{Conntrack, Dump, Filter, Translation, Tuple};
use node_sys::nftables::{
    Batch, ChainHook, ChainKind, Comparison, CtKey, Expression, Family, Hook, MetaKey, Nftables, NftablesError,
    Register,
};
use node_sys::sysctl;
use proxy_common::flow_table::FlowEdit;
use proxy_common::pod::Pod;
use proxy_common::{
    BACKEND_FREE, Backend, Be16, FLOW_CLOSING, FLOW_FOREIGN, FLOW_REPLY, FLOW_TUNNEL, Flow, FlowKey, Frontend,
    FrontendKey, MARK_DONE, NODE_CLUSTER_IPS_ANYWHERE, NodeSettings, V4, V6,
};
use tracing::{info, warn};

use super::encode::UserAddress;
use super::flows::FlowTable;
use crate::conntrack::redirected::{TCP_TIMEOUT_S, UDP_TIMEOUT_S};
use crate::model::Protocol;

/// Our table in each family; its only rule does nothing but ask conntrack, which keeps that registered too.
const TABLE: &str = "trama-keep-nat";
/// Our table in each family while flows are handed over.
const HAND_OVER_TABLE: &str = "trama-hand-over";
/// Priority of the chain there, `NF_IP_PRI_RAW`: before conntrack looks.
const BEFORE_CONNTRACK: i32 = -300;
/// The families that flows have.
const FAMILIES: [Family; 2] = [Family::Ipv4, Family::Ipv6];
/// TCP's number.
const TCP: u8 = Protocol::Tcp as u8;
/// UDP's number.
const UDP: u8 = Protocol::Udp as u8;
/// SCTP's number.
const SCTP: u8 = Protocol::Sctp as u8;
/// Flows of datagrams of one family that are told at most. Nobody knows which of them still live, and a few seconds is how long this
/// many take.
const UDP_FLOWS_MAX: usize = 65_536;

/// Registers NAT hooks if connections are translated here now, and takes them away if not.
pub(super) fn keep_nat() {
    let wanted = sysctl::read("net/netfilter/nf_conntrack_count").is_ok_and(|count| count != "0") && is_translating();
    let changed = if wanted { add_hooks() } else { remove_hooks() };
    match changed {
        Ok(()) if wanted => {
            info!(table = TABLE, "connections of another proxy are here; NAT stays registered for them");
        }
        // Without nf_tables nobody translates with it either.
        Ok(()) => {}
        Err(error) => warn!(%error, "connections of a proxy that used nf_tables may end when its tables go"),
    }
}

/// Removes our tables. Idempotent.
pub(super) fn remove_hooks() -> Result<(), NftablesError> {
    for (family, table) in FAMILIES.into_iter().flat_map(|family| [(family, TABLE), (family, HAND_OVER_TABLE)]) {
        let mut kernel = Nftables::open()?;
        let Ok(Some(_)) = kernel.table(family, table) else { continue };
        let mut batch = Batch::new(family, table);
        batch.delete_table();
        kernel.commit(batch)?;
    }
    Ok(())
}

/// Keeps what our programs have translated and left to the kernel from conntrack, which is told meanwhile that it is to translate
/// the same: it would take the packet for another connection's, and change its port.
fn hide_translated() -> Result<(), NftablesError> {
    for family in FAMILIES {
        let mut batch = Batch::new(family, HAND_OVER_TABLE);
        batch.add_table(b"");
        let hook = ChainHook { kind: ChainKind::Filter, hook: Hook::Prerouting, priority: BEFORE_CONNTRACK };
        batch.add_chain("prerouting", Some(hook));
        let (mask, zero) = (MARK_DONE.to_ne_bytes().to_vec(), vec![0; 4]);
        batch.add_rule(
            "prerouting",
            &[
                Expression::Meta { key: MetaKey::Mark, to: Register(0) },
                Expression::Bitwise { from: Register(0), to: Register(0), mask, xor: zero.clone() },
                Expression::Compare { from: Register(0), comparison: Comparison::NotEqual, with: zero },
                Expression::Notrack,
            ],
        );
        Nftables::open()?.commit(batch)?;
    }
    Ok(())
}

fn add_hooks() -> Result<(), NftablesError> {
    remove_hooks()?;
    for family in FAMILIES {
        let mut batch = Batch::new(family, TABLE);
        batch.add_table(b"");
        for (name, hook) in [
            ("prerouting", Hook::Prerouting),
            ("input", Hook::Input),
            ("output", Hook::Output),
            ("postrouting", Hook::Postrouting),
        ] {
            batch.add_chain(name, Some(ChainHook { kind: ChainKind::Nat, hook, priority: 100 }));
        }
        batch.add_rule("prerouting", &[Expression::Ct { key: CtKey::State, to: Register(0) }]);
        Nftables::open()?.commit(batch)?;
    }
    Ok(())
}

fn is_translating() -> bool {
    let Ok(mut table) = Conntrack::open() else { return false };
    let mut found = false;
    for (protocol, v6) in [TCP, UDP, SCTP].into_iter().flat_map(|protocol| [(protocol, false), (protocol, true)]) {
        let filter = Filter { protocol, v6, destination: None, port: None };
        let visited = table.for_each(&filter, |entry| found |= entry.is_translated());
        // What a dump did not reach may be translated.
        found |= matches!(visited, Ok(Dump::Interrupted));
    }
    found
}

/// Stops taking new flows, and tells conntrack of those that live: to be called before the programs go. `version` is the directory of
/// the pins; nothing pinned is nothing to do.
pub(super) fn hand_over(version: &Path) {
    if !version.exists() {
        return;
    }
    if let Err(error) = hide_translated() {
        warn!(%error, "connections to endpoints on this node's own address may end");
    }
    for told in [hand_over_family::<V4>(version), hand_over_family::<V6>(version)] {
        match told {
            Ok(Told { count: 0, refused: None }) => {}
            Ok(Told { count, refused: None }) => info!(count, "handed flows to conntrack"),
            Ok(Told { count, refused: Some(error) }) => {
                warn!(count, %error, "not every flow could be handed to conntrack; some connections may end");
            }
            Err(error) => warn!(%error, "flows could not be handed to conntrack; connections will end"),
        }
    }
}

/// What became of the flows of one family.
#[derive(Debug, Default)]
struct Told {
    /// Those that conntrack has now.
    count: usize,
    /// Why it did not take the last of the others.
    refused: Option<io::Error>,
}

fn hand_over_family<A: UserAddress>(version: &Path) -> io::Result<Told>
where
    Backend<A>: aya::Pod,
    FrontendKey<A>: aya::Pod,
    NodeSettings<A>: aya::Pod,
    FlowKey<A>: Pod + Hash,
    Flow<A>: Pod,
    FlowEdit<A>: Pod,
{
    let pin = |name: &str| version.join("maps").join(format!("{name}_{}", A::SUFFIX));
    let open = |name: &str| MapData::from_pin(pin(name)).map_err(io::Error::other);
    let mut settings: Array<_, NodeSettings<A>> = Map::Array(open("NODE")?).try_into().map_err(io::Error::other)?;
    let mut frontends: HashMap<_, FrontendKey<A>, Frontend> =
        Map::HashMap(open("FRONTENDS")?).try_into().map_err(io::Error::other)?;
    let flows = FlowTable::<A>::open(version)?;
    let backends: Array<_, Backend<A>> = Map::Array(open("BACKENDS")?).try_into().map_err(io::Error::other)?;
    stop_refusing(&mut settings)?;
    let keys: Vec<_> = frontends.keys().flatten().collect();
    for key in keys {
        // One that is gone already is as good.
        let _ = frontends.remove(&key);
    }
    let mut told = Told::default();
    let mut seen = HashSet::new();
    let mut table = Conntrack::open()?;
    let serves = |flow: &Flow<A>| {
        let backend = backends.get(&flow.backend_id, 0);
        backend.is_ok_and(|now| now.state != BACKEND_FREE && now.generation == flow.backend_generation)
    };
    // Connections first: they end without their entry, where datagrams only find another endpoint. Each twice: a packet that had found
    // its frontend before that went may have written its flow behind the first look.
    for (protocol, timeout_s, max) in
        [(TCP, TCP_TIMEOUT_S, usize::MAX), (UDP, UDP_TIMEOUT_S, UDP_FLOWS_MAX)].into_iter().flat_map(|part| [part; 2])
    {
        let mut live = Vec::new();
        flows.each(|key, flow| {
            let counts = key.protocol == protocol && is_live(&flow) && (protocol == TCP || serves(&flow));
            if counts && live.len() < max {
                live.push((key, flow));
            }
        })?;
        for (key, flow) in live {
            if !seen.insert(key) {
                continue;
            }
            match table.replace(&translation(&key, &flow), timeout_s) {
                Ok(()) => {
                    told.count += 1;
                    // From here on the flow is conntrack's alone: the programs go one interface after the other, and what one of them
                    // left to conntrack the next would take for another flow. One that is gone already is as good.
                    let _ = flows.remove(&flow.twin_key(protocol));
                    let _ = flows.remove(&key);
                }
                Err(error) => told.refused = Some(error),
            }
        }
    }
    Ok(told)
}

/// Otherwise a Service's address would be nobody's now, and refused, while the next proxy is serving it.
fn stop_refusing<A: UserAddress>(settings: &mut Array<MapData, NodeSettings<A>>) -> io::Result<()>
where
    NodeSettings<A>: aya::Pod,
{
    let mut now = settings.get(&0, 0).map_err(io::Error::other)?;
    now.service_cidr_count = 0;
    now.flags &= !NODE_CLUSTER_IPS_ANYWHERE;
    settings.set(0, now, 0).map_err(io::Error::other)
}

/// Whether it is the forward entry of a flow that has not ended, and that conntrack could go on with.
fn is_live<A>(flow: &Flow<A>) -> bool {
    flow.flags & (FLOW_REPLY | FLOW_CLOSING | FLOW_FOREIGN | FLOW_TUNNEL) == 0
}

fn translation<A: UserAddress>(key: &FlowKey<A>, flow: &Flow<A>) -> Translation {
    let at = |address: A, port: Be16| SocketAddr::new(address.to_ip(), port.to_host());
    Translation {
        protocol: key.protocol,
        arriving: Tuple {
            source: at(key.source, key.source_port),
            destination: at(key.destination, key.destination_port),
        },
        leaving: Tuple {
            source: at(flow.source, flow.source_port),
            destination: at(flow.destination, flow.destination_port),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn live_connections_are_told_as_they_arrive_and_leave() {
        let v4 = |last| V4::from_octets([10, 0, 0, last]);
        let port = Be16::from_host;
        let key = FlowKey {
            source: v4(1),
            destination: v4(2),
            source_port: port(4000),
            destination_port: port(80),
            protocol: TCP,
            padding: [0; 3],
        };
        let flow = Flow {
            source: v4(9),
            destination: v4(3),
            source_port: port(5000),
            destination_port: port(8080),
            ..Flow::default()
        };
        let told = translation(&key, &flow);
        assert_eq!(
            (told.arriving.source, told.arriving.destination),
            ("10.0.0.1:4000".parse().unwrap(), "10.0.0.2:80".parse().unwrap())
        );
        assert_eq!(
            (told.leaving.source, told.leaving.destination),
            ("10.0.0.9:5000".parse().unwrap(), "10.0.0.3:8080".parse().unwrap())
        );
        assert_eq!(told.protocol, TCP);
        assert!(is_live(&flow));
        for flags in [FLOW_REPLY, FLOW_CLOSING, FLOW_FOREIGN, FLOW_TUNNEL] {
            assert!(!is_live(&Flow { flags, ..flow }), "{flags}");
        }
    }

    #[test]
    fn nat_is_kept_only_where_connections_are_translated() {
        let netns = node_sys::Netns::anonymous().unwrap();
        netns
            .run(|| {
                let is_there = || Nftables::open().unwrap().table(Family::Ipv4, TABLE).unwrap().is_some();
                keep_nat();
                assert!(!is_there());
                add_hooks().unwrap();
                let tuple = |source: &str, destination: &str| Tuple {
                    source: source.parse().unwrap(),
                    destination: destination.parse().unwrap(),
                };
                let (arriving, leaving) = (tuple("10.0.0.1:1", "10.0.0.2:2"), tuple("10.0.0.1:1", "10.0.0.3:3"));
                let translation = Translation { protocol: TCP, arriving, leaving };
                Conntrack::open().unwrap().replace(&translation, 60).unwrap();
                remove_hooks().unwrap();
                assert!(!is_there());
                keep_nat();
                assert!(is_there());
                Conntrack::open()
                    .unwrap()
                    .delete_if(&Filter { protocol: TCP, v6: false, destination: None, port: None }, |_| true)
                    .unwrap();
                keep_nat();
                assert!(!is_there());
            })
            .unwrap();
    }

    #[test]
    fn what_is_translated_is_hidden_until_the_programs_are_gone() {
        let netns = node_sys::Netns::anonymous().unwrap();
        netns
            .run(|| {
                let is_there = |family| Nftables::open().unwrap().table(family, HAND_OVER_TABLE).unwrap().is_some();
                hide_translated().unwrap();
                assert!(FAMILIES.into_iter().all(is_there));
                remove_hooks().unwrap();
                assert!(!FAMILIES.into_iter().any(is_there));
            })
            .unwrap();
    }

    #[test]
    fn nothing_pinned_is_nothing_to_hand_over() {
        hand_over(Path::new("/nonexistent"));
        assert!(hand_over_family::<V4>(Path::new("/nonexistent")).is_err());
    }
}
