//! The vocabulary of the schema: resources, types, fields and how their lists merge.

/// A type's place in the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TypeId(u32);

impl TypeId {
    pub(super) fn new(index: usize) -> Self {
        // Tables hold about a thousand types; an id that does not fit finds nothing.
        Self(u32::try_from(index).unwrap_or(u32::MAX))
    }

    pub(super) fn index(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

/// A Go package of types: one per group and version, and the shared ones.
#[derive(Clone, Debug)]
pub struct Package {
    /// Short name used in the tables, for example `core.v1` or `meta.v1`.
    pub alias: &'static str,
    /// OpenAPI prefix, for example `io.k8s.api.core.v1`.
    pub path: &'static str,
    /// API group of the kinds in it; empty for core and for packages without kinds.
    pub group: &'static str,
    /// API version of the kinds in it; empty for packages without kinds.
    pub version: &'static str,
}

/// One resource of one group and version, as discovery describes it.
#[derive(Clone, Debug)]
pub struct Resource {
    /// API group, empty for core.
    pub group: &'static str,
    /// API version.
    pub version: &'static str,
    /// Kind of its objects.
    pub kind: &'static str,
    /// Name in paths.
    pub plural: &'static str,
    /// Name for people.
    pub singular: &'static str,
    /// Short names such as `svc`.
    pub short_names: Vec<&'static str>,
    /// Categories such as `all`.
    pub categories: Vec<&'static str>,
    /// Whether objects live in a namespace.
    pub namespaced: bool,
    /// Verbs, sorted.
    pub verbs: Vec<&'static str>,
    /// Subresources; for served resources only those that this server has.
    pub subresources: Vec<Subresource>,
    /// Type of its objects; `None` for the few kinds without a definition (`NodeProxyOptions` and the like).
    pub ty: Option<TypeId>,
    /// Whether this server serves it.
    pub served: bool,
}

impl Resource {
    /// `v1` for core, else `group/version`: what stands in an object's `apiVersion`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.to_owned() } else { format!("{}/{}", self.group, self.version) }
    }

    /// `api/v1` or `apis/<group>/<version>`: the path of its group version, without slashes at the ends.
    pub fn group_version_path(&self) -> String {
        group_version_path(self.group, self.version)
    }

    /// Kind of its list, for example `ServiceList`.
    pub fn list_kind(&self) -> String {
        format!("{}List", self.kind)
    }

    /// Whether the verb is offered.
    pub fn has_verb(&self, verb: &str) -> bool {
        self.verbs.contains(&verb)
    }

    /// One of its subresources.
    pub fn subresource(&self, name: &str) -> Option<&Subresource> {
        self.subresources.iter().find(|subresource| subresource.name == name)
    }
}

/// `api/v1` for core, else `apis/<group>/<version>`.
pub(crate) fn group_version_path(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

/// A subresource such as `status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subresource {
    /// Last path segment.
    pub name: &'static str,
    /// Group of the kind it speaks.
    pub group: &'static str,
    /// Version of the kind it speaks.
    pub version: &'static str,
    /// Kind it speaks.
    pub kind: &'static str,
    /// Verbs, sorted.
    pub verbs: Vec<&'static str>,
}

/// What a type looks like in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// An object with known fields.
    Struct,
    /// Any JSON value: raw extensions, managed fields, JSON schema parts.
    Any,
    /// A quantity: text or number such as `500m`.
    Quantity,
    /// A 32-bit integer or a text.
    IntOrString,
    /// RFC 3339 in seconds, or null.
    Time,
    /// RFC 3339 in microseconds, or null.
    MicroTime,
}

/// A named type.
#[derive(Clone, Debug)]
pub struct Type {
    /// Name without its package.
    pub name: &'static str,
    pub(super) package: usize,
    /// What it looks like.
    pub shape: Shape,
    /// Whether it is replaced as a whole by server-side apply (`x-kubernetes-map-type: atomic`).
    pub atomic: bool,
    /// Whether it is a kind of its package's group and version.
    pub is_kind: bool,
    /// Fields sorted by name; empty unless it is a struct.
    pub fields: Vec<Field>,
}

impl Type {
    /// A field by its JSON name.
    pub fn field(&self, name: &str) -> Option<&Field> {
        let index = self.fields.binary_search_by(|field| field.name.cmp(name)).ok()?;
        self.fields.get(index)
    }
}

/// The type of a field or of an element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FieldType {
    /// Text.
    String,
    /// 32-bit signed integer.
    Int32,
    /// 64-bit signed integer.
    Int64,
    /// Floating point number.
    Double,
    /// Boolean.
    Bool,
    /// Bytes, in JSON as standard base64 text.
    Bytes,
    /// Any JSON value.
    Any,
    /// A named type.
    Ref(TypeId),
    /// A list.
    List(Box<FieldType>),
    /// A map from text.
    Map(Box<FieldType>),
}

impl FieldType {
    /// The element type of a list or a map.
    pub fn element(&self) -> Option<&FieldType> {
        match self {
            Self::List(element) | Self::Map(element) => Some(element),
            _ => None,
        }
    }

    /// The named type it is, or its elements are.
    pub fn named(&self) -> Option<TypeId> {
        match self {
            Self::Ref(id) => Some(*id),
            Self::List(element) | Self::Map(element) => element.named(),
            _ => None,
        }
    }
}

/// How server-side apply sees a list or map (`x-kubernetes-list-type`, `x-kubernetes-map-type`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ListType {
    /// Not said.
    #[default]
    Unset,
    /// Replaced as a whole.
    Atomic,
    /// Elements are unique scalars.
    Set,
    /// Elements are objects identified by these fields.
    Map(Vec<&'static str>),
    /// A map whose entries merge one by one.
    Granular,
}

/// How a strategic merge patch treats a field (`x-kubernetes-patch-strategy`). Both flags may be set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PatchStrategy {
    /// Lists merge element by element instead of being replaced.
    pub merge: bool,
    /// Fields not named in `$retainKeys` go away.
    pub retain_keys: bool,
    /// Said explicitly: replaced as a whole, even for an object.
    pub replace: bool,
}

/// A field of a struct.
#[derive(Clone, Debug)]
pub struct Field {
    /// JSON name.
    pub name: &'static str,
    /// Its type.
    pub ty: FieldType,
    /// Whether the schema requires it.
    pub required: bool,
    /// For server-side apply.
    pub list_type: ListType,
    /// For strategic merge patch.
    pub patch_strategy: PatchStrategy,
    /// For strategic merge patch: the field that identifies a list element.
    pub patch_merge_key: Option<&'static str>,
}
