//! Messages of the generic netlink family `IPVS`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{Command, Family, Scheduler, Server, Service, ServiceAddress, ServiceId, Timeouts};
use crate::netlink::{attribute, attribute_string, find, nested};

/// `IPVS_GENL_VERSION`.
const VERSION: u8 = 1;
/// Commands: `IPVS_CMD_*`.
const NEW_SERVICE: u8 = 1;
const SET_SERVICE: u8 = 2;
const DELETE_SERVICE: u8 = 3;
pub(super) const GET_SERVICE: u8 = 4;
const NEW_SERVER: u8 = 5;
const SET_SERVER: u8 = 6;
const DELETE_SERVER: u8 = 7;
pub(super) const GET_SERVER: u8 = 8;
pub(super) const SET_CONFIG: u8 = 12;
/// Attributes of a command: `IPVS_CMD_ATTR_*`.
const SERVICE: u16 = 1;
const SERVER: u16 = 2;
/// Attributes of a service: `IPVS_SVC_ATTR_*`.
const SERVICE_FAMILY: u16 = 1;
const SERVICE_PROTOCOL: u16 = 2;
const SERVICE_ADDRESS: u16 = 3;
const SERVICE_PORT: u16 = 4;
const SERVICE_MARK: u16 = 5;
const SERVICE_SCHEDULER: u16 = 6;
const SERVICE_FLAGS: u16 = 7;
const SERVICE_TIMEOUT: u16 = 8;
const SERVICE_MASK: u16 = 9;
/// Attributes of a server: `IPVS_DEST_ATTR_*`.
const SERVER_ADDRESS: u16 = 1;
const SERVER_PORT: u16 = 2;
const SERVER_FORWARDING: u16 = 3;
const SERVER_WEIGHT: u16 = 4;
const SERVER_UPPER_THRESHOLD: u16 = 5;
const SERVER_LOWER_THRESHOLD: u16 = 6;
const SERVER_ACTIVE: u16 = 7;
const SERVER_INACTIVE: u16 = 8;
const SERVER_FAMILY: u16 = 11;

/// `struct genlmsghdr`.
pub(super) fn header(buffer: &mut Vec<u8>, command: u8) {
    buffer.extend_from_slice(&[command, VERSION, 0, 0]);
}

/// What a command says after the netlink header.
pub(super) fn write_command(buffer: &mut Vec<u8>, command: &Command) {
    match *command {
        Command::AddService(id, scheduler) => write_service(buffer, NEW_SERVICE, id, Some(scheduler)),
        Command::SetScheduler(id, scheduler) => write_service(buffer, SET_SERVICE, id, Some(scheduler)),
        Command::DeleteService(id) => write_service(buffer, DELETE_SERVICE, id, None),
        Command::DeleteServiceAt(address) => write_deletion_at(buffer, address),
        Command::AddServer(id, address, weight) => write_server(buffer, NEW_SERVER, id, address, Some(weight)),
        Command::SetWeight(id, address, weight) => write_server(buffer, SET_SERVER, id, address, Some(weight)),
        Command::DeleteServer(id, address) => write_server(buffer, DELETE_SERVER, id, address, None),
    }
}

fn write_service(buffer: &mut Vec<u8>, command: u8, id: ServiceId, scheduler: Option<Scheduler>) {
    header(buffer, command);
    nested(buffer, SERVICE, |buffer| {
        write_id(buffer, id);
        let Some(scheduler) = scheduler else { return };
        attribute_string(buffer, SERVICE_SCHEDULER, scheduler.name());
        // `struct ip_vs_flags`: the flags, and which of them are meant.
        let flags = [scheduler.flags().to_ne_bytes(), u32::MAX.to_ne_bytes()].concat();
        attribute(buffer, SERVICE_FLAGS, &flags);
        attribute_u32(buffer, SERVICE_TIMEOUT, 0);
        attribute_u32(buffer, SERVICE_MASK, id.family.full_mask());
    });
}

fn write_deletion_at(buffer: &mut Vec<u8>, ServiceAddress { protocol, address }: ServiceAddress) {
    header(buffer, DELETE_SERVICE);
    let family = if address.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 };
    nested(buffer, SERVICE, |buffer| {
        attribute_u16(buffer, SERVICE_FAMILY, family as u16);
        attribute_u16(buffer, SERVICE_PROTOCOL, u16::from(protocol));
        attribute(buffer, SERVICE_ADDRESS, &address_bytes(address.ip()));
        attribute(buffer, SERVICE_PORT, &address.port().to_be_bytes());
    });
}

fn write_server(buffer: &mut Vec<u8>, command: u8, id: ServiceId, address: SocketAddr, weight: Option<u32>) {
    header(buffer, command);
    nested(buffer, SERVICE, |buffer| write_id(buffer, id));
    nested(buffer, SERVER, |buffer| {
        attribute_u16(buffer, SERVER_FAMILY, id.family as u16);
        attribute(buffer, SERVER_ADDRESS, &address_bytes(address.ip()));
        attribute(buffer, SERVER_PORT, &address.port().to_be_bytes());
        let Some(weight) = weight else { return };
        // IP_VS_CONN_F_MASQ: by NAT.
        for (kind, value) in
            [(SERVER_FORWARDING, 0), (SERVER_WEIGHT, weight), (SERVER_UPPER_THRESHOLD, 0), (SERVER_LOWER_THRESHOLD, 0)]
        {
            attribute_u32(buffer, kind, value);
        }
    });
}

/// Asks for the servers of a service.
pub(super) fn write_servers_of(buffer: &mut Vec<u8>, id: ServiceId) {
    header(buffer, GET_SERVER);
    nested(buffer, SERVICE, |buffer| write_id(buffer, id));
}

pub(super) fn write_timeouts(buffer: &mut Vec<u8>, timeouts: Timeouts) {
    header(buffer, SET_CONFIG);
    for (kind, value) in [(4, timeouts.tcp), (5, timeouts.tcp_fin), (6, timeouts.udp)] {
        attribute_u32(buffer, kind, value);
    }
}

fn write_id(buffer: &mut Vec<u8>, id: ServiceId) {
    attribute_u16(buffer, SERVICE_FAMILY, id.family as u16);
    attribute_u32(buffer, SERVICE_MARK, id.mark);
}

/// `union nf_inet_addr`: an IPv4 address lies in its first four bytes.
fn address_bytes(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        IpAddr::V6(address) => address.octets(),
    }
}

/// Reads a message about a service, generic header included.
pub(super) fn read_service(body: &[u8]) -> Option<Service> {
    let service = find(body.get(4..)?, SERVICE)?;
    let family = find(service, SERVICE_FAMILY).and_then(read_u16).and_then(family_of)?;
    let mark = find(service, SERVICE_MARK).and_then(read_u32);
    let scheduler = find(service, SERVICE_SCHEDULER).map(read_string).unwrap_or_default();
    let address = read_service_address(service, family);
    Some(Service { id: mark.map(|mark| ServiceId { family, mark }), address, scheduler })
}

fn read_service_address(service: &[u8], family: Family) -> Option<ServiceAddress> {
    let protocol = u8::try_from(find(service, SERVICE_PROTOCOL).and_then(read_u16)?).ok()?;
    let address = read_address(find(service, SERVICE_ADDRESS)?, find(service, SERVICE_PORT)?, family)?;
    Some(ServiceAddress { protocol, address })
}

/// `union nf_inet_addr` with a port in network byte order.
fn read_address(address: &[u8], port: &[u8], family: Family) -> Option<SocketAddr> {
    let bytes: [u8; 16] = *address.first_chunk()?;
    let ip = match family {
        Family::Ipv4 => {
            let [a, b, c, d, ..] = bytes;
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        }
        Family::Ipv6 => IpAddr::V6(Ipv6Addr::from(bytes)),
    };
    Some(SocketAddr::new(ip, u16::from_be_bytes(*port.first_chunk()?)))
}

/// Reads a message about a server of a service of `family`.
pub(super) fn read_server(body: &[u8], family: Family) -> Option<Server> {
    let server = find(body.get(4..)?, SERVER)?;
    let number = |kind| find(server, kind).and_then(read_u32).unwrap_or_default();
    let address = read_address(find(server, SERVER_ADDRESS)?, find(server, SERVER_PORT)?, family)?;
    let connections = number(SERVER_ACTIVE).saturating_add(number(SERVER_INACTIVE));
    Some(Server { address, weight: number(SERVER_WEIGHT), connections })
}

fn family_of(number: u16) -> Option<Family> {
    [Family::Ipv4, Family::Ipv6].into_iter().find(|family| *family as u16 == number)
}

fn attribute_u16(buffer: &mut Vec<u8>, kind: u16, value: u16) {
    attribute(buffer, kind, &value.to_ne_bytes());
}

fn attribute_u32(buffer: &mut Vec<u8>, kind: u16, value: u32) {
    attribute(buffer, kind, &value.to_ne_bytes());
}

pub(super) fn read_u16(value: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(*value.first_chunk()?))
}

fn read_u32(value: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(*value.first_chunk()?))
}

fn read_string(value: &[u8]) -> String {
    String::from_utf8_lossy(value).trim_end_matches('\0').to_owned()
}
