//! The reader of the tables; their format is described at the top of each table by the generator.

use super::types::{Field, FieldType, ListType, Package, PatchStrategy, Resource, Shape, Subresource, Type, TypeId};
use super::{Registry, served};

/// A table line that cannot be understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("line {line} of the {table} table: {cause}: {text}")]
pub struct TableError {
    /// Which table.
    pub table: &'static str,
    /// Line number, from 1.
    pub line: usize,
    /// What is wrong.
    pub cause: &'static str,
    /// The line.
    pub text: String,
}

type Parsed<T> = Result<T, &'static str>;

/// Reads both tables.
pub(super) fn registry(types: &'static str, resources: &'static str) -> Result<Registry, TableError> {
    let mut registry = Registry::default();
    let mut ty = None;
    // Names first, so that fields may refer to types that stand further down.
    each_line(types, "types", |line| declare(&mut registry, line))?;
    each_line(types, "types", |line| fill(&mut registry, &mut ty, line))?;
    for ty in &mut registry.types {
        ty.fields.sort_unstable_by_key(|field| field.name);
    }
    let mut group_version = ("", "");
    each_line(resources, "resources", |line| resource_line(&mut registry, &mut group_version, line))?;
    for (index, resource) in registry.resources.iter().enumerate() {
        let Resource { group, version, plural, kind, .. } = resource;
        registry.resource_by_plural.insert((group, version, plural), index);
        registry.resource_by_kind.entry((group, version, kind)).or_insert(index);
    }
    Ok(registry)
}

fn each_line(
    table: &'static str,
    name: &'static str,
    mut read: impl FnMut(&'static str) -> Parsed<()>,
) -> Result<(), TableError> {
    for (index, line) in table.lines().enumerate() {
        read(line).map_err(|cause| TableError { table: name, line: index + 1, cause, text: line.to_owned() })?;
    }
    Ok(())
}

fn declare(registry: &mut Registry, line: &'static str) -> Parsed<()> {
    if let Some(release) = line.strip_prefix("# release ") {
        registry.release = release;
    } else if let Some(rest) = line.strip_prefix('@') {
        registry.packages.push(package(rest)?);
    } else if let Some(rest) = line.strip_prefix(':') {
        let package = registry.packages.len().checked_sub(1).ok_or("a type before any package")?;
        let ty = declared_type(package, rest)?;
        let alias = registry.packages.get(package).map(|package| package.alias).unwrap_or_default();
        let id = TypeId::new(registry.types.len());
        if registry.type_by_name.insert((alias, ty.name), id).is_some() {
            return Err("a type declared twice");
        }
        registry.types.push(ty);
    }
    Ok(())
}

fn package(rest: &'static str) -> Parsed<Package> {
    let mut words = rest.split(' ');
    let alias = words.next().unwrap_or_default();
    let path = words.next().ok_or("a package without a path")?;
    let (group, version) = match words.next() {
        Some(group_version) => group_version.split_once('/').ok_or("a package's group version without a slash")?,
        None => ("", ""),
    };
    Ok(Package { alias, path, group, version })
}

fn declared_type(package: usize, rest: &'static str) -> Parsed<Type> {
    let mut words = rest.split(' ');
    let name = words.next().unwrap_or_default();
    let mut ty = Type { name, package, shape: Shape::Struct, atomic: false, is_kind: false, fields: Vec::new() };
    for word in words {
        match word {
            "kind" => ty.is_kind = true,
            "atomic" => ty.atomic = true,
            "=any" => ty.shape = Shape::Any,
            "=quantity" => ty.shape = Shape::Quantity,
            "=int-or-string" => ty.shape = Shape::IntOrString,
            "=time" => ty.shape = Shape::Time,
            "=micro-time" => ty.shape = Shape::MicroTime,
            _ => return Err("an unknown word after a type"),
        }
    }
    Ok(ty)
}

fn fill(registry: &mut Registry, current: &mut Option<usize>, line: &'static str) -> Parsed<()> {
    if line.is_empty() || line.starts_with(['#', '@']) {
        return Ok(());
    }
    if line.starts_with(':') {
        *current = Some(current.map_or(0, |index| index + 1));
        return Ok(());
    }
    let index = current.ok_or("a field before any type")?;
    let package = registry.types.get(index).map(|ty| ty.package).ok_or("a field before any type")?;
    let alias = registry.packages.get(package).map(|package| package.alias).unwrap_or_default();
    let field = field(registry, alias, line)?;
    registry.types.get_mut(index).ok_or("a field before any type")?.fields.push(field);
    Ok(())
}

fn field(registry: &Registry, alias: &str, line: &'static str) -> Parsed<Field> {
    let mut words = line.split(' ');
    let name = words.next().unwrap_or_default();
    let required = name.ends_with('!');
    let ty = field_type(registry, alias, words.next().ok_or("a field without a type")?)?;
    let mut field = Field {
        name: name.trim_end_matches('!'),
        ty,
        required,
        list_type: ListType::Unset,
        patch_strategy: PatchStrategy::default(),
        patch_merge_key: None,
    };
    words.try_for_each(|word| attribute(&mut field, word))?;
    Ok(field)
}

fn attribute(field: &mut Field, word: &'static str) -> Parsed<()> {
    let (key, value) = word.split_once('=').unwrap_or((word, ""));
    match key {
        "a" => field.list_type = ListType::Atomic,
        "set" => field.list_type = ListType::Set,
        "granular" => field.list_type = ListType::Granular,
        "map" => field.list_type = ListType::Map(value.split(',').collect()),
        "merge" => field.patch_strategy.merge = true,
        "retainKeys" => field.patch_strategy.retain_keys = true,
        "replace" => field.patch_strategy.replace = true,
        "key" => field.patch_merge_key = Some(value),
        _ => return Err("an unknown word after a field"),
    }
    Ok(())
}

fn field_type(registry: &Registry, alias: &str, text: &str) -> Parsed<FieldType> {
    if let Some(element) = text.strip_prefix('*') {
        return Ok(FieldType::List(Box::new(field_type(registry, alias, element)?)));
    }
    if let Some(element) = text.strip_prefix('%') {
        return Ok(FieldType::Map(Box::new(field_type(registry, alias, element)?)));
    }
    Ok(match text {
        "s" => FieldType::String,
        "i" => FieldType::Int32,
        "l" => FieldType::Int64,
        "d" => FieldType::Double,
        "b" => FieldType::Bool,
        "y" => FieldType::Bytes,
        "any" => FieldType::Any,
        reference => {
            let (package, name) = reference.rsplit_once('.').unwrap_or((alias, reference));
            FieldType::Ref(registry.type_by_name(package, name).ok_or("a reference to an unknown type")?)
        }
    })
}

fn resource_line(
    registry: &mut Registry,
    group_version: &mut (&'static str, &'static str),
    line: &'static str,
) -> Parsed<()> {
    if line.is_empty() || line.starts_with('#') {
        return Ok(());
    }
    if let Some(rest) = line.strip_prefix('@') {
        *group_version = rest.split_once('/').ok_or("a group version without a slash")?;
    } else if let Some(rest) = line.strip_prefix('/') {
        let resource = registry.resources.last_mut().ok_or("a subresource before any resource")?;
        let subresource = subresource(resource, rest)?;
        let offered = served::subresources(resource.group, resource.version, resource.plural);
        if offered.is_none_or(|names| names.contains(&subresource.name)) {
            resource.subresources.push(subresource);
        }
    } else {
        let resource = resource(registry, *group_version, line)?;
        registry.resources.push(resource);
    }
    Ok(())
}

fn resource(
    registry: &Registry,
    (group, version): (&'static str, &'static str),
    line: &'static str,
) -> Parsed<Resource> {
    let mut words = line.split(' ');
    let plural = words.next().unwrap_or_default();
    let kind = words.next().ok_or("a resource without a kind")?;
    let singular = words.next().ok_or("a resource without a singular")?;
    let namespaced = words.next().ok_or("a resource without a scope")? == "namespaced";
    let verbs = verbs(words.next().ok_or("a resource without verbs")?)?;
    let mut resource = Resource {
        group,
        version,
        kind,
        plural,
        singular,
        short_names: Vec::new(),
        categories: Vec::new(),
        namespaced,
        verbs,
        subresources: Vec::new(),
        ty: kind_type(registry, group, version, kind),
        served: served::subresources(group, version, plural).is_some(),
    };
    for word in words {
        match word.split_once('=') {
            Some(("short", names)) => resource.short_names = names.split(',').collect(),
            Some(("in", names)) => resource.categories = names.split(',').collect(),
            _ => return Err("an unknown word after a resource"),
        }
    }
    Ok(resource)
}

fn subresource(resource: &Resource, rest: &'static str) -> Parsed<Subresource> {
    let mut words = rest.split(' ');
    let name = words.next().unwrap_or_default();
    let kind = words.next().ok_or("a subresource without a kind")?;
    let verbs = verbs(words.next().ok_or("a subresource without verbs")?)?;
    let mut parts = kind.rsplitn(3, '/');
    let kind = parts.next().unwrap_or_default();
    let version = parts.next().unwrap_or(resource.version);
    let group = parts.next().unwrap_or(resource.group);
    Ok(Subresource { name, group, version, kind, verbs })
}

fn kind_type(registry: &Registry, group: &str, version: &str, kind: &str) -> Option<TypeId> {
    let in_group = |package: &&Package| package.group == group && package.version == version;
    let mut packages = registry.packages.iter().filter(in_group);
    packages.find_map(|package| registry.type_by_name(package.alias, kind))
}

const VERBS: [(char, &str); 8] = [
    ('c', "create"),
    ('d', "delete"),
    ('x', "deletecollection"),
    ('g', "get"),
    ('l', "list"),
    ('p', "patch"),
    ('u', "update"),
    ('w', "watch"),
];

fn verbs(letters: &str) -> Parsed<Vec<&'static str>> {
    let all = letters == "*";
    if !all && letters.chars().any(|letter| VERBS.iter().all(|(known, _)| *known != letter)) {
        return Err("an unknown verb letter");
    }
    Ok(VERBS.iter().filter(|(letter, _)| all || letters.contains(*letter)).map(|(_, verb)| *verb).collect())
}
