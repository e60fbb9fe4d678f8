//! The node's connection tracking limits and timeouts, as kube-proxy sets them in every mode (1.36
//! `pkg/proxy/conntrack/sysctls.go`). Each is written only where it differs; one that can't be written is a warning, because
//! Services work without it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::{info, warn};

/// No more entries than this, however many CPUs there are.
const ENTRIES_MAX: u32 = 1_048_576;
/// Four entries a bucket are still found quickly.
const ENTRIES_PER_BUCKET: u32 = 4;

/// What to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ConntrackSysctls {
    /// Entries per CPU; 0 leaves the kernel's limit, whatever `min` says.
    pub max_per_core: u32,
    /// At least so many entries.
    pub min: u32,
    /// Idle TCP connections; below a second leaves the kernel's.
    pub tcp_established: Duration,
    /// TCP connections in CLOSE_WAIT; below a second leaves the kernel's.
    pub tcp_close_wait: Duration,
    /// Whether packets outside of a connection's window count as valid; false leaves the kernel's.
    pub tcp_be_liberal: bool,
    /// UDP without an answer; below a second leaves the kernel's.
    pub udp: Duration,
    /// UDP with answers; below a second leaves the kernel's.
    pub udp_stream: Duration,
}

/// One kernel parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Setting {
    name: &'static str,
    value: u64,
}

/// Where parameters are; other places in tests.
#[derive(Debug, Clone)]
struct Places {
    /// Directory of the `nf_conntrack_*` parameters of this network namespace.
    sysctls: PathBuf,
    /// Number of buckets of the machine's table.
    hashsize: PathBuf,
    /// The CPUs that are on, like `0-3,6`.
    cpus: PathBuf,
}

impl ConntrackSysctls {
    /// Makes the kernel's parameters so. Those of a network namespace are the calling thread's; the limit belongs to the machine
    /// and can't be written in a child namespace.
    pub fn apply(&self) {
        self.apply_at(&Places {
            sysctls: PathBuf::from("/proc/sys/net/netfilter"),
            hashsize: PathBuf::from("/sys/module/nf_conntrack/parameters/hashsize"),
            cpus: PathBuf::from("/sys/devices/system/cpu/online"),
        });
    }

    fn apply_at(&self, places: &Places) {
        let cpus = fs::read_to_string(&places.cpus).ok().and_then(|list| count_cpus(list.trim())).unwrap_or(1);
        if let Some(max) = self.entries(cpus)
            && ensure(&places.sysctls.join("nf_conntrack_max"), u64::from(max))
        {
            ensure_at_least(&places.hashsize, u64::from(max / ENTRIES_PER_BUCKET));
        }
        for Setting { name, value } in self.settings() {
            ensure(&places.sysctls.join(name), value);
        }
    }

    /// The limit of entries on a machine with `cpus` CPUs; `None` leaves it.
    fn entries(&self, cpus: u32) -> Option<u32> {
        let scaled = self.max_per_core.saturating_mul(cpus);
        match scaled {
            0 => None,
            scaled if scaled > ENTRIES_MAX => Some(ENTRIES_MAX),
            scaled => Some(scaled.max(self.min)),
        }
    }

    fn settings(&self) -> impl Iterator<Item = Setting> {
        let timeout = |name, duration: Duration| Setting { name, value: duration.as_secs() };
        let all = [
            timeout("nf_conntrack_tcp_timeout_established", self.tcp_established),
            timeout("nf_conntrack_tcp_timeout_close_wait", self.tcp_close_wait),
            Setting { name: "nf_conntrack_tcp_be_liberal", value: u64::from(self.tcp_be_liberal) },
            timeout("nf_conntrack_udp_timeout", self.udp),
            timeout("nf_conntrack_udp_timeout_stream", self.udp_stream),
        ];
        all.into_iter().filter(|setting| setting.value > 0)
    }
}

/// The number of CPUs in a list like `0-3,6`.
fn count_cpus(list: &str) -> Option<u32> {
    let ranges = list.split(',').map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    });
    ranges.sum()
}

/// Returns whether the parameter has the value in the end.
fn ensure(path: &Path, value: u64) -> bool {
    read(path).is_some_and(|now| now == value) || write(path, value)
}

fn ensure_at_least(path: &Path, value: u64) {
    if read(path).is_some_and(|now| now < value) {
        write(path, value);
    }
}

fn read(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn write(path: &Path, value: u64) -> bool {
    match fs::write(path, value.to_string()) {
        Ok(()) => info!(parameter = %path.display(), value, "connection tracking parameter set"),
        Err(error) => {
            warn!(parameter = %path.display(), value, %error, "cannot set a connection tracking parameter, going on without");
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn the_limit_grows_with_the_cpus_within_bounds() {
        let entries =
            |max_per_core, min, cpus| ConntrackSysctls { max_per_core, min, ..Default::default() }.entries(cpus);
        assert_eq!(entries(32_768, 131_072, 2), Some(131_072));
        assert_eq!(entries(32_768, 131_072, 8), Some(262_144));
        assert_eq!(entries(32_768, 131_072, 32), Some(1_048_576));
        assert_eq!(entries(32_768, 131_072, 33), Some(1_048_576), "capped");
        assert_eq!(entries(u32::MAX, 0, 2), Some(1_048_576));
        assert_eq!(entries(100, 2_000_000, 2), Some(2_000_000), "the minimum is not capped");
        assert_eq!(entries(0, 131_072, 8), None, "left as it is");
    }

    #[test]
    fn cpus_are_counted_from_the_kernels_list() {
        assert_eq!(count_cpus("0"), Some(1));
        assert_eq!(count_cpus("0-3,6,8-9"), Some(7));
        assert_eq!(count_cpus("x"), None);
        assert_eq!(count_cpus("3-1"), None);
    }

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new(files: &[(&str, &str)]) -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            for (name, value) in files {
                fs::write(tree.0.path().join(name), value).unwrap();
            }
            tree
        }

        fn places(&self) -> Places {
            let at = |name| self.0.path().join(name);
            Places { sysctls: at(""), hashsize: at("hashsize"), cpus: at("online") }
        }

        fn value(&self, name: &str) -> String {
            fs::read_to_string(self.0.path().join(name)).unwrap()
        }
    }

    const ALL: ConntrackSysctls = ConntrackSysctls {
        max_per_core: 100_000,
        min: 0,
        tcp_established: Duration::from_secs(86_400),
        tcp_close_wait: Duration::from_millis(3_600_900),
        tcp_be_liberal: true,
        udp: Duration::from_millis(900),
        udp_stream: Duration::from_secs(300),
    };

    #[test]
    fn what_differs_is_written_and_nothing_else() {
        let tree = Tree::new(&[
            ("online", "0-3\n"),
            ("hashsize", "65536\n"),
            ("nf_conntrack_max", "262144\n"),
            ("nf_conntrack_tcp_timeout_established", "86400\n"),
            ("nf_conntrack_tcp_timeout_close_wait", "60\n"),
            ("nf_conntrack_tcp_be_liberal", "0\n"),
            ("nf_conntrack_udp_timeout", "30\n"),
            ("nf_conntrack_udp_timeout_stream", "120\n"),
        ]);
        ALL.apply_at(&tree.places());
        for (name, expect) in [
            ("nf_conntrack_max", "400000"),
            ("hashsize", "100000"),
            ("nf_conntrack_tcp_timeout_established", "86400\n"),
            ("nf_conntrack_tcp_timeout_close_wait", "3600"),
            ("nf_conntrack_tcp_be_liberal", "1"),
            ("nf_conntrack_udp_timeout", "30\n"),
            ("nf_conntrack_udp_timeout_stream", "300"),
        ] {
            assert_eq!(tree.value(name), expect, "{name}");
        }
    }

    #[test]
    fn zero_leaves_everything_and_a_large_table_stays() {
        let files = [("online", "0-3\n"), ("hashsize", "999999\n"), ("nf_conntrack_max", "5\n")];
        let tree = Tree::new(&files);
        ConntrackSysctls::default().apply_at(&tree.places());
        assert_eq!(tree.value("nf_conntrack_max"), "5\n");
        ConntrackSysctls { max_per_core: 10, ..Default::default() }.apply_at(&tree.places());
        assert_eq!((tree.value("nf_conntrack_max"), tree.value("hashsize")), ("40".into(), "999999\n".into()));
    }

    #[test]
    fn what_cannot_be_written_stops_nothing_else() {
        let tree = Tree::new(&[("online", "0\n"), ("hashsize", "1\n"), ("nf_conntrack_tcp_be_liberal", "0\n")]);
        fs::create_dir(tree.0.path().join("nf_conntrack_max")).unwrap();
        ALL.apply_at(&tree.places());
        assert_eq!(tree.value("hashsize"), "1\n", "the table grows only with the limit");
        assert_eq!(tree.value("nf_conntrack_tcp_be_liberal"), "1");
    }

    #[test]
    fn a_child_namespace_has_its_own_timeouts_and_leaves_the_machines_limit() {
        let namespace = node_sys::Netns::anonymous().unwrap();
        let machine = "/sys/module/nf_conntrack/parameters/hashsize";
        let before = (read(Path::new(machine)), fs::metadata(machine).unwrap().mtime());
        let inside = namespace.run(|| {
            ALL.apply();
            let value = |name: &str| node_sys::sysctl::read(&format!("net/netfilter/{name}")).unwrap();
            (value("nf_conntrack_tcp_timeout_close_wait"), value("nf_conntrack_udp_timeout_stream"))
        });
        assert_eq!(inside.unwrap(), ("3600".to_owned(), "300".to_owned()));
        assert_eq!((read(Path::new(machine)), fs::metadata(machine).unwrap().mtime()), before);
    }
}
