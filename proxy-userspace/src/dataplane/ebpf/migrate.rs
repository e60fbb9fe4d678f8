//! Connections that live while one proxy is exchanged for another.
//!
//! To us: connections that conntrack translates go on being translated by it, as long as a NAT hook is registered. The tables of the
//! proxy that we replace may hold the only ones: so we hold some.
//! From us: when the programs go, conntrack is told of the connections that they translate, and whoever comes next carries them on.

use std::collections::HashSet;
use std::hash::Hash;
use std::io;
use std::net::SocketAddr;
use std::path::Path;

use aya::maps::{Array, HashMap, Map, MapData};
use node_sys::conntrack::{Conntrack, Dump, Filter, Translation, Tuple};
use node_sys::nftables::{
    Batch, ChainHook, ChainKind, CtKey, Expression, Family, Hook, Nftables, NftablesError, Register,
};
use node_sys::sysctl;
use proxy_common::{
    Be16, FLOW_CLOSING, FLOW_REPLY, Flow, FlowKey, Frontend, FrontendKey, NODE_CLUSTER_IPS_ANYWHERE, NodeSettings, V4,
    V6,
};
use tracing::{info, warn};

use super::encode::UserAddress;

/// Our table in each family; its only rule does nothing but ask conntrack, which keeps that registered too.
const TABLE: &str = "trama-keep-nat";
/// TCP's number.
const TCP: u8 = 6;
/// How long an entry waits for its connection's next packet, in seconds. Flows that ended without a FIN are among them, and must not
/// fill the table for days.
const TIMEOUT_S: u32 = 3600;

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

/// Removes the hooks. Idempotent.
pub(super) fn remove_hooks() -> Result<(), NftablesError> {
    for family in [Family::Ipv4, Family::Ipv6] {
        let mut kernel = Nftables::open()?;
        let Ok(Some(_)) = kernel.table(family, TABLE) else { continue };
        let mut batch = Batch::new(family, TABLE);
        batch.delete_table();
        kernel.commit(batch)?;
    }
    Ok(())
}

fn add_hooks() -> Result<(), NftablesError> {
    remove_hooks()?;
    for family in [Family::Ipv4, Family::Ipv6] {
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
    for v6 in [false, true] {
        let filter = Filter { protocol: TCP, v6, destination: None, port: None };
        let visited = table.for_each(&filter, |entry| {
            found |=
                entry.original.destination != entry.reply.source || entry.original.source != entry.reply.destination;
        });
        // What a dump did not reach may be translated.
        found |= matches!(visited, Ok(Dump::Interrupted));
    }
    found
}

/// Stops taking new connections, and tells conntrack of those that live: to be called before the programs go. `maps` is the directory
/// of the pins; nothing pinned is nothing to do.
pub(super) fn hand_over(maps: &Path) {
    if !maps.exists() {
        return;
    }
    let told = hand_over_family::<V4>(maps, "V4").and_then(|v4| Ok(v4 + hand_over_family::<V6>(maps, "V6")?));
    match told {
        Ok(0) => {}
        Ok(count) => info!(count, "handed established connections to conntrack"),
        Err(error) => warn!(%error, "not every established connection could be handed to conntrack; some may end"),
    }
}

fn hand_over_family<A: UserAddress>(maps: &Path, suffix: &str) -> io::Result<usize>
where
    FrontendKey<A>: aya::Pod,
    NodeSettings<A>: aya::Pod,
    FlowKey<A>: aya::Pod + Hash,
    Flow<A>: aya::Pod,
{
    let open = |name: &str| MapData::from_pin(maps.join(format!("{name}_{suffix}"))).map_err(io::Error::other);
    let mut settings: Array<_, NodeSettings<A>> = Map::Array(open("NODE")?).try_into().map_err(io::Error::other)?;
    let mut frontends: HashMap<_, FrontendKey<A>, Frontend> =
        Map::HashMap(open("FRONTENDS")?).try_into().map_err(io::Error::other)?;
    let flows: HashMap<_, FlowKey<A>, Flow<A>> =
        Map::LruHashMap(open("FLOWS")?).try_into().map_err(io::Error::other)?;
    stop_refusing(&mut settings)?;
    let keys: Vec<_> = frontends.keys().flatten().collect();
    for key in keys {
        // One that is gone already is as good.
        let _ = frontends.remove(&key);
    }
    let mut table = Conntrack::open()?;
    let mut told = HashSet::new();
    // Twice: a packet that had found its frontend before that went may have written its flow behind the first look.
    for _ in 0..2 {
        for (key, flow) in flows.iter().flatten().filter(|(key, flow)| is_live(key, flow)) {
            if told.insert(key) {
                table.replace(&translation(&key, &flow), TIMEOUT_S)?;
            }
        }
    }
    Ok(told.len())
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

/// Datagrams are looked at one by one by whoever comes next.
fn is_live<A>(key: &FlowKey<A>, flow: &Flow<A>) -> bool {
    key.protocol == TCP && flow.flags & (FLOW_REPLY | FLOW_CLOSING) == 0
}

fn translation<A: UserAddress>(key: &FlowKey<A>, flow: &Flow<A>) -> Translation {
    let at = |address: A, port: Be16| SocketAddr::new(address.to_ip(), port.to_host());
    Translation {
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
        assert!(is_live(&key, &flow));
        assert!(!is_live(&key, &Flow { flags: FLOW_REPLY, ..flow }));
        assert!(!is_live(&key, &Flow { flags: FLOW_CLOSING, ..flow }));
        assert!(!is_live(&FlowKey { protocol: 17, ..key }, &flow));
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
                Conntrack::open().unwrap().replace(&Translation { arriving, leaving }, 60).unwrap();
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
    fn nothing_pinned_is_nothing_to_hand_over() {
        hand_over(Path::new("/nonexistent"));
        assert!(hand_over_family::<V4>(Path::new("/nonexistent"), "V4").is_err());
    }
}
