//! Object metadata: small accessors over JSON, time formats and generated names.

mod access;
mod names;
mod time;

pub use access::{
    annotation, annotations, creation_timestamp, deletion_grace_period_seconds, deletion_timestamp, finalizers,
    generate_name_base, generation, is_controller_of, label, labels, metadata, metadata_mut, name, namespace,
    owner_references, remove, resource_version, set, text_at, uid, value_at,
};
pub use names::{GENERATED_NAME_BYTES_MAX, NAME_SUFFIX_ALPHABET, NAME_SUFFIX_LENGTH, generate_name, name_suffix};
pub use time::{format_micro_time, format_time, parse_time};
