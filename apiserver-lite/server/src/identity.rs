//! Who a client is, from its certificate.

use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// A user as a client certificate names it: the common name is the user, the organizations are its groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) user: String,
    pub(crate) groups: Vec<String>,
}

impl Identity {
    /// Reads the subject of a certificate that the TLS handshake has verified; `None` without a common name.
    pub(crate) fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
        let subject = certificate.subject();
        let user = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
        let groups = subject.iter_organization().filter_map(|group| group.as_str().ok()).map(str::to_owned).collect();
        (!user.is_empty()).then_some(Self { user, groups })
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    fn certificate(name: Option<&str>, groups: &[&str]) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        if let Some(name) = name {
            params.distinguished_name.push(DnType::CommonName, name);
        }
        for group in groups {
            params.distinguished_name.push(DnType::OrganizationName, *group);
        }
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn common_name_and_organizations() {
        let identity = Identity::of(&certificate(Some("admin"), &["system:masters"])).unwrap();
        assert_eq!(
            (identity.user.as_str(), identity.groups.as_slice()),
            ("admin", ["system:masters".to_owned()].as_slice())
        );
    }

    #[test]
    fn no_name_is_nobody() {
        assert_eq!(Identity::of(&certificate(None, &["system:masters"])), None);
    }
}
