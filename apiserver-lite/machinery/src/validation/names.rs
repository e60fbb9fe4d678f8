//! The grammars of names, labels, keys and ports, with the messages that say what is allowed.
//!
//! Every function gives the list of complaints, empty when the text is fine. The rules are those of apimachinery's
//! `util/validation` package in Kubernetes 1.36.

/// Longest label, in bytes (RFC 1123, RFC 1035).
pub const LABEL_BYTES_MAX: usize = 63;

/// Longest subdomain, in bytes (RFC 1123).
pub const SUBDOMAIN_BYTES_MAX: usize = 253;

const LABEL_PATTERN: &str = "[a-z0-9]([-a-z0-9]*[a-z0-9])?";
const SUBDOMAIN_PATTERN: &str = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*";
const DNS1035_PATTERN: &str = "[a-z]([-a-z0-9]*[a-z0-9])?";
const QUALIFIED_PATTERN: &str = "([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]";
const QUALIFIED_RULE: &str = "must consist of alphanumeric characters, '-', '_' or '.', \
                              and must start and end with an alphanumeric character";

/// A lowercase RFC 1123 label: names of namespaces, Services, and parts of hostnames.
pub fn dns1123_label(value: &str) -> Vec<String> {
    let mut errors = too_long(value, LABEL_BYTES_MAX);
    if !is_label(value) {
        if is_subdomain(value) {
            errors.push("must not contain dots".to_owned());
        } else {
            let rule = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', \
                        and must start and end with an alphanumeric character";
            errors.push(pattern_error(rule, LABEL_PATTERN, &["my-name", "123-abc"]));
        }
    }
    errors
}

/// A lowercase RFC 1123 subdomain: names of most objects.
pub fn dns1123_subdomain(value: &str) -> Vec<String> {
    let mut errors = too_long(value, SUBDOMAIN_BYTES_MAX);
    if !is_subdomain(value) {
        let rule = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', \
                    and must start and end with an alphanumeric character";
        errors.push(pattern_error(rule, SUBDOMAIN_PATTERN, &["example.com"]));
    }
    errors
}

/// An RFC 1035 label: as [`dns1123_label`], but starting with a letter.
pub fn dns1035_label(value: &str) -> Vec<String> {
    let mut errors = too_long(value, LABEL_BYTES_MAX);
    if !(is_label(value) && value.starts_with(|first: char| first.is_ascii_lowercase())) {
        let rule = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', \
                    start with an alphabetic character, and end with an alphanumeric character";
        errors.push(pattern_error(rule, DNS1035_PATTERN, &["my-name", "abc-123"]));
    }
    errors
}

/// A label key: a name, optionally after a DNS subdomain and a slash.
pub fn qualified_name(value: &str) -> Vec<String> {
    let examples = &["MyName", "my.name", "123-abc"];
    let mut errors = Vec::new();
    let parts: Vec<&str> = value.split('/').collect();
    let name = match parts.as_slice() {
        [name] => name,
        ["", name] => {
            errors.push("prefix part must be non-empty".to_owned());
            name
        }
        [prefix, name] => {
            errors.extend(dns1123_subdomain(prefix).into_iter().map(|error| format!("prefix part {error}")));
            name
        }
        _ => {
            let rule = pattern_error(QUALIFIED_RULE, QUALIFIED_PATTERN, examples);
            let prefix = "with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')";
            return vec![format!("a valid label key {rule} {prefix}")];
        }
    };
    if name.is_empty() {
        errors.push("name part must be non-empty".to_owned());
    } else if name.len() > LABEL_BYTES_MAX {
        errors.push(format!("name part must be no more than {LABEL_BYTES_MAX} bytes"));
    }
    if !is_qualified(name) {
        errors.push(format!("name part {}", pattern_error(QUALIFIED_RULE, QUALIFIED_PATTERN, examples)));
    }
    errors
}

/// A label value; may be empty.
pub fn label_value(value: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if value.len() > LABEL_BYTES_MAX {
        errors.push(format!("must be no more than {LABEL_BYTES_MAX} bytes"));
    }
    if !value.is_empty() && !is_qualified(value) {
        let rule =
            format!("a valid label must be an empty string or {}", QUALIFIED_RULE.replace("must consist", "consist"));
        let pattern = format!("({QUALIFIED_PATTERN})?");
        errors.push(pattern_error(&rule, &pattern, &["MyValue", "my_value", "12345"]));
    }
    errors
}

/// A port name (IANA service name): at most 15 characters, with a letter.
pub fn port_name(value: &str) -> Vec<String> {
    let rules = [
        (value.len() > 15, "must be no more than 15 characters"),
        (
            value.is_empty() || !value.bytes().all(is_label_byte),
            "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)",
        ),
        (!value.bytes().any(|byte| byte.is_ascii_lowercase()), "must contain at least one letter (a-z)"),
        (value.contains("--"), "must not contain consecutive hyphens"),
        (value.starts_with('-') || value.ends_with('-'), "must not begin or end with a hyphen"),
    ];
    rules.into_iter().filter(|(broken, _)| *broken).map(|(_, text)| text.to_owned()).collect()
}

/// A key of a ConfigMap or Secret.
pub fn config_map_key(value: &str) -> Vec<String> {
    let mut errors = too_long(value, SUBDOMAIN_BYTES_MAX);
    if value.is_empty() || !value.bytes().all(is_qualified_byte) {
        let rule = "a valid config key must consist of alphanumeric characters, '-', '_' or '.'";
        errors.push(pattern_error(rule, "[-._a-zA-Z0-9]+", &["key.name", "KEY_NAME", "key-name"]));
    }
    if matches!(value, "." | "..") {
        errors.push(format!("must not be '{value}'"));
    } else if value.starts_with("..") {
        errors.push("must not start with '..'".to_owned());
    }
    errors
}

/// An environment variable name: printable ASCII without `=`.
pub fn env_var_name(value: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if value.is_empty() {
        errors.push("environment variable name must be non-empty".to_owned());
    }
    if !value.bytes().all(|byte| (b' '..=b'~').contains(&byte) && byte != b'=') {
        let rule = "a valid environment variable name must consist only of printable ASCII characters other than '='";
        errors.push(rule.to_owned());
    }
    errors
}

/// What a generated name will look like: the dash at the end of a base is followed by letters.
pub fn completed_base(base: &str) -> String {
    match base.strip_suffix('-') {
        Some(rest) if !rest.is_empty() => format!("{rest}a"),
        _ => base.to_owned(),
    }
}

/// `must be between <low> and <high>, inclusive`.
pub fn range_error(low: i64, high: i64) -> String {
    format!("must be between {low} and {high}, inclusive")
}

fn too_long(value: &str, bytes_max: usize) -> Vec<String> {
    if value.len() > bytes_max { vec![format!("must be no more than {bytes_max} characters")] } else { Vec::new() }
}

fn pattern_error(rule: &str, pattern: &str, examples: &[&str]) -> String {
    let examples: Vec<String> = examples.iter().map(|example| format!("'{example}', ")).collect();
    format!("{rule} (e.g. {}regex used for validation is '{pattern}')", examples.join(" or "))
}

fn is_label_byte(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-'
}

fn is_label(value: &str) -> bool {
    !value.is_empty() && value.bytes().all(is_label_byte) && !value.starts_with('-') && !value.ends_with('-')
}

fn is_subdomain(value: &str) -> bool {
    value.split('.').all(is_label)
}

fn is_qualified_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}

fn is_qualified(value: &str) -> bool {
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = value.as_bytes();
    bytes.iter().all(|byte| is_qualified_byte(*byte)) && edge(bytes.first()) && edge(bytes.last())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(rule: fn(&str) -> Vec<String>, good: &[&str], bad: &[&str]) {
        for text in good {
            assert_eq!(rule(text), Vec::<String>::new(), "{text}");
        }
        for text in bad {
            assert!(!rule(text).is_empty(), "{text}");
        }
    }

    #[test]
    fn grammars() {
        let long = "a".repeat(64);
        let long_subdomain = format!("{0}.{0}.{0}.{0}", "a".repeat(63));
        check(dns1123_label, &["a", "1", "a-b", &"a".repeat(63)], &["", "-a", "a-", "A", "a.b", "a_b", "é", &long]);
        check(dns1123_subdomain, &["a", "a.b", "1.2-3"], &["", ".", "a.", ".a", "a..b", "A.b", &long_subdomain]);
        check(dns1035_label, &["a", "a1-b"], &["", "1a", "a.b", "-a"]);
        check(qualified_name, &["a", "A_b.c", "x.io/A", "1"], &["", "/a", "a/", "a/b/c", "X.io/a", "-a", "a.", &long]);
        check(label_value, &["", "a", "A_1.b"], &["-", "a b", "a/b", ".a", &long]);
        check(port_name, &["http", "p1", "1-a"], &["", "80", "HTTP", "a--b", "-a", "a-", "a234567890123456", "a_b"]);
        check(config_map_key, &["a", "A.b_c-d", ".x"], &["", "a/b", ".", "..", "..a", "a b"]);
        check(env_var_name, &["A", "a.b-c", "1 2"], &["", "A=B", "é", "a\n"]);
    }

    #[test]
    fn messages() {
        assert_eq!(
            dns1035_label("1a"),
            ["a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic \
              character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for \
              validation is '[a-z]([-a-z0-9]*[a-z0-9])?')"]
        );
        assert_eq!(dns1123_label("a.b"), ["must not contain dots"]);
        assert_eq!(range_error(1, 65535), "must be between 1 and 65535, inclusive");
    }

    #[test]
    fn bases_of_generated_names() {
        assert_eq!(completed_base("web-"), "weba");
        assert_eq!(completed_base("-"), "-");
        assert_eq!(completed_base("web"), "web");
    }
}
