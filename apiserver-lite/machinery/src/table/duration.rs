//! Ages as people read them: `59s`, `2m5s`, `3h`, `2d4h`, `1y200d`.

use jiff::Timestamp;
use serde_json::Value;

use crate::meta::{self, parse_time};

const MINUTE: i64 = 60;
const HOUR: i64 = 60 * MINUTE;
const DAY_HOURS: i64 = 24;
const YEAR_DAYS: i64 = 365;

/// A duration, at most two units of it; up to 1 s in the future counts as now (clocks differ), more is `<invalid>`.
pub fn human_duration(seconds: i64) -> String {
    let (minutes, hours) = (seconds / MINUTE, seconds / HOUR);
    let days = hours / DAY_HOURS;
    match seconds {
        ..-1 => "<invalid>".to_owned(),
        -1 => "0s".to_owned(),
        _ if seconds < 2 * MINUTE => format!("{seconds}s"),
        _ if minutes < 10 => two(minutes, "m", seconds % MINUTE, "s"),
        _ if minutes < 180 => format!("{minutes}m"),
        _ if hours < 8 => two(hours, "h", minutes % 60, "m"),
        _ if hours < 48 => format!("{hours}h"),
        _ if days < 8 => two(days, "d", hours % DAY_HOURS, "h"),
        _ if days < 2 * YEAR_DAYS => format!("{days}d"),
        _ if days < 8 * YEAR_DAYS => two(days / YEAR_DAYS, "y", days % YEAR_DAYS, "d"),
        _ => format!("{}y", days / YEAR_DAYS),
    }
}

fn two(large: i64, large_unit: &str, small: i64, small_unit: &str) -> String {
    if small == 0 { format!("{large}{large_unit}") } else { format!("{large}{large_unit}{small}{small_unit}") }
}

/// How long ago a time of the API was; `<unknown>` when it is absent.
pub(super) fn since(time: &str, now: Timestamp) -> String {
    match parse_time(time) {
        Some(time) => human_duration(now.duration_since(time).as_secs()),
        None => "<unknown>".to_owned(),
    }
}

/// The age of an object.
pub(super) fn age(object: &Value, now: Timestamp) -> Value {
    since(meta::creation_timestamp(object), now).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (seconds, wanted) in [
            (-2, "<invalid>"),
            (-1, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (599, "9m59s"),
            (600, "10m"),
            (10_799, "179m"),
            (10_800, "3h"),
            (11_100, "3h5m"),
            (8 * HOUR, "8h"),
            (47 * HOUR, "47h"),
            (48 * HOUR, "2d"),
            (52 * HOUR, "2d4h"),
            (8 * 24 * HOUR, "8d"),
            (729 * 24 * HOUR, "729d"),
            (730 * 24 * HOUR, "2y"),
            (800 * 24 * HOUR, "2y70d"),
            (9 * 365 * 24 * HOUR, "9y"),
        ] {
            assert_eq!(human_duration(seconds), wanted);
        }
    }
}
