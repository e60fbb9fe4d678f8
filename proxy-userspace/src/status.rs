//! What `trama-proxy status` says: the answer of `/status` beside `/metrics`, or what the pinned maps tell when no process runs.

use std::fmt::{self, Write as _};

use serde::{Deserialize, Serialize};

/// The state of the proxy on this node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Whether a running process said this; else it was read from what is pinned.
    pub running: bool,
    /// Name of the data plane.
    pub mode: String,
    /// Why this one.
    pub why: String,
    /// Version of the maps' layouts.
    pub abi: u32,
    /// How much is programmed.
    pub counts: Counts,
    /// What the last look at the kernel found; `None` before the first one.
    pub audit: Option<Audit>,
    /// The last sync that succeeded; `None` before the first one.
    pub last_sync: Option<LastSync>,
    /// What the data plane says of itself.
    pub kernel: Description,
}

/// How much is programmed. `[IPv4, IPv6]` where it is by family.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    /// Services; `None` where only their ports are known.
    pub services: Option<usize>,
    /// ServicePorts of both families.
    pub service_ports: usize,
    /// Addresses and ports that are answered.
    pub frontends: [usize; 2],
    /// Endpoints that get new connections, one for each ServicePort that it serves.
    pub endpoints: [usize; 2],
}

/// A look at the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Audit {
    /// How long ago, in seconds.
    pub seconds_ago: u64,
    /// What somebody else had changed; `None` for nothing.
    pub drift: Option<String>,
    /// How often this process found something changed.
    pub repairs: u64,
}

/// A sync.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastSync {
    /// How long ago, in seconds.
    pub seconds_ago: u64,
    /// How long it took, in seconds.
    pub duration_seconds: f64,
    /// Whether everything was looked at.
    pub full: bool,
    /// Entries written to or deleted from the kernel.
    pub kernel_writes: usize,
    /// ServicePorts that the kernel has no room for.
    pub refused: usize,
}

/// What a data plane says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Description {
    /// How full its maps are.
    pub maps: Vec<MapFill>,
    /// What hangs where.
    pub programs: Vec<Attached>,
    /// What the last audit found changed.
    pub drift: Option<String>,
}

/// How full a map is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MapFill {
    /// Name of the map.
    pub map: String,
    /// Entries in use.
    pub entries: usize,
    /// Room.
    pub maximum: usize,
}

/// Programs of one place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attached {
    /// Name of the interface, or `cgroup`.
    pub place: String,
    /// Names of the programs.
    pub programs: Vec<String>,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.running {
            writeln!(
                f,
                "No trama-proxy answers here; this is what an earlier one left in the kernel, which goes on with it.\n"
            )?;
        }
        row(f, "MODE", &format!("{} ({})", self.mode, self.why))?;
        row(f, "MAP LAYOUT", &format!("version {}", self.abi))?;
        let counts = &self.counts;
        if let Some(services) = counts.services {
            row(f, "SERVICES", &services.to_string())?;
        }
        row(f, "SERVICEPORTS", &counts.service_ports.to_string())?;
        row(f, "FRONTENDS", &by_family(counts.frontends))?;
        row(f, "ENDPOINTS", &by_family(counts.endpoints))?;
        row(f, "LAST SYNC", &self.last_sync.as_ref().map_or_else(|| "none known".to_owned(), LastSync::sentence))?;
        row(f, "AUDIT", &self.audit.as_ref().map_or_else(|| "none known".to_owned(), Audit::sentence))?;
        if !self.kernel.maps.is_empty() {
            writeln!(f, "\n{:<20} {:>9} {:>9} {:>7}", "MAP", "ENTRIES", "MAXIMUM", "FILL")?;
        }
        for MapFill { map, entries, maximum } in &self.kernel.maps {
            let percent = *entries as f64 * 100.0 / (*maximum).max(1) as f64;
            writeln!(f, "{map:<20} {entries:>9} {maximum:>9} {percent:>6.1}%")?;
        }
        if !self.kernel.programs.is_empty() {
            writeln!(f, "\n{:<20} PROGRAMS", "WHERE")?;
        }
        self.kernel
            .programs
            .iter()
            .try_for_each(|Attached { place, programs }| writeln!(f, "{place:<20} {}", programs.join(" ")))
    }
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, value: &str) -> fmt::Result {
    writeln!(f, "{name:<14} {value}")
}

fn by_family([v4, v6]: [usize; 2]) -> String {
    format!("{v4} IPv4, {v6} IPv6")
}

impl LastSync {
    fn sentence(&self) -> String {
        let scope = if self.full { "everything" } else { "changes" };
        let milliseconds = self.duration_seconds * 1000.0;
        let mut text = format!(
            "{} s ago, {scope}: {} entries written in {milliseconds:.1} ms",
            self.seconds_ago, self.kernel_writes
        );
        if self.refused > 0 {
            // Writing into a String cannot fail.
            let _ = write!(text, "; {} ServicePorts refused for want of room", self.refused);
        }
        text
    }
}

impl Audit {
    fn sentence(&self) -> String {
        let found = self.drift.as_deref().unwrap_or("the kernel holds what was written");
        format!("{} s ago: {found}; {} repairs", self.seconds_ago, self.repairs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        Status {
            running: true,
            mode: "ebpf".to_owned(),
            why: "configured".to_owned(),
            abi: 4,
            counts: Counts { services: Some(2), service_ports: 3, frontends: [4, 1], endpoints: [6, 2] },
            audit: Some(Audit { seconds_ago: 3, drift: None, repairs: 0 }),
            last_sync: Some(LastSync {
                seconds_ago: 60,
                duration_seconds: 0.0125,
                full: true,
                kernel_writes: 17,
                refused: 0,
            }),
            kernel: Description {
                maps: vec![MapFill { map: "FRONTENDS_V4".to_owned(), entries: 4, maximum: 16 }],
                programs: vec![Attached { place: "eth0".to_owned(), programs: vec!["tc_ingress".to_owned()] }],
                drift: None,
            },
        }
    }

    #[test]
    fn a_status_reads_as_a_table() {
        let expected = "\
MODE           ebpf (configured)
MAP LAYOUT     version 4
SERVICES       2
SERVICEPORTS   3
FRONTENDS      4 IPv4, 1 IPv6
ENDPOINTS      6 IPv4, 2 IPv6
LAST SYNC      60 s ago, everything: 17 entries written in 12.5 ms
AUDIT          3 s ago: the kernel holds what was written; 0 repairs

MAP                    ENTRIES   MAXIMUM    FILL
FRONTENDS_V4                 4        16   25.0%

WHERE                PROGRAMS
eth0                 tc_ingress
";
        assert_eq!(status().to_string(), expected);
        let left = Status { running: false, ..status() };
        assert!(left.to_string().starts_with("No trama-proxy answers here;"));
    }

    #[test]
    fn a_status_survives_its_json() {
        let json = serde_json::to_string(&status()).unwrap();
        assert!(json.contains("\"servicePorts\":3"), "{json}");
        assert_eq!(serde_json::from_str::<Status>(&json).unwrap(), status());
    }
}
