//! The way to the API server, from the standard client configuration, and how often it is gone.

mod identity;
mod observe;
mod pace;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http::header::USER_AGENT;
use http::{HeaderValue, Request, Uri};
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};

use self::observe::Observed;
use self::pace::{Bucket, Paced};
use crate::config::ApiSettings;
use crate::metrics::Metrics;

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
    /// Without `--kubeconfig`: neither a service account nor a kubeconfig.
    #[error("no --kubeconfig given and no other way to an API server found: {0}")]
    Nothing(String),
    /// `--master` is no address.
    #[error("--master {0:?} is not the address of an API server, like https://10.0.0.1:6443")]
    Master(String),
    /// A certificate or address in it is unusable.
    #[error("cannot set up the connection to the API server: {0}")]
    Client(String),
}

/// A client for the cluster that the settings (or else the environment) name, and the API server's address where it is named by
/// one; requests are paced and counted. Nothing is sent.
///
/// # Errors
/// [`ConnectionError`], one sentence.
pub async fn connect(
    settings: &ApiSettings,
    metrics: Arc<Metrics>,
) -> Result<(Client, Option<SocketAddr>), ConnectionError> {
    let mut config = find(settings).await?;
    config.read_timeout = Some(READ_TIMEOUT);
    let agent = concat!("trama-proxy/", env!("CARGO_PKG_VERSION"));
    config.headers.push((USER_AGENT, HeaderValue::from_static(agent)));
    let api_server = address_of(&config.cluster_url);
    let host: Arc<str> = Arc::from(config.cluster_url.authority().map_or("", |authority| authority.as_str()));
    let bucket = settings.qps.map(|qps| Arc::new(Bucket::new(qps, settings.burst)));
    let client = match identity::take(&mut config).map_err(ConnectionError::Client)? {
        Some(identity) => identity::client(config, identity).map_err(ConnectionError::Client)?,
        None => Client::try_from(config).map_err(|error| ConnectionError::Client(first_line(&error)))?,
    };
    let namespace = client.default_namespace().to_owned();
    let send = tower::service_fn(move |request: Request<Body>| {
        let client = client.clone();
        async move { client.send(request).await }
    });
    Ok((Client::new(Paced::new(Observed::new(send, host, metrics), bucket), namespace), api_server))
}

/// `None` for a host name.
fn address_of(url: &Uri) -> Option<SocketAddr> {
    let host = url.host()?.trim_start_matches('[').trim_end_matches(']');
    let default_port = if url.scheme_str() == Some("http") { 80 } else { 443 };
    Some(SocketAddr::new(host.parse().ok()?, url.port_u16().unwrap_or(default_port)))
}

/// As kube-proxy: a kubeconfig, or an address alone, or the pod's service account. Only where there is none of them the usual
/// search of a user's tools goes on.
async fn find(settings: &ApiSettings) -> Result<Config, ConnectionError> {
    let master = settings.master.as_deref();
    let mut config = match (&settings.kubeconfig, master) {
        (Some(path), _) => from_file(path).await.map_err(|error| explain(path, error))?,
        (None, Some(address)) => return Ok(Config::new(master_uri(address, "http")?)),
        (None, None) => match Config::incluster() {
            Ok(config) => config,
            Err(_) => Config::infer().await.map_err(|error| ConnectionError::Nothing(first_line(&error)))?,
        },
    };
    if let Some(address) = master {
        config.cluster_url = master_uri(address, "https")?;
    }
    Ok(config)
}

/// An address without a scheme gets the one that fits the credentials.
fn master_uri(address: &str, scheme: &str) -> Result<Uri, ConnectionError> {
    let whole = if address.contains("://") { address.to_owned() } else { format!("{scheme}://{address}") };
    let uri: Result<Uri, _> = whole.parse();
    let uri = uri.ok().filter(|uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some());
    uri.ok_or_else(|| ConnectionError::Master(address.to_owned()))
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

    fn settings(kubeconfig: Option<&Path>, master: Option<&str>) -> ApiSettings {
        ApiSettings {
            kubeconfig: kubeconfig.map(Path::to_owned),
            master: master.map(str::to_owned),
            qps: Some(5.0),
            burst: 10,
        }
    }

    async fn try_connect(settings: &ApiSettings) -> Result<Client, ConnectionError> {
        connect(settings, Arc::new(Metrics::new().unwrap())).await.map(|(client, _)| client)
    }

    async fn complaint(content: Option<&str>) -> String {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kubeconfig");
        if let Some(content) = content {
            std::fs::write(&path, content).unwrap();
        }
        let Err(error) = try_connect(&settings(Some(&path), None)).await else { panic!("accepted: {content:?}") };
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

    #[tokio::test]
    async fn the_master_goes_before_the_kubeconfigs_server() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kubeconfig");
        let text = "current-context: a\ncontexts: [{name: a, context: {cluster: c, user: u}}]\nusers: [{name: u, user: {}}]\n\
                    clusters: [{name: c, cluster: {server: 'https://192.0.2.1:6443'}}]\n";
        std::fs::write(&path, text).unwrap();
        let url = async |kubeconfig, master| find(&settings(kubeconfig, master)).await.unwrap().cluster_url.to_string();
        assert_eq!(url(Some(&*path), None).await, "https://192.0.2.1:6443/");
        assert_eq!(url(Some(&*path), Some("https://api:443")).await, "https://api:443/");
        assert_eq!(url(Some(&*path), Some("api:6443")).await, "https://api:6443/");
        assert_eq!(url(None, Some("http://127.0.0.1:8080")).await, "http://127.0.0.1:8080/");
        assert_eq!(url(None, Some("127.0.0.1:8080")).await, "http://127.0.0.1:8080/");
        for wrong in ["ftp://a", "not a url", "https://"] {
            let error = try_connect(&settings(Some(&path), Some(wrong))).await.err().map(|error| error.to_string());
            assert!(error.unwrap().contains("--master"), "{wrong}");
        }
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
