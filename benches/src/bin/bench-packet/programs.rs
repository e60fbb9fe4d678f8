//! The programs of the benchmark in the kernel, and the maps that a row needs filled.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use aya::maps::{Array, HashMap, MapData};
use aya::programs::{Program, ProgramError, SchedClassifier, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use proxy_common::{
    BACKEND_ACTIVE, Backend, Be16, Frontend, FrontendKey, NodeSettings, POD_CIDRS_MAX, RuleBits, SERVICE_CIDRS_MAX, V4,
    V6,
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench-ebpf"));

/// Bytes of headers that the wrapper writes.
const HEADERS: usize = 80;
/// `Template` of the BPF side: headers, two tables of as many bytes, five numbers, and padding.
const TEMPLATE_SIZE: usize = 3 * HEADERS + 6 * 4;

/// Offset of `ifindex` in `struct __sk_buff` (include/uapi/linux/bpf.h).
const SKB_IFINDEX: usize = 40;
const SKB_SIZE: usize = 192;

/// What the wrapper sends.
#[derive(Debug, Clone)]
pub(crate) struct Traffic {
    /// A whole frame.
    pub(crate) frame: Vec<u8>,
    /// Number of different sources that the wrapper goes through; `None` leaves the frame as it is.
    pub(crate) flows: Option<u32>,
}

/// What the packet path returned over a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Verdicts {
    pub(crate) redirected: u32,
    pub(crate) passed: u32,
    pub(crate) dropped: u32,
}

/// The loaded programs.
pub(crate) struct Programs {
    ebpf: Ebpf,
    interface: u32,
}

impl Programs {
    /// Loads everything fresh: no row sees another one's flows.
    pub(crate) fn load(interface: u32) -> Result<Self> {
        let mut ebpf = EbpfLoader::new().load(OBJECT).context("cannot load the BPF object")?;
        for (name, program) in ebpf.programs_mut() {
            match program {
                Program::SchedClassifier(program) => program.load(),
                Program::Xdp(program) => program.load(),
                _ => continue,
            }
            .with_context(|| format!("cannot load program {name}"))?;
        }
        Ok(Self { ebpf, interface })
    }

    /// Mean time of `packets` repeats of a program on `frame`, and what it returned last.
    pub(crate) fn time(&mut self, program: &str, frame: &[u8], packets: u32) -> Result<(Duration, u32)> {
        let context = self.context();
        let options =
            TestRunOptions { data_in: Some(frame), ctx_in: Some(&context), repeat: packets, ..TestRunOptions::new() };
        let result = match self.program(program)? {
            Program::Xdp(program) => {
                let options = TestRunOptions { data_in: Some(frame), repeat: packets, ..TestRunOptions::new() };
                program.test_run(options)
            }
            Program::SchedClassifier(program) => program.test_run(options),
            _ => return Err(ProgramError::UnexpectedProgramType.into()),
        }?;
        Ok((result.duration, result.return_value))
    }

    /// The packet after one pass through a program.
    pub(crate) fn one(&mut self, program: &str, frame: &[u8]) -> Result<(u32, Vec<u8>)> {
        let context = self.context();
        let mut out = vec![0; frame.len() + 256];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let program: &mut SchedClassifier = self.program(program)?.try_into()?;
        let result = program.test_run(options)?;
        out.truncate(result.data_size_out as usize);
        Ok((result.return_value, out))
    }

    fn program(&mut self, name: &str) -> Result<&mut Program> {
        self.ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))
    }

    fn context(&self) -> Vec<u8> {
        let mut context = vec![0; SKB_SIZE];
        context[SKB_IFINDEX..SKB_IFINDEX + 4].copy_from_slice(&self.interface.to_ne_bytes());
        context
    }

    /// Tells the wrapper what to send, from the first flow on.
    pub(crate) fn set_traffic(&mut self, traffic: &Traffic) -> Result<()> {
        let v4 = traffic.frame.get(12) == Some(&0x08);
        let (port, address) = if v4 { (34, 28) } else { (54, 36) };
        let mut template = [0; TEMPLATE_SIZE];
        template[..HEADERS].copy_from_slice(&traffic.frame[..HEADERS]);
        if traffic.flows.is_some() {
            for (table, offset) in [(HEADERS, port), (2 * HEADERS, address)] {
                template[offset..offset + 2].fill(0);
                // The lowest byte of a word is the first in memory here: a one there moves a number to its place.
                template[table + offset] = 1;
            }
        }
        let numbers = [traffic.flows.unwrap_or(1), 0, 0, 0, 0];
        for (slot, number) in template[3 * HEADERS..].chunks_exact_mut(4).zip(numbers) {
            slot.copy_from_slice(&number.to_ne_bytes());
        }
        Ok(self.array::<[u8; TEMPLATE_SIZE]>("TEMPLATE")?.set(0, template, 0)?)
    }

    /// Verdicts since [`Self::set_traffic`].
    pub(crate) fn verdicts(&mut self) -> Result<Verdicts> {
        let template = self.array::<[u8; TEMPLATE_SIZE]>("TEMPLATE")?.get(&0, 0)?;
        let number = |index: usize| {
            let start = 3 * HEADERS + index * 4;
            u32::from_ne_bytes([template[start], template[start + 1], template[start + 2], template[start + 3]])
        };
        Ok(Verdicts { redirected: number(2), passed: number(3), dropped: number(4) })
    }

    /// Fills the table of the lookup row with `keys` keys, a power of two.
    pub(crate) fn fill_hash(&mut self, keys: u64) -> Result<()> {
        self.array::<u64>("KEY_MASK")?.set(0, keys - 1, 0)?;
        let mut hash: HashMap<&mut MapData, u64, u64> = self.ebpf.map_mut("HASH").context("no map HASH")?.try_into()?;
        (0..keys).try_for_each(|key| hash.insert(key, key, 0)).map_err(Into::into)
    }

    /// Programs `services` services of ten endpoints each; the first one listens at `frontend`.
    pub(crate) fn program_services(&mut self, frontend: SocketAddr, services: u32) -> Result<()> {
        for index in 0..services {
            let address = nth_address(frontend.ip(), index);
            match address {
                IpAddr::V4(ip) => {
                    let backend = |host: u32| V4::from_octets(backend_v4(index, host));
                    self.program_one("V4", V4::from_octets(ip.octets()), frontend.port(), index, backend)?;
                }
                IpAddr::V6(ip) => {
                    let backend = |host: u32| V6::from_octets(backend_v6(index, host));
                    self.program_one("V6", V6::from_octets(ip.octets()), frontend.port(), index, backend)?;
                }
            }
        }
        self.array::<NodeSettings<V4>>("NODE_V4")?.set(0, settings(V4::from_octets([10, 9, 0, 1])), 0)?;
        let v6 = V6::from_octets([0xfd, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        Ok(self.array::<NodeSettings<V6>>("NODE_V6")?.set(0, settings(v6), 0)?)
    }

    fn program_one<A>(
        &mut self,
        suffix: &str,
        address: A,
        port: u16,
        index: u32,
        backend: impl Fn(u32) -> A,
    ) -> Result<()>
    where
        A: Copy,
        FrontendKey<A>: aya::Pod,
        Backend<A>: aya::Pod,
    {
        let first = index * ENDPOINTS;
        for host in 0..ENDPOINTS {
            let value = Backend {
                address: backend(host),
                port: Be16::from_host(8080),
                state: BACKEND_ACTIVE,
                local: 0,
                service_id: index + 1,
                generation: 0,
            };
            self.array::<Backend<A>>(&format!("BACKENDS_{suffix}"))?.set(first + host, value, 0)?;
            self.array::<u32>(&format!("SLOTS_{suffix}"))?.set(first + host, first + host, 0)?;
        }
        let rule = RuleBits::new(RuleBits::FORWARD, false, false);
        let value = Frontend {
            service_id: index + 1,
            cluster_first: first,
            cluster_count: ENDPOINTS,
            rules: Frontend::pack_rules([rule; 3]),
            ..Frontend::default()
        };
        let key = FrontendKey { address, port: Be16::from_host(port), protocol: 6, padding: 0 };
        let map = self.ebpf.map_mut(&format!("FRONTENDS_{suffix}")).context("no map of frontends")?;
        let mut frontends: HashMap<&mut MapData, FrontendKey<A>, Frontend> = map.try_into()?;
        Ok(frontends.insert(key, value, 0)?)
    }

    fn array<T: aya::Pod>(&mut self, name: &str) -> Result<Array<&mut MapData, T>> {
        Ok(self.ebpf.map_mut(name).with_context(|| format!("no map {name}"))?.try_into()?)
    }
}

/// Endpoints of every service.
const ENDPOINTS: u32 = 10;

/// Whether `address` is an endpoint of service 0.
pub(crate) fn is_backend(address: IpAddr) -> bool {
    (0..ENDPOINTS).any(|host| match address {
        IpAddr::V4(ip) => ip.octets() == backend_v4(0, host),
        IpAddr::V6(ip) => ip.octets() == backend_v6(0, host),
    })
}

fn backend_v4(service: u32, host: u32) -> [u8; 4] {
    let number = service * ENDPOINTS + host + 1;
    [10, 244, (number >> 8) as u8, number as u8]
}

fn backend_v6(service: u32, host: u32) -> [u8; 16] {
    let number = (service * ENDPOINTS + host + 1).to_be_bytes();
    let mut octets = [0xfd, 0, 0x02, 0x44, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    octets[12..].copy_from_slice(&number);
    octets
}

/// The address of service `index` when service 0 has `first`.
fn nth_address(first: IpAddr, index: u32) -> IpAddr {
    match first {
        IpAddr::V4(ip) => IpAddr::V4((u32::from(ip) + index).into()),
        IpAddr::V6(ip) => IpAddr::V6((u128::from(ip) + u128::from(index)).into()),
    }
}

fn settings<A: Copy + Default>(masquerade: A) -> NodeSettings<A>
where
    proxy_common::Cidr<A>: Default + Copy,
{
    NodeSettings {
        masquerade,
        source_port_min: 1024,
        source_port_max: 29999,
        node_port_min: 30000,
        node_port_max: 32767,
        flags: 0,
        netns_cookie: [0; 2],
        pod_cidr_count: 0,
        pod_cidrs: [Default::default(); POD_CIDRS_MAX],
        service_cidr_count: 0,
        service_cidrs: [Default::default(); SERVICE_CIDRS_MAX],
    }
}
