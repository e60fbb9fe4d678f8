//! Scalars with a grammar of their own: quantities, times, bytes.

use serde_json::Value;

use crate::field::quote;
use crate::meta;

/// Checks a quantity; numbers are as good as text.
pub(super) fn quantity(value: &Value) -> Result<(), String> {
    let valid = match value {
        Value::Number(_) => true,
        Value::String(text) => is_quantity(text),
        _ => false,
    };
    let grammar = "^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$";
    if valid { Ok(()) } else { Err(format!("quantities must match the regular expression '{grammar}'")) }
}

/// A decimal number with an SI or binary suffix or a decimal exponent (apimachinery `resource.ParseQuantity`).
fn is_quantity(text: &str) -> bool {
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let end =
        unsigned.find(|character: char| !character.is_ascii_digit() && character != '.').unwrap_or(unsigned.len());
    let (number, suffix) = unsigned.split_at(end);
    let has_digits = number.bytes().any(|byte| byte.is_ascii_digit());
    has_digits && number.matches('.').count() <= 1 && is_quantity_suffix(suffix)
}

fn is_quantity_suffix(suffix: &str) -> bool {
    let plain = ["", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    if plain.contains(&suffix) {
        return true;
    }
    let Some(exponent) = suffix.strip_prefix(['e', 'E']) else { return false };
    let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
    !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// Checks a time and brings it into the form the API answers with.
pub(super) fn time(value: &Value, micro: bool) -> Result<Value, String> {
    let Value::String(text) = value else {
        return Err(format!("parsing time {value} failed: want a text in RFC 3339"));
    };
    let layout = if micro { "2006-01-02T15:04:05.000000Z07:00" } else { "2006-01-02T15:04:05Z07:00" };
    let time = meta::parse_time(text)
        .ok_or_else(|| format!("parsing time {} as {}: cannot parse", quote(text), quote(layout)))?;
    Ok(if micro { meta::format_micro_time(time) } else { meta::format_time(time) }.into())
}

/// Checks standard base64 with padding; line breaks are allowed, as in Go.
pub(super) fn bytes(text: &str) -> Result<(), String> {
    use base64::Engine as _;
    let compact: String = text.chars().filter(|character| !matches!(character, '\r' | '\n')).collect();
    match base64::engine::general_purpose::STANDARD.decode(compact.as_bytes()) {
        Ok(_) => Ok(()),
        Err(base64::DecodeError::InvalidByte(at, _) | base64::DecodeError::InvalidLastSymbol(at, _)) => {
            Err(format!("illegal base64 data at input byte {at}"))
        }
        Err(_) => Err(format!("illegal base64 data at input byte {}", compact.len() / 4 * 4)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn quantities() {
        for good in ["0", "1", "-1", "+1.5", ".5", "1.", "100m", "1Gi", "2Ei", "1e3", "1E-3", "12E"] {
            assert!(is_quantity(good), "{good}");
        }
        for bad in ["", "m", "1gi", "1.2.3", "--1", "1 Gi", "1e", "1e+", "Gi1", ".", "0x1", "1KI"] {
            assert!(!is_quantity(bad), "{bad}");
        }
        assert!(quantity(&json!(1.5)).is_ok());
        assert!(quantity(&json!(true)).is_err());
    }

    #[test]
    fn times_are_normalised() {
        assert_eq!(time(&json!("2026-01-02T05:04:05.5+02:00"), false), Ok(json!("2026-01-02T03:04:05Z")));
        assert_eq!(time(&json!("2026-01-02T03:04:05Z"), true), Ok(json!("2026-01-02T03:04:05.000000Z")));
        assert!(time(&json!("yesterday"), false).unwrap_err().starts_with("parsing time \"yesterday\" as \"2006"));
        assert!(time(&json!(5), false).is_err());
    }

    #[test]
    fn base64_with_line_breaks() {
        assert_eq!(bytes("aGVs\nbG8="), Ok(()));
        assert_eq!(bytes("aGV$"), Err("illegal base64 data at input byte 3".to_owned()));
        assert!(bytes("aGVsbG8").is_err());
    }
}
