//! The kubeconfig of a client of this server.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::pki::{Authority, Leaf};

/// The text of a kubeconfig (YAML) with everything inside: server, authority, certificate and key.
pub fn kubeconfig(server: &str, authority: &Authority, user: &str, client: &Leaf) -> String {
    let encode = |pem: &str| STANDARD.encode(pem);
    format!(
        "apiVersion: v1\n\
         kind: Config\n\
         clusters:\n\
         - name: trama\n\
         \x20 cluster:\n\
         \x20   server: {server}\n\
         \x20   certificate-authority-data: {ca}\n\
         users:\n\
         - name: {user}\n\
         \x20 user:\n\
         \x20   client-certificate-data: {certificate}\n\
         \x20   client-key-data: {key}\n\
         contexts:\n\
         - name: trama\n\
         \x20 context:\n\
         \x20   cluster: trama\n\
         \x20   user: {user}\n\
         current-context: trama\n",
        ca = encode(authority.certificate_pem()),
        certificate = encode(&client.certificate_pem),
        key = encode(&client.key_pem),
    )
}
