//! Kernel parameters under `/proc/sys`. Those of `net` belong to the calling thread's network namespace.

use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::SysError;

/// Writes `value` to the parameter, given as a path below `/proc/sys`: `net/ipv4/ip_forward`.
/// Slashes, not dots, as names of network interfaces may hold dots.
///
/// # Errors
/// When the parameter does not exist, refuses the value or may not be written; a key that leaves `/proc/sys` is invalid.
pub fn write(key: &str, value: &str) -> Result<(), SysError> {
    fs::write(path_of(key)?, value).map_err(|e| SysError::new("write sysctl", format!("{key} = {value}"), e))
}

/// Reads the parameter, without the line's end.
///
/// # Errors
/// As [`write()`].
pub fn read(key: &str) -> Result<String, SysError> {
    let text = fs::read_to_string(path_of(key)?).map_err(|e| SysError::new("read sysctl", key, e))?;
    Ok(text.trim_end().to_owned())
}

fn path_of(key: &str) -> Result<PathBuf, SysError> {
    let relative = Path::new(key);
    if relative.components().all(|part| matches!(part, Component::Normal(_))) {
        return Ok(Path::new("/proc/sys").join(relative));
    }
    Err(SysError::new("find sysctl", key, std::io::Error::from(std::io::ErrorKind::InvalidInput)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Netns;

    #[test]
    fn a_parameter_belongs_to_its_namespace() {
        let before = read("net/ipv6/conf/all/forwarding").unwrap();
        let netns = Netns::anonymous().unwrap();
        let inside = netns.run(|| {
            write("net/ipv6/conf/all/forwarding", "1").unwrap();
            read("net/ipv6/conf/all/forwarding").unwrap()
        });
        assert_eq!(inside.unwrap(), "1");
        assert_eq!(read("net/ipv6/conf/all/forwarding").unwrap(), before);
    }

    #[test]
    fn a_key_stays_below_proc_sys() {
        for key in ["../version", "/etc/passwd", "net/../../version"] {
            assert_eq!(read(key).unwrap_err().source.kind(), std::io::ErrorKind::InvalidInput, "{key}");
        }
    }
}
