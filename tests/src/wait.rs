//! Waiting for a condition with a deadline: the only place that sleeps.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Between two looks at a condition.
const PAUSE: Duration = Duration::from_millis(10);

/// Looks until `look` gives a value, and returns it.
///
/// # Errors
/// At once when `look` fails; after `limit` when it still gives nothing, naming `what` was waited for.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
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
        assert_eq!(never.unwrap_err().to_string(), "the end of time did not happen within 0.02 s");
    }
}
