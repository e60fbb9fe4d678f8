//! The data planes by name.

use std::fmt;

/// Which data plane programs the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// The best that this node can carry: eBPF, else nftables, else iptables.
    #[default]
    Auto,
    /// Programs at sockets and interfaces.
    Ebpf,
    /// nf_tables through netlink.
    Nftables,
    /// Rules through iptables-restore.
    Iptables,
    /// The kernel's load balancer.
    Ipvs,
}

impl Mode {
    /// Every mode, by its name in `mode` and `--proxy-mode`.
    pub const ALL: [Self; 5] = [Self::Auto, Self::Ebpf, Self::Nftables, Self::Iptables, Self::Ipvs];

    /// The name in `mode`, `--proxy-mode` and `/proxyMode`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
        }
    }

    /// The mode of this name; empty is [`Mode::Auto`], as it is kube-proxy's choice too.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "" => Some(Self::Auto),
            name => Self::ALL.into_iter().find(|mode| mode.name() == name),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
