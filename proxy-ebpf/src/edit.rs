//! Changes to the table of flows that user space asks for: it can lock no bucket, since it may be killed at any time.

use aya_ebpf::programs::TcContext;
use proxy_common::flow_table::{
    FLOW_EDIT_ADD, FLOW_EDIT_BUSY, FLOW_EDIT_DONE, FLOW_EDIT_INVALID, FLOW_EDIT_NO, FLOW_EDIT_READ, FLOW_EDIT_REMOVE,
    FlowEdit, FlowInsertError,
};

use crate::ctx::{ETHERNET_LENGTH, Hook, Packet};
use crate::maps::Family;

/// Does what the packet asks for; the answer is in the packet.
#[inline(always)]
pub fn run<F: Family>(ctx: &TcContext) -> i32 {
    let packet = Packet::new(ctx);
    let Some(edit) = packet.at::<FlowEdit<F::A>>(ETHERNET_LENGTH) else { return FLOW_EDIT_INVALID as i32 };
    // SAFETY: `at` checked the whole request, and any bytes are one.
    let FlowEdit { operation, key, mut flow } = unsafe { *edit };
    let result = match operation {
        FLOW_EDIT_READ => F::flows().read(&key, &mut flow).map_or(FLOW_EDIT_NO, |_place| FLOW_EDIT_DONE),
        FLOW_EDIT_ADD => match F::flows().add(&key, &flow) {
            Ok(()) => FLOW_EDIT_DONE,
            Err(FlowInsertError::Exists) => FLOW_EDIT_NO,
            Err(FlowInsertError::Busy) => FLOW_EDIT_BUSY,
        },
        FLOW_EDIT_REMOVE if F::flows().remove(&key) => FLOW_EDIT_DONE,
        FLOW_EDIT_REMOVE => FLOW_EDIT_NO,
        _ => FLOW_EDIT_INVALID,
    };
    if let Some(edit) = packet.at::<FlowEdit<F::A>>(ETHERNET_LENGTH) {
        // SAFETY: as above.
        unsafe { (*edit).flow = flow };
    }
    result as i32
}
