//! Netlink as every protocol of it has in common: messages, attributes, and a socket that is asked and answers.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Length of `struct nlmsghdr` (include/uapi/linux/netlink.h).
pub const MESSAGE_HEADER: usize = 16;
/// Length of `struct nlattr`.
pub const ATTRIBUTE_HEADER: usize = 4;
/// `NLM_F_REQUEST`.
pub const REQUEST: u16 = 0x1;
/// `NLM_F_ACK`.
pub const ACK: u16 = 0x4;
/// `NLM_F_ROOT | NLM_F_MATCH`.
pub const DUMP: u16 = 0x300;
/// `NLM_F_EXCL`.
pub const EXCL: u16 = 0x200;
/// `NLM_F_CREATE`.
pub const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`.
pub const APPEND: u16 = 0x800;
/// `NLM_F_DUMP_INTR`: what was read out changed meanwhile.
const DUMP_INTERRUPTED: u16 = 0x10;
/// `NLM_F_CAPPED` and `NLM_F_ACK_TLVS`: the shape of an acknowledgement.
const ACK_CAPPED: u16 = 0x100;
const ACK_ATTRIBUTES: u16 = 0x200;
/// `NLMSG_ERROR` and `NLMSG_DONE`.
const MESSAGE_ERROR: u16 = 2;
const MESSAGE_DONE: u16 = 3;
/// `NLMSGERR_ATTR_MSG`.
const ERROR_TEXT: u16 = 1;
/// `NLA_F_NESTED`, and the mask of the bits that are the attribute's type.
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;
/// `NETLINK_CAP_ACK` and `NETLINK_EXT_ACK` (options of `SOL_NETLINK`).
const CAP_ACK: libc::c_int = 10;
const EXT_ACK: libc::c_int = 11;
/// `NETLINK_GET_STRICT_CHK`.
const STRICT: libc::c_int = 12;
/// One read; larger than any message that the kernel puts into a dump (32 KiB).
const READ_BYTES: usize = 64 * 1024;
/// How long the kernel may take to answer. It answers within the system call that asks.
const ANSWER_SECONDS: libc::time_t = 10;

/// Appends a message to `buffer`; `body` writes what follows the header, and the length is filled in behind it.
pub fn message(buffer: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let start = buffer.len();
    buffer.extend_from_slice(&0u32.to_ne_bytes());
    buffer.extend_from_slice(&kind.to_ne_bytes());
    buffer.extend_from_slice(&flags.to_ne_bytes());
    buffer.extend_from_slice(&sequence.to_ne_bytes());
    buffer.extend_from_slice(&0u32.to_ne_bytes());
    body(buffer);
    end_message(buffer, start);
}

/// Writes the length of the message that starts at `start` and ends with the buffer.
pub fn end_message(buffer: &mut Vec<u8>, start: usize) {
    pad(buffer);
    let length = u32::try_from(buffer.len() - start).unwrap_or(u32::MAX);
    if let Some(field) = buffer.get_mut(start..start + 4) {
        field.copy_from_slice(&length.to_ne_bytes());
    }
}

/// Appends an attribute. A value longer than 65531 bytes does not fit; its length would be wrong and the kernel refuses it.
pub fn attribute(buffer: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).unwrap_or(u16::MAX);
    buffer.extend_from_slice(&length.to_ne_bytes());
    buffer.extend_from_slice(&kind.to_ne_bytes());
    buffer.extend_from_slice(value);
    pad(buffer);
}

/// Appends a string with its terminating zero.
pub fn attribute_string(buffer: &mut Vec<u8>, kind: u16, value: &str) {
    let length = u16::try_from(ATTRIBUTE_HEADER + value.len() + 1).unwrap_or(u16::MAX);
    buffer.extend_from_slice(&length.to_ne_bytes());
    buffer.extend_from_slice(&kind.to_ne_bytes());
    buffer.extend_from_slice(value.as_bytes());
    buffer.push(0);
    pad(buffer);
}

/// Appends an attribute that holds attributes, which `body` writes.
pub fn nested(buffer: &mut Vec<u8>, kind: u16, body: impl FnOnce(&mut Vec<u8>)) {
    let start = begin_nested(buffer, kind);
    body(buffer);
    end_nested(buffer, start);
}

/// Begins an attribute that holds attributes; returns its place for [`end_nested`].
pub fn begin_nested(buffer: &mut Vec<u8>, kind: u16) -> usize {
    let start = buffer.len();
    buffer.extend_from_slice(&0u16.to_ne_bytes());
    buffer.extend_from_slice(&(kind | NESTED).to_ne_bytes());
    start
}

/// Ends the attribute that began at `start`.
pub fn end_nested(buffer: &mut [u8], start: usize) {
    let length = u16::try_from(buffer.len() - start).unwrap_or(u16::MAX);
    if let Some(field) = buffer.get_mut(start..start + 2) {
        field.copy_from_slice(&length.to_ne_bytes());
    }
}

fn pad(buffer: &mut Vec<u8>) {
    buffer.resize(buffer.len().next_multiple_of(4), 0);
}

/// The attributes in `bytes`: type without its flags, and value. Ends at the first that is cut off.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?) & TYPE_MASK;
        let value = rest.get(ATTRIBUTE_HEADER..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of a type.
pub fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// `GENL_ID_CTRL`, `CTRL_CMD_GETFAMILY`, `CTRL_ATTR_FAMILY_ID` and `CTRL_ATTR_FAMILY_NAME` of include/uapi/linux/genetlink.h.
const CONTROLLER: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

/// The message type of a generic netlink family; `None` where the kernel does not have it. Asking may load its module.
///
/// # Errors
/// Those of [`Socket::ask`].
pub fn generic_family(socket: &mut Socket, name: &str) -> io::Result<Option<u16>> {
    let mut family = None;
    let request = |buffer: &mut Vec<u8>| {
        buffer.extend_from_slice(&[GET_FAMILY, 1, 0, 0]);
        attribute_string(buffer, FAMILY_NAME, name);
    };
    let asked = socket.ask(CONTROLLER, ACK, request, |message| {
        let id = message.body.get(4..).and_then(|body| find(body, FAMILY_ID));
        family = id.and_then(|id| Some(u16::from_ne_bytes(*id.first_chunk()?)));
        Ok(())
    });
    match asked {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        asked => asked.map(|()| family),
    }
}

/// A message that was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received<'a> {
    /// Type: of the protocol.
    pub kind: u16,
    /// Flags.
    pub flags: u16,
    /// Sequence number of the request that it answers.
    pub sequence: u32,
    /// What follows the header.
    pub body: &'a [u8],
}

/// A request among others of one datagram.
pub struct Request<'a> {
    /// Type: of the protocol.
    pub kind: u16,
    /// Flags besides those that every request has.
    pub flags: u16,
    /// Writes what follows the header.
    pub body: &'a dyn Fn(&mut Vec<u8>),
}

/// The kernel's word on one request.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Sequence number of the request.
    pub sequence: u32,
    /// Error number; 0 is success.
    pub errno: i32,
    /// What the kernel says about it, where it says anything.
    pub text: Option<String>,
}

/// A netlink socket of one protocol, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Socket {
    socket: OwnedFd,
    sequence: u32,
    send_bytes: usize,
    read: Vec<u8>,
}

impl Socket {
    /// Opens a socket of `protocol`, for instance `libc::NETLINK_NETFILTER`.
    ///
    /// # Errors
    /// Those of socket(2) and setsockopt(2).
    pub fn open(protocol: libc::c_int) -> io::Result<Self> {
        // SAFETY: no memory of ours is handed over.
        let socket = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let socket = Self { socket, sequence: 0, send_bytes: 0, read: Vec::new() };
        socket.set_option(libc::SOL_NETLINK, CAP_ACK, &1i32)?;
        socket.set_option(libc::SOL_NETLINK, EXT_ACK, &1i32)?;
        let wait = libc::timeval { tv_sec: ANSWER_SECONDS, tv_usec: 0 };
        socket.set_option(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &wait)?;
        Ok(socket)
    }

    /// Makes the kernel hand out of a dump only what the request's header describes (Linux 4.20), where the protocol has that.
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn filter_dumps(&self) -> io::Result<()> {
        self.set_option(libc::SOL_NETLINK, STRICT, &1i32)
    }

    /// A sequence number that no earlier request of this socket had.
    pub fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// Sends one datagram of any number of messages.
    ///
    /// # Errors
    /// Those of send(2); `EPERM` when a large datagram needs `CAP_NET_ADMIN`.
    pub fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        self.make_room(datagram.len())?;
        let (fd, start) = (self.socket.as_raw_fd(), datagram.as_ptr().cast());
        // SAFETY: the kernel reads `len` bytes from the slice, which outlives the call.
        let sent = unsafe { libc::send(fd, start, datagram.len(), 0) };
        match usize::try_from(sent) {
            Ok(sent) if sent == datagram.len() => Ok(()),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    /// Reads the answers of a request that is no dump, up to the acknowledgement of `last`; the answers with errors, all of
    /// them if there are any.
    ///
    /// # Errors
    /// Those of recv(2); `TimedOut` when the kernel says nothing; `InvalidData` for what is no netlink message.
    pub fn acknowledged(&mut self, first: u32, last: u32) -> io::Result<Vec<Answer>> {
        let mut failures = Vec::new();
        let mut done = false;
        while !done {
            self.receive(|message| {
                let in_range = message.sequence.wrapping_sub(first) <= last.wrapping_sub(first);
                let Some(answer) = answer(message).filter(|_| in_range) else { return Ok(()) };
                done |= answer.sequence == last || answer.errno != 0;
                if answer.errno != 0 {
                    failures.push(answer);
                }
                Ok(())
            })?;
        }
        Ok(failures)
    }

    /// Sends a request and hands every message that answers it to `visit`. For a dump, and for a request with [`ACK`].
    ///
    /// # Errors
    /// Those of send(2) and recv(2); the kernel's error as an `io::Error`; `Interrupted` when what a dump reads changed
    /// meanwhile; what `visit` returns.
    pub fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        body: impl FnOnce(&mut Vec<u8>),
        mut visit: impl FnMut(Received<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        let sequence = self.next_sequence();
        let mut request = Vec::new();
        message(&mut request, kind, REQUEST | flags, sequence, body);
        self.send(&request)?;
        let (mut done, mut result) = (false, Ok(()));
        while !done {
            self.receive(|message| {
                if message.sequence != sequence {
                    return Ok(());
                }
                match message.kind {
                    MESSAGE_DONE => done = true,
                    MESSAGE_ERROR => {
                        done = true;
                        let errno = answer(message).map_or(libc::EPROTO, |answer| answer.errno);
                        if errno != 0 {
                            result = Err(io::Error::from_raw_os_error(errno));
                        }
                    }
                    _ => visit(message)?,
                }
                Ok(())
            })?;
        }
        result
    }

    /// Sends requests in one datagram, each with [`ACK`], and returns the kernel's error number for each, in their order; 0 is
    /// success. The kernel answers one behind the other within the system call, so nothing of ours comes between them.
    ///
    /// # Errors
    /// Those of send(2) and recv(2); `TimedOut` when an answer does not come.
    pub fn ask_together<const N: usize>(&mut self, requests: [Request<'_>; N]) -> io::Result<[i32; N]> {
        let (mut datagram, mut errors) = (Vec::new(), [None; N]);
        let first = self.sequence.wrapping_add(1);
        for Request { kind, flags, body } in requests {
            let sequence = self.next_sequence();
            message(&mut datagram, kind, REQUEST | ACK | flags, sequence, body);
        }
        self.send(&datagram)?;
        while errors.iter().any(Option::is_none) {
            self.receive(|message| {
                let place = usize::try_from(message.sequence.wrapping_sub(first)).ok();
                let of = place.and_then(|place| errors.get_mut(place));
                if let (Some(of), Some(answer)) = (of, answer(message)) {
                    *of = Some(answer.errno);
                }
                Ok(())
            })?;
        }
        Ok(errors.map(Option::unwrap_or_default))
    }

    /// Receives one datagram and hands out its messages.
    fn receive(&mut self, visit: impl FnMut(Received<'_>) -> io::Result<()>) -> io::Result<()> {
        self.read.resize(READ_BYTES, 0);
        let (fd, start) = (self.socket.as_raw_fd(), self.read.as_mut_ptr().cast());
        // SAFETY: the kernel writes at most `len` bytes into the buffer, which nobody else uses.
        let received = unsafe { libc::recv(fd, start, self.read.len(), 0) };
        let Ok(received) = usize::try_from(received) else {
            let error = io::Error::last_os_error();
            return Err(if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error });
        };
        messages(self.read.get(..received).unwrap_or_default(), visit)
    }

    /// A datagram has to fit into the send buffer whole.
    fn make_room(&mut self, bytes: usize) -> io::Result<()> {
        if bytes <= self.send_bytes {
            return Ok(());
        }
        let wanted = i32::try_from(bytes + READ_BYTES).map_err(|_| io::Error::from_raw_os_error(libc::EMSGSIZE))?;
        self.set_option(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &wanted)?;
        self.send_bytes = bytes;
        Ok(())
    }

    fn set_option<T>(&self, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
        let length = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
        let value: *const T = value;
        // SAFETY: the kernel reads `length` bytes from the value, which outlives the call.
        let result = unsafe { libc::setsockopt(self.socket.as_raw_fd(), level, option, value.cast(), length) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Hands out the messages of a datagram. `Interrupted` when one of them says that what a dump reads changed meanwhile.
pub(crate) fn messages(datagram: &[u8], mut visit: impl FnMut(Received<'_>) -> io::Result<()>) -> io::Result<()> {
    let (mut rest, mut interrupted) = (datagram, false);
    while !rest.is_empty() {
        let (message, length) = split(rest).ok_or(io::ErrorKind::InvalidData)?;
        interrupted |= message.flags & DUMP_INTERRUPTED != 0;
        visit(message)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    if interrupted { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
}

/// The first message of `bytes`, and its length.
fn split(bytes: &[u8]) -> Option<(Received<'_>, usize)> {
    let length = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()?;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let flags = u16::from_ne_bytes(*bytes.get(6..)?.first_chunk()?);
    let sequence = u32::from_ne_bytes(*bytes.get(8..)?.first_chunk()?);
    let body = bytes.get(MESSAGE_HEADER..length)?;
    Some((Received { kind, flags, sequence, body }, length))
}

/// Reads a message of type `NLMSG_ERROR`: error number, the request or only its header, and attributes.
pub(crate) fn answer(message: Received<'_>) -> Option<Answer> {
    if message.kind != MESSAGE_ERROR {
        return None;
    }
    let errno = i32::from_ne_bytes(*message.body.first_chunk()?).wrapping_neg();
    let request = message.body.get(4..)?;
    let request_length = usize::try_from(u32::from_ne_bytes(*request.first_chunk()?)).ok()?;
    let skipped = if message.flags & ACK_CAPPED != 0 { MESSAGE_HEADER } else { request_length.next_multiple_of(4) };
    let explained = message.flags & ACK_ATTRIBUTES != 0;
    let text = explained.then(|| find(request.get(skipped..)?, ERROR_TEXT)).flatten();
    let text = text.map(|text| String::from_utf8_lossy(text).trim_end_matches('\0').to_owned());
    Some(Answer { sequence: message.sequence, errno, text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut buffer = Vec::new();
        message(&mut buffer, 7, REQUEST, 42, |buffer| {
            attribute(buffer, 1, &[1, 2, 3]);
            nested(buffer, 2, |buffer| attribute_string(buffer, 3, "name"));
            attribute(buffer, 4, &[]);
        });
        let (message, length) = split(&buffer).unwrap();
        assert_eq!((message.kind, message.flags, message.sequence), (7, REQUEST, 42));
        assert_eq!(length, buffer.len());
        let all: Vec<_> = attributes(message.body).collect();
        assert_eq!(all.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [1, 2, 4]);
        assert_eq!(all[0].1, [1, 2, 3]);
        assert_eq!(find(all[1].1, 3), Some(b"name\0".as_slice()));
        assert_eq!(find(all[1].1, 4), None);
    }

    #[test]
    fn what_is_cut_off_ends_the_attributes() {
        let mut buffer = Vec::new();
        attribute(&mut buffer, 1, &[1, 2, 3, 4]);
        attribute(&mut buffer, 2, &[5, 6, 7, 8]);
        for length in 0..buffer.len() {
            let whole = attributes(&buffer[..length]).count();
            assert_eq!(whole, length / 8, "{length} bytes");
        }
        assert_eq!(attributes(&[2, 0, 1, 0]).count(), 0, "a length shorter than its own header");
        assert!(split(&[200, 0, 0, 0, 1, 0]).is_none());
    }

    #[test]
    fn the_kernel_acknowledges_and_explains() {
        // NETLINK_ROUTE, RTM_GETLINK (18) of interface 1, which every namespace has, then of one that none has.
        let mut socket = Socket::open(libc::NETLINK_ROUTE).unwrap();
        let link = |index: i32| {
            move |buffer: &mut Vec<u8>| {
                buffer.extend_from_slice(&[0; 4]);
                buffer.extend_from_slice(&index.to_ne_bytes());
                buffer.extend_from_slice(&[0; 8]);
            }
        };
        let mut seen = 0;
        let count = |_: Received<'_>| {
            seen += 1;
            Ok(())
        };
        socket.ask(18, ACK, link(1), count).unwrap();
        assert_eq!(seen, 1);
        let error = socket.ask(18, ACK, link(i32::MAX), |_| Ok(())).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }
}
