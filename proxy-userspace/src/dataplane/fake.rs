//! A data plane that only remembers: the double for tests of everything in front of the kernel.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Counters, Dataplane, SyncError, SyncReport, SyncScope};
use crate::model::{ServiceSnapshot, apply};

/// What a [`FakeDataplane`] was asked to do; shared with the test that looks.
#[derive(Debug, Clone, Default)]
pub(crate) struct Recorder {
    state: Arc<Mutex<Recorded>>,
}

/// The state behind a [`Recorder`].
#[derive(Debug, Default)]
pub(crate) struct Recorded {
    /// What the kernel would hold: deltas are applied to it, so an incomplete delta shows.
    pub(crate) programmed: ServiceSnapshot,
    /// Successful syncs with [`SyncScope::Full`].
    pub(crate) full_syncs: usize,
    /// Successful syncs with [`SyncScope::Changed`].
    pub(crate) partial_syncs: usize,
    /// Syncs that failed because the test wanted it.
    pub(crate) failed_syncs: usize,
    /// How many of the next syncs fail.
    pub(crate) failures_wanted: usize,
    /// Whether somebody else has changed the kernel; a full sync repairs it.
    pub(crate) tampered: bool,
    /// Whether every changed ServicePort is reported as refused.
    pub(crate) refuse: bool,
    /// How often more room can be made; then nothing is refused any more.
    pub(crate) growths_left: usize,
    /// Calls of [`Dataplane::cleanup`].
    pub(crate) cleanups: usize,
}

impl Recorder {
    /// The state now.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Recorded> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A data plane that writes into this recorder.
    pub(crate) fn dataplane(&self) -> FakeDataplane {
        FakeDataplane { recorder: self.clone() }
    }
}

/// See [`Recorder`].
#[derive(Debug)]
pub(crate) struct FakeDataplane {
    recorder: Recorder,
}

impl Dataplane for FakeDataplane {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn sync(&mut self, desired: &ServiceSnapshot, scope: SyncScope<'_>) -> Result<SyncReport, SyncError> {
        let mut state = self.recorder.lock();
        if state.failures_wanted > 0 {
            state.failures_wanted -= 1;
            state.failed_syncs += 1;
            return Err(SyncError::Kernel { object: "fake".into(), source: io::Error::other("wanted by the test") });
        }
        let refused = match scope {
            SyncScope::Changed(delta) if state.refuse => delta.changed.clone(),
            _ => Vec::new(),
        };
        let services_changed = match scope {
            SyncScope::Full => {
                state.programmed = desired.clone();
                state.full_syncs += 1;
                state.tampered = false;
                desired.services.len()
            }
            SyncScope::Changed(delta) => {
                state.programmed = apply(&state.programmed, delta, desired);
                state.partial_syncs += 1;
                delta.changed.len()
            }
        };
        Ok(SyncReport { services_changed, kernel_writes: services_changed, refused, ..SyncReport::default() })
    }

    fn audit(&mut self) -> Result<bool, SyncError> {
        Ok(!self.recorder.lock().tampered)
    }

    fn grow(&mut self) -> bool {
        let mut state = self.recorder.lock();
        let grows = state.growths_left > 0;
        state.growths_left -= usize::from(grows);
        state.refuse &= !grows;
        grows
    }

    fn counters(&self) -> Counters {
        let syncs = self.recorder.lock().full_syncs;
        vec![("trama_fake_full_syncs_total".into(), vec![("mode".into(), "fake".into())], syncs as u64)]
    }

    fn cleanup(&mut self) -> Result<(), SyncError> {
        self.recorder.lock().cleanups += 1;
        Ok(())
    }
}
