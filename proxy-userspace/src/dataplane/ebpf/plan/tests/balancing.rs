//! Endpoints that drain, algorithms and weights.

use proxy_common::{FRONTEND_LEAST_CONNECTIONS, FRONTEND_MAGLEV};

use super::*;

#[test]
fn an_endpoint_that_drains_keeps_its_id_and_generation_until_it_is_gone() {
    let mut bench = Bench::new();
    bench.set(&service(1, 1, &[1, 2], &[])).unwrap();
    let second = endpoint(2, false).address();
    let of = |bench: &Bench| {
        let backends = bench.kernel.backends.iter().enumerate();
        let mut known = backends.filter(|(_, backend)| backend.address.octets()[3] == 2);
        known.next().map(|(id, backend)| (id, backend.state, backend.generation))
    };
    let (id, _, generation) = of(&bench).unwrap();
    let drains = draining(&service(1, 1, &[1], &[]), &[2]);
    bench.set(&drains).unwrap();
    bench.kernel.assert_serves(&drains);
    assert_eq!((of(&bench), bench.kernel.draining()), (Some((id, BACKEND_DRAINING, generation)), [second].into()));
    assert_eq!(bench.restart(std::slice::from_ref(&drains)), Writes::default(), "a new process knows that it drains");
    bench.set(&service(1, 1, &[1, 2], &[])).unwrap();
    assert_eq!(of(&bench), Some((id, BACKEND_ACTIVE, generation)), "back with all its flows");
    bench.set(&drains).unwrap();
    bench.set(&service(1, 1, &[1], &[])).unwrap();
    assert_eq!(bench.kernel.draining(), [].into());
    assert_eq!(bench.kernel.backends[id].generation, generation + 1, "flows find out");
}

#[test]
fn who_never_served_does_not_drain() {
    let mut bench = Bench::new();
    bench.set(&draining(&service(1, 1, &[1], &[]), &[2])).unwrap();
    assert_eq!(bench.kernel.draining(), [].into());
}

#[test]
fn an_algorithm_changes_with_one_flip_and_outlives_a_restart() {
    let mut bench = Bench::new();
    let plain = service(1, 1, &[1, 2, 3], &[1]);
    for (algorithm, flag, slots) in [
        (Algorithm::Maglev, FRONTEND_MAGLEV, 4093),
        (Algorithm::LeastConnections, FRONTEND_LEAST_CONNECTIONS, 3),
        (Algorithm::Random, 0, 3),
    ] {
        let service = balanced(&plain, algorithm);
        assert_eq!(bench.set(&service), Ok(Planned::Whole));
        bench.kernel.assert_serves(&service);
        assert!(bench.kernel.frontends.values().all(|value| (value.flags, value.cluster_count) == (flag, slots)));
        assert_eq!(bench.restart(std::slice::from_ref(&service)), Writes::default());
    }
}

#[test]
fn weights_are_slots_and_for_least_connections_in_them() {
    let mut bench = Bench::new();
    let mut weighted = ServicePort::clone(&service(1, 1, &[1, 2], &[]));
    weighted.cluster_endpoints[1].weight = 3;
    bench.set(&Arc::new(weighted.clone())).unwrap();
    let block = |bench: &Bench| {
        let value = *bench.kernel.frontends.values().next().unwrap();
        bench.kernel.slots[value.cluster_first as usize..][..value.cluster_count as usize].to_vec()
    };
    let slots = block(&bench);
    assert_eq!(slots.iter().filter(|slot| **slot == slots[3]).count(), 3);
    weighted.algorithm = Algorithm::LeastConnections;
    bench.set(&Arc::new(weighted)).unwrap();
    let weights: Vec<u32> = block(&bench).iter().map(|slot| slot >> SLOT_ID_BITS).collect();
    assert_eq!(weights, [1, 3, 3, 3]);
}

#[test]
fn without_room_for_its_table_a_service_is_served_at_random_and_tried_again() {
    let mut bench = Bench::new();
    let hosts: Vec<u8> = (1..=20).collect();
    let tables: Vec<_> = (1..=2).map(|n| balanced(&service(n, n, &hosts, &[]), Algorithm::Maglev)).collect();
    assert_eq!(bench.set(&tables[0]), Ok(Planned::Whole));
    assert_eq!(bench.set(&tables[1]), Ok(Planned::Whole));
    let third = balanced(&service(3, 3, &hosts[..6], &[]), Algorithm::Maglev);
    assert_eq!(bench.set(&third), Ok(Planned::WithoutTable));
    bench.kernel.assert_serves(&third);
    bench.sync(&[(&tables[0].name, None)]);
    assert_eq!(bench.set(&third), Ok(Planned::Whole), "what does not change is tried again all the same");
    bench.kernel.assert_serves(&third);
}
