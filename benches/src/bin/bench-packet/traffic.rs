//! Rows of the packet path: what each one sets up, and what proves that it did its work.

mod direct;

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use benches::frame::{self, ACK, SYN};
use benches::programs::{Programs, Sizes, Traffic, Verdicts};
use benches::services::{ENDPOINTS, Services, TCP, UDP};

use crate::rows::Bench;

/// `TC_ACT_REDIRECT` of include/uapi/linux/pkt_cls.h.
const REDIRECT: u32 = 7;
/// `TC_ACT_OK`.
const PASS: u32 = 0;
/// `XDP_REDIRECT` and `XDP_PASS` of include/uapi/linux/bpf.h.
const FRAME_REDIRECT: u32 = 4;
const FRAME_PASS: u32 = 2;
/// `XDP_TX`.
const FRAME_SEND: u32 = 3;
/// Flows of the "64k" rows.
const MANY: u32 = 65536;
/// Flows of the "1M" rows.
const MILLION: u32 = 1 << 20;
/// Room for two entries a flow of these, and an eighth more.
const MILLION_ENTRIES: u32 = MILLION * 2 + MILLION / 4;
/// Endpoints of a service with so many flows that are masqueraded: the node's address has 28,976 source ports towards each, of which few
/// should be taken.
const MANY_ENDPOINTS: u32 = 400;
/// Sources of the rows in which every packet is a new flow: more than the table holds.
const EVER_NEW: u32 = 1 << 24;
/// What the row of new flows is called where there are source ports for all of them, and where there are not.
const NEW_ROW: &str = "new flow each, both entries written";
const USED_UP_ROW: &str = "new flow each, all source ports to the endpoints used up";

/// Client, virtual address and a destination that is no service, of one family.
#[derive(Clone, Copy)]
struct Family {
    name: &'static str,
    protocol: u8,
    client: SocketAddr,
    frontend: SocketAddr,
    elsewhere: SocketAddr,
}

impl Family {
    /// A packet of the client's to the service; the flags are TCP's.
    fn packet(self, flags: u8) -> Vec<u8> {
        self.frame(self.client, self.frontend, flags)
    }

    fn frame(self, from: SocketAddr, to: SocketAddr, flags: u8) -> Vec<u8> {
        if self.protocol == UDP { frame::udp(from, to) } else { frame::tcp(from, to, flags) }
    }
}

/// A hook, as the programs of the benchmark know it.
#[derive(Clone, Copy)]
struct Hook {
    /// What its rows are called.
    name: &'static str,
    /// The wrapped program.
    program: &'static str,
    redirect: u32,
    pass: u32,
    /// Whether the node's address becomes the source, as it must where answers come from another machine.
    masquerade: bool,
}

impl Hook {
    /// What the rows of a service are called.
    const fn service_rows(self) -> [&'static str; 4] {
        let new = if self.masquerade { USED_UP_ROW } else { NEW_ROW };
        ["established, 1 flow", "reply, 1 flow", "established, 64k flows", new]
    }
}

const TC: Hook = Hook { name: "DNAT", program: "wrapped_ingress", redirect: REDIRECT, pass: PASS, masquerade: false };
const XDP: Hook = Hook {
    name: "XDP NAT, both ways",
    program: "wrapped_xdp",
    redirect: FRAME_REDIRECT,
    pass: FRAME_PASS,
    masquerade: true,
};

/// What the rows of a service differ in.
#[derive(Clone, Copy)]
struct Setting {
    services: u32,
    routes_are_remembered: bool,
}

const ALONE: Setting = Setting { services: 1, routes_are_remembered: true };
/// The rows that take turns, the one that the others are compared with first.
const SETTINGS: [Setting; 4] = [
    ALONE,
    Setting { services: 10_000, ..ALONE },
    Setting { services: 100_000, ..ALONE },
    Setting { routes_are_remembered: false, ..ALONE },
];

impl Setting {
    fn suffix(self) -> String {
        match self {
            Self { routes_are_remembered: false, .. } => ", each packet asks for its route".to_owned(),
            Self { services: 1, .. } => String::new(),
            Self { services, .. } => format!(", {services} services"),
        }
    }
}

/// A setting in the kernel.
struct Subject {
    setting: Setting,
    programs: Programs,
    flow: Opened,
    /// Packets of the present row.
    sent: u32,
}

/// Measures the rows of the packet path that the options ask for.
pub(crate) fn measure(bench: &mut Bench<'_>) -> Result<()> {
    let v4 = family("IPv4", TCP, ["10.1.0.0:1024", "10.96.0.1:80", "10.5.0.1:80"])?;
    let v6 = family("IPv6", TCP, ["[fd00:c::]:1024", "[fd00:10:96::1]:80", "[fd00:5::1]:80"])?;
    let udp = Family { name: "IPv4 UDP", protocol: UDP, ..v4 };
    for hook in [TC, XDP] {
        bench.not_a_service(v4, hook)?;
        bench.service(v4, hook, &SETTINGS)?;
        bench.service(v6, hook, &[ALONE])?;
        bench.service(udp, hook, &[ALONE])?;
        if hook.masquerade {
            bench.new_flows(v4, hook)?;
            bench.new_flows(v6, hook)?;
        }
        bench.million(v4, hook)?;
    }
    bench.direct(v4)?;
    bench.direct(v6)?;
    Ok(())
}

fn family(name: &'static str, protocol: u8, addresses: [&str; 3]) -> Result<Family> {
    let [client, frontend, elsewhere] = addresses.map(str::parse);
    Ok(Family { name, protocol, client: client?, frontend: frontend?, elsewhere: elsewhere? })
}

fn label(family: Family, hook: Hook, what: &str, setting: Setting) -> String {
    format!("{} {}, {what}{}", family.name, hook.name, setting.suffix())
}

impl Bench<'_> {
    fn programs(&self, sizes: &Sizes, services: &Services) -> Result<Programs> {
        let mut programs = Programs::load_sized(self.interface, sizes)?;
        programs.add_device(self.out)?;
        programs.program_services(services)?;
        Ok(programs)
    }

    /// Packets to an address that is no service: they must come out as they went in.
    fn not_a_service(&mut self, family: Family, hook: Hook) -> Result<()> {
        for (what, flags) in [("data", ACK), ("SYN", SYN)] {
            let name = format!("{}: not a service: pass, {what}", hook.name);
            if !self.wants(&name) {
                continue;
            }
            let frame = frame::tcp(family.client, family.elsewhere, flags);
            let mut programs = self.programs(&Sizes::default(), &services(family, hook, 1))?;
            programs.set_traffic(&Traffic { frame: frame.clone(), flows: Some(1) })?;
            let (verdict, out) = programs.one(hook.program, &frame)?;
            ensure!(verdict == hook.pass && out == frame, "{name}: the packet was changed or its verdict is {verdict}");
            let mut subject = [Subject { setting: ALONE, programs, flow: Opened::NONE, sent: 0 }];
            let traffic = |_: &Subject| Traffic { frame: frame.clone(), flows: Some(1) };
            self.traffic_rows(&mut subject, hook, |_| name.clone(), traffic, Expect::Pass)?;
        }
        Ok(())
    }

    /// Established, reply and new rows of a service, in every setting.
    fn service(&mut self, family: Family, hook: Hook, settings: &[Setting]) -> Result<()> {
        let wanted = |setting: &&Setting| {
            hook.service_rows().iter().any(|what| self.wants(&label(family, hook, what, **setting)))
        };
        let opened: Result<Vec<_>> =
            settings.iter().filter(wanted).map(|setting| self.open(family, hook, *setting)).collect();
        let mut subjects = opened?;
        let (syn, data) = (family.packet(SYN), family.packet(ACK));
        let [one, reply, many, new] = hook.service_rows();
        let name = |what: &'static str| move |subject: &Subject| label(family, hook, what, subject.setting);
        let first = self.rows.len();

        for subject in &mut subjects {
            let name = label(family, hook, one, subject.setting);
            subject.programs.set_traffic(&Traffic { frame: data.clone(), flows: Some(1) })?;
            let (verdict, out) = subject.programs.one(hook.program, &data)?;
            ensure!(verdict == hook.redirect, "{name}: verdict {verdict}");
            frame::check(&out, subject.flow.source, subject.flow.backend, 1).with_context(|| name.clone())?;
        }
        let data_of = |flows| {
            let frame = data.clone();
            move |_: &Subject| Traffic { frame: frame.clone(), flows: Some(flows) }
        };
        self.traffic_rows(&mut subjects, hook, name(one), data_of(1), Expect::Redirect)?;
        self.reply_rows(&mut subjects, hook, family, name(reply))?;
        for subject in &mut subjects {
            subject.programs.set_traffic(&Traffic { frame: syn.clone(), flows: Some(MANY) })?;
            subject.programs.time(hook.program, &syn, MANY)?;
        }
        self.traffic_rows(&mut subjects, hook, name(many), data_of(MANY), Expect::Redirect)?;
        // A new flow asks for its route in any case.
        subjects.retain(|subject| subject.setting.routes_are_remembered);
        let new_each = |_: &Subject| Traffic { frame: syn.clone(), flows: Some(EVER_NEW) };
        self.traffic_rows(&mut subjects, hook, name(new), new_each, Expect::Redirect)?;
        self.compare(first, family, hook);
        Ok(())
    }

    /// New flows to more endpoints than those of the other rows, whose source ports they use up within a run.
    fn new_flows(&mut self, family: Family, hook: Hook) -> Result<()> {
        let name = label(family, hook, NEW_ROW, ALONE);
        if !self.wants(&name) {
            return Ok(());
        }
        let services = Services { endpoints: MANY_ENDPOINTS, ..services(family, hook, 1) };
        let programs = self.programs(&Sizes::default(), &services)?;
        let mut subject = [Subject { setting: ALONE, programs, flow: Opened::NONE, sent: 0 }];
        let traffic = |_: &Subject| Traffic { frame: family.packet(SYN), flows: Some(EVER_NEW) };
        self.traffic_rows(&mut subject, hook, |_| name.clone(), traffic, Expect::Redirect)
    }

    /// Names for each row among many services, from the row `first` on, the one that it is compared with.
    fn compare(&mut self, first: usize, family: Family, hook: Hook) {
        for setting in SETTINGS.iter().filter(|setting| setting.services > 1) {
            for what in hook.service_rows() {
                let name = label(family, hook, what, *setting);
                let row = self.rows.iter_mut().skip(first).find(|row| row.name == name);
                if let Some(row) = row {
                    row.of_one_service = Some(label(family, hook, what, ALONE));
                }
            }
        }
    }

    /// Loads a setting and opens its first flow.
    fn open(&self, family: Family, hook: Hook, setting: Setting) -> Result<Subject> {
        eprint!("\r\x1b[K{} {}{} ...", family.name, hook.name, setting.suffix());
        let services = services(family, hook, setting.services);
        let default = Sizes::default();
        let sizes = Sizes {
            services: default.services.max(setting.services),
            endpoints: default.endpoints.max(services.endpoints_in_all()),
            routes_are_remembered: setting.routes_are_remembered,
            ..default
        };
        let mut programs = self.programs(&sizes, &services)?;
        let syn = family.packet(SYN);
        programs.set_traffic(&Traffic { frame: syn.clone(), flows: Some(1) })?;
        let flow = first_packet(&mut programs, hook, &syn, family, &services)
            .with_context(|| label(family, hook, "new flow", setting))?;
        Ok(Subject { setting, programs, flow, sent: 0 })
    }

    fn reply_rows(
        &mut self,
        subjects: &mut [Subject],
        hook: Hook,
        family: Family,
        name: impl Fn(&Subject) -> String,
    ) -> Result<()> {
        let reply = |subject: &Subject| Traffic {
            frame: family.frame(subject.flow.backend, subject.flow.source, ACK),
            flows: None,
        };
        for subject in &mut *subjects {
            let traffic = reply(subject);
            subject.programs.set_traffic(&traffic)?;
            subject.programs.add_device(self.interface)?;
            let (verdict, out) = subject.programs.one(hook.program, &traffic.frame)?;
            ensure!(verdict == hook.redirect || verdict == FRAME_SEND, "{}: verdict {verdict}", name(subject));
            frame::check(&out, family.frontend, family.client, 1).with_context(|| name(subject))?;
        }
        self.traffic_rows(subjects, hook, name, reply, Expect::Redirect)
    }

    /// A million flows, all of which the table holds.
    fn million(&mut self, family: Family, hook: Hook) -> Result<()> {
        let name = label(family, hook, "established, 1M flows", ALONE);
        if !self.wants(&name) {
            return Ok(());
        }
        eprint!("\r\x1b[K{name} ...");
        let services = Services { endpoints: MANY_ENDPOINTS, ..services(family, hook, 1) };
        let mut programs = self.programs(&Sizes { flows: MILLION_ENTRIES, ..Sizes::default() }, &services)?;
        let (syn, data) = (family.packet(SYN), family.packet(ACK));
        programs.set_traffic(&Traffic { frame: syn.clone(), flows: Some(MILLION) })?;
        programs.time(hook.program, &syn, MILLION)?;
        ensure!(
            programs.verdicts()? == Expect::Redirect.verdicts(MILLION),
            "{name}: not every flow was opened: {:?}; counters {}",
            programs.verdicts()?,
            programs.counts()?
        );
        let mut subject = [Subject { setting: ALONE, programs, flow: Opened::NONE, sent: 0 }];
        let traffic = |_: &Subject| Traffic { frame: data.clone(), flows: Some(MILLION) };
        self.traffic_rows(&mut subject, hook, |_| name.clone(), traffic, Expect::Redirect)
    }

    /// A row of the packet path for each subject: every packet of every run must have had the expected verdict.
    fn traffic_rows(
        &mut self,
        subjects: &mut [Subject],
        hook: Hook,
        name: impl Fn(&Subject) -> String,
        traffic: impl Fn(&Subject) -> Traffic,
        expect: Expect,
    ) -> Result<()> {
        for subject in &mut *subjects {
            subject.programs.set_traffic(&traffic(subject))?;
            subject.sent = 0;
        }
        self.rows_in_turn(subjects, false, 1, &name, |subject, packets| {
            subject.sent += packets;
            let frame = traffic(subject).frame;
            subject.programs.time(hook.program, &frame, packets).map(|(time, _)| time)
        })?;
        for subject in subjects {
            let (verdicts, counts) = (subject.programs.verdicts()?, subject.programs.counts()?);
            let expected = expect.verdicts(subject.sent);
            let name = name(subject);
            ensure!(verdicts == expected, "{name}: verdicts {verdicts:?}, expected {expected:?}; counters {counts}");
        }
        Ok(())
    }
}

/// The services of a family's rows.
fn services(family: Family, hook: Hook, count: u32) -> Services {
    let (protocol, endpoints, masquerade) = (family.protocol, ENDPOINTS, hook.masquerade);
    Services { protocol, endpoints, masquerade, ..Services::tcp(family.frontend, count) }
}

/// What every packet of a row must meet.
#[derive(Clone, Copy)]
enum Expect {
    Redirect,
    Pass,
}

impl Expect {
    fn verdicts(self, sent: u32) -> Verdicts {
        match self {
            Self::Redirect => Verdicts { redirected: sent, passed: 0, dropped: 0 },
            Self::Pass => Verdicts { redirected: 0, passed: sent, dropped: 0 },
        }
    }
}

/// A flow as its backend sees it.
#[derive(Clone, Copy)]
struct Opened {
    source: SocketAddr,
    backend: SocketAddr,
}

impl Opened {
    const NONE: Self = Self {
        source: SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0),
        backend: SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0),
    };
}

/// Opens the first flow; the packet must be right in every byte.
fn first_packet(
    programs: &mut Programs,
    hook: Hook,
    syn: &[u8],
    family: Family,
    services: &Services,
) -> Result<Opened> {
    let (verdict, out) = programs.one(hook.program, syn)?;
    ensure!(verdict == hook.redirect, "the first packet has verdict {verdict}");
    let (source, backend) = addresses(&out).context("the first packet is cut short")?;
    ensure!(services.is_backend(backend.ip()), "{backend} is no endpoint of the service");
    ensure!((source == family.client) != hook.masquerade, "{source} is the source");
    frame::check(&out, source, backend, 1)?;
    Ok(Opened { source, backend })
}

/// Source and destination.
fn addresses(frame: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let transport = frame::transport_offset(frame);
    let port = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
    let address = |at: usize| -> Option<IpAddr> {
        if transport == 34 {
            let octets: [u8; 4] = frame.get(26 + at * 4..30 + at * 4)?.try_into().ok()?;
            return Some(octets.into());
        }
        let octets: [u8; 16] = frame.get(22 + at * 16..38 + at * 16)?.try_into().ok()?;
        Some(octets.into())
    };
    Some((SocketAddr::new(address(0)?, port(transport)?), SocketAddr::new(address(1)?, port(transport + 2)?)))
}
