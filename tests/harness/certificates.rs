//! Certificates for the servers and clients of a test, made when it runs: a CA of its own, and what it signs.
//!
//! The files lie in a folder that goes with the authority. A server's key belongs to the user that PostgreSQL runs
//! as, ours to us; nobody else may read either.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd};
use tempfile::TempDir;

use super::unique;

/// A CA.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: TempDir,
}

/// A certificate and its key, as files in PEM.
pub struct Issued {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    pub fn new() -> Authority {
        let mut params = params(&unique("test authority "), &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let folder = tempfile::Builder::new().prefix("pg-outbox-ca-").tempdir().unwrap();
        // The user postgres must get through to its files.
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        fs::write(folder.path().join("ca.pem"), issuer.pem()).unwrap();
        Authority { issuer, folder }
    }

    /// Its own certificate.
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// A certificate for these host names or addresses; the first of them is its common name, too.
    pub fn issue(&self, names: &[&str]) -> Issued {
        self.sign(&params(names[0], names))
    }

    /// The same, no longer valid.
    pub fn issue_expired(&self, names: &[&str]) -> Issued {
        let mut params = params(names[0], names);
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2021, 1, 1);
        self.sign(&params)
    }

    fn sign(&self, params: &CertificateParams) -> Issued {
        let key = KeyPair::generate().unwrap();
        let signed = params.signed_by(&key, &self.issuer).unwrap();
        let path = |suffix: &str| self.folder.path().join(unique("issued-") + suffix);
        let issued = Issued { certificate: path(".pem"), key: path(".key") };
        fs::write(&issued.certificate, signed.pem()).unwrap();
        fs::write(&issued.key, key.serialize_pem()).unwrap();
        fs::set_permissions(&issued.key, Permissions::from_mode(0o600)).unwrap();
        issued
    }
}

impl Issued {
    /// Gives the key to PostgreSQL, and returns the settings that make it serve with this certificate.
    pub fn postgres_settings(&self) -> Vec<String> {
        if rustix::process::geteuid().is_root() {
            let status = Command::new("chown").arg("postgres").arg(&self.key).status().unwrap();
            assert!(status.success(), "chown postgres {}", self.key.display());
        }
        vec![
            "ssl=on".to_owned(),
            format!("ssl_cert_file={}", self.certificate.display()),
            format!("ssl_key_file={}", self.key.display()),
        ]
    }
}

fn params(common_name: &str, names: &[&str]) -> CertificateParams {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params
}
