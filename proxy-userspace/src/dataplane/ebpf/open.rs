//! From the compiled programs to a data plane: loaded beside what runs, then put in its place.

use std::fs;
use std::path::Path;
use std::time::Instant;

use node_sys::probe::KernelVersion;

use super::attach::Attacher;
use super::carry::Predecessor;
use super::drift::Drift;
use super::expiry::{Expiry, Looks, Totals};
use super::exports::Exports;
use super::family::{Constants, Family};
use super::growth::Growth;
use super::load::{load, load_programs, preflight, release_object};
use super::maps::{Counters, Interfaces, TakingOver, take_service_counts};
use super::pins::{Pins, links_of, maps_of, mount, pin_directory, with_sizes_in_use};
use super::programs::pin_editors;
use super::takeover::Takeover;
use super::{EbpfConfig, EbpfDataplane, EbpfError, flows, migrate, service_ids};

impl EbpfDataplane {
    /// Loads the programs and maps, adopting pinned maps, and attaches the socket programs. Nothing is changed in the
    /// maps before the first sync.
    ///
    /// # Errors
    /// [`EbpfError`] names what is missing; what was attached before stays.
    pub fn open(config: &EbpfConfig) -> Result<Self, EbpfError> {
        let kernel = preflight()?;
        mount(&config.bpffs)?;
        let config = with_sizes_in_use(config);
        let directory = pin_directory(&config)?;
        let predecessor = Predecessor::find(&directory);
        let (mut opened, looks) = Self::load_beside(&config, &directory, predecessor, kernel)?;
        opened.takeover = Some(Takeover::open(&directory, config.max_flows)?);
        migrate::keep_nat();
        opened.begin()?;
        opened.look_after_flows(looks, Totals::default());
        Ok(opened)
    }

    /// Loads the programs, with their maps in `directory` and what is shared with a predecessor. No packet and no socket meets them yet.
    pub(super) fn load_beside(
        config: &EbpfConfig,
        directory: &Path,
        mut predecessor: Option<Predecessor>,
        kernel: KernelVersion,
    ) -> Result<(Self, Option<Looks>), EbpfError> {
        let links = links_of(directory);
        fs::create_dir_all(&links).map_err(|source| EbpfError::Bpffs { path: links.clone(), source })?;
        // The programs are loaded while the object still owns all its maps: afterwards they keep them alive.
        let mut object = load(config, directory)?;
        if predecessor.as_mut().map(shares_maps).transpose()?.unwrap_or_default() {
            object = load(config, directory)?;
        }
        let pins = Pins::hold(&maps_of(directory))?;
        load_programs(&mut object)?;
        pin_editors(&object, directory)?;
        let attacher = Attacher::new(&mut object, directory, config, kernel)?;
        flows::make_secret(&mut object)?;
        let looks = load_looks(&mut object, config, directory);
        let constants = Constants::of(config)?;
        let loaded = Self {
            config: config.clone(),
            directory: directory.to_owned(),
            pins,
            attacher,
            counters: Counters::take(&mut object)?,
            exports: Exports::new(take_service_counts(&mut object)?, directory.to_owned()),
            interfaces: Interfaces::take(&mut object)?,
            v4: Family::take(&mut object, "V4", constants)?,
            v6: Family::take(&mut object, "V6", constants)?,
            service_ids: service_ids(config),
            expiry: None,
            takeover: None,
            taking_over: TakingOver::take(&mut object)?,
            predecessor,
            growth: Growth::default(),
            started: Instant::now(),
            now_ms: 0,
            drift: Drift::default(),
        };
        drop(object);
        release_object();
        Ok((loaded, looks))
    }

    /// Puts the socket programs in their place, once the maps hold what a predecessor's hold.
    ///
    /// # Errors
    /// [`EbpfError`] where they cannot be attached, or a predecessor that runs cannot be taken over whole.
    pub(super) fn begin(&mut self) -> Result<(), EbpfError> {
        if let Some(predecessor) = &self.predecessor {
            let leaves_flows = predecessor.keeps_flows() && self.attacher.leaves_others_behind();
            let mut whole = predecessor.copy(leaves_flows);
            if leaves_flows {
                self.taking_over.begin()?;
            }
            if let Err(error) = predecessor.take_links() {
                whole = false;
                tracing::warn!(%error, "programs of another version are not replaced but removed");
            }
            if predecessor.runs() && !whole {
                return Err(EbpfError::Incomplete);
            }
        }
        self.v4.maps.forget_absent()?;
        self.v6.maps.forget_absent()?;
        self.attacher.attach_cgroup(&self.config.cgroup)?;
        Ok(())
    }

    /// Has flows ended from now on: not before the backends are known, or each flow would be taken for one whose endpoint is gone. Without
    /// it everything works, and flows end by being evicted.
    pub(super) fn look_after_flows(&mut self, looks: Option<Looks>, totals: Totals) {
        let started = looks.map(|looks| Expiry::start(looks, totals)).transpose();
        self.expiry = started.unwrap_or_else(|error| {
            tracing::warn!(%error, "flows will not end when they are idle, but when their room is needed");
            None
        });
    }
}

/// Whether maps of another version's were made ours.
fn shares_maps(predecessor: &mut Predecessor) -> Result<bool, EbpfError> {
    match predecessor.share() {
        Ok(0) => Ok(false),
        Ok(maps) => {
            tracing::info!(maps, "took over maps of another version");
            Ok(true)
        }
        Err(error) => {
            tracing::warn!(%error, "cannot take over all maps of another version");
            // Some of them may be ours now.
            if predecessor.runs() { Err(EbpfError::Incomplete) } else { Ok(true) }
        }
    }
}

fn load_looks(object: &mut aya::Ebpf, config: &EbpfConfig, directory: &Path) -> Option<Looks> {
    let loaded = Looks::take(object, config, directory);
    let said = |error: &EbpfError| {
        tracing::warn!(%error, "flows will not end when they are idle, but when their room is needed");
    };
    loaded.inspect_err(said).ok()
}
