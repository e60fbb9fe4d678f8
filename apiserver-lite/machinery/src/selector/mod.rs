//! Label selectors and field selectors.

mod field;
mod fields;
mod label;
mod lexer;

pub use field::FieldSelector;
pub use label::LabelSelector;
