//! The programs that are attached, as the kernel has them: what it took to load them is given back.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::cgroup_sock::CgroupSockAttachType;
use aya::programs::cgroup_sock_addr::CgroupSockAddrAttachType as Hook;
use aya::programs::{CgroupSock, CgroupSockAddr, Program, ProgramError, SchedClassifier, Xdp};
use aya_obj::programs::XdpAttachType;
use node_sys::bpf::pin;

use super::attach::refused;
use super::error::EbpfError;
use super::flows::{EDITORS, program_pin};

/// Programs by name. aya keeps the instructions and the debugging data of each program that it has loaded, a megabyte for ours; of one
/// that it finds in the BPF file system it keeps a descriptor.
pub(super) struct Programs(BTreeMap<String, Program>);

impl Programs {
    /// The programs of these names, which are loaded. Each is pinned for a moment, below `version`.
    pub(super) fn of<'a>(
        ebpf: &mut Ebpf,
        names: impl Iterator<Item = &'a str>,
        version: &Path,
    ) -> Result<Self, EbpfError> {
        let mut programs = BTreeMap::new();
        for name in names {
            let program = ebpf.program(name).ok_or_else(|| missing(name))?;
            programs.insert(name.to_owned(), reopen(name, program, version)?);
        }
        Ok(Self(programs))
    }

    /// The program of this name, of whatever kind.
    pub(super) fn get(&mut self, name: &str) -> Result<&mut Program, EbpfError> {
        self.0.get_mut(name).ok_or_else(|| missing(name))
    }

    /// The program of this name, of the kind `P`.
    pub(super) fn get_as<'a, P>(&'a mut self, name: &str) -> Result<&'a mut P, EbpfError>
    where
        &'a mut P: TryFrom<&'a mut Program>,
    {
        self.get(name)?.try_into().map_err(|_| missing(name))
    }
}

/// Pins the programs that change the table of flows for user space, in the place of an earlier process's.
pub(super) fn pin_editors(ebpf: &Ebpf, version: &Path) -> Result<(), EbpfError> {
    for name in EDITORS {
        // Whoever edits meanwhile finds the old one or the new one.
        let new = pin_aside(name, ebpf.program(name).ok_or_else(|| missing(name))?, version)?;
        let path = program_pin(version, name);
        fs::rename(&new, &path).map_err(|source| EbpfError::Bpffs { path, source })?;
    }
    Ok(())
}

/// Pins a program under a name that is used for a moment.
fn pin_aside(name: &str, program: &Program, version: &Path) -> Result<PathBuf, EbpfError> {
    let path = program_pin(version, &format!("{name}-new"));
    let failed = |source| EbpfError::Bpffs { path: path.clone(), source };
    let fd = program.fd().map_err(|source| refused(name, &source))?;
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(failed)?;
    }
    remove(&path).map_err(failed)?;
    pin(fd.as_fd(), &path).map_err(failed)?;
    Ok(path)
}

fn reopen(name: &str, program: &Program, version: &Path) -> Result<Program, EbpfError> {
    let path = pin_aside(name, program, version)?;
    let opened = open(name, program, &path);
    remove(&path).map_err(|source| EbpfError::Bpffs { path, source })?;
    opened.map_err(|source| refused(name, &source))?.ok_or_else(|| missing(name))
}

/// `None` for a program of a kind that is not attached.
fn open(name: &str, program: &Program, path: &Path) -> Result<Option<Program>, ProgramError> {
    Ok(Some(match program {
        Program::SchedClassifier(_) => Program::SchedClassifier(SchedClassifier::from_pin(path)?),
        Program::Xdp(_) => Program::Xdp(Xdp::from_pin(path, XdpAttachType::Interface)?),
        Program::CgroupSock(_) => Program::CgroupSock(CgroupSock::from_pin(path, CgroupSockAttachType::SockRelease)?),
        Program::CgroupSockAddr(_) => match hook(name) {
            Some(hook) => Program::CgroupSockAddr(CgroupSockAddr::from_pin(path, hook)?),
            None => return Ok(None),
        },
        _ => return Ok(None),
    }))
}

/// Programs at addresses of sockets have the names of their hooks.
fn hook(name: &str) -> Option<Hook> {
    Some(match name {
        "connect4" => Hook::Connect4,
        "connect6" => Hook::Connect6,
        "sendmsg4" => Hook::UDPSendMsg4,
        "sendmsg6" => Hook::UDPSendMsg6,
        "recvmsg4" => Hook::UDPRecvMsg4,
        "recvmsg6" => Hook::UDPRecvMsg6,
        "getpeername4" => Hook::GetPeerName4,
        "getpeername6" => Hook::GetPeerName6,
        _ => return None,
    })
}

/// That there is none is no error.
fn remove(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

pub(super) fn missing(program: &str) -> EbpfError {
    EbpfError::MissingProgram { program: program.to_owned() }
}
