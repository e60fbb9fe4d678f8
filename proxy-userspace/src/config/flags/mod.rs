//! The command line: kube-proxy's flags with their meaning, and ours.

mod kube_proxy;
mod own;
mod values;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;

pub use self::kube_proxy::KubeProxyFlags;
pub use self::own::{LogFlags, OwnFlags};

use super::Documents;
use values::go_bool;

/// The node's Service proxy: watches Services and EndpointSlices and programs the kernel.
///
/// The flags of kube-proxy 1.36 are understood. As there, most are ignored where --config names a file. Those that count all the
/// same are said to override it.
#[derive(Debug, Clone, Default, Parser)]
#[command(name = "trama-proxy", version, args_override_self = true, allow_negative_numbers = true)]
#[command(
    after_help = "trama-proxy status, explain, monitor and top look at a node instead: see trama-proxy status --help"
)]
pub struct Flags {
    /// Configuration file: YAML documents of kind KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1) and
    /// ProxyConfiguration (trama.dev/v1alpha1), one of each at most
    #[arg(long, value_name = "FILE", default_value = "", hide_default_value = true)]
    pub config: String,
    /// Write the configuration, defaults filled in, to this file and exit
    #[arg(long, value_name = "FILE")]
    pub write_config_to: Option<PathBuf>,
    /// Remove everything that trama-proxy in any mode has put into this node's kernel, and exit
    #[arg(long, value_name = "BOOL", value_parser = go_bool, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub cleanup: Option<bool>,
    /// Set what needs full privileges (connection tracking), and exit
    #[arg(long, value_name = "BOOL", value_parser = go_bool, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub init_only: Option<bool>,
    /// Address of the API server; overrides the kubeconfig
    #[arg(long, value_name = "URL", default_value = "", hide_default_value = true)]
    pub master: String,
    /// Name of this node's Node object; overrides the file [default: the host name]
    #[arg(long, value_name = "NAME")]
    pub hostname_override: Option<String>,
    /// Those of kube-proxy that a file makes void.
    #[command(flatten)]
    pub kube_proxy: KubeProxyFlags,
    /// Those that say how to log.
    #[command(flatten)]
    pub logging: LogFlags,
    /// Ours.
    #[command(flatten)]
    pub own: OwnFlags,
}

impl Flags {
    /// Reads a command line, its first word being the program's name. As in every program of Kubernetes, `_` and `-` are one in
    /// the name of a flag.
    ///
    /// # Errors
    /// What is wrong, or the text of `--help` and `--version`.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        Self::try_parse_from(arguments.into_iter().map(with_dashes))
    }

    /// The file, unless its name is empty.
    pub(super) fn file(&self) -> Option<PathBuf> {
        Some(PathBuf::from(&self.config)).filter(|path| !path.as_os_str().is_empty())
    }

    /// Whether `--cleanup` was given, and not as false.
    pub fn is_cleanup(&self) -> bool {
        self.cleanup == Some(true)
    }

    /// Whether `--init-only` was given, and not as false.
    pub fn is_init_only(&self) -> bool {
        self.init_only == Some(true)
    }

    /// Puts the flags over `documents`, in which defaults are filled in: an empty address is nowhere. Returns the names of those
    /// that a file makes void.
    pub(super) fn apply(&self, documents: &mut Documents) -> Vec<&'static str> {
        let void = if self.file().is_some() {
            self.kube_proxy.apply(&mut super::KubeProxyConfiguration::default())
        } else {
            self.kube_proxy.apply(&mut documents.kube_proxy);
            Vec::new()
        };
        let name = self.hostname_override.as_deref().map(str::trim).filter(|name| !name.is_empty());
        if let Some(name) = name {
            documents.kube_proxy.hostname_override = Some(name.to_owned());
        }
        self.logging.apply(&mut documents.kube_proxy.logging);
        self.own.apply(&mut documents.own);
        void
    }
}

/// `--Proxy_mode=x_y` becomes `--Proxy-mode=x_y`.
fn with_dashes(argument: OsString) -> OsString {
    let Some(text) = argument.to_str().filter(|text| text.starts_with("--")) else { return argument };
    let (name, value) = text.split_at(text.find('=').unwrap_or(text.len()));
    OsString::from(format!("{}{value}", name.replace('_', "-")))
}
