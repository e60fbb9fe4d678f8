//! The programs of the benchmarks in the kernel, what they are run on, and what they counted.
#![expect(
    clippy::indexing_slicing,
    reason = "offsets into frames and contexts that the benchmark makes itself: a wrong one ends it at once"
)]

use std::time::Duration;

use anyhow::{Context, Result};
use aya::maps::xdp::DevMapHash;
use aya::maps::{Array, HashMap, MapData, PerCpuArray};
use aya::programs::{Program, ProgramError, TestRun, TestRunAttrs, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use proxy_common::Counter;
use proxy_common::flow_table::{FlowSecret, WAYS};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench-ebpf"));

/// Of the tables of flows, the same in each run.
const SECRET: FlowSecret = FlowSecret {
    transport: [0x243f_6a88, 0x85a3_08d3],
    addresses: [
        [0x1319_8a2e, 0x0370_7344],
        [0xa409_3822, 0x299f_31d0],
        [0x082e_fa98, 0xec4e_6c89],
        [0x4528_21e6, 0x38d0_1377],
    ],
};

/// Bytes of headers that the wrapper writes behind the first two.
const HEADERS: usize = 72;
const LEAD: usize = 2;
/// `Template` of the BPF side: headers, two tables of as many bytes, six numbers, and the first two bytes with what follows them.
const TEMPLATE_SIZE: usize = 3 * HEADERS + 6 * 4 + 8;

/// Source ports that the wrapper goes through at one address.
const PORTS: u32 = 32768;

/// Offset of `ifindex` in `struct __sk_buff` (include/uapi/linux/bpf.h).
const SKB_IFINDEX: usize = 40;
const SKB_SIZE: usize = 192;
/// Live frames at once; the kernel's default.
const LIVE_BATCH: u32 = 64;

/// What the wrapper sends: one frame, or that from many sources.
#[derive(Debug, Clone)]
pub struct Traffic {
    /// A whole frame.
    pub frame: Vec<u8>,
    /// Number of different sources that the wrapper goes through; `None` leaves the frame as it is.
    pub flows: Option<u32>,
}

/// How large the maps are that grow with what is measured, and what else is set at load.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Services.
    pub services: u32,
    /// Endpoints of all services together.
    pub endpoints: u32,
    /// Entries of the IPv4 table of flows.
    pub flows: u32,
    /// Cache lines of the row that reads them.
    pub lines: u32,
    /// Whether a flow follows a route that one of its packets has asked for; else every packet asks.
    pub routes_are_remembered: bool,
}

impl Default for Sizes {
    /// The defaults of the maps, which `--max-*` of trama-proxy change.
    fn default() -> Self {
        Self { services: 16_384, endpoints: 262_144, flows: 262_144, lines: 1, routes_are_remembered: true }
    }
}

impl Sizes {
    /// Buckets of each table of flows: half of its entries are to be in use.
    fn buckets(&self) -> u32 {
        self.flows.div_ceil(WAYS / 2)
    }

    /// By map, in the proportions of trama-proxy.
    fn entries(&self) -> [(&'static str, u32); 13] {
        let frontends = self.services.saturating_mul(4);
        let slots = self.endpoints.saturating_mul(2);
        [
            ("FRONTENDS_V4", frontends),
            ("FRONTENDS_V6", frontends),
            ("SLOTS_V4", slots),
            ("SLOTS_V6", slots),
            ("BACKENDS_V4", self.endpoints),
            ("BACKENDS_V6", self.endpoints),
            ("LOADS_V4", self.endpoints),
            ("LOADS_V6", self.endpoints),
            ("FLOWS_V4", self.buckets().saturating_mul(WAYS)),
            ("FLOWS_V6", self.buckets().saturating_mul(WAYS)),
            ("FLOW_HEADS_V4", self.buckets()),
            ("FLOW_HEADS_V6", self.buckets()),
            ("LINES", self.lines),
        ]
    }
}

/// Any order does, the same one each time.
const LINES_SEED: u64 = 7;

/// What the packet path returned over a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdicts {
    /// Sent out through an interface.
    pub redirected: u32,
    /// Left to the kernel.
    pub passed: u32,
    /// Dropped.
    pub dropped: u32,
}

/// The loaded programs.
pub struct Programs {
    pub(crate) ebpf: Ebpf,
    interface: u32,
}

impl Programs {
    /// Loads the programs of the packet path and the calibration, everything fresh: no row sees another one's flows. Packets arrive at
    /// the interface of this index.
    ///
    /// # Errors
    /// When the kernel refuses a map or a program.
    pub fn load(interface: u32) -> Result<Self> {
        Self::load_sized(interface, &Sizes::default())
    }

    /// As [`Programs::load`], with maps of these sizes.
    ///
    /// # Errors
    /// As there.
    pub fn load_sized(interface: u32, sizes: &Sizes) -> Result<Self> {
        let mut programs = Self { ebpf: object(sizes)?, interface };
        programs.load_each(|program| match program {
            Program::SchedClassifier(program) => program.load(),
            Program::Xdp(program) => program.load(),
            _ => Ok(()),
        })?;
        Ok(programs)
    }

    /// Loads the programs of the socket path, with maps of these sizes.
    ///
    /// # Errors
    /// As with [`Programs::load`].
    pub fn load_sockets(sizes: &Sizes) -> Result<Self> {
        let mut programs = Self { ebpf: object(sizes)?, interface: 0 };
        programs.load_each(|program| match program {
            Program::CgroupSockAddr(program) => program.load(),
            Program::CgroupSock(program) => program.load(),
            _ => Ok(()),
        })?;
        Ok(programs)
    }

    /// Loads the programs of these names only.
    ///
    /// # Errors
    /// As with [`Programs::load`], and when one of them is not of the packet path.
    pub fn load_only(interface: u32, sizes: &Sizes, names: &[&str]) -> Result<Self> {
        let mut programs = Self { ebpf: object(sizes)?, interface };
        for name in names {
            match programs.program(name)? {
                Program::SchedClassifier(program) => program.load(),
                Program::Xdp(program) => program.load(),
                _ => return Err(ProgramError::UnexpectedProgramType.into()),
            }
            .with_context(|| format!("cannot load program {name}"))?;
        }
        Ok(programs)
    }

    fn load_each(&mut self, load: impl Fn(&mut Program) -> Result<(), ProgramError>) -> Result<()> {
        let mut programs = self.ebpf.programs_mut();
        programs.try_for_each(|(name, program)| load(program).with_context(|| format!("cannot load program {name}")))
    }

    /// Mean time of `packets` repeats of a program on `frame`, and what it returned last.
    ///
    /// # Errors
    /// When there is no such program, or the kernel refuses to run it.
    pub fn time(&mut self, program: &str, frame: &[u8], packets: u32) -> Result<(Duration, u32)> {
        let context = self.context();
        let options =
            TestRunOptions { data_in: Some(frame), ctx_in: Some(&context), repeat: packets, ..TestRunOptions::new() };
        let frame_context = self.frame_context(frame);
        let result = match self.program(program)? {
            Program::Xdp(program) => program.test_run(TestRunOptions { ctx_in: Some(&frame_context), ..options }),
            Program::SchedClassifier(program) => program.test_run(options),
            _ => return Err(ProgramError::UnexpectedProgramType.into()),
        }?;
        Ok((result.duration, result.return_value))
    }

    /// What a program returns for a packet, and the packet after it.
    ///
    /// # Errors
    /// As with [`Programs::time`].
    pub fn one(&mut self, program: &str, frame: &[u8]) -> Result<(u32, Vec<u8>)> {
        let context = self.context();
        let mut out = vec![0; frame.len() + 256];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let frame_context = self.frame_context(frame);
        let result = match self.program(program)? {
            Program::Xdp(program) => program.test_run(TestRunOptions { ctx_in: Some(&frame_context), ..options }),
            Program::SchedClassifier(program) => program.test_run(options),
            _ => return Err(ProgramError::UnexpectedProgramType.into()),
        }?;
        out.truncate(result.data_size_out as usize);
        Ok((result.return_value, out))
    }

    /// Sends `packets` frames, which the XDP program `program` makes and passes, up the network stack at the interface, in batches
    /// of 64; they are on their way or at its end when this returns. Returns the mean time of a frame as the kernel took it: making the
    /// generator and taking it down again, some 20 ms, is not part of it.
    ///
    /// # Errors
    /// When the kernel refuses (live frames need Linux 5.18), or this thread is not in the interface's network namespace.
    pub fn send_live(&mut self, program: &str, frame: &[u8], packets: u32) -> Result<Duration> {
        let context = self.frame_context(frame);
        let options = TestRunOptions {
            data_in: Some(frame),
            ctx_in: Some(&context),
            repeat: packets,
            attrs: TestRunAttrs::new().xdp_live_frames(LIVE_BATCH),
            ..TestRunOptions::new()
        };
        let Program::Xdp(program) = self.program(program)? else {
            return Err(ProgramError::UnexpectedProgramType.into());
        };
        Ok(program.test_run(options).context("cannot send live frames")?.duration)
    }

    /// The program of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn program(&mut self, name: &str) -> Result<&mut Program> {
        self.ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))
    }

    fn context(&self) -> Vec<u8> {
        let mut context = vec![0; SKB_SIZE];
        context[SKB_IFINDEX..SKB_IFINDEX + 4].copy_from_slice(&self.interface.to_ne_bytes());
        context
    }

    /// `struct xdp_md`: the frame's end, and the interface at which it arrives.
    fn frame_context(&self, frame: &[u8]) -> Vec<u8> {
        [0, frame.len() as u32, 0, self.interface, 0, 0].iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    /// Lets XDP programs send frames out through an interface.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn add_device(&mut self, interface: u32) -> Result<()> {
        let map = self.ebpf.map_mut("DEVICES").context("no map of devices")?;
        let mut devices: DevMapHash<&mut MapData> = map.try_into()?;
        Ok(devices.insert(interface, interface, None, 0)?)
    }

    /// Tells the wrapper what to send, from the first flow on. A frame is at least as long as what the wrapper writes.
    ///
    /// # Errors
    /// When the map cannot be written.
    pub fn set_traffic(&mut self, traffic: &Traffic) -> Result<()> {
        let v4 = traffic.frame.get(12) == Some(&0x08);
        let (port, address) = if v4 { (34 - LEAD, 28 - LEAD) } else { (54 - LEAD, 36 - LEAD) };
        let mut template = [0; TEMPLATE_SIZE];
        template[..HEADERS].copy_from_slice(&traffic.frame[LEAD..LEAD + HEADERS]);
        let lead = TEMPLATE_SIZE - 8;
        template[lead..lead + LEAD].copy_from_slice(&traffic.frame[..LEAD]);
        let tables = match traffic.flows {
            None => &[][..],
            // One address has ports enough, and the frame's stays as it is.
            Some(..=PORTS) => &[(HEADERS, port)],
            Some(_) => &[(HEADERS, port), (2 * HEADERS, address)],
        };
        for (table, offset) in tables {
            template[*offset..*offset + 2].fill(0);
            // The lowest byte of a word is the first in memory here: a one there moves a number to its place.
            template[*table + *offset] = 1;
        }
        let numbers = [traffic.flows.unwrap_or(1), 0, 0, 0, 0, traffic.frame.len() as u32];
        for (slot, number) in template[3 * HEADERS..].chunks_exact_mut(4).zip(numbers) {
            slot.copy_from_slice(&number.to_ne_bytes());
        }
        Ok(self.array::<[u8; TEMPLATE_SIZE]>("TEMPLATE")?.set(0, template, 0)?)
    }

    /// Verdicts since [`Self::set_traffic`].
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn verdicts(&mut self) -> Result<Verdicts> {
        let template = self.array::<[u8; TEMPLATE_SIZE]>("TEMPLATE")?.get(&0, 0)?;
        let number = |index: usize| {
            let start = 3 * HEADERS + index * 4;
            u32::from_ne_bytes([template[start], template[start + 1], template[start + 2], template[start + 3]])
        };
        Ok(Verdicts { redirected: number(2), passed: number(3), dropped: number(4) })
    }

    /// Datagrams that the program `sink` has seen, on all CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn arrived(&self) -> Result<u64> {
        let map = self.ebpf.map("ARRIVED").context("no map ARRIVED")?;
        let arrived: PerCpuArray<&MapData, u64> = map.try_into()?;
        Ok(arrived.get(&0, 0)?.iter().sum())
    }

    /// What the packet path counted since the programs were loaded, in words.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn counts(&mut self) -> Result<String> {
        let mut counts = Vec::new();
        for counter in Counter::ALL {
            let count = self.counted(*counter)?;
            if count > 0 {
                counts.push(format!("{} {count}", counter.name()));
            }
        }
        Ok(counts.join(", "))
    }

    /// What one counter counted since the programs were loaded.
    ///
    /// # Errors
    /// When the kernel refuses to say.
    pub fn counted(&mut self, counter: Counter) -> Result<u64> {
        let map = self.ebpf.map_mut("COUNTERS").context("no map of counters")?;
        let counters: PerCpuArray<&mut MapData, u64> = map.try_into()?;
        Ok(counters.get(&(counter as u32), 0)?.iter().sum())
    }

    /// Has each of the `lines` cache lines say which is the next, in one round through all of them without an order.
    ///
    /// # Errors
    /// When the kernel refuses an element.
    pub fn fill_lines(&mut self, lines: u32) -> Result<()> {
        let mut next: Vec<u32> = (0..lines).collect();
        let mut random = fastrand::Rng::with_seed(LINES_SEED);
        // Sattolo's shuffle: one cycle.
        for last in (1..next.len()).rev() {
            next.swap(last, random.usize(..last));
        }
        let mut map = self.array::<[u64; 8]>("LINES")?;
        for (line, next) in (0..).zip(next) {
            map.set(line, [u64::from(next), 0, 0, 0, 0, 0, 0, 0], 0)?;
        }
        Ok(())
    }

    /// Fills the table of the lookup row with `keys` keys, a power of two.
    ///
    /// # Errors
    /// When the map takes no more.
    pub fn fill_hash(&mut self, keys: u64) -> Result<()> {
        self.array::<u64>("KEY_MASK")?.set(0, keys - 1, 0)?;
        let mut hash: HashMap<&mut MapData, u64, u64> = self.ebpf.map_mut("HASH").context("no map HASH")?.try_into()?;
        (0..keys).try_for_each(|key| hash.insert(key, key, 0)).map_err(Into::into)
    }

    pub(crate) fn array<T: aya::Pod>(&mut self, name: &str) -> Result<Array<&mut MapData, T>> {
        Ok(self.ebpf.map_mut(name).with_context(|| format!("no map {name}"))?.try_into()?)
    }
}

/// The object with its maps made.
fn object(sizes: &Sizes) -> Result<Ebpf> {
    let (entries, buckets) = (sizes.entries(), sizes.buckets());
    let mut loader = EbpfLoader::new();
    for (map, entries) in &entries {
        loader.map_max_entries(map, *entries);
    }
    loader.override_global("FLOW_BUCKETS", &buckets, true);
    if !sizes.routes_are_remembered {
        loader.override_global("ROUTE_TICKS", &0u32, true);
    }
    let mut object = loader.load(OBJECT).context("cannot load the BPF object")?;
    let secret = object.map_mut("FLOW_SECRET").context("no map FLOW_SECRET")?;
    Array::<_, FlowSecret>::try_from(secret)?.set(0, SECRET, 0)?;
    Ok(object)
}
