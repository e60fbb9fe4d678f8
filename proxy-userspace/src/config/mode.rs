//! `mode`, and `--proxy-mode`.

use super::{ConfigError, value};

/// Which data plane expresses Services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// BPF programs at sockets and interfaces.
    Ebpf,
    /// Rules through `iptables-restore`.
    Iptables,
}

impl Mode {
    /// Every mode of this build.
    pub const ALL: [Self; 2] = [Self::Ebpf, Self::Iptables];

    /// Its name in the configuration, in logs and at `/proxyMode`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Iptables => "iptables",
        }
    }

    /// The mode named `text`; empty is the default.
    pub(super) fn parse(text: &str) -> Result<Self, ConfigError> {
        if text.is_empty() {
            return Ok(Self::Ebpf);
        }
        let known = Self::ALL.into_iter().find(|mode| mode.name() == text);
        known.ok_or_else(|| value("mode", text, &format!("is no mode of this build; there is: {}", Self::names())))
    }

    fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }
}
