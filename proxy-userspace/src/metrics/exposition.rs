//! What a scrape gets besides the registered metrics: the process, and the counters of the data plane.

use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use crate::dataplane::Counters;

/// Linux counts process times in hundredths of a second (USER_HZ) on every architecture that we build for.
const TICKS_PER_SECOND: f64 = 100.0;
/// Gauges of kube-proxy whose names look like counters'.
const GAUGES: [&str; 1] = ["kubeproxy_sync_proxy_rules_iptables_total"];

pub(super) fn write_sample(text: &mut String, name: &str, kind: &str, value: impl std::fmt::Display) {
    // Writing into a String cannot fail.
    let _ = write!(text, "# TYPE {name} {kind}\n{name} {value}\n");
}

pub(super) fn write_process(text: &mut String, start: Duration) {
    write_sample(text, "process_start_time_seconds", "gauge", start.as_secs_f64());
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    for (field, name) in
        [("VmRSS:", "process_resident_memory_bytes"), ("VmHWM:", "trama_process_resident_memory_peak_bytes")]
    {
        if let Some(kilobytes) = status_kilobytes(&status, field) {
            write_sample(text, name, "gauge", kilobytes * 1024);
        }
    }
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    if let Some(seconds) = cpu_seconds(&stat) {
        write_sample(text, "process_cpu_seconds_total", "counter", seconds);
    }
}

fn status_kilobytes(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_whitespace().next()?.parse().ok()
}

/// utime and stime are fields 14 and 15; the second field is in parentheses and may hold spaces.
fn cpu_seconds(stat: &str) -> Option<f64> {
    let after_name = stat.rsplit_once(')')?.1;
    let mut fields = after_name.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u32>().ok();
    Some((f64::from(ticks()?) + f64::from(ticks()?)) / TICKS_PER_SECOND)
}

/// Samples of one name have to stand together.
pub(super) fn write_counters(text: &mut String, counters: &Counters) {
    let mut sorted: Vec<_> = counters.iter().collect();
    sorted.sort();
    let mut last = "";
    for (name, labels, value) in sorted {
        if name != last {
            let is_counter = name.ends_with("_total") && !GAUGES.contains(&name.as_str());
            let kind = if is_counter { "counter" } else { "gauge" };
            let _ = writeln!(text, "# TYPE {name} {kind}");
            last = name;
        }
        let labels: Vec<_> = labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escape(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(text, "{name}{labels} {value}");
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_process_files() {
        let stat = "42 (a b) c) S 1 1 1 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 1 0 1 1 1";
        assert_eq!(cpu_seconds(stat), Some(3.0));
        assert_eq!(cpu_seconds(""), None);
        assert_eq!(status_kilobytes("VmHWM:\t 99 kB\nVmRSS:\t 12 kB\n", "VmRSS:"), Some(12));
    }

    #[test]
    fn a_gauge_of_kube_proxy_with_a_counters_name_is_a_gauge() {
        let mut text = String::new();
        let table = vec![("table".to_string(), "nat".to_string())];
        write_counters(&mut text, &vec![("kubeproxy_sync_proxy_rules_iptables_total".to_string(), table, 7)]);
        let expect = "# TYPE kubeproxy_sync_proxy_rules_iptables_total gauge\n\
                      kubeproxy_sync_proxy_rules_iptables_total{table=\"nat\"} 7\n";
        assert_eq!(text, expect);
    }
}
