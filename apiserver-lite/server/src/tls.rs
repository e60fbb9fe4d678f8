//! The TLS side of the server: its certificate, and the CA whose client certificates it believes.

use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

/// Why certificates can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The CA of clients is unusable.
    #[error("the client CA certificate can't be used")]
    ClientCa(#[source] rustls::Error),
    /// No verifier can be built from the CA.
    #[error("client certificates can't be verified with this CA")]
    Verifier(#[source] rustls::server::VerifierBuilderError),
    /// Certificate and key do not go together, or are unusable.
    #[error("the serving certificate and its key can't be used")]
    Serving(#[source] rustls::Error),
}

/// Builds the TLS configuration: TLS 1.2 and 1.3, HTTP/2 and HTTP/1.1, client certificates optional but verified when shown.
///
/// # Errors
/// [`TlsError`] names the part that can't be used.
pub fn tls_config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    client_ca: CertificateDer<'static>,
) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(client_ca).map_err(TlsError::ClientCa)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .map_err(TlsError::Verifier)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Serving)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(TlsError::Serving)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
