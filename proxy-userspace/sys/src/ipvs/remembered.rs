//! The connections that IPVS remembers, as `/proc/net/ip_vs_conn` lists them.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::ServiceAddress;

/// The list, of the network namespace of the thread that reads it.
const LIST: &str = "/proc/thread-self/net/ip_vs_conn";

/// A connection that IPVS remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Remembered {
    /// Who began it.
    pub client: SocketAddr,
    /// Where its packets go before they are sent to a server.
    pub to: ServiceAddress,
}

/// Visits every connection of TCP and UDP that IPVS remembers in this network namespace. Without IPVS there is none.
///
/// # Errors
/// When the list can't be read.
pub fn remembered(mut visit: impl FnMut(Remembered)) -> io::Result<()> {
    let file = match File::open(LIST) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    for line in BufReader::new(file).lines() {
        if let Some(connection) = read_line(&line?) {
            visit(connection);
        }
    }
    Ok(())
}

/// `None` for the heading, and for other protocols: `TCP 0A000001 9C40 0A600001 0050 0AF40103 1F90 ESTABLISHED 899`.
fn read_line(line: &str) -> Option<Remembered> {
    let mut words = line.split_whitespace();
    let protocol = match words.next()? {
        "TCP" => 6,
        "UDP" => 17,
        _ => return None,
    };
    let mut end = || Some(SocketAddr::new(read_ip(words.next()?)?, u16::from_str_radix(words.next()?, 16).ok()?));
    let (client, address) = (end()?, end()?);
    Some(Remembered { client, to: ServiceAddress { protocol, address } })
}

/// IPv4 as eight digits, IPv6 as anybody writes it, with or without brackets.
fn read_ip(word: &str) -> Option<IpAddr> {
    if word.len() == 8 && !word.contains(':') {
        return u32::from_str_radix(word, 16).ok().map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits)));
    }
    word.trim_matches(['[', ']']).parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_families() {
        let v4 = read_line("TCP 0A000001 9C40 0A600001 0050 0AF40103 1F90 ESTABLISHED     899").unwrap();
        assert_eq!((v4.client, v4.to.protocol), ("10.0.0.1:40000".parse().unwrap(), 6));
        assert_eq!(v4.to.address, "10.96.0.1:80".parse().unwrap());
        let v6 = "UDP fd00:0000:0000:0000:0000:0000:0000:0001 9C40 fd00:0010:0096:0000:0000:0000:0000:0001 0035 \
                  fd00:0000:0000:0000:0000:0000:0000:0002 14E9 UDP             299";
        let v6 = read_line(v6).unwrap();
        assert_eq!((v6.client, v6.to.protocol), ("[fd00::1]:40000".parse().unwrap(), 17));
        assert_eq!(v6.to.address, "[fd00:10:96::1]:53".parse().unwrap());
        for other in
            ["Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires", "", "TCP 0A000001", "UDP x y z"]
        {
            assert_eq!(read_line(other), None, "{other:?}");
        }
    }
}
