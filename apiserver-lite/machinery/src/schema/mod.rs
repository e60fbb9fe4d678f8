//! What is known about groups, versions, resources, kinds and their fields, from the committed tables.
//!
//! `tables/resources.txt` and `tables/types.txt` are parsed once, on first use, into borrowed `'static` parts. Everything of the
//! named Kubernetes release is known; only [`Resource::served`] resources appear in discovery and OpenAPI.

mod parse;
mod served;
mod types;

use std::collections::HashMap;
use std::sync::OnceLock;

pub use parse::TableError;
pub(crate) use types::group_version_path;
pub use types::{Field, FieldType, ListType, Package, PatchStrategy, Resource, Shape, Subresource, Type, TypeId};

/// The committed tables: types, resources.
pub(crate) const TABLES: (&str, &str) =
    (include_str!("../../tables/types.txt"), include_str!("../../tables/resources.txt"));

/// Every known type and resource. Get it with [`registry`].
#[derive(Debug, Default)]
pub struct Registry {
    release: &'static str,
    packages: Vec<Package>,
    types: Vec<Type>,
    resources: Vec<Resource>,
    type_by_name: HashMap<(&'static str, &'static str), TypeId>,
    resource_by_plural: HashMap<(&'static str, &'static str, &'static str), usize>,
    resource_by_kind: HashMap<(&'static str, &'static str, &'static str), usize>,
}

/// The registry of this build.
pub fn registry() -> &'static Registry {
    static REGISTRY: OnceLock<Registry> = OnceLock::new();
    REGISTRY.get_or_init(|| {
        // The tables are part of this crate and a test parses them; broken ones would leave a server that serves nothing.
        parse::registry(TABLES.0, TABLES.1).unwrap_or_default()
    })
}

impl Registry {
    /// The Kubernetes release the tables were made from, for example `v1.36.3`.
    pub fn release(&self) -> &'static str {
        self.release
    }

    /// Every known resource, core group first, then in the order of upstream's discovery.
    pub fn resources(&self) -> impl Iterator<Item = &Resource> {
        self.resources.iter()
    }

    /// The resources that this server serves, in the same order.
    pub fn served(&self) -> impl Iterator<Item = &Resource> {
        self.resources.iter().filter(|resource| resource.served)
    }

    /// A resource, served or not, by group (empty for core), version and plural.
    pub fn resource(&self, group: &str, version: &str, plural: &str) -> Option<&Resource> {
        self.resources.get(*self.resource_by_plural.get(&(group, version, plural))?)
    }

    /// A resource, served or not, by group (empty for core), version and kind.
    pub fn resource_by_kind(&self, group: &str, version: &str, kind: &str) -> Option<&Resource> {
        self.resources.get(*self.resource_by_kind.get(&(group, version, kind))?)
    }

    /// The served (group, version) pairs without repetition, in discovery order.
    pub fn served_group_versions(&self) -> Vec<(&'static str, &'static str)> {
        let mut pairs = Vec::new();
        for resource in self.served() {
            let pair = (resource.group, resource.version);
            if !pairs.contains(&pair) {
                pairs.push(pair);
            }
        }
        pairs
    }

    /// A type; `None` only for an id that did not come from this registry.
    pub fn get(&self, id: TypeId) -> Option<&Type> {
        self.types.get(id.index())
    }

    /// The package (OpenAPI name prefix, group and version) of a type.
    pub fn package(&self, ty: &Type) -> Option<&Package> {
        self.packages.get(ty.package)
    }

    /// Every type with its id.
    pub fn types(&self) -> impl Iterator<Item = (TypeId, &Type)> {
        self.types.iter().enumerate().map(|(index, ty)| (TypeId::new(index), ty))
    }

    /// A type by the short package name and its own name, for example (`meta.v1`, `DeleteOptions`).
    pub fn type_by_name(&self, package: &str, name: &str) -> Option<TypeId> {
        self.type_by_name.get(&(package, name)).copied()
    }

    /// A field of a type; `None` when the type has no such field (or is no struct).
    pub fn field(&self, id: TypeId, name: &str) -> Option<&Field> {
        self.get(id)?.field(name)
    }

    /// The full OpenAPI definition name of a type, for example `io.k8s.api.core.v1.Service`.
    pub fn definition_name(&self, ty: &Type) -> String {
        let package = self.package(ty).map(|package| package.path).unwrap_or_default();
        format!("{package}.{}", ty.name)
    }
}

#[cfg(test)]
mod tests;
