//! Whether others have changed our rules, without reading them each time.
//!
//! The kernel is asked for something that every change moves: the number of nf_tables' last transaction, or the sizes of
//! iptables-legacy's tables. Only when that is another one, the rules are read and counted.

use std::time::{Duration, Instant};

use node_sys::nftables::Nftables;
use node_sys::xtables::{TableSize, table_size};

use super::chain::Table;
use super::tool::{Tool, Variant};
use crate::model::IpFamily;

/// Reading the rules may take at most one part in so many, plus one, of the time: where others change theirs all the time, ours are read less often.
const READING_SHARE: u32 = 3;

/// What every change moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// nf_tables.
    Generation(u32),
    /// iptables-legacy: of filter and nat.
    Sizes([TableSize; 2]),
}

/// Looks at one family.
#[derive(Debug, Default)]
pub(super) struct Watch {
    last: Option<Mark>,
    /// When the rules may be read again.
    read_after: Option<Instant>,
}

impl Watch {
    /// What is in the kernel now is ours.
    pub(super) fn synced(&mut self, tool: Tool) {
        self.last = mark(tool);
    }

    /// Whether the kernel is as it was. If not, `holds` reads the rules; when it says yes, that is what is compared with from now on.
    pub(super) fn is_as_it_was<E>(&mut self, tool: Tool, holds: impl FnOnce() -> Result<bool, E>) -> Result<bool, E> {
        let now = mark(tool);
        let start = Instant::now();
        if (now.is_some() && now == self.last) || self.read_after.is_some_and(|earliest| start < earliest) {
            return Ok(true);
        }
        let holds = holds()?;
        let took: Duration = start.elapsed();
        self.read_after = Some(Instant::now() + took * READING_SHARE);
        if holds {
            self.last = now;
        }
        Ok(holds)
    }
}

/// `None` where it can't be told; then the rules are read each time.
fn mark(tool: Tool) -> Option<Mark> {
    match tool.variant {
        Variant::Nft => Some(Mark::Generation(Nftables::open().ok()?.generation().ok()?)),
        Variant::Legacy => {
            let size = |table: Table| table_size(tool.family == IpFamily::V6, table.name()).ok();
            Some(Mark::Sizes([size(Table::Filter)?, size(Table::Nat)?]))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_only_when_the_kernel_changed() {
        let netns = node_sys::Netns::anonymous().unwrap();
        netns
            .run(|| {
                for variant in Variant::ALL {
                    let tool = Tool { variant, family: IpFamily::V4 };
                    tool.change_for_test("*nat\n:A - [0:0]\nCOMMIT\n");
                    let mut watch = Watch::default();
                    watch.synced(tool);
                    let never = || -> Result<bool, ()> { panic!("read without need") };
                    assert_eq!(watch.is_as_it_was(tool, never), Ok(true));
                    tool.change_for_test("*nat\n-A A -j RETURN\nCOMMIT\n");
                    assert_eq!(watch.is_as_it_was(tool, || Ok::<_, ()>(false)), Ok(false), "{variant}");
                }
            })
            .unwrap();
    }
}
