//! What is written is what the kernel holds, where the kernel has IPVS; the bytes of a command everywhere.

use super::codec::{read_server, write_command};
use super::*;
use crate::Netns;

const ID: ServiceId = ServiceId { family: Family::Ipv4, mark: 0x7000_0001 };

#[test]
fn a_server_reads_as_it_was_written() {
    for (family, address) in [(Family::Ipv4, "10.1.2.3:8080"), (Family::Ipv6, "[fd00::1]:53")] {
        let address: SocketAddr = address.parse().unwrap();
        let mut bytes = Vec::new();
        write_command(&mut bytes, &Command::AddServer(ServiceId { family, ..ID }, address, 7));
        assert_eq!(bytes[..4], [5, 1, 0, 0]);
        assert_eq!(read_server(&bytes, family), Some(Server { address, weight: 7, connections: 0 }));
    }
}

#[test]
fn schedulers_have_the_names_of_the_kernel() {
    for name in ["rr", "lc", "dh", "sh", "sed", "nq", "wrr", "wlc", "mh"] {
        assert_eq!(Scheduler::of_name(name).unwrap().name(), name);
    }
    assert_eq!(Scheduler::of_name("random"), None);
}

/// The build machine's kernel may have no IPVS; `cargo xtask vm` runs this on one that has, and that there is none must be
/// said as such.
#[test]
fn the_kernel_holds_what_it_was_told() {
    Netns::anonymous().unwrap().run(with_kernel).unwrap();
}

fn with_kernel() {
    // Without the loopback interface no address is unicast.
    assert!(std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
    let mut ipvs = match Ipvs::open() {
        Ok(ipvs) => ipvs,
        Err(error) => {
            assert!(matches!(error, IpvsError::Missing), "{error}");
            let modules = std::fs::read_dir("/sys/module").unwrap().flatten();
            assert!(modules.into_iter().all(|module| module.file_name() != "ip_vs"), "the module is there");
            return;
        }
    };
    let servers: Vec<SocketAddr> = (1..=200u8).map(|n| SocketAddr::from(([10, 0, 0, n], 8080))).collect();
    // Not every kernel has the others.
    for scheduler in Scheduler::ALL.into_iter().take(9) {
        let mut commands = vec![Command::AddService(ID, scheduler)];
        commands.extend(servers.iter().map(|server| Command::AddServer(ID, *server, 1)));
        commands.extend(servers.iter().skip(100).map(|server| Command::SetWeight(ID, *server, 0)));
        assert!(ipvs.run(&commands).unwrap().is_empty());
        assert_eq!(
            ipvs.services().unwrap(),
            [Service { id: Some(ID), address: None, scheduler: scheduler.name().to_owned() }]
        );
        let found = ipvs.servers(ID).unwrap();
        assert_eq!(found.len(), 200);
        assert_eq!(found.iter().filter(|server| server.weight == 0).count(), 100);
        // A multicast address is refused, and the command behind it is done.
        let bad = Command::AddServer(ID, "224.0.0.1:80".parse().unwrap(), 1);
        let refused =
            ipvs.run(&[Command::DeleteServer(ID, servers[0]), bad, Command::DeleteServer(ID, servers[1])]).unwrap();
        assert_eq!(refused.iter().map(|refusal| refusal.command).collect::<Vec<_>>(), [bad]);
        assert_eq!(ipvs.servers(ID).unwrap().len(), 198);
        assert!(ipvs.run(&[Command::DeleteService(ID)]).unwrap().is_empty());
        assert_eq!(ipvs.services().unwrap(), []);
        assert_eq!(ipvs.servers(ID).unwrap(), []);
    }
    ipvs.set_timeouts(Timeouts { tcp: 7200, tcp_fin: 60, udp: 100 }).unwrap();
}
