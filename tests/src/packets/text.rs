//! Packets as lines of text, both ways: `tcp 10.0.0.1:1000 > 10.0.0.2:80 SYN ttl=63`.
//!
//! `PROTOCOL SOURCE > DESTINATION WORDS`, where the words are, in this order and each only where it says something:
//! the flags of TCP or the name of an SCTP chunk, `ttl=` unless 64, `df`, `options=` bytes of IPv4 options, `ext=` numbers of extension
//! headers, `frag=ID+OFFSET` with `+` behind it where more follow, `sum=none|bad`, `data=` bytes of payload. An ICMP message has its type
//! and code behind the protocol, `mtu=`, and `about (PACKET)` for the one that it quotes. A fragment that is not the first is `later`.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};

use crate::fuzz::{ACK, FIN, RST, SCTP, SYN, crc32c};
use crate::packet::{ICMP, ICMP6, Packet, TCP, UDP};

/// The flags that have names here.
const FLAGS: [(u8, &str); 4] = [(SYN, "SYN"), (FIN, "FIN"), (RST, "RST"), (ACK, "ACK")];
/// The chunks that have names here.
const CHUNKS: [(u8, &str); 5] = [(0, "DATA"), (1, "INIT"), (2, "INIT-ACK"), (6, "ABORT"), (14, "COMPLETE")];
/// What payload consists of.
const FILL: u8 = b'a';

/// Reads a packet. Fragments are cut from the whole one, which is as long as `whole=` says.
pub(super) fn parse(text: &str) -> Result<Packet> {
    let (text, quoted) = match text.split_once(" about (") {
        Some((text, rest)) => (text, Some(parse(rest.strip_suffix(')').context("an open bracket")?)?)),
        None => (text, None),
    };
    let words: Vec<&str> = text.split_whitespace().collect();
    let arrow = words.iter().position(|word| *word == ">").context("no `>` between the ends")?;
    let (kind, source, destination) = (words[0], words[arrow - 1], *words.get(arrow + 1).context("no destination")?);
    let value = |name: &str| words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let number = |name: &str| value(name).map(|text| text.parse::<usize>().with_context(|| format!("{name}={text}")));
    let data = vec![FILL; number("data").transpose()?.unwrap_or(0)];
    let mut packet = match kind {
        "tcp" => Packet::tcp(source.parse()?, destination.parse()?, flags(&words[arrow + 2..]), 1, &data),
        "udp" => Packet::udp(source.parse()?, destination.parse()?, &data),
        "sctp" => sctp(source.parse()?, destination.parse()?, chunk(&words[arrow + 2..])?, &data),
        "icmp" => icmp(
            &words,
            source.parse()?,
            destination.parse()?,
            number("mtu").transpose()?,
            quoted.as_ref(),
            number("quote").transpose()?,
        )?,
        "ip" => Packet::new(
            source.parse()?,
            destination.parse()?,
            number("protocol").transpose()?.context("no protocol=")? as u8,
            data,
        ),
        _ => bail!("{kind} is no protocol"),
    };
    packet.hops = number("ttl").transpose()?.unwrap_or(64) as u8;
    packet.dont_fragment = words.contains(&"df");
    packet.options = vec![1; number("options").transpose()?.unwrap_or(0)];
    if let Some(kinds) = value("ext") {
        packet = extended(packet, kinds)?;
    }
    let at = if packet.protocol == UDP { 6 } else { 16 };
    match value("sum") {
        None => {}
        Some("none") => packet.payload[at..at + 2].fill(0),
        Some(_) => packet.payload[at] ^= 0x55,
    }
    match value("frag") {
        Some(piece) => cut(packet, piece),
        None => Ok(packet),
    }
}

fn flags(words: &[&str]) -> u8 {
    let named = |word: &str| FLAGS.iter().find(|(_, name)| *name == word).map_or(0, |(flag, _)| *flag);
    words.first().map_or(ACK, |words| words.split(',').map(named).fold(0, |all, flag| all | flag))
}

fn chunk(words: &[&str]) -> Result<u8> {
    let word = words.first().context("no chunk")?;
    CHUNKS.iter().find(|(_, name)| name == word).map(|(kind, _)| *kind).with_context(|| format!("{word} is no chunk"))
}

fn sctp(source: SocketAddr, destination: SocketAddr, chunk: u8, data: &[u8]) -> Packet {
    let mut payload = [source.port(), destination.port()].map(u16::to_be_bytes).concat();
    payload.extend([0, 0, 0, 9, 0, 0, 0, 0, chunk, 0, 0, 16]);
    payload.extend([0; 12]);
    payload.extend(data);
    let sum = crc32c(&payload).to_le_bytes();
    payload[8..12].copy_from_slice(&sum);
    Packet::new(source.ip(), destination.ip(), SCTP, payload)
}

/// `icmp 3/1 SOURCE > DESTINATION about (...)`; `quote=` says how many bytes of the quoted packet there are.
fn icmp(
    words: &[&str],
    source: IpAddr,
    destination: IpAddr,
    mtu: Option<usize>,
    quoted: Option<&Packet>,
    length: Option<usize>,
) -> Result<Packet> {
    let (kind, code) = words.get(1).and_then(|word| word.split_once('/')).context("no type and code")?;
    let quote = quoted.map(Packet::bytes).unwrap_or_default();
    let length = length.unwrap_or(quote.len());
    ensure!(length <= quote.len(), "it has {} bytes only", quote.len());
    Ok(Packet::icmp_error(
        source,
        destination,
        [kind.parse()?, code.parse()?],
        mtu.unwrap_or(0) as u32,
        &quote[..length],
    ))
}

fn extended(packet: Packet, kinds: &str) -> Result<Packet> {
    let kinds: Vec<u8> = kinds.split(',').map(str::parse).collect::<Result<_, _>>()?;
    let protocol = packet.protocol;
    let headers = (0..kinds.len()).flat_map(|index| {
        let next = kinds.get(index + 1).copied().unwrap_or(protocol);
        let body = if kinds[index] == 43 { [4, 0, 0, 0, 0, 0] } else { [1, 4, 0, 0, 0, 0] };
        [next, 0].into_iter().chain(body)
    });
    let headers = headers.collect();
    Ok(packet.with_extensions(kinds[0], headers))
}

/// `ID+OFFSET+SIZE`: so many bytes of the whole packet from there on; more follow unless it ends there.
fn cut(whole: Packet, piece: &str) -> Result<Packet> {
    let numbers: Vec<usize> = piece.split('+').map(str::parse).collect::<Result<_, _>>()?;
    let &[identification, offset, size] = &numbers[..] else { bail!("frag={piece} is not ID+OFFSET+SIZE") };
    let end = (offset + size).min(whole.payload.len());
    let fragment = Some((identification as u32, offset as u16, end < whole.payload.len()));
    let payload = whole.payload.get(offset..end).context("it lies behind the packet")?.to_vec();
    Ok(Packet { fragment, payload, dont_fragment: whole.source.is_ipv6(), ..whole })
}

/// Writes a packet as it is to be read; its length behind the headers as `data=`.
pub(super) fn write(packet: &Packet) -> String {
    let mut words = Vec::new();
    let later = packet.fragment.is_some_and(|(_, offset, _)| offset != 0);
    let (head, data) = if later { ("later".to_owned(), packet.payload.len()) } else { head(packet) };
    let ends = match packet.protocol {
        TCP | UDP | SCTP if !later => [packet.from().to_string(), packet.to().to_string()],
        _ => [packet.source.to_string(), packet.destination.to_string()],
    };
    words.push(format!("{head} {} > {}", ends[0], ends[1]));
    words.extend(named(packet).filter(|_| !later));
    words.extend((packet.hops != 64).then(|| format!("ttl={}", packet.hops)));
    words.extend((packet.dont_fragment && packet.source.is_ipv4()).then(|| "df".to_owned()));
    words.extend(
        (packet.first_extension.is_some() || !packet.options.is_empty())
            .then(|| format!("options={}", packet.options.len())),
    );
    words
        .extend(packet.fragment.map(|(id, offset, more)| format!("frag={id}+{offset}{}", if more { "+" } else { "" })));
    words.extend(sum(packet, later).map(|what| format!("sum={what}")));
    words.extend((data > 0).then(|| format!("data={data}")));
    if matches!(packet.protocol, ICMP | ICMP6) && !later {
        let mtu = packet.payload.get(6..8).map_or(0, |mtu| u16::from_be_bytes([mtu[0], mtu[1]]));
        words.extend((mtu != 0).then(|| format!("mtu={mtu}")));
        words.extend(packet.quoted().map(|quoted| format!("about ({})", write_quoted(&quoted))));
    }
    words.join(" ")
}

fn head(packet: &Packet) -> (String, usize) {
    let length = packet.payload.len();
    match packet.protocol {
        TCP => ("tcp".to_owned(), length.saturating_sub(20)),
        UDP => ("udp".to_owned(), length.saturating_sub(8)),
        SCTP => ("sctp".to_owned(), length.saturating_sub(28)),
        ICMP | ICMP6 => {
            let byte = |at: usize| packet.payload.get(at).copied().unwrap_or(0);
            (format!("icmp {}/{}", byte(0), byte(1)), 0)
        }
        protocol => (format!("protocol {protocol}"), length),
    }
}

/// Flags or a chunk, by name.
fn named(packet: &Packet) -> Option<String> {
    match packet.protocol {
        TCP => {
            let flags = *packet.payload.get(13)?;
            let names = FLAGS.iter().filter(|(flag, _)| flags & flag != 0).map(|(_, name)| *name);
            Some(names.collect::<Vec<_>>().join(","))
        }
        SCTP => {
            let kind = packet.payload.get(12)?;
            CHUNKS.iter().find(|(chunk, _)| chunk == kind).map(|(_, name)| (*name).to_owned())
        }
        _ => None,
    }
}

/// A quoted packet may be cut off; its checksum is that of all of it.
fn write_quoted(packet: &Packet) -> String {
    let (head, _) = head(packet);
    match packet.protocol {
        TCP | UDP | SCTP => format!("{head} {} > {}", packet.from(), packet.to()),
        _ => format!("{head} {} > {}", packet.source, packet.destination),
    }
}

/// What is not right about the transport checksum.
fn sum(packet: &Packet, later: bool) -> Option<&'static str> {
    let field = packet.payload.get(6..8) == Some(&[0, 0]);
    match packet.protocol {
        _ if later || packet.fragment.is_some() => None,
        UDP if field => Some("none"),
        SCTP => {
            let mut payload = packet.payload.clone();
            let field: [u8; 4] = std::array::from_fn(|index| payload[8 + index]);
            payload[8..12].fill(0);
            (crc32c(&payload) != u32::from_le_bytes(field)).then_some("bad")
        }
        TCP | UDP | ICMP | ICMP6 => (!packet.checksum_is_right()).then_some("bad"),
        _ => None,
    }
}
