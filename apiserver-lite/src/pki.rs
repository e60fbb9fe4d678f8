//! The certificate authority of a server: made once, kept in two files, and used to sign fresh certificates at every start.

use std::fs;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType, date_time_ymd,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tempfile::NamedTempFile;

const CA_NAME: &str = "apiserver-lite CA";
const CA_YEARS: i16 = 10;
/// Serving and client certificates are made at every start, so they only have to outlive one run.
const LEAF_YEARS: i16 = 2;

/// Why there is no usable certificate authority.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The directory or a file in it can't be used.
    #[error("{action} {} failed", .path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// One of the two files is missing.
    #[error("{} exists without {}: restore the missing file or remove both", .present.display(), .missing.display())]
    Half {
        /// The file that is there.
        present: PathBuf,
        /// The file that is not.
        missing: PathBuf,
    },
    /// A file does not hold what it should.
    #[error("{} holds no usable PEM data: restore it, or remove ca.crt and ca.key to begin anew", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
    },
    /// A certificate can't be made.
    #[error("a certificate for {subject:?} can't be made")]
    Sign {
        /// Whose certificate.
        subject: String,
        /// Why not.
        #[source]
        source: rcgen::Error,
    },
}

/// A certificate with its key.
pub struct Leaf {
    /// The certificate, PEM.
    pub certificate_pem: String,
    /// The key, PEM (PKCS #8).
    pub key_pem: String,
    certificate: CertificateDer<'static>,
    key: Vec<u8>,
}

impl Leaf {
    /// The certificate as rustls takes it.
    pub fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    /// The key as rustls takes it.
    pub fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.clone()))
    }
}

/// The certificate authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate_pem: String,
    certificate: CertificateDer<'static>,
    /// The files that [`Authority::save`] still has to put into place.
    unsaved: Option<Unsaved>,
}

struct Unsaved {
    certificate: (NamedTempFile, PathBuf),
    key: (NamedTempFile, PathBuf),
}

impl Authority {
    /// Reads the authority of a directory, or makes one whose files are written but not in place until [`Authority::save`].
    ///
    /// # Errors
    /// [`PkiError`] where the directory can't be used or holds something else.
    pub fn open(directory: &Path) -> Result<Self, PkiError> {
        let (certificate, key) = (directory.join("ca.crt"), directory.join("ca.key"));
        match (certificate.exists(), key.exists()) {
            (true, true) => Self::load(&certificate, &key),
            (false, false) => Self::make(directory, certificate, key),
            (true, false) => Err(PkiError::Half { present: certificate, missing: key }),
            (false, true) => Err(PkiError::Half { present: key, missing: certificate }),
        }
    }

    fn load(certificate: &Path, key: &Path) -> Result<Self, PkiError> {
        let read = |path: &Path| {
            fs::read_to_string(path).map_err(|source| PkiError::File {
                action: "reading",
                path: path.to_owned(),
                source,
            })
        };
        let unreadable = |path: &Path| PkiError::Unreadable { path: path.to_owned() };
        let certificate_pem = read(certificate)?;
        let der = CertificateDer::from_pem_slice(certificate_pem.as_bytes()).map_err(|_| unreadable(certificate))?;
        let pair = KeyPair::from_pem(&read(key)?).map_err(|_| unreadable(key))?;
        // The name of every authority is the same, so its parameters need not be read from the certificate.
        Ok(Self { issuer: Issuer::new(ca_params(), pair), certificate_pem, certificate: der, unsaved: None })
    }

    fn make(directory: &Path, certificate_path: PathBuf, key_path: PathBuf) -> Result<Self, PkiError> {
        fs::create_dir_all(directory).map_err(|source| PkiError::File {
            action: "making the directory",
            path: directory.to_owned(),
            source,
        })?;
        let sign = |source| PkiError::Sign { subject: CA_NAME.to_owned(), source };
        let pair = KeyPair::generate().map_err(sign)?;
        let certificate = ca_params().self_signed(&pair).map_err(sign)?;
        let unsaved = Unsaved {
            certificate: (prepare(directory, certificate.pem().as_bytes())?, certificate_path),
            key: (prepare(directory, pair.serialize_pem().as_bytes())?, key_path),
        };
        Ok(Self {
            issuer: Issuer::new(ca_params(), pair),
            certificate_pem: certificate.pem(),
            certificate: certificate.der().clone(),
            unsaved: Some(unsaved),
        })
    }

    /// Puts the files of a new authority into place; does nothing for one that was read.
    ///
    /// # Errors
    /// [`PkiError::File`].
    pub fn save(&mut self) -> Result<(), PkiError> {
        let Some(unsaved) = self.unsaved.take() else { return Ok(()) };
        for (file, path) in [unsaved.key, unsaved.certificate] {
            file.persist(&path).map_err(|error| PkiError::File { action: "writing", path, source: error.error })?;
        }
        Ok(())
    }

    /// The certificate, PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The certificate as rustls takes it.
    pub fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    /// A certificate for the server under all its names and addresses.
    ///
    /// # Errors
    /// [`PkiError::Sign`] for a name that can't stand in a certificate.
    pub fn serving(&self, names: &[String], addresses: &[IpAddr]) -> Result<Leaf, PkiError> {
        let subject = "kube-apiserver";
        let mut params = leaf_params(subject, None, ExtendedKeyUsagePurpose::ServerAuth);
        for name in names {
            let name = name.as_str().try_into().map_err(|source| PkiError::Sign { subject: name.clone(), source })?;
            params.subject_alt_names.push(SanType::DnsName(name));
        }
        params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
        self.sign(subject, &params)
    }

    /// A certificate for a client.
    ///
    /// # Errors
    /// [`PkiError::Sign`].
    pub fn client(&self, user: &str, group: &str) -> Result<Leaf, PkiError> {
        self.sign(user, &leaf_params(user, Some(group), ExtendedKeyUsagePurpose::ClientAuth))
    }

    fn sign(&self, subject: &str, params: &CertificateParams) -> Result<Leaf, PkiError> {
        let failed = |source| PkiError::Sign { subject: subject.to_owned(), source };
        let pair = KeyPair::generate().map_err(failed)?;
        let certificate = params.signed_by(&pair, &self.issuer).map_err(failed)?;
        Ok(Leaf {
            certificate_pem: certificate.pem(),
            key_pem: pair.serialize_pem(),
            certificate: certificate.der().clone(),
            key: pair.serialize_der(),
        })
    }
}

/// Writes a file beside its place, readable by its owner only; dropped without being put into place, it is gone.
pub(crate) fn prepare(directory: &Path, content: &[u8]) -> Result<NamedTempFile, PkiError> {
    let failed = |source| PkiError::File { action: "writing into", path: directory.to_owned(), source };
    let mut file = NamedTempFile::new_in(directory).map_err(failed)?;
    file.write_all(content).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
    Ok(file)
}

fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, CA_NAME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    set_validity(&mut params, CA_YEARS);
    params
}

fn leaf_params(user: &str, group: Option<&str>, usage: ExtendedKeyUsagePurpose) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, user);
    if let Some(group) = group {
        params.distinguished_name.push(DnType::OrganizationName, group);
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, LEAF_YEARS);
    params
}

/// From two days ago, because clocks differ, for some years.
fn set_validity(params: &mut CertificateParams, years: i16) {
    let today: Zoned = Timestamp::now().to_zoned(TimeZone::UTC);
    let from = today.date().saturating_sub(jiff::Span::new().days(2));
    // The first day of a month exists in every year.
    params.not_before = date_time_ymd(i32::from(from.year()), month(from), 1);
    params.not_after = date_time_ymd(i32::from(from.year() + years), month(from), 1);
}

fn month(date: jiff::civil::Date) -> u8 {
    u8::try_from(date.month()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn an_authority_is_made_once_and_then_reused() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("deep/data");
        let mut made = Authority::open(&directory).unwrap();
        assert!(!directory.join("ca.crt").exists());
        made.save().unwrap();
        assert_eq!(fs::metadata(directory.join("ca.key")).unwrap().permissions().mode() & 0o777, 0o600);
        let read = Authority::open(&directory).unwrap();
        assert_eq!(read.certificate_pem(), made.certificate_pem());
        let config = |authority: &Authority, leaf: Leaf| {
            apiserver_server::tls_config(vec![leaf.certificate()], leaf.key(), authority.certificate()).unwrap();
        };
        config(&read, read.serving(&["localhost".to_owned()], &[IpAddr::from([127, 0, 0, 1])]).unwrap());
    }

    #[test]
    fn an_unsaved_authority_leaves_no_files() {
        let home = tempfile::tempdir().unwrap();
        drop(Authority::open(home.path()).unwrap());
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    }

    #[test]
    fn half_an_authority_is_refused() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("ca.key"), "x").unwrap();
        assert!(matches!(Authority::open(home.path()), Err(PkiError::Half { .. })));
        fs::write(home.path().join("ca.crt"), "x").unwrap();
        assert!(matches!(Authority::open(home.path()), Err(PkiError::Unreadable { .. })));
    }

    #[test]
    fn a_file_in_the_way_is_one_clear_error() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("file"), "x").unwrap();
        let Err(error) = Authority::open(&home.path().join("file/data")) else { panic!("made a directory in a file") };
        assert!(error.to_string().starts_with("making the directory "), "{error}");
    }
}
