//! A client certificate of any version.
//!
//! rustls refuses to present an X.509 version 1 certificate, which is what `openssl x509 -req` makes where it is told of no
//! extensions, and what an API server accepts: whether a certificate is good is the server's to judge, so it is shown as it is.

use std::fs;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper_rustls::{FixedServerNameResolver, HttpsConnectorBuilder};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ConfigExt};
use kube::{Client, Config};
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::CertifiedKey;
use secrecy::ExposeSecret;
use tower::{BoxError, ServiceBuilder};

/// The certificate that is shown to every server that asks.
#[derive(Debug)]
pub(super) struct Identity(Arc<CertifiedKey>);

impl ResolvesClientCert for Identity {
    fn resolve(&self, _issuers: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Takes the client certificate out of `config`; `None` where there is no pair of certificate and key. An error is one phrase.
pub(super) fn take(config: &mut Config) -> Result<Option<Identity>, String> {
    let auth = &mut config.auth_info;
    let certificate = load("client-certificate", auth.client_certificate_data.take(), auth.client_certificate.take())?;
    let key_data = auth.client_key_data.take().map(|secret| secret.expose_secret().to_owned());
    let key = load("client-key", key_data, auth.client_key.take())?;
    let (Some(certificate), Some(key)) = (certificate, key) else { return Ok(None) };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&certificate).collect();
    let chain = chain.map_err(|error| format!("client-certificate: {error}"))?;
    if chain.is_empty() {
        return Err("client-certificate holds no certificate".to_owned());
    }
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(|error| format!("client-key: {error}"))?;
    let provider = ring::default_provider();
    let signer = provider.key_provider.load_private_key(key).map_err(|error| format!("client-key: {error}"))?;
    Ok(Some(Identity(Arc::new(CertifiedKey::new(chain, signer)))))
}

/// Data goes before a file, as everywhere in a kubeconfig.
fn load(field: &str, data: Option<String>, file: Option<String>) -> Result<Option<Vec<u8>>, String> {
    match (data.filter(|data| !data.is_empty()), file.filter(|file| !file.is_empty())) {
        (Some(data), _) => {
            let decoded =
                STANDARD.decode(data.trim()).map_err(|error| format!("{field}-data is not base64: {error}"))?;
            Ok(Some(decoded))
        }
        (None, Some(file)) => {
            fs::read(&file).map(Some).map_err(|error| format!("{field}: cannot read {file}: {error}"))
        }
        (None, None) => Ok(None),
    }
}

/// A client that shows `identity`; in everything else it is what [`Client::try_from`] makes. An error is one phrase.
pub(super) fn client(config: Config, identity: Identity) -> Result<Client, String> {
    let problem = |error: &dyn std::fmt::Display| super::first_line(&error);
    if config.proxy_url.is_some() {
        return Err("a proxy-url together with a client certificate is not supported".to_owned());
    }
    let mut tls = config.rustls_client_config().map_err(|error| problem(&error))?;
    tls.client_auth_cert_resolver = Arc::new(identity);
    let mut https = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http();
    if let Some(name) = config.tls_server_name.clone() {
        let name = ServerName::try_from(name).map_err(|error| problem(&error))?;
        https = https.with_server_name_resolver(FixedServerNameResolver::new(name));
    }
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    let mut connector = TimeoutConnector::new(https.enable_http1().wrap_connector(http));
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    let http: HttpClient<_, Body> = HttpClient::builder(TokioExecutor::new()).build(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().map_err(|error| problem(&error))?)
        .layer(config.extra_headers_layer().map_err(|error| problem(&error))?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}

#[cfg(test)]
mod tests {
    use kube::config::AuthInfo;

    use super::*;

    /// Of version 1, as `openssl x509 -req` makes it, and the key that it belongs to.
    const VERSION_1: &str = "\
-----BEGIN CERTIFICATE-----\n\
MIIBFTCBvQIUVo2kDPxXQYzD7FRScCj1dXHfjlkwCgYIKoZIzj0EAwIwDTELMAkG\n\
A1UEAwwCdjEwIBcNMjYxMTIxMTUwOTU1WhgPMjEyNjEwMjgxNTA5NTVaMA0xCzAJ\n\
BgNVBAMMAnYxMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAESx4xZpwWwE2iJVkK\n\
VWHqacKDc+XcfpVmdqhMaHQKJDUBvNCF08JYHl20PjrJQUfDuzzD8fDWOLYBEG2R\n\
sZ1+qTAKBggqhkjOPQQDAgNHADBEAiAu4U+HKvNEFHP/rKY9Tgo7do/Rcu2BHRQ+\n\
657xcy1ZHQIgc7uJ52leg2HHowxNlUR6VzMb5PRBVlr6CYUJbQzZKZo=\n\
-----END CERTIFICATE-----\n";
    const VERSION_1_KEY: &str = "\
-----BEGIN PRIVATE KEY-----\n\
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgLw0UkZ/oqvFpyNdo\n\
Yv6DZf3UU0+Q9PlIJHmdxunWioihRANCAARLHjFmnBbATaIlWQpVYeppwoNz5dx+\n\
lWZ2qExodAokNQG80IXTwlgeXbQ+OslBR8O7PMPx8NY4tgEQbZGxnX6p\n\
-----END PRIVATE KEY-----\n";

    fn config(auth_info: AuthInfo) -> Config {
        let mut config = Config::new("https://127.0.0.1:6443".parse().unwrap());
        config.auth_info = auth_info;
        // Without one the machine's own certificates would be read.
        config.root_cert = Some(Vec::new());
        config
    }

    #[tokio::test]
    async fn a_certificate_of_version_1_is_taken_from_data_or_files() {
        let (certificate, key) = (VERSION_1, VERSION_1_KEY);
        let mut from_data = config(AuthInfo {
            client_certificate_data: Some(STANDARD.encode(certificate)),
            client_key_data: Some(STANDARD.encode(key).into()),
            ..AuthInfo::default()
        });
        let identity = take(&mut from_data).unwrap().unwrap();
        assert_eq!(identity.0.cert.len(), 1);
        client(from_data, identity).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        fs::write(path("crt"), certificate).unwrap();
        fs::write(path("key"), key).unwrap();
        let mut from_files = config(AuthInfo {
            client_certificate: Some(path("crt")),
            client_key: Some(path("key")),
            ..AuthInfo::default()
        });
        assert!(take(&mut from_files).unwrap().is_some());
        assert!(take(&mut config(AuthInfo::default())).unwrap().is_none());
    }

    #[test]
    fn what_is_wrong_with_it_is_named() {
        let complaint = |certificate: &str, key: &str| {
            let auth = AuthInfo {
                client_certificate_data: Some(certificate.to_owned()),
                client_key_data: Some(key.to_owned().into()),
                ..AuthInfo::default()
            };
            take(&mut config(auth)).unwrap_err()
        };
        let (certificate, key) = (VERSION_1, VERSION_1_KEY);
        assert!(complaint("%%", "").starts_with("client-certificate-data is not base64"));
        assert!(complaint(&STANDARD.encode("text"), &STANDARD.encode(key)).contains("no certificate"));
        assert!(complaint(&STANDARD.encode(certificate), &STANDARD.encode("text")).starts_with("client-key"));
        let missing = AuthInfo { client_certificate: Some("/nonexistent".into()), ..AuthInfo::default() };
        assert!(take(&mut config(missing)).unwrap_err().contains("/nonexistent"));
    }
}
