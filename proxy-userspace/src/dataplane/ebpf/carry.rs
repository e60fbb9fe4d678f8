//! What a version of ours with other layouts left, carried over to this one, in either direction: newer or older; and what maps of
//! smaller sizes hold.
//!
//! A map with the same layout in both versions is made ours as it is, so that the programs of both work on it. The entries of others are
//! copied field by field, by the names that the kernel knows from the programs' BTF. So **a field's name is its meaning**: who changes what a
//! field means gives it another name, and then it is not carried over.
//!
//! In this order, which loses no flow: maps are shared and copied; our socket and XDP programs take the others' place behind their links;
//! our tc programs are put in front of theirs, which go on with the flows that only they know, and open the new ones until ours are on every
//! interface; what they opened is copied; then theirs go.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use node_sys::bpf::{open_pinned, pin};
use node_sys::{DescribedMap, Fields, MapLayout};
use proxy_common::flow_table::{FlowEdit, FlowEntry};
use proxy_common::pod::Pod;
use proxy_common::{FLOW_CLOSED, FLOW_CLOSING, Flow, FlowKey, V4, V6};
use tracing::{info, warn};

use super::attach::is_replaced_in_place;
use super::encode::UserAddress;
use super::flows::FlowTable;
use super::pins::{PINNED_MAPS, attached_at, is_same_layout, links_of, maps_of};

/// Maps that packets and sockets write: their entries are copied again when no program of the other version opens flows any more.
const KERNEL_MAPS: [&str; 5] = ["FLOWS_V4", "FLOWS_V6", "AFFINITY_V4", "AFFINITY_V6", "AFFINITY_SOCKETS"];
/// The tables of flows: shared all together or not at all, since each is of use only with the others.
const FLOW_MAPS: [&str; 5] = ["FLOWS_V4", "FLOWS_V6", "FLOW_HEADS_V4", "FLOW_HEADS_V6", "FLOW_SECRET"];
/// `BPF_MAP_TYPE_ARRAY`: every entry is there.
const ARRAY: u32 = 2;
/// `BPF_MAP_TYPE_HASH`, `_ARRAY`, `_LRU_HASH` and `_LPM_TRIE`: what can be read as bytes and written again.
const COPIED: [u32; 4] = [1, ARRAY, 9, 11];
/// Kernels interrupt the reading of a map that others change.
const READS_MAX: usize = 3;

/// The version that ran before.
pub(super) struct Predecessor {
    theirs: PathBuf,
    ours: PathBuf,
    /// Whether none of our programs has run yet. Else what user space wrote is newer here than there.
    fresh: bool,
    /// Whether only sizes differ: then entries are copied as they are, which takes no BTF.
    resized: bool,
    /// Whether it runs: then it goes on where not everything can be taken over.
    runs: bool,
    /// Whether its flows are in our tables too.
    shares_flows: bool,
}

impl Predecessor {
    /// Another version's directory beside `directory`, which is ours; of several the one whose programs were attached last.
    pub(super) fn find(directory: &Path) -> Option<Self> {
        let others = fs::read_dir(directory.parent()?).ok()?.flatten().map(|entry| entry.path());
        let others = others.filter(|path| path != directory && maps_of(path).is_dir());
        let theirs = others.max_by_key(|path| attached_at(path))?;
        Some(Self::of(&theirs, directory))
    }

    /// The version in `theirs`, for one in `ours`.
    fn of(theirs: &Path, ours: &Path) -> Self {
        let fresh = fs::read_dir(links_of(ours)).map_or(true, |mut links| links.next().is_none());
        let resized = is_same_layout(theirs, ours);
        Self { theirs: theirs.to_owned(), ours: ours.to_owned(), fresh, resized, runs: false, shares_flows: false }
    }

    /// This process itself, with its maps in `theirs`.
    pub(super) fn running(theirs: &Path, ours: &Path) -> Self {
        Self { runs: true, ..Self::of(theirs, ours) }
    }

    /// Whether it goes on where not everything can be taken over. Else there is nothing better than to go on with less.
    pub(super) fn runs(&self) -> bool {
        self.runs
    }

    /// Whether its programs go on with flows of their own until they go: such as [`Predecessor::copy`] left out.
    pub(super) fn keeps_flows(&self) -> bool {
        !self.shares_flows
    }

    /// Pins their maps that look like ours in place of ours, which were just made and are empty. The programs have to be loaded with the maps
    /// anew then. Returns how many there are.
    pub(super) fn share(&mut self) -> io::Result<usize> {
        let mut shared = 0;
        let flows = FLOW_MAPS.iter().try_fold(true, |all, name| Ok::<_, io::Error>(all && self.is_alike(name)?))?;
        self.shares_flows = self.fresh && flows;
        let wanted = |name: &&&str| self.fresh && (flows || !FLOW_MAPS.contains(*name));
        for name in PINNED_MAPS.iter().filter(wanted) {
            let (theirs, ours) = (maps_of(&self.theirs).join(name), maps_of(&self.ours).join(name));
            if self.is_alike(name)? {
                let map = open_pinned(&theirs)?;
                fs::remove_file(&ours)?;
                pin(map.as_fd(), &ours)?;
                shared += 1;
            }
        }
        Ok(shared)
    }

    /// Whether they have a map of this name, with the same layout.
    fn is_alike(&self, name: &str) -> io::Result<bool> {
        let Ok(theirs) = open_pinned(&maps_of(&self.theirs).join(name)) else { return Ok(false) };
        let ours = open_pinned(&maps_of(&self.ours).join(name))?;
        Ok(self.described(theirs)?.layout() == self.described(ours)?.layout())
    }

    /// Where only sizes differ the fields are not asked for, which takes a capability.
    fn described(&self, map: OwnedFd) -> io::Result<DescribedMap> {
        if self.resized { DescribedMap::without_fields(map) } else { DescribedMap::new(map) }
    }

    /// Copies what is not shared. To be called before a program of ours is attached. Returns whether all of it could be. Where their programs
    /// `open_flows` meanwhile, connections that end are left to them: they may open another with the tuple of one, which ours would take for
    /// the one before.
    pub(super) fn copy(&self, open_flows: bool) -> bool {
        let all = PINNED_MAPS.iter().filter(|name| self.fresh || KERNEL_MAPS.contains(*name));
        self.copy_each(all, if open_flows { FLOW_CLOSING | FLOW_CLOSED } else { 0 })
    }

    /// Copies what their programs have written since. To be called when ours are attached wherever theirs are.
    pub(super) fn copy_again(&self) {
        let _warned = self.copy_each(KERNEL_MAPS.iter(), 0);
    }

    /// Leaves flows out that have one of the flags `without`.
    fn copy_each<'a>(&self, names: impl Iterator<Item = &'a &'a str>, without: u8) -> bool {
        let mut whole = true;
        for name in names {
            let copied = match *name {
                "FLOWS_V4" => self.copy_flows::<V4>(name, without),
                "FLOWS_V6" => self.copy_flows::<V6>(name, without),
                // They belong to the entries.
                name if FLOW_MAPS.contains(&name) => Ok(0),
                name => self.copy_map(name),
            };
            match copied {
                Ok(0) => {}
                Ok(entries) => info!(map = name, entries, "carried over from another version"),
                Err(error) => {
                    whole = false;
                    warn!(map = name, %error, "cannot be carried over from another version; flows may end");
                }
            }
        }
        whole
    }

    /// Returns how many entries were written.
    fn copy_map(&self, name: &str) -> io::Result<usize> {
        let Ok(theirs) = open_pinned(&maps_of(&self.theirs).join(name)) else { return Ok(0) };
        let theirs = self.described(theirs)?;
        let ours = self.described(open_pinned(&maps_of(&self.ours).join(name))?)?;
        if theirs.layout() == ours.layout() || !COPIED.contains(&ours.layout().kind) {
            // Shared, or nothing that outlives a version: devices, events, counters.
            return Ok(0);
        }
        let copier = match self.resized {
            true => Some(Copier::identity(ours.layout())),
            false => Copier::new(theirs.layout(), ours.layout()),
        };
        let Some(copier) = copier else { return Err(io::Error::other("its keys are others")) };
        for _ in 1..READS_MAX {
            match copy_entries(&theirs, &ours, &copier) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
        copy_entries(&theirs, &ours, &copier)
    }

    /// Adds their flows to our table, which has other buckets. Layouts before 5 had none.
    fn copy_flows<A: UserAddress>(&self, name: &str, without: u8) -> io::Result<usize>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
        FlowEdit<A>: Pod,
    {
        let Ok(theirs) = open_pinned(&maps_of(&self.theirs).join(name)) else { return Ok(0) };
        let theirs = self.described(theirs)?;
        let ours = self.described(open_pinned(&maps_of(&self.ours).join(name))?)?;
        if theirs.layout() == ours.layout() || theirs.layout().kind != ARRAY {
            return Ok(0);
        }
        let moves = match self.resized {
            true => Moves::identity(ours.layout().value_size),
            false => Moves::new(&theirs.layout().value, &ours.layout().value, ours.layout().value_size),
        };
        let table = FlowTable::<A>::open(&self.ours)?;
        let (mut written, mut result) = (0, Ok(()));
        theirs.read(|_, value| {
            let entry = if result.is_ok() { FlowEntry::<A>::from_bytes(&moves.apply(value)) } else { None };
            let Some((key, flow)) = entry.filter(|(_, flow)| flow.flags & without == 0) else { return };
            match table.add(&key, &flow) {
                Ok(new) => written += usize::from(new),
                Err(error) => result = Err(error),
            }
        })?;
        result.map(|()| written)
    }

    /// Makes their links ours where a program is replaced behind its link: of sockets, and of XDP, of which an interface has one.
    pub(super) fn take_links(&self) -> io::Result<()> {
        for link in fs::read_dir(links_of(&self.theirs))?.flatten() {
            let ours = links_of(&self.ours).join(link.file_name());
            if is_replaced_in_place(&link.file_name().to_string_lossy()) && !ours.exists() {
                pin(open_pinned(&link.path())?.as_fd(), &ours)?;
            }
        }
        Ok(())
    }
}

fn copy_entries(theirs: &DescribedMap, ours: &DescribedMap, copier: &Copier) -> io::Result<usize> {
    let is_array = ours.layout().kind == ARRAY;
    let (mut written, mut result) = (0, Ok(()));
    theirs.read(|key, value| {
        // An array holds zeros where nothing was written.
        if result.is_err() || (is_array && value.iter().all(|byte| *byte == 0)) {
            return;
        }
        let (key, value) = (copier.key.apply(key), copier.value.apply(value));
        match ours.write(&key, &value, !is_array) {
            Ok(new) => written += usize::from(new),
            Err(error) => result = Err(error),
        }
    })?;
    result.map(|()| written)
}

/// How entries of one layout become those of another.
struct Copier {
    key: Moves,
    value: Moves,
}

impl Copier {
    fn identity(layout: &MapLayout) -> Self {
        Self { key: Moves::identity(layout.key_size), value: Moves::identity(layout.value_size) }
    }

    /// `None` where a key of theirs has a field that ours lack: two of them might become one.
    fn new(theirs: &MapLayout, ours: &MapLayout) -> Option<Self> {
        let is_there =
            |(path, field): (&String, &node_sys::Field)| ours.key.get(path).is_some_and(|own| own.size >= field.size);
        if theirs.key.is_empty() || !theirs.key.iter().all(is_there) {
            return None;
        }
        Some(Self {
            key: Moves::new(&theirs.key, &ours.key, ours.key_size),
            value: Moves::new(&theirs.value, &ours.value, ours.value_size),
        })
    }
}

/// Which bytes go where.
struct Moves {
    size: usize,
    /// By the place where they go: the place where they are, and how many they are.
    from: BTreeMap<usize, (usize, usize)>,
}

impl Moves {
    fn identity(size: usize) -> Self {
        Self { size, from: [(0, (0, size))].into() }
    }

    /// Fields that ours lack, or have narrower, are left out; those that theirs lack are zero. Numbers are little-endian, so that a wider
    /// one begins with the narrower.
    fn new(theirs: &Fields, ours: &Fields, size: usize) -> Self {
        let both = ours.iter().filter_map(|(path, own)| Some((own, theirs.get(path)?)));
        let from = both
            .filter(|(own, their)| own.size >= their.size)
            .map(|(own, their)| (own.offset, (their.offset, their.size)));
        Self { size, from: from.collect() }
    }

    fn apply(&self, from: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; self.size];
        for (to, (at, length)) in &self.from {
            let (target, source) = (bytes.get_mut(*to..to + length), from.get(*at..at + length));
            if let (Some(target), Some(source)) = (target, source) {
                target.copy_from_slice(source);
            }
        }
        bytes
    }
}

#[cfg(test)]
mod tests;
