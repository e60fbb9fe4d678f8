//! The way to the API server, from the standard client configuration.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::HeaderValue;
use http::header::USER_AGENT;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};

mod identity;

/// A request without any answer for this long is broken off; above the 295 s after which a silent watch is.
const READ_TIMEOUT: Duration = Duration::from_secs(300);

/// Why there is no way to the API server. That it does not answer is none of these: it is tried for ever.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The file can't be read.
    #[error("cannot read kubeconfig {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It names a context that it does not have.
    #[error("kubeconfig {path} has no context {context:?}")]
    Context {
        /// The file.
        path: PathBuf,
        /// The context.
        context: String,
    },
    /// It can't be used for another reason.
    #[error("cannot use kubeconfig {path}: {problem}")]
    Use {
        /// The file.
        path: PathBuf,
        /// What is wrong, one line.
        problem: String,
    },
    /// Without `--kubeconfig`: neither a kubeconfig nor a service account.
    #[error("no --kubeconfig given and no other way to an API server found: {0}")]
    Nothing(String),
    /// A certificate or address in it is unusable.
    #[error("cannot set up the connection to the API server: {0}")]
    Client(String),
}

/// A client for the cluster that `kubeconfig` (or else the environment) names, and the API server's address where it is named
/// by one. Nothing is sent.
///
/// # Errors
/// [`ConnectionError`], one sentence.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<(Client, Option<SocketAddr>), ConnectionError> {
    let mut config = match kubeconfig {
        Some(path) => from_file(path).await.map_err(|error| explain(path, error))?,
        None => Config::infer().await.map_err(|error| ConnectionError::Nothing(first_line(&error)))?,
    };
    config.read_timeout = Some(READ_TIMEOUT);
    let agent = concat!("trama-proxy/", env!("CARGO_PKG_VERSION"));
    config.headers.push((USER_AGENT, HeaderValue::from_static(agent)));
    let api_server = address_of(&config.cluster_url);
    let client = match identity::take(&mut config).map_err(ConnectionError::Client)? {
        Some(identity) => identity::client(config, identity).map_err(ConnectionError::Client),
        None => Client::try_from(config).map_err(|error| ConnectionError::Client(first_line(&error))),
    };
    Ok((client?, api_server))
}

/// `None` for a host name.
fn address_of(url: &http::Uri) -> Option<SocketAddr> {
    let host = url.host()?.trim_start_matches('[').trim_end_matches(']');
    let default_port = if url.scheme_str() == Some("http") { 80 } else { 443 };
    Some(SocketAddr::new(host.parse().ok()?, url.port_u16().unwrap_or(default_port)))
}

async fn from_file(path: &Path) -> Result<Config, KubeconfigError> {
    let kubeconfig = Kubeconfig::read_from(path)?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await
}

fn explain(path: &Path, error: KubeconfigError) -> ConnectionError {
    let path = path.to_owned();
    match error {
        KubeconfigError::ReadConfig(source, _) => ConnectionError::Read { path, source },
        KubeconfigError::LoadContext(context) => ConnectionError::Context { path, context },
        other => ConnectionError::Use { path, problem: first_line(&other) },
    }
}

fn first_line(error: &impl std::fmt::Display) -> String {
    error.to_string().lines().next().unwrap_or_default().trim_end_matches(':').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn complaint(content: Option<&str>) -> String {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kubeconfig");
        if let Some(content) = content {
            std::fs::write(&path, content).unwrap();
        }
        let Err(error) = connect(Some(&path)).await else { panic!("accepted: {content:?}") };
        let text = error.to_string();
        assert!(text.contains("kubeconfig") && text.lines().count() == 1, "{text}");
        text
    }

    #[tokio::test]
    async fn a_wrong_kubeconfig_is_one_sentence() {
        assert!(complaint(None).await.contains("No such file"));
        complaint(Some("clusters: [")).await;
        complaint(Some("")).await;
        let other = "apiVersion: v1\nkind: Config\ncurrent-context: nowhere\n";
        assert!(complaint(Some(other)).await.contains("no context \"nowhere\""));
        let no_cluster = "current-context: a\ncontexts: [{name: a, context: {cluster: gone, user: u}}]\n";
        assert!(complaint(Some(no_cluster)).await.contains("gone"));
        let bad_url = "current-context: a\ncontexts: [{name: a, context: {cluster: c, user: u}}]\nusers: [{name: u, user: {}}]\n\
                       clusters: [{name: c, cluster: {server: 'not a url'}}]\n";
        complaint(Some(bad_url)).await;
    }

    #[test]
    fn the_api_servers_address_is_known_where_it_is_one() {
        let cases = [
            ("https://10.96.0.1", Some("10.96.0.1:443")),
            ("https://[fd00::1]:6443/", Some("[fd00::1]:6443")),
            ("http://127.0.0.1", Some("127.0.0.1:80")),
            ("https://api.example.com:6443", None),
        ];
        for (url, expect) in cases {
            assert_eq!(address_of(&url.parse().unwrap()), expect.map(|address| address.parse().unwrap()), "{url}");
        }
    }
}
