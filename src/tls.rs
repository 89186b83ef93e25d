//! What both servers' connections have in common over TLS: which certificates count, and who we say we are.
//!
//! [`Tls`] says what is wanted; [`Tls::client`] reads the files and makes rustls's configuration of it, anew for
//! every connection, so that a renewed certificate counts from the next one on. The handshake's signature is always
//! verified: whoever answers has the key of the certificate that it shows. How much that certificate must be worth is
//! [`Check`]'s to say. TLS 1.2 and 1.3, with the ciphers of the *ring* library.
//!
//! No thread of its own: whoever connects calls it. It blocks on reading files alone, owns no socket, names no other
//! file of the program, and says nothing of what stands in a file with a key.

use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme};

/// How TLS is wanted towards one server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// What must be true of the server's certificate.
    pub check: Check,
    /// Whose signature it must lead to.
    pub roots: Roots,
    /// Our own certificate (its chain behind it) and its key, should the server ask; files in PEM.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// What must be true of a server's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// Nothing: keeps listeners out, and nobody else.
    Nothing,
    /// It is valid now, and leads to one of the roots.
    Chain,
    /// The same, and it is for the host that we called.
    ChainAndName,
}

/// The CA certificates that count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Roots {
    /// None are needed.
    None,
    /// Those of the system (`SSL_CERT_FILE`, or what the distribution installs).
    System,
    /// Those in this file, in PEM.
    File(PathBuf),
}

impl Tls {
    /// Reads the files and makes a configuration of them.
    ///
    /// # Errors
    /// A file that cannot be read or used, named. The message holds nothing of what is in it.
    pub fn client(&self) -> Result<ClientConfig, String> {
        let provider = Arc::new(ring::default_provider());
        let verifier = Verifier {
            check: self.check,
            roots: self.roots.read()?,
            algorithms: provider.signature_verification_algorithms,
        };
        let builder = client_builder(provider)?;
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
        let Some((certificate, key)) = &self.identity else { return Ok(builder.with_no_client_auth()) };
        let chain = certificates(certificate)?;
        let private = private_key(key)?;
        builder.with_client_auth_cert(chain, private).map_err(|error| {
            format!("{} and {} cannot be used together: {error}", certificate.display(), key.display())
        })
    }
}

fn client_builder(
    provider: Arc<CryptoProvider>,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, String> {
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS cannot be used: {error}"))
}

impl Roots {
    fn read(&self) -> Result<RootCertStore, String> {
        let mut roots = RootCertStore::empty();
        match self {
            Roots::None => {}
            Roots::System => {
                let found = rustls_native_certs::load_native_certs();
                // Some systems keep certificates that no library takes any more.
                let (usable, _) = roots.add_parsable_certificates(found.certs);
                if usable == 0 {
                    let why = found.errors.first().map(|error| format!(": {error}")).unwrap_or_default();
                    return Err(format!("the system has no CA certificates (ca-certificates){why}"));
                }
            }
            Roots::File(path) => {
                for certificate in certificates(path)? {
                    roots
                        .add(certificate)
                        .map_err(|error| format!("{}: not a CA certificate: {error}", path.display()))?;
                }
            }
        }
        Ok(roots)
    }
}

/// A TLS client over a socket that somebody else owns.
pub struct TlsSession(ClientConnection);

impl TlsSession {
    /// A session with a server whose certificate is to be for `name`, a host name or an address.
    ///
    /// # Errors
    /// As [`Tls::client`], or the name is none.
    pub fn new(tls: &Tls, name: &str) -> Result<TlsSession, String> {
        let config = Arc::new(tls.client()?);
        let name = ServerName::try_from(name.to_owned()).map_err(|error| format!("{name}: {error}"))?;
        let mut session = ClientConnection::new(config, name).map_err(|error| error.to_string())?;
        // Written to only when nothing waits: what waits is what was written last.
        session.set_buffer_limit(None);
        Ok(TlsSession(session))
    }

    /// Whether the handshake is not over yet.
    pub fn is_shaking_hands(&self) -> bool {
        self.0.is_handshaking()
    }

    /// Version and cipher, `TLSv1_3 TLS13_AES_128_GCM_SHA256`, once the handshake is over.
    pub fn described(&self) -> String {
        let version = self.0.protocol_version().map(|version| format!("{version:?}"));
        let suite = self.0.negotiated_cipher_suite().map(|suite| format!("{:?}", suite.suite()));
        [version, suite].into_iter().flatten().collect::<Vec<_>>().join(" ")
    }

    /// Takes plain bytes that are to be sent.
    ///
    /// # Errors
    /// The session is over.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.writer().write_all(bytes)
    }

    /// Whether there is something to send.
    pub fn wants_write(&self) -> bool {
        self.0.wants_write()
    }

    /// Sends what the socket, which does not block, takes.
    ///
    /// # Errors
    /// The socket's.
    pub fn push(&mut self, socket: &mut TcpStream) -> io::Result<()> {
        while self.0.wants_write() {
            match self.0.write_tls(socket) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Adds to `plain` what has come over the socket, which does not block. False: the other end will say no more.
    ///
    /// # Errors
    /// What came is no TLS, or an alert; or the socket's.
    pub fn take(&mut self, socket: &mut TcpStream, plain: &mut Vec<u8>) -> io::Result<bool> {
        let read = match self.0.read_tls(socket) {
            Ok(read) => read,
            Err(error) if [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted].contains(&error.kind()) => {
                return Ok(true);
            }
            Err(error) => return Err(error),
        };
        let processed = self.0.process_new_packets();
        let mut chunk = [0; 16 * 1024];
        // What came before an alert counts.
        while let Ok(bytes @ 1..) = self.0.reader().read(&mut chunk) {
            plain.extend_from_slice(&chunk[..bytes]);
        }
        let state = processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(read > 0 && !state.peer_has_closed())
    }

    /// Tells the other end that we say no more.
    pub fn say_goodbye(&mut self) {
        self.0.send_close_notify();
    }
}

/// All certificates of a file in PEM; at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let found = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| unreadable(path, &error))?;
    if found.is_empty() {
        return Err(format!("{}: holds no certificate in PEM", path.display()));
    }
    Ok(found)
}

/// That nobody but its owner, and root's group, can read this file, in which a key stands.
///
/// # Errors
/// They can, or it is not there; the file is named.
pub fn is_private(path: &Path) -> Result<(), String> {
    let file = fs::metadata(path).map_err(|error| format!("{}: cannot be read: {error}", path.display()))?;
    let forbidden = if file.uid() == 0 { 0o037 } else { 0o077 };
    if file.mode() & forbidden == 0 {
        return Ok(());
    }
    Err(format!(
        "{}: mode {:04o} lets others have the key; allowed: 0600, or 0640 if it is root's",
        path.display(),
        file.mode() & 0o7777
    ))
}

/// The private key of a file in PEM that nobody but its owner, or root's group, can read: libpq's rule.
fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    is_private(path)?;
    let named = |why: &dyn fmt::Display| format!("{}: {why}", path.display());
    PrivateKeyDer::from_pem_file(path).map_err(|error| match error {
        // So it is with one that a password protects.
        pem::Error::NoItemsFound => named(&"holds no private key in PEM without a password"),
        error => unreadable(path, &error),
    })
}

/// The library's words quote what they could not read; a key is none of anybody's business.
fn unreadable(path: &Path, error: &pem::Error) -> String {
    match error {
        pem::Error::Io(error) => format!("{}: cannot be read: {error}", path.display()),
        _ => format!("{}: is not PEM", path.display()),
    }
}

/// Whether TLS itself failed: the handshake, or what the other end said of it later.
pub fn is_failure_of_tls(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let within = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if error.is::<rustls::Error>()
            || within.is_some_and(<dyn std::error::Error + Send + Sync>::is::<rustls::Error>)
        {
            return true;
        }
        next = error.source();
    }
    false
}

/// Judges a server's certificate.
#[derive(Debug)]
struct Verifier {
    check: Check,
    roots: RootCertStore,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.check == Check::Nothing {
            return Ok(ServerCertVerified::assertion());
        }
        let certificate = ParsedCertificate::try_from(certificate)?;
        verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        if self.check == Check::ChainAndName {
            verify_server_name(&certificate, name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
