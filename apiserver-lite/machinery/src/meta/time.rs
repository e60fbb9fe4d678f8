//! The two time formats of the API: seconds (`Time`) and microseconds (`MicroTime`), always UTC.

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// `2026-01-02T03:04:05Z`, the form of `metav1.Time`; fractions are cut off.
pub fn format_time(time: Timestamp) -> String {
    time.to_zoned(TimeZone::UTC).strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `2026-01-02T03:04:05.000006Z`, the form of `metav1.MicroTime`.
pub fn format_micro_time(time: Timestamp) -> String {
    time.to_zoned(TimeZone::UTC).strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

/// Parses RFC 3339 with any fraction and offset; `None` when it is not one.
pub fn parse_time(text: &str) -> Option<Timestamp> {
    // jiff also accepts a blank instead of the `T`; Kubernetes does not.
    if text.as_bytes().get(10) != Some(&b'T') {
        return None;
    }
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_and_parses() {
        let time: Timestamp = "2026-01-02T03:04:05.000006789Z".parse().unwrap();
        assert_eq!(format_time(time), "2026-01-02T03:04:05Z");
        assert_eq!(format_micro_time(time), "2026-01-02T03:04:05.000006Z");
        assert_eq!(parse_time(&format_time(time)).map(format_time).as_deref(), Some("2026-01-02T03:04:05Z"));
        assert_eq!(parse_time("2026-01-02T05:04:05+02:00").map(format_time).as_deref(), Some("2026-01-02T03:04:05Z"));
        for wrong in ["", "x", "2026-01-02", "2026-01-02 03:04:05Z", "2026-13-02T03:04:05Z"] {
            assert_eq!(parse_time(wrong), None, "{wrong}");
        }
    }
}
