//! What a Service takes and gives back around a write.

use std::net::IpAddr;

use apiserver_machinery::field::FieldError;
use apiserver_machinery::meta;
use apiserver_machinery::schema::{Resource, registry};
use apiserver_machinery::status::Status;
use apiserver_store::StoreError;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::fields::{self, HEADLESS};
use super::pool::{Family, PoolError};
use super::{ServiceAllocator, families};
use crate::engine::{Engine, Part, encode, resource_prefix};

/// What was taken for a write, and what the old Service had that goes when the write succeeds.
#[derive(Debug, Default)]
pub(crate) struct Reservation {
    taken_ips: Vec<IpAddr>,
    taken_ports: Vec<u16>,
    freed_ips: Vec<IpAddr>,
    freed_ports: Vec<u16>,
}

impl Engine {
    /// Fills in and takes the addresses and ports of a new Service; other kinds take nothing.
    ///
    /// # Errors
    /// 422 for what is taken or impossible, 500 when a range is full. Nothing stays taken then.
    pub(crate) async fn reserve_for_create(
        &self,
        resource: &Resource,
        object: &mut Value,
        dry_run: bool,
    ) -> Result<Reservation, Status> {
        if !is_service(resource) {
            return Ok(Reservation::default());
        }
        fields::normalize_create(object);
        let mut reservation = Reservation::default();
        let outcome = create(&self.services, object, &mut reservation);
        self.finish(resource, object, reservation, outcome, dry_run).await
    }

    /// The same for an update of a Service that is stored as `old`.
    ///
    /// # Errors
    /// As [`Engine::reserve_for_create`].
    pub(crate) async fn reserve_for_update(
        &self,
        resource: &Resource,
        part: Part,
        new: &mut Value,
        old: &Value,
        dry_run: bool,
    ) -> Result<Reservation, Status> {
        if !is_service(resource) || part != Part::Main {
            return Ok(Reservation::default());
        }
        fields::keep_allocated(new, old);
        fields::normalize_update(new, old);
        fields::drop_unused(new, old);
        let mut reservation = Reservation::default();
        let outcome = update(&self.services, new, old, &mut reservation);
        self.finish(resource, new, reservation, outcome, dry_run).await
    }

    async fn finish(
        &self,
        resource: &Resource,
        service: &Value,
        reservation: Reservation,
        outcome: Result<(), Vec<FieldError>>,
        dry_run: bool,
    ) -> Result<Reservation, Status> {
        let refuse = |errors: &[FieldError]| Status::invalid_object(resource, meta::name(service), errors);
        if let Err(errors) = outcome {
            self.services.release(&reservation.taken_ips, &reservation.taken_ports);
            return Err(full_range(&errors).unwrap_or_else(|| refuse(&errors)));
        }
        if dry_run {
            self.services.release(&reservation.taken_ips, &reservation.taken_ports);
            return Ok(Reservation::default());
        }
        if let Err(error) = self.create_ip_addresses(service, &reservation.taken_ips).await {
            self.services.release(&reservation.taken_ips, &reservation.taken_ports);
            return Err(refuse(&[error]));
        }
        Ok(reservation)
    }

    /// Ends a reservation: after a successful write the old values are free, after a failed one the new ones are.
    pub(crate) async fn settle(&self, reservation: Reservation, written: bool) {
        let (ips, ports) = if written {
            (reservation.freed_ips, reservation.freed_ports)
        } else {
            (reservation.taken_ips, reservation.taken_ports)
        };
        self.give_back(&ips, &ports).await;
    }

    /// Frees all that a deleted Service had.
    pub(crate) async fn release_deleted(&self, resource: &Resource, service: &Value) {
        if is_service(resource) {
            self.give_back(&cluster_ips(service), &all_ports(service)).await;
        }
    }

    async fn give_back(&self, ips: &[IpAddr], ports: &[u16]) {
        if ips.is_empty() && ports.is_empty() {
            return;
        }
        // The objects go first: a free number whose object still exists would be refused to the next Service.
        self.delete_ip_addresses(ips).await;
        self.services.release(ips, ports);
    }

    async fn create_ip_addresses(&self, service: &Value, ips: &[IpAddr]) -> Result<(), FieldError> {
        for (index, ip) in ips.iter().enumerate() {
            let outcome = match encode(&ip_address(*ip, service)) {
                Ok(bytes) => self.store.create(&ip_address_key(*ip), bytes).await.map_err(|error| match error {
                    StoreError::Conflict { .. } => PoolError::IpTaken.to_string(),
                    other => other.to_string(),
                }),
                Err(status) => Err(status.message),
            };
            if let Err(cause) = outcome {
                self.delete_ip_addresses(ips.get(..index).unwrap_or_default()).await;
                return Err(refused_ip(service, &ip.to_string(), &cause));
            }
        }
        Ok(())
    }

    async fn delete_ip_addresses(&self, ips: &[IpAddr]) {
        for ip in ips {
            let key = ip_address_key(*ip);
            if let Ok(read) = self.store.get(&key, None).await
                && let Some(entry) = read.entry
                && let Err(error) = self.store.delete(&key, entry.mod_revision).await
            {
                tracing::warn!(%ip, %error, "an IPAddress object stays behind");
            }
        }
    }
}

fn is_service(resource: &Resource) -> bool {
    resource.group.is_empty() && resource.plural == "services"
}

fn create(pools: &ServiceAllocator, service: &mut Value, reservation: &mut Reservation) -> Result<(), Vec<FieldError>> {
    families::init(service, None, &pools.families)?;
    take_cluster_ips(pools, service, reservation)?;
    if fields::has_node_ports(service) {
        take_node_ports(pools, service, &[], reservation)?;
    }
    if fields::needs_health_check_port(service) {
        take_health_check_port(pools, service, reservation)?;
    }
    Ok(())
}

fn update(
    pools: &ServiceAllocator,
    new: &mut Value,
    old: &Value,
    reservation: &mut Reservation,
) -> Result<(), Vec<FieldError>> {
    let keep_families = families::is_unchanged_preference(new, old);
    families::init(new, Some(old), &pools.families)?;
    if !keep_families {
        update_cluster_ips(pools, new, old, reservation)?;
    }
    let before = fields::node_ports(old);
    if fields::has_node_ports(new) {
        take_node_ports(pools, new, &before, reservation)?;
    }
    let after = fields::node_ports(new);
    reservation.freed_ports.extend(before.into_iter().filter(|port| !after.contains(port)));
    match (fields::needs_health_check_port(old), fields::needs_health_check_port(new)) {
        (false, true) => take_health_check_port(pools, new, reservation)?,
        (true, false) => reservation.freed_ports.extend(fields::port(old, "healthCheckNodePort")),
        _ => {}
    }
    Ok(())
}

fn update_cluster_ips(
    pools: &ServiceAllocator,
    new: &mut Value,
    old: &Value,
    reservation: &mut Reservation,
) -> Result<(), Vec<FieldError>> {
    let had = cluster_ips(old);
    if fields::is_external_name(new) {
        reservation.freed_ips = had;
        return Ok(());
    }
    if is_headless(old) || is_headless(new) {
        return Ok(());
    }
    take_cluster_ips_beyond(pools, new, &had, reservation)?;
    let has = cluster_ips(new);
    reservation.freed_ips = had.into_iter().filter(|ip| !has.contains(ip)).collect();
    Ok(())
}

fn take_cluster_ips(
    pools: &ServiceAllocator,
    service: &mut Value,
    reservation: &mut Reservation,
) -> Result<(), Vec<FieldError>> {
    if fields::is_external_name(service) || is_headless(service) {
        return Ok(());
    }
    take_cluster_ips_beyond(pools, service, &[], reservation)
}

/// Takes one address per family, but those that the Service has already.
fn take_cluster_ips_beyond(
    pools: &ServiceAllocator,
    service: &mut Value,
    had: &[IpAddr],
    reservation: &mut Reservation,
) -> Result<(), Vec<FieldError>> {
    let wanted = fields::texts(service, "clusterIPs");
    let mut ips: Vec<String> = Vec::new();
    for (index, family) in families::families(service).into_iter().enumerate() {
        let requested = wanted.get(index).map(String::as_str).unwrap_or_default();
        let ip = take_ip(pools, family, requested, had, reservation).map_err(|error| {
            let text = match error {
                PoolError::Full => return vec![range_is_full(service)],
                other => other.to_string(),
            };
            vec![refused_ip(service, requested, &text)]
        })?;
        ips.push(ip);
    }
    if let Some(first) = ips.first() {
        fields::set(service, "clusterIP", first.as_str());
    }
    fields::set(service, "clusterIPs", json!(ips));
    Ok(())
}

fn take_ip(
    pools: &ServiceAllocator,
    family: Family,
    requested: &str,
    had: &[IpAddr],
    reservation: &mut Reservation,
) -> Result<String, PoolError> {
    if requested.is_empty() {
        let ip = pools.take_next_ip(family)?;
        reservation.taken_ips.push(ip);
        return Ok(ip.to_string());
    }
    let ip: IpAddr = requested.parse().map_err(|_| PoolError::OtherNetwork)?;
    if !had.contains(&ip) {
        pools.take_ip(ip)?;
        reservation.taken_ips.push(ip);
    }
    Ok(requested.to_owned())
}

/// Takes a node port for every port of the Service, but those in `had`. Ports with the same number (TCP and UDP 53) share one.
fn take_node_ports(
    pools: &ServiceAllocator,
    service: &mut Value,
    had: &[u16],
    reservation: &mut Reservation,
) -> Result<(), Vec<FieldError>> {
    let name_new_ones = fields::wants_node_ports(service);
    let requested = fields::ports(service).to_vec();
    let mut shared: Vec<(u64, u16)> = Vec::new();
    for (index, port) in fields::ports_mut(service).iter_mut().enumerate() {
        let number = port.get("port").and_then(Value::as_u64).unwrap_or_default();
        let own = fields::port_of(port, "nodePort");
        let same_number = shared.iter().find(|(other, _)| *other == number).map(|(_, node_port)| *node_port);
        let asked = own.or(same_number).or_else(|| later_request(&requested, number));
        let node_port = match asked {
            Some(node_port) if had.contains(&node_port) || reservation.taken_ports.contains(&node_port) => node_port,
            Some(node_port) => {
                let path = format!("spec.ports[{index}].nodePort");
                pools
                    .take_port(node_port)
                    .map_err(|error| vec![FieldError::invalid(path, node_port, error.to_string())])?;
                reservation.taken_ports.push(node_port);
                node_port
            }
            None if name_new_ones => take_next_port(pools, reservation)?,
            None => continue,
        };
        shared.push((number, node_port));
        if let Some(fields) = port.as_object_mut() {
            fields.insert("nodePort".to_owned(), json!(node_port));
        }
    }
    Ok(())
}

/// The node port that any port with this number asks for.
fn later_request(ports: &[Value], number: u64) -> Option<u16> {
    ports
        .iter()
        .filter(|port| port.get("port").and_then(Value::as_u64) == Some(number))
        .find_map(|port| fields::port_of(port, "nodePort"))
}

fn take_health_check_port(
    pools: &ServiceAllocator,
    service: &mut Value,
    reservation: &mut Reservation,
) -> Result<(), Vec<FieldError>> {
    let path = "spec.healthCheckNodePort";
    match fields::port(service, "healthCheckNodePort") {
        Some(port) => {
            pools.take_port(port).map_err(|error| vec![FieldError::invalid(path, port, error.to_string())])?;
            reservation.taken_ports.push(port);
        }
        None => {
            let port = take_next_port(pools, reservation)?;
            fields::set(service, "healthCheckNodePort", port);
        }
    }
    Ok(())
}

fn take_next_port(pools: &ServiceAllocator, reservation: &mut Reservation) -> Result<u16, Vec<FieldError>> {
    let full = |error: PoolError| vec![internal(format!("failed to allocate a nodePort: {error}"))];
    let port = pools.take_next_port().map_err(full)?;
    reservation.taken_ports.push(port);
    Ok(port)
}

fn is_headless(service: &Value) -> bool {
    fields::text(service, "clusterIP") == HEADLESS
}

fn cluster_ips(service: &Value) -> Vec<IpAddr> {
    fields::texts(service, "clusterIPs").iter().filter_map(|ip| ip.parse().ok()).collect()
}

fn all_ports(service: &Value) -> Vec<u16> {
    let mut ports = fields::node_ports(service);
    ports.extend(fields::port(service, "healthCheckNodePort"));
    ports
}

fn refused_ip(service: &Value, requested: &str, cause: &str) -> FieldError {
    let value = json!(fields::texts(service, "clusterIPs"));
    let detail = if requested.is_empty() {
        format!("failed to allocate IP: {cause}")
    } else {
        format!("failed to allocate IP {requested}: {cause}")
    };
    FieldError::invalid("spec.clusterIPs", value, detail)
}

fn range_is_full(service: &Value) -> FieldError {
    let name = meta::name(service);
    internal(format!(
        "failed to allocate a serviceIP for Service {}: range is full",
        apiserver_machinery::field::quote(name)
    ))
}

fn internal(text: String) -> FieldError {
    FieldError::new(apiserver_machinery::field::ErrorKind::Internal, "", "", text)
}

/// A full range is the server's trouble and not the object's: 500 instead of 422.
fn full_range(errors: &[FieldError]) -> Option<Status> {
    let internal = errors.iter().find(|error| error.kind == apiserver_machinery::field::ErrorKind::Internal)?;
    Some(Status::internal(&internal.detail))
}

fn ip_address_key(ip: IpAddr) -> String {
    let prefix = registry().resource("networking.k8s.io", "v1", "ipaddresses").map(resource_prefix);
    format!("{}{ip}", prefix.unwrap_or_else(|| "/registry/ipaddresses/".to_owned()))
}

fn ip_address(ip: IpAddr, service: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "IPAddress",
        "metadata": {
            "name": ip.to_string(), "uid": uuid::Uuid::new_v4().to_string(),
            "creationTimestamp": meta::format_time(Timestamp::now()),
            "labels": {
                "ipaddress.kubernetes.io/ip-family": Family::of(ip).as_str(),
                "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io",
            },
        },
        "spec": {"parentRef": {
            "group": "", "resource": "services", "namespace": meta::namespace(service), "name": meta::name(service),
        }},
    })
}
