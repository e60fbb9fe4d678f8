//! A daemon's `/metrics` and `/healthz` as a scraper on its node reads them.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use node_sys::Netns;

use crate::patient;

/// For the connection, and again for the answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Largest answer in bytes.
const ANSWER_MAX: u64 = 16 << 20;

/// Samples by their full name with labels, as the text format writes them: `a_total{path="socket"}`.
pub type Samples = BTreeMap<String, f64>;

/// The body of `http://ADDRESS/PATH`, asked for inside `netns`.
///
/// # Errors
/// When no one answers, or the status is not 200.
pub fn http_get(netns: &Netns, address: SocketAddr, path: &str) -> Result<String> {
    let answer = netns.run(|| exchange(address, path))?;
    let answer = answer.with_context(|| format!("cannot get http://{address}{path} in {}", netns.label()))?;
    let (head, body) = answer.split_once("\r\n\r\n").context("not an HTTP answer")?;
    let status = head.lines().next().unwrap_or_default();
    ensure!(status.split(' ').nth(1) == Some("200"), "http://{address}{path} answered {status:?}");
    Ok(body.to_owned())
}

/// Reads the Prometheus text format; comments and lines that are no samples are left out.
pub fn parse(text: &str) -> Samples {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        })
        .collect()
}

/// HTTP/1.0: the answer ends with the connection, so it needs no length and no chunks.
fn exchange(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, patient(PATIENCE))?;
    stream.set_read_timeout(Some(patient(PATIENCE)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(ANSWER_MAX).read_to_string(&mut answer)?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read_with_their_labels() {
        let samples = parse("# HELP a b\n# TYPE a counter\na{path=\"socket\"} 3\nb 1.5e3\nnonsense\n");
        assert_eq!(samples.get("a{path=\"socket\"}"), Some(&3.0));
        assert_eq!(samples.get("b"), Some(&1500.0));
        assert_eq!(samples.len(), 2);
    }
}
