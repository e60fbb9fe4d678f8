//! What becomes of measured values.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

/// Nearest rank of values in ascending order: a measured value, never one in between; `NaN` where there is none.
pub fn percentile(sorted: &[f64], hundredths: usize) -> f64 {
    let rank = (sorted.len() * hundredths).div_ceil(100).saturating_sub(1);
    sorted.get(rank).copied().unwrap_or(f64::NAN)
}

/// Name and release of this kernel.
pub fn kernel() -> String {
    node_sys::sysctl::read("kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// The folder of results: `TRAMA_BENCH_DIR`, else `target/bench`.
pub fn folder() -> PathBuf {
    std::env::var_os("TRAMA_BENCH_DIR").map_or_else(|| PathBuf::from("target/bench"), PathBuf::from)
}

/// Writes `NAME.json` into `folder` and returns its path.
///
/// # Errors
/// When the folder cannot be made or the file not be written.
pub fn write_json(folder: &Path, name: &str, document: &Value) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let path = folder.join(format!("{name}.json"));
    fs::write(&path, format!("{document:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measured_values() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!((percentile(&values, 50), percentile(&values, 99)), (100.0, 198.0));
        assert_eq!(percentile(&[3.0], 99), 3.0);
        assert!(percentile(&[], 50).is_nan());
    }
}
