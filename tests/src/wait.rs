//! Waiting for a condition with a deadline: the only place that sleeps.

use std::env;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Between two looks at a condition.
const PAUSE: Duration = Duration::from_millis(10);

/// A whole number that lengthens every limit of waiting, for machines that are slow: emulated ones.
const VARIABLE: &str = "TRAMA_PATIENCE";

/// `limit` on this machine: as many times as long as `TRAMA_PATIENCE` says (1 to 100; 1 without it).
pub fn patient(limit: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    let read = || env::var(VARIABLE).ok().and_then(|text| text.parse().ok());
    limit * *FACTOR.get_or_init(|| read().map_or(1, |factor: u32| factor.clamp(1, 100)))
}

/// Looks until `look` gives a value, and returns it.
///
/// # Errors
/// At once when `look` fails; after the [`patient`] `limit` when it still gives nothing, naming `what` was waited for.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let limit = patient(limit);
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = look()? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("{what} did not happen within {} s", limit.as_secs_f32());
        }
        std::thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_is_met_or_named() {
        let mut looks = 0;
        let third = wait_for("three looks", Duration::from_secs(5), || {
            looks += 1;
            Ok((looks == 3).then_some(looks))
        });
        assert_eq!(third.unwrap(), 3);
        let never: Result<()> = wait_for("the end of time", Duration::from_millis(20), || Ok(None));
        assert_eq!(
            never.unwrap_err().to_string(),
            format!("the end of time did not happen within {} s", patient(Duration::from_millis(20)).as_secs_f32())
        );
    }
}
