//! Archives in the "newc" format, as the kernel unpacks them: <https://docs.kernel.org/driver-api/early-userspace/buffer-format.html>.

use std::io::{self, Write};

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// Writes one archive, entry by entry; a folder before what is in it.
pub(crate) struct Writer<W> {
    output: W,
    entries: u32,
}

impl<W: Write> Writer<W> {
    pub(crate) fn new(output: W) -> Self {
        Self { output, entries: 0 }
    }

    pub(crate) fn folder(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, FOLDER, &[])
    }

    /// A file that may be executed.
    pub(crate) fn program(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.entry(name, PROGRAM, bytes)
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.output)
    }

    /// A magic number and thirteen hexadecimal fields: inode, mode, owner, group, links, time, size, two device numbers, length of
    /// the name, checksum; name and content are padded to four bytes.
    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
        self.entries += 1;
        let size = u32::try_from(bytes.len()).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        let name_size = name.len() as u32 + 1;
        write!(self.output, "070701")?;
        for field in [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            write!(self.output, "{field:08X}")?;
        }
        write!(self.output, "{name}\0")?;
        self.pad(110 + name.len() + 1)?;
        self.output.write_all(bytes)?;
        self.pad(bytes.len())
    }

    fn pad(&mut self, written: usize) -> io::Result<()> {
        let zeros = written.next_multiple_of(4) - written;
        write!(self.output, "{}", "\0".repeat(zeros))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_padded_to_four_bytes() {
        let mut archive = Writer::new(Vec::new());
        archive.program("init", b"abc").unwrap();
        let bytes = archive.finish().unwrap();
        let text = String::from_utf8(bytes.clone()).unwrap();
        assert!(text.starts_with("07070100000001000081ED"));
        // 110 bytes of header and "init\0" make 115, the content starts at 116 and ends at 120.
        assert_eq!(text.get(110..120), Some("init\0\0abc\0"));
        assert_eq!((bytes.len() % 4, text.get(120..126)), (0, Some("070701")));
    }
}
