//! Whom a client asks.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

/// A Service's address and how it is talked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Whether by UDP, else by TCP.
    pub udp: bool,
    /// Where.
    pub address: SocketAddr,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", if self.udp { "udp" } else { "tcp" }, self.address)
    }
}

impl FromStr for Target {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (transport, address) = text.split_once(':').context("a target is tcp:ADDRESS:PORT or udp:ADDRESS:PORT")?;
        let udp = match transport {
            "tcp" => false,
            "udp" => true,
            other => bail!("{other} is neither tcp nor udp"),
        };
        Ok(Self { udp, address: address.parse().with_context(|| format!("{address} is no address and port"))? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_read_back() {
        for text in ["tcp:10.96.0.1:80", "udp:[fd00::1]:53"] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
        assert!("sctp:10.96.0.1:80".parse::<Target>().is_err());
        assert!("10.96.0.1:80".parse::<Target>().is_err());
    }
}
