//! Durations as Kubernetes writes them: `1h30m`, `15s`, `0s` (Go's `time.ParseDuration`).

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A duration that is read and written as Go does; never negative, at most some 292 years.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct GoDuration(pub Duration);

/// Why a text is no duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DurationError {
    /// Not a number with a unit.
    #[error("{0:?} is not a duration, like 30s or 1h15m")]
    Malformed(String),
    /// Below zero.
    #[error("duration {0:?} is negative")]
    Negative(String),
    /// More than Go's 64 bits of nanoseconds.
    #[error("duration {0:?} is too long")]
    TooLong(String),
}

const NANOSECONDS_PER_SECOND: u128 = 1_000_000_000;

/// Units of Go, in nanoseconds, longest name first where one begins another.
const UNITS: [(&str, u128); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", NANOSECONDS_PER_SECOND),
    ("m", 60 * NANOSECONDS_PER_SECOND),
    ("h", 3_600 * NANOSECONDS_PER_SECOND),
];

impl GoDuration {
    /// So many seconds.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// Whether it is zero, which Kubernetes takes for "not set".
    pub fn is_zero(self) -> bool {
        self.0.is_zero()
    }
}

impl FromStr for GoDuration {
    type Err = DurationError;

    fn from_str(text: &str) -> Result<Self, DurationError> {
        let unsigned = text.strip_prefix('+').unwrap_or(text);
        if unsigned.starts_with('-') {
            return Err(DurationError::Negative(text.to_owned()));
        }
        if unsigned == "0" {
            return Ok(Self::default());
        }
        let malformed = || DurationError::Malformed(text.to_owned());
        let too_long = || DurationError::TooLong(text.to_owned());
        let (mut rest, mut total) = (unsigned, 0_u128);
        loop {
            let (nanoseconds, after) = component(rest).ok_or_else(malformed)?;
            total = nanoseconds.and_then(|more| total.checked_add(more)).ok_or_else(too_long)?;
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        let nanoseconds = i64::try_from(total).map_err(|_| too_long())?;
        Ok(Self(Duration::from_nanos(nanoseconds.unsigned_abs())))
    }
}

/// The first number and unit: its nanoseconds (`None` inside where they are too many), and what follows.
fn component(text: &str) -> Option<(Option<u128>, &str)> {
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
    let (number, rest) = text.split_at(end);
    let (name, nanoseconds) = UNITS.iter().find(|(name, _)| unit_of(rest) == *name)?;
    Some((scale(number, *nanoseconds)?, rest.get(name.len()..)?))
}

fn unit_of(text: &str) -> &str {
    let end = text.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(text.len());
    text.get(..end).unwrap_or_default()
}

/// A decimal number times a unit, exactly; digits below a nanosecond are dropped.
fn scale(number: &str, unit: u128) -> Option<Option<u128>> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return None;
    }
    let whole = if whole.is_empty() { Ok(0) } else { whole.parse::<u128>() };
    let Ok(whole) = whole else { return Some(None) };
    let (mut below, mut place) = (0, unit);
    for digit in fraction.bytes() {
        place /= 10;
        below += u128::from(digit - b'0') * place;
    }
    Some(whole.checked_mul(unit).and_then(|above| above.checked_add(below)))
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanoseconds = self.0.as_nanos();
        match nanoseconds {
            0 => write!(f, "0s"),
            1..1_000 => write!(f, "{nanoseconds}ns"),
            1_000..1_000_000 => write!(f, "{}µs", decimal(nanoseconds, 1_000)),
            1_000_000..NANOSECONDS_PER_SECOND => write!(f, "{}ms", decimal(nanoseconds, 1_000_000)),
            _ => {
                let (hours, minutes) = (self.0.as_secs() / 3_600, self.0.as_secs() / 60 % 60);
                let seconds = nanoseconds % (60 * NANOSECONDS_PER_SECOND);
                if hours > 0 {
                    write!(f, "{hours}h")?;
                }
                if hours > 0 || minutes > 0 {
                    write!(f, "{minutes}m")?;
                }
                write!(f, "{}s", decimal(seconds, NANOSECONDS_PER_SECOND))
            }
        }
    }
}

/// `nanoseconds` in units of `unit`, without zeros at the end.
fn decimal(nanoseconds: u128, unit: u128) -> String {
    let (whole, mut below) = (nanoseconds / unit, nanoseconds % unit);
    let mut text = whole.to_string();
    let mut place = unit / 10;
    if below > 0 {
        text.push('.');
    }
    while below > 0 {
        text.push_str(&(below / place).to_string());
        below %= place;
        place /= 10;
    }
    text
}

impl Serialize for GoDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_go_reads() {
        let nanoseconds = |text: &str| text.parse::<GoDuration>().map(|duration| duration.0.as_nanos());
        for (text, expect) in [
            ("0", 0),
            ("0s", 0),
            ("30s", 30_000_000_000),
            ("1.5h", 5_400_000_000_000),
            ("1h15m30.918273645s", 4_530_918_273_645),
            ("+5ms", 5_000_000),
            (".5s", 500_000_000),
            ("3µs", 3_000),
            ("52763797000ns", 52_763_797_000),
        ] {
            assert_eq!(nanoseconds(text), Ok(expect), "{text}");
        }
        for text in ["", "3", "s", ".s", "1.2.3s", "5 s", "1d", "1h2", "-1s", "9999999999h", "1s1"] {
            assert!(nanoseconds(text).is_err(), "{text}");
        }
        assert!(matches!("-1s".parse::<GoDuration>(), Err(DurationError::Negative(_))));
        assert!(matches!("99999999h".parse::<GoDuration>(), Err(DurationError::TooLong(_))));
    }

    #[test]
    fn writes_what_go_writes() {
        for (nanoseconds, expect) in [
            (0, "0s"),
            (1, "1ns"),
            (1_100, "1.1µs"),
            (2_200_000, "2.2ms"),
            (3_300_000_000, "3.3s"),
            (245_000_000_000, "4m5s"),
            (86_400_000_000_000, "24h0m0s"),
            (18_367_001_000_000, "5h6m7.001s"),
        ] {
            let duration = GoDuration(Duration::from_nanos(nanoseconds));
            assert_eq!(duration.to_string(), expect);
            assert_eq!(expect.parse(), Ok(duration));
        }
    }
}
