//! Where other nodes' tunnels lead, and which frontends send packets into one.

use super::*;

/// [`service`], whose external IP masquerades clients from outside.
fn crossing(cluster: &[u8], local: &[u8]) -> ServicePort {
    let mut service = Arc::unwrap_or_clone(service(1, 1, cluster, local));
    service.frontends[1].rules.external.masquerade = true;
    service
}

/// Last bytes of the addresses that tunnels lead to, each with the last byte of the backend that it gets.
fn led(bench: &Bench) -> Vec<(u8, u8)> {
    let entries = bench.kernel.endpoints.iter();
    let mut led: Vec<_> = entries
        .map(|(key, id)| {
            let backend = &bench.kernel.backends[*id as usize];
            assert_eq!(backend.service_id, key.service_id);
            (key.address.octets()[3], backend.address.octets()[3])
        })
        .collect();
    led.sort_unstable();
    led
}

#[test]
fn tunnels_lead_to_endpoints_of_this_node_until_these_are_gone() {
    let mut bench = Bench::new();
    bench.set(&service(1, 1, &[1, 2], &[1, 2])).unwrap();
    assert_eq!(led(&bench), [], "nobody is masqueraded, so nothing crosses nodes");
    bench.set(&crossing(&[1, 2, 3], &[1, 2]).into()).unwrap();
    assert_eq!(led(&bench), [(1, 1), (2, 2)]);
    bench.set(&draining(&crossing(&[1, 3], &[1]), &[2])).unwrap();
    assert_eq!(led(&bench), [(1, 1), (2, 2)], "an endpoint that drains keeps its flows");
    let gone: Arc<ServicePort> = crossing(&[1, 3], &[1]).into();
    bench.set(&gone).unwrap();
    assert_eq!(led(&bench), [(1, 1)]);
    assert_eq!(bench.restart(std::slice::from_ref(&gone)), Writes::default(), "a new process finds them");
    bench.sync(&[(&gone.name, None)]);
    assert_eq!(led(&bench), []);
}

#[test]
fn what_an_earlier_process_left_goes() {
    let mut bench = Bench::new();
    bench.set(&crossing(&[1], &[1]).into()).unwrap();
    let writes = bench.restart(&[]);
    bench.kernel.execute(writes);
    assert_eq!(led(&bench), []);
}

#[test]
fn only_a_table_finds_the_endpoint_of_any_packet() {
    let mut bench = Bench::new();
    let mut has = |algorithm, direct_return| {
        let service = ServicePort { algorithm, direct_return, ..crossing(&[1, 2], &[]) };
        bench.set(&Arc::new(service)).unwrap();
        let direct = bench.kernel.frontends.values().filter(|frontend| frontend.rule(Origin::External).direct_return());
        (direct.count(), bench.planner.has_direct_tables())
    };
    assert_eq!(has(Algorithm::Random, true), (1, false));
    assert_eq!(has(Algorithm::Maglev, false), (0, false));
    assert_eq!(has(Algorithm::Maglev, true), (1, true));
    assert_eq!(has(Algorithm::Maglev, true), (1, true));
    assert_eq!(has(Algorithm::Random, true), (1, false));
    assert_eq!(has(Algorithm::Maglev, true), (1, true));
    let name = crossing(&[], &[]).name;
    bench.sync(&[(&name, None)]);
    assert!(!bench.planner.has_direct_tables());
}

#[test]
fn a_service_for_whose_endpoints_there_is_no_room_is_refused_whole() {
    let mut planner = Planner::<V4>::new(Limits { endpoints: 1, ..LIMITS });
    let (mut ids, mut writes) = (RangeAllocator::new(1, 9), Writes::default());
    let service: Arc<ServicePort> = crossing(&[1, 2], &[1, 2]).into();
    let refused = planner.change(&service.name, Some(&service), &mut ids, 0, &mut writes);
    assert_eq!((refused, writes), (Err(Full { map: "endpoints" }), Writes::default()));
}
