//! Where the programs hang: links pinned beside the maps, so that they outlive this process and are replaced, never
//! detached, by the next one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::Ebpf;
use aya::programs::links::FdLink;
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact, qdisc_detach_program,
};
use aya::programs::{CgroupAttachMode, LinkOrder, Program, ProgramError, SchedClassifier, TcAttachType};
use node_sys::bpf::{open_pinned, replace_program};
use node_sys::probe::KernelVersion;

use super::EbpfConfig;
use super::error::EbpfError;
use super::frames::{FRAME_PROGRAM, FrameHook};
use super::pins::links_of;
use super::programs::{Programs, missing};
use crate::status::Attached;

/// Names of the socket programs, which are also the names of their pins. First the one that hears of closed sockets: what another
/// remembers before that is never forgotten.
const SOCKET_PROGRAMS: [&str; 9] = [
    "sock_release",
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
];

/// Names of the packet programs and where they hang.
const PACKET_PROGRAMS: [(&str, TcAttachType); 2] =
    [("tc_ingress", TcAttachType::Ingress), ("tc_egress", TcAttachType::Egress)];

/// The interface of the node with itself, which carries one program: what goes out there has been seen when it comes in.
pub(super) const LOOPBACK: &str = "lo";

/// The packet programs that an interface carries.
fn packet_programs(interface: &str) -> impl Iterator<Item = (&'static str, TcAttachType)> {
    PACKET_PROGRAMS
        .into_iter()
        .filter(move |(_, direction)| interface != LOOPBACK || *direction == TcAttachType::Egress)
}

/// Whether the link of this name keeps its place when another version's program comes: that of a socket program, or of XDP, of which an
/// interface has one. tc programs of both stand side by side until flows are carried over.
pub(super) fn is_replaced_in_place(link: &str) -> bool {
    SOCKET_PROGRAMS.contains(&link) || link.rsplit_once('-').is_some_and(|(program, _)| program == FRAME_PROGRAM)
}

/// Priority and handle of our clsact filters: fixed, so that the next process finds and replaces them.
const FILTER_PRIORITY: u16 = 4;
const FILTER_HANDLE: u32 = 0x7472;

/// First kernel with TCX.
const TCX_SINCE: KernelVersion = KernelVersion { major: 6, minor: 6 };

/// Which kernel interface carries the packet programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttachMode {
    /// TCX where the kernel has it (6.6), clsact elsewhere.
    Auto,
    /// TCX or nothing.
    Tcx,
    /// clsact filters.
    Clsact,
}

/// Attaches programs and replaces those that are attached.
pub(super) struct Attacher {
    programs: Programs,
    links: PathBuf,
    tcx: bool,
    attached: BTreeMap<u32, Arc<str>>,
    frames: FrameHook,
}

impl Attacher {
    /// Takes the programs of `ebpf`, which are loaded; attaches none. Links will be pinned in `version`, in a folder that exists.
    pub(super) fn new(
        ebpf: &mut Ebpf,
        version: &Path,
        config: &EbpfConfig,
        kernel: KernelVersion,
    ) -> Result<Self, EbpfError> {
        let tcx = match config.attach_mode {
            AttachMode::Tcx => true,
            AttachMode::Clsact => false,
            AttachMode::Auto => kernel >= TCX_SINCE,
        };
        let packets = PACKET_PROGRAMS.map(|(name, _)| name);
        let names = SOCKET_PROGRAMS.into_iter().chain(packets).chain([FRAME_PROGRAM]);
        let programs = Programs::of(ebpf, names, version)?;
        let frames = FrameHook::take(ebpf, config)?;
        Ok(Self { programs, links: links_of(version), tcx, attached: BTreeMap::new(), frames })
    }

    /// Attaches the socket programs to a cgroup, or puts them in the place of an earlier process's. Returns how many were not
    /// there.
    pub(super) fn attach_cgroup(&mut self, cgroup: &Path) -> Result<usize, EbpfError> {
        let mut attached = 0;
        let directory = File::open(cgroup).map_err(|source| EbpfError::Cgroup { path: cgroup.to_owned(), source })?;
        for name in SOCKET_PROGRAMS {
            let pin = self.links.join(name);
            let failed = |source: &dyn std::error::Error| not_attached(name, &cgroup.display(), source);
            let program = self.programs.get(name)?;
            let fd = program.fd().map_err(|source| failed(&source))?.try_clone().map_err(|source| failed(&source))?;
            if replace_pinned(&pin, fd.as_fd()) {
                continue;
            }
            let link = link_socket_program(program, &directory).map_err(|source| failed(&*source))?;
            pin_link(link.ok_or_else(|| missing(name))?, &pin)?;
            attached += 1;
        }
        Ok(attached)
    }

    /// Whether packet programs of a version before us that are on an interface go on behind ours.
    pub(super) fn leaves_others_behind(&self) -> bool {
        self.tcx
    }

    /// What hangs where.
    pub(super) fn attached(&self) -> Vec<Attached> {
        let cgroup = Attached { place: "cgroup".to_owned(), programs: SOCKET_PROGRAMS.map(str::to_owned).to_vec() };
        let kind = if self.tcx { "tcx" } else { "clsact" };
        let interfaces = self.attached.iter().map(|(index, interface)| {
            let frames = self.packet_pin(FRAME_PROGRAM, *index).exists().then(|| FRAME_PROGRAM.to_owned());
            let packets = packet_programs(interface).map(|(name, _)| format!("{name} ({kind})"));
            Attached { place: interface.to_string(), programs: frames.into_iter().chain(packets).collect() }
        });
        std::iter::once(cgroup).chain(interfaces).collect()
    }

    /// Attaches again what hung on the cgroup or the interfaces and was detached. Returns how many programs were.
    pub(super) fn reattach(&mut self, cgroup: &Path) -> Result<usize, EbpfError> {
        let mut detached = self.attach_cgroup(cgroup)?;
        for (index, name) in self.attached.clone() {
            detached += self.attach_interface(index, &name)?.unwrap_or(0);
        }
        Ok(detached)
    }

    /// Makes the packet programs hang on exactly `interfaces`. One that disappears meanwhile is left out; the next call
    /// brings the truth. One that refuses them keeps none of the others without; the first refusal is returned. VLAN devices lie on
    /// `vlan_parents`.
    pub(super) fn attach_interfaces(
        &mut self,
        interfaces: &BTreeMap<u32, Arc<str>>,
        vlan_parents: &BTreeSet<u32>,
    ) -> Result<usize, EbpfError> {
        let mut changed = self.frames.set_vlan_parents(vlan_parents);
        changed.retain(|index| self.attached.contains_key(index) && interfaces.contains_key(index));
        let gone: Vec<u32> =
            self.attached.iter().filter(|(index, name)| interfaces.get(index) != Some(name)).map(|(i, _)| *i).collect();
        for index in &gone {
            self.attached.remove(index);
            for (program, _) in PACKET_PROGRAMS {
                // The link went with its interface; only the pin is left.
                let _gone = fs::remove_file(self.packet_pin(program, *index));
            }
            self.frames.forget(*index);
            let _gone = fs::remove_file(self.packet_pin(FRAME_PROGRAM, *index));
        }
        let new: Vec<(u32, Arc<str>)> = interfaces
            .iter()
            .filter(|(index, _)| !self.attached.contains_key(index) || changed.contains(index))
            .map(|(index, name)| (*index, name.clone()))
            .collect();
        let mut failed = None;
        for (index, name) in &new {
            match self.attach_interface(*index, name) {
                Ok(Some(_)) => drop(self.attached.insert(*index, name.clone())),
                Ok(None) => {}
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(gone.len() + new.len()), Err)
    }

    /// How many programs were not there; `None` when the interface is gone again.
    fn attach_interface(&mut self, index: u32, interface: &str) -> Result<Option<usize>, EbpfError> {
        let mut new = 0;
        for (name, direction) in packet_programs(interface) {
            let attached = match self.tcx {
                true => self.attach_tcx(name, direction, index, interface),
                false => self.attach_clsact(name, direction, interface),
            };
            match attached {
                Ok(attached) => new += usize::from(attached),
                Err(error) if nix::net::if_::if_nametoindex(interface) == Ok(index) => return Err(error),
                Err(_) => return Ok(None),
            }
        }
        let pin = self.packet_pin(FRAME_PROGRAM, index);
        new += usize::from(self.frames.attach(&mut self.programs, &pin, index, interface));
        Ok(Some(new))
    }

    /// `false` when the program took another's place.
    fn attach_tcx(&mut self, name: &str, direction: TcAttachType, index: u32, on: &str) -> Result<bool, EbpfError> {
        let pin = self.packet_pin(name, index);
        let program: &mut SchedClassifier = self.programs.get_as(name)?;
        let fd = program.fd().map_err(|source| attach(name, on, source))?.try_clone();
        let fd = fd.map_err(|source| attach(name, on, source))?;
        if replace_pinned(&pin, fd.as_fd()) {
            return Ok(false);
        }
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = program.attach_with_options(on, direction, options).map_err(|source| attach(name, on, source))?;
        let link = program.take_link(id).map_err(|source| attach(name, on, source))?;
        pin_link(FdLink::try_from(link).map_err(|source| attach(name, on, source))?, &pin)?;
        Ok(true)
    }

    /// `false` when the program took another's place.
    fn attach_clsact(&mut self, name: &str, direction: TcAttachType, on: &str) -> Result<bool, EbpfError> {
        match qdisc_add_clsact(on) {
            Err(source) if !already_there(&source) => return Err(attach(name, on, source)),
            _ => {}
        }
        let program: &mut SchedClassifier = self.programs.get_as(name)?;
        let handle = TcHandle::from(FILTER_HANDLE);
        let options = NlOptions { priority: FILTER_PRIORITY, handle, ..NlOptions::default() };
        let (id, new) = match program.attach_with_options(on, direction, TcAttachOptions::Netlink(options)) {
            Ok(id) => (id, true),
            // A filter with our handle is there: an earlier process's. It is replaced, not removed.
            Err(ProgramError::TcError(error)) if already_there(&error) => {
                let old = SchedClassifierLink::attached(on, direction, FILTER_PRIORITY, handle, None)
                    .map_err(|source| attach(name, on, source))?;
                (program.attach_to_link(old).map_err(|source| attach(name, on, source))?, false)
            }
            Err(source) => return Err(attach(name, on, source)),
        };
        // The filter stays when this process ends: dropping the link would remove it.
        std::mem::forget(program.take_link(id).map_err(|source| attach(name, on, source))?);
        Ok(new)
    }

    fn packet_pin(&self, program: &str, index: u32) -> PathBuf {
        self.links.join(format!("{program}-{index}"))
    }

    /// Removes the clsact filters of the interfaces that this process attached to. Pinned links go with their pins.
    pub(super) fn remove_filters(&self) {
        for interface in self.attached.values() {
            remove_filters(interface);
        }
    }
}

/// Removes our clsact filters from one interface; that there are none is no error.
pub(super) fn remove_filters(interface: &str) {
    for (name, direction) in PACKET_PROGRAMS {
        let _absent = qdisc_detach_program(interface, direction, name);
    }
}

/// `None` for a program of another kind.
fn link_socket_program(program: &mut Program, cgroup: &File) -> Result<Option<FdLink>, Box<dyn std::error::Error>> {
    // A link always allows others beside it, and the kernel refuses the flag that would say so.
    let mode = CgroupAttachMode::Single;
    let link = match program {
        Program::CgroupSockAddr(program) => {
            let id = program.attach(cgroup, mode)?;
            FdLink::try_from(program.take_link(id)?)
        }
        Program::CgroupSock(program) => {
            let id = program.attach(cgroup, mode)?;
            FdLink::try_from(program.take_link(id)?)
        }
        _ => return Ok(None),
    };
    Ok(Some(link?))
}

/// Puts `program` behind a pinned link. `false` when there is none, or what it was attached to is gone; then the pin is
/// removed, for it leads nowhere.
pub(super) fn replace_pinned(pin: &Path, program: std::os::fd::BorrowedFd<'_>) -> bool {
    let Ok(link) = open_pinned(pin) else { return false };
    let replaced = replace_program(link.as_fd(), program).is_ok();
    if !replaced {
        let _gone = fs::remove_file(pin);
    }
    replaced
}

pub(super) fn pin_link(link: FdLink, pin: &Path) -> Result<(), EbpfError> {
    link.pin(pin).map(|_pinned| ()).map_err(|source| EbpfError::Pin { path: pin.to_owned(), source: Box::new(source) })
}

/// The kernel's answer in one line; what the verifier says is long and goes to the log.
pub(super) fn refused(program: &str, error: &(dyn std::error::Error + 'static)) -> EbpfError {
    let reason = match error.downcast_ref() {
        Some(ProgramError::LoadError { io_error, verifier_log }) => {
            tracing::debug!(program, log = %verifier_log, "the verifier's log");
            io_error.to_string()
        }
        _ => reasons(error),
    };
    EbpfError::Load { program: program.to_owned(), reason }
}

pub(super) fn attach<E>(program: &str, target: impl std::fmt::Display, source: E) -> EbpfError
where
    E: std::error::Error,
{
    not_attached(program, &target, &source)
}

fn not_attached(program: &str, target: &dyn std::fmt::Display, source: &dyn std::error::Error) -> EbpfError {
    EbpfError::Attach { program: program.to_owned(), target: target.to_string(), reason: reasons(source) }
}

/// Whether the kernel says `EEXIST`: the qdisc or a filter with this handle is there.
fn already_there(error: &TcError) -> bool {
    match error {
        TcError::AlreadyAttached => true,
        TcError::NetlinkError(error) => error.raw_os_error() == Some(nix::errno::Errno::EEXIST as i32),
        _ => false,
    }
}

/// An error with everything that caused it: aya keeps the kernel's answer in the cause.
pub(super) fn reasons(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
