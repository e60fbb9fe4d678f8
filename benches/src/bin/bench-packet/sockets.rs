//! Rows of the socket path: real sockets of a process in a cgroup of its own, timed by the kernel (`BPF_ENABLE_STATS`) and as whole calls.
//!
//! The kernel's own timing is part of what it says, so an empty program has rows beside.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, Program};
use aya::sys::{Stats, enable_stats};
use benches::programs::{Programs, Sizes};
use benches::services::{ENDPOINT_PORT, Services, TCP, UDP};
use ipnet::IpNet;
use node_sys::{Cgroup, Netns, Placement};
use trama_cni::{NetlinkError, Route, in_netns};
use trama_lab::Claim;

use crate::rows::{Bench, Row};
use crate::socket_client::{Done, Order, Work};

/// One call for so many packets of the other rows.
const PACKETS_A_CALL: u32 = 50;
/// Fewest calls of a run.
const CALLS_MIN: u32 = 1000;
/// Services of the rows.
const SIZES: [u32; 2] = [1, 10_000];
/// The first service, an address that is none, and an endpoint.
const VIP: &str = "10.96.0.1:80";
const ELSEWHERE: &str = "10.5.0.1:80";
const ENDPOINT: &str = "127.0.0.1:8080";
/// Network of the first two; loopback has all of it.
const EVERYTHING: &str = "10.0.0.0/8";

/// What is attached while a row is taken.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Attached {
    Nothing,
    Empty,
    /// Makes the socket's storage, which the kernel allocates, and nothing else.
    Storage,
    Services(u32),
}

impl Attached {
    fn suffix(self) -> String {
        match self {
            Self::Nothing => ", no program".to_owned(),
            Self::Empty => ", empty program".to_owned(),
            Self::Storage => ", program that makes socket storage only".to_owned(),
            Self::Services(1) => String::new(),
            Self::Services(count) => format!(", {count} services"),
        }
    }

    /// What stands at the hook of the program `name`.
    fn program(self, name: &str) -> Option<String> {
        match self {
            Self::Nothing => None,
            Self::Empty => Some(format!("empty_{name}")),
            Self::Storage => (name == "connect4").then(|| format!("storage_{name}")),
            Self::Services(_) => Some(name.to_owned()),
        }
    }
}

/// Whose time a row has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Timed {
    /// That of the program of this name.
    Program(&'static str),
    /// That of the whole call.
    Call,
}

/// A kind of row.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    work: Work,
    timed: Timed,
    /// Whether the socket asks for the service.
    service: bool,
}

const KINDS: [Kind; 8] = [
    kind("connect4 to a VIP, new UDP socket", Work::NewUdp, Timed::Program("connect4"), true),
    kind("connect4 to a VIP, reused UDP socket", Work::ReusedUdp, Timed::Program("connect4"), true),
    kind("connect4, not a service", Work::ReusedUdp, Timed::Program("connect4"), false),
    kind("sendmsg4 to a VIP", Work::Send, Timed::Program("sendmsg4"), true),
    kind("sock_release, UDP socket that is connected to a VIP", Work::NewUdp, Timed::Program("sock_release"), true),
    kind("sock_release, not a service", Work::NewUdp, Timed::Program("sock_release"), false),
    kind("UDP socket, connect to a VIP, close", Work::NewUdp, Timed::Call, true),
    kind("TCP connect to a VIP over loopback", Work::NewTcp, Timed::Call, true),
];

const fn kind(name: &'static str, work: Work, timed: Timed, service: bool) -> Kind {
    Kind { name, work, timed, service }
}

/// A row that is being taken.
struct Cell {
    kind: Kind,
    attached: Attached,
    nanoseconds: Vec<f64>,
}

/// Programs, and as what they are attached one after the other.
struct Subject {
    programs: Programs,
    attached: Vec<Attached>,
}

/// Measures the rows of the socket path that the options ask for.
pub(crate) fn measure(bench: &mut Bench<'_>) -> Result<()> {
    let mut cells = cells(bench);
    if cells.is_empty() {
        return Ok(());
    }
    let stand = Stand::new()?;
    let mut client = Client::start(&stand)?;
    let mut subjects = subjects(&cells)?;
    let calls = (bench.options.packets / PACKETS_A_CALL).max(CALLS_MIN);
    for _ in 0..bench.options.runs {
        for Subject { programs, attached } in &mut subjects {
            for attached in attached {
                let _links = attach(programs, *attached, &stand.cgroup)?;
                for cell in cells.iter_mut().filter(|cell| cell.attached == *attached) {
                    eprint!("\r\x1b[K{} ...", cell.name());
                    let time = cell.take(programs, &mut client, calls).with_context(|| cell.name())?;
                    cell.nanoseconds.push(time);
                }
            }
        }
    }
    eprint!("\r\x1b[K");
    bench.rows.extend(cells.into_iter().map(Cell::into_row));
    Ok(())
}

fn cells(bench: &Bench<'_>) -> Vec<Cell> {
    let mut cells = Vec::new();
    for kind in KINDS {
        let calibration = if kind.timed == Timed::Call { Attached::Nothing } else { Attached::Empty };
        if kind.work == Work::NewUdp && kind.timed == Timed::Program("connect4") {
            cells.push(Cell { kind, attached: Attached::Storage, nanoseconds: Vec::new() });
        }
        for attached in [calibration, Attached::Services(SIZES[0]), Attached::Services(SIZES[1])] {
            cells.push(Cell { kind, attached, nanoseconds: Vec::new() });
        }
    }
    cells.retain(|cell| bench.wants(&cell.name()));
    cells
}

fn subjects(cells: &[Cell]) -> Result<Vec<Subject>> {
    let attached: BTreeSet<Attached> = cells.iter().map(|cell| cell.attached).collect();
    let subject = |attached| {
        let mut programs = Programs::load_sockets(&Sizes::default())?;
        if let Attached::Services(count) = attached {
            [TCP, UDP].iter().try_for_each(|protocol| programs.program_services(&services(count, *protocol)?))?;
        }
        Ok(Subject { programs, attached: vec![attached] })
    };
    attached.into_iter().map(subject).collect()
}

/// Endpoints are addresses of loopback: everything arrives, nothing leaves.
fn services(count: u32, protocol: u8) -> Result<Services> {
    let backends = IpAddr::from([127, 0, 0, 0]);
    Ok(Services { protocol, backends, networks: true, ..Services::tcp(VIP.parse()?, count) })
}

/// Attaches the programs of the socket path, or the empty ones in their place; they are detached when the links are dropped.
fn attach(programs: &mut Programs, attached: Attached, cgroup: &Cgroup) -> Result<Vec<FdLink>> {
    let folder = File::open(cgroup.path()).with_context(|| format!("cannot open {}", cgroup.path().display()))?;
    let mut links = Vec::new();
    for name in ["sock_release", "connect4", "sendmsg4"] {
        let Some(name) = attached.program(name) else { continue };
        links.push(match programs.program(&name)? {
            Program::CgroupSockAddr(program) => {
                let link = program.attach(&folder, CgroupAttachMode::Single)?;
                program.take_link(link)?.try_into()?
            }
            Program::CgroupSock(program) => {
                let link = program.attach(&folder, CgroupAttachMode::Single)?;
                program.take_link(link)?.try_into()?
            }
            _ => bail!("{name} is no program of the socket path"),
        });
    }
    Ok(links)
}

impl Cell {
    fn name(&self) -> String {
        format!("{}{}", self.kind.name, self.attached.suffix())
    }

    fn target(&self) -> Result<SocketAddr> {
        let served = matches!(self.attached, Attached::Services(_));
        let target = match self.kind.service {
            false => ELSEWHERE,
            // Nobody translates the Service's address, and the connection is to be made all the same.
            true if self.kind.work == Work::NewTcp && !served => ENDPOINT,
            true => VIP,
        };
        Ok(target.parse()?)
    }

    /// Nanoseconds of one call, or of the program in one call.
    fn take(&self, programs: &mut Programs, client: &mut Client, count: u32) -> Result<f64> {
        let order = Order { work: self.kind.work, target: self.target()?, count };
        let Timed::Program(name) = self.kind.timed else {
            let done = client.ask(&order)?;
            self.check(&done)?;
            return Ok(done.nanoseconds as f64 / f64::from(count));
        };
        let name = self.attached.program(name).context("a program's time without a program")?;
        let timing = enable_stats(Stats::RunTime).context("cannot have the kernel time programs")?;
        let before = Runs::of(programs, &name)?;
        let done = client.ask(&order)?;
        let after = Runs::of(programs, &name)?;
        drop(timing);
        self.check(&done)?;
        let runs = after.count - before.count;
        ensure!(runs == u64::from(count), "the program ran {runs} times in {count} calls");
        Ok((after.time - before.time).as_nanos() as f64 / f64::from(count))
    }

    /// A connected socket leads to an endpoint where the row is about one, and else to where it was told.
    fn check(&self, done: &Done) -> Result<()> {
        let target = self.target()?;
        let translated = self.kind.service && matches!(self.attached, Attached::Services(_));
        let connected = self.kind.work != Work::Send;
        let right = match translated && connected {
            true => services(1, UDP)?.is_backend(done.peer.ip()) && done.peer.port() == ENDPOINT_PORT,
            false => done.peer == target,
        };
        ensure!(right, "a socket that asked for {target} leads to {}", done.peer);
        Ok(())
    }

    fn into_row(self) -> Row {
        let calibration = !matches!(self.attached, Attached::Services(_));
        let one = format!("{}{}", self.kind.name, Attached::Services(1).suffix());
        let compared = matches!(self.attached, Attached::Services(2..));
        Row { of_one_service: compared.then_some(one), ..Row::new(&self.name(), calibration, self.nanoseconds) }
    }
}

/// What the kernel says of a program.
struct Runs {
    count: u64,
    time: Duration,
}

impl Runs {
    fn of(programs: &mut Programs, name: &str) -> Result<Self> {
        let info = programs.program(name)?.info()?;
        Ok(Self { count: info.run_count(), time: info.run_time() })
    }
}

/// A namespace with nothing but loopback, and a cgroup. The claim removes both, also after a signal.
struct Stand {
    claim: Claim,
    netns: Netns,
    cgroup: Cgroup,
}

impl Stand {
    fn new() -> Result<Self> {
        let claim = Claim::take(&format!("bench{}", std::process::id()))?;
        let (netns, cgroup) = (claim.netns("sockets")?, claim.cgroup("sockets")?);
        let to: IpNet = EVERYTHING.parse()?;
        in_netns(&netns, async |session| -> Result<(), NetlinkError> {
            let interface = session.link("lo").await?;
            session.set_up(interface).await?;
            session.set_route(Route { to, via: None, interface }).await
        })?;
        Ok(Self { claim, netns, cgroup })
    }
}

/// The process whose sockets are measured.
struct Client {
    // Ends when its input does.
    _process: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Client {
    fn start(stand: &Stand) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--socket-client").stdin(Stdio::piped()).stdout(Stdio::piped());
        let placement = Placement { netns: Some(&stand.netns), cgroup: Some(&stand.cgroup) };
        let mut process = stand.claim.spawn(&mut command, placement)?;
        let orders = process.stdin.take().context("a client without an input")?;
        let answers = BufReader::new(process.stdout.take().context("a client without an output")?);
        Ok(Self { _process: process, orders, answers })
    }

    fn ask(&mut self, order: &Order) -> Result<Done> {
        writeln!(self.orders, "{}", serde_json::to_string(order)?).context("the client is gone")?;
        let mut line = String::new();
        self.answers.read_line(&mut line).context("the client is gone")?;
        serde_json::from_str(&line).context("the client gave up")
    }
}
