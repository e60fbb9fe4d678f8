//! What can be said on the command line, and what of it makes sense.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::Parser;
use ipnet::IpNet;

/// A small Kubernetes API server in one process.
///
/// All objects are kept in memory: they are gone when the process ends. Only the certificate authority is kept, in --data-dir, so that
/// kubeconfig files stay valid. Clients authenticate with a certificate of that authority, and each of them may do everything.
#[derive(Clone, Debug, Parser)]
#[command(name = "apiserver-lite", version)]
pub struct Options {
    /// The address to listen on.
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    pub bind_address: IpAddr,
    /// The port to listen on; 0 takes any free one.
    #[arg(long, value_name = "PORT", default_value_t = 6443)]
    pub secure_port: u16,
    /// The directory of the certificate authority (ca.crt, ca.key). Made when it does not exist; objects are not kept in it.
    #[arg(long, value_name = "DIR", default_value = "apiserver-lite.data")]
    pub data_dir: PathBuf,
    /// Write a kubeconfig of the administrator (group system:masters) to this file, readable by its owner only.
    #[arg(long, value_name = "FILE")]
    pub write_kubeconfig: Option<PathBuf>,
    /// The ranges of cluster IPs: one, or one for each IP family; the first is the default family.
    #[arg(long, value_name = "CIDR[,CIDR]", value_delimiter = ',', default_value = "10.96.0.0/16,fd00:10:96::/112")]
    pub service_cluster_ip_range: Vec<IpNet>,
    /// The node ports that Services may have.
    #[arg(long, value_name = "FIRST-LAST", default_value = "30000-32767", value_parser = parse_ports)]
    pub service_node_port_range: RangeInclusive<u16>,
    /// The address at which nodes and pods reach this server [default: --bind-address]. A loopback address or 0.0.0.0 gives the Service
    /// default/kubernetes no endpoints.
    #[arg(long, value_name = "IP")]
    pub advertise_address: Option<IpAddr>,
    /// A further name or address for the serving certificate; can be given several times.
    #[arg(long, value_name = "NAME")]
    pub tls_san: Vec<String>,
    /// Which controllers to run: `all` or `none`.
    #[arg(long, value_name = "WHICH", default_value = "all")]
    pub controllers: Controllers,
}

/// Which controllers run inside the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Controllers {
    /// EndpointSlices, Endpoints, namespaces and ServiceAccounts.
    All,
    /// None; something else may run them.
    None,
}

/// What is wrong with the options, taken together.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OptionsError {
    /// Too many ranges, or two of one family.
    #[error("--service-cluster-ip-range must hold one range, or one IPv4 and one IPv6 range, not {ranges}")]
    Families {
        /// What was given.
        ranges: String,
    },
    /// A range that can't be used for cluster IPs.
    #[error(
        "--service-cluster-ip-range {range} must have at least 8 addresses, and an IPv6 range a prefix of /64 or longer"
    )]
    Size {
        /// What was given.
        range: IpNet,
    },
}

impl Options {
    /// Checks what can't be checked for one option alone.
    ///
    /// # Errors
    /// [`OptionsError`] in one sentence for the operator.
    pub fn check(&self) -> Result<(), OptionsError> {
        let ranges = &self.service_cluster_ip_range;
        let families = |v4: bool| ranges.iter().filter(|range| range.addr().is_ipv4() == v4).count();
        if families(true) > 1 || families(false) > 1 || ranges.is_empty() {
            let ranges = ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
            return Err(OptionsError::Families { ranges });
        }
        let unusable = |range: &&IpNet| {
            let bits_free = range.max_prefix_len() - range.prefix_len();
            bits_free < 3 || (range.addr().is_ipv6() && range.prefix_len() < 64)
        };
        ranges.iter().find(unusable).map_or(Ok(()), |range| Err(OptionsError::Size { range: *range }))
    }

    /// Where to listen.
    pub fn listen(&self) -> SocketAddr {
        SocketAddr::new(self.bind_address, self.secure_port)
    }

    /// The address that other machines are told.
    pub fn advertised(&self) -> IpAddr {
        self.advertise_address.unwrap_or(self.bind_address)
    }
}

fn parse_ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let wrong = || format!("{text:?} is not a range of ports such as 30000-32767");
    let (first, last) = text.split_once('-').ok_or_else(wrong)?;
    let first: u16 = first.parse().map_err(|_| wrong())?;
    let last: u16 = last.parse().map_err(|_| wrong())?;
    if first == 0 || first > last { Err(wrong()) } else { Ok(first..=last) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(text: &str) -> Result<(), OptionsError> {
        Options::parse_from(["apiserver-lite", "--service-cluster-ip-range", text]).check()
    }

    #[test]
    fn defaults_are_fine() {
        let options = Options::parse_from(["apiserver-lite"]);
        options.check().unwrap();
        assert_eq!(options.listen().to_string(), "127.0.0.1:6443");
        assert_eq!(options.service_node_port_range, 30000..=32767);
    }

    #[test]
    fn ranges_are_checked() {
        ranges("10.0.0.0/24").unwrap();
        ranges("fd00::/112,10.0.0.0/24").unwrap();
        assert!(matches!(ranges("10.0.0.0/24,10.1.0.0/24"), Err(OptionsError::Families { .. })));
        assert!(matches!(ranges("10.0.0.0/30"), Err(OptionsError::Size { .. })));
        assert!(matches!(ranges("fd00::/48"), Err(OptionsError::Size { .. })));
    }

    #[test]
    fn ports_are_checked() {
        assert_eq!(parse_ports("80-90"), Ok(80..=90));
        for wrong in ["", "80", "90-80", "0-5", "1-70000", "a-b"] {
            assert!(parse_ports(wrong).is_err(), "{wrong}");
        }
    }
}
